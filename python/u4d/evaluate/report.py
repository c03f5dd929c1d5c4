"""An evaluation as text for the terminal, as Markdown, and as JSON.

Metrics are lines and predictors columns, one table each for depth, camera and images, so that it fits a terminal; a
cell is "mean / median" over clips. Numbers are printed as measured: a trivial predictor that beats the model is not
hidden.
"""

from __future__ import annotations

import json
import math
from typing import Any

from u4d.evaluate.pose_metrics import COMPONENTS
from u4d.evaluate.results import METRICS, EvaluationReport, Metric, Row, Summary

ARROWS = {"lower": "↓", "higher": "↑"}
Table = list[list[str]]  # the first line is the header


def format_text(report: EvaluationReport) -> str:
    """Plain-text tables with the settings above and the alignments below."""
    blocks = ["\n".join(_preface(report)), *map(_text_table, _tables(report)), "\n".join(_notes(report))]
    return "\n\n".join(blocks) + "\n"


def format_markdown(report: EvaluationReport) -> str:
    """The same as Markdown tables."""
    blocks = ["  \n".join(_preface(report)), *map(_markdown_table, _tables(report)), "  \n".join(_notes(report))]
    return "\n\n".join(blocks) + "\n"


def to_dict(report: EvaluationReport) -> dict[str, Any]:
    """Plain values for JSON: settings, alignments, and per row summaries and every clip's value (None: undefined)."""
    return {
        "title": report.title,
        "settings": report.settings,
        "alignments": report.alignments,
        "clips": report.clips,
        "seconds_per_clip": report.seconds_per_clip,
        "rows": [_row_dict(row) for row in report.rows],
    }


def format_json(report: EvaluationReport) -> str:
    """`to_dict` as standard JSON (no NaN)."""
    return json.dumps(to_dict(report), indent=2, allow_nan=False) + "\n"


def _row_dict(row: Row) -> dict[str, Any]:
    metrics = {}
    for name, values in row.values.items():
        summary = row.summary(name)
        metrics[name] = {
            "mean": _number(summary.mean),
            "median": _number(summary.median),
            "count": summary.count,
            "values": [_number(value) for value in values],
        }
    correlations = {name: _number(value) for name, value in row.correlations.items()}
    return {"name": row.name, "trivial": row.trivial, "metrics": metrics, "correlations": correlations}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _preface(report: EvaluationReport) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    return [f"{report.title}: {report.clips} clips, {report.seconds_per_clip:.2f} s per clip", settings]


def _notes(report: EvaluationReport) -> list[str]:
    notes = ["cells: mean / median over clips; '-' is undefined or not predicted; (n) where fewer clips define it"]
    return notes + [f"{kind} alignment: {text}" for kind, text in report.alignments.items()]


def _tables(report: EvaluationReport) -> list[Table]:
    """One table per group of metrics, with the predictors that say something about it as columns."""
    tables = []
    for group in dict.fromkeys(METRICS[name].group for name in report.metrics):
        names = [name for name in report.metrics if METRICS[name].group == group]
        rows = [row for row in report.rows if any(name in row.values for name in names)]
        body = [_metric_line(name, rows, report.clips) for name in names]
        if group == "camera":
            lines = (_correlation_line(component, rows) for component in COMPONENTS)
            body += [line for line in lines if any(cell != "-" for cell in line[1:])]
        tables.append([[group, *(row.name for row in rows)], *body])
    return tables


def _metric_line(name: str, rows: list[Row], clips: int) -> list[str]:
    metric = METRICS[name]
    cells = [_cell(row.summary(name), metric, clips) if name in row.values else "-" for row in rows]
    return [f"{metric.label} {ARROWS[metric.better]}", *cells]


def _correlation_line(component: str, rows: list[Row]) -> list[str]:
    r = [row.correlations.get(component, math.nan) for row in rows]
    return [f"correlation of {component} {ARROWS['higher']}", *("-" if math.isnan(x) else f"{x:.2f}" for x in r)]


def _text_table(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join((cells[0].ljust(widths[0]), *others)))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown_table(table: Table) -> str:
    ruler = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (table[0], ruler, *table[1:]))


def _cell(summary: Summary, metric: Metric, clips: int) -> str:
    if summary.count == 0:
        return "-"
    text = f"{summary.mean:.{metric.decimals}f} / {summary.median:.{metric.decimals}f}"
    return text if summary.count == clips else f"{text} ({summary.count})"
