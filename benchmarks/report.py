"""Makes benchmarks/RESULTS.md from the JSON files under benchmarks/results: never typed by hand.

    python benchmarks/report.py [--check]

`--check` changes nothing and fails if the file is out of date.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGET = HERE / "RESULTS.md"
HEADER = """# Benchmark results

Made by `python benchmarks/report.py` from `benchmarks/results/*/*.json`; do not edit. The time is the median, with the
10th and the 90th percentile. GB/s counts what must be read and written; the share is of a plain copy in the same run.
`x` is how many times longer a version takes than the kernel of the same case.
"""


def table(result: dict[str, Any]) -> str:
    """One op on one machine."""
    named = {key: value for key, value in result["environment"].items() if key != "machine"}
    lines = [f"### {result['op']}", "", ", ".join(f"{key} {value}" for key, value in named.items()), ""]
    lines += [
        "| case | version | ms | 10 % .. 90 % | x | GB/s | of a copy | notes |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in result["rows"]:
        kernel = next((r for r in result["rows"] if r["case"] == row["case"] and "kernel" in r["version"]), None)
        factor = f"{row['ms'] / kernel['ms']:.1f}" if kernel else ""
        rate = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] is not None else ""
        share = f"{100 * row['limit_share']:.0f} %" if row["limit_share"] is not None else ""
        notes = ", ".join(f"{name} {number(value)}" for name, value in row["notes"].items())
        spread = f"{row['low_ms']:.3f} .. {row['high_ms']:.3f}"
        lines.append(
            f"| {row['case']} | {row['version']} | {row['ms']:.3f} | {spread} | {factor} | {rate} | {share} | {notes} |"
        )
    if "skipped" in result:
        lines += ["", "Not measured: " + "; ".join(f"{name} ({why})" for name, why in result["skipped"].items()) + "."]
    return "\n".join(lines) + "\n"


def number(value: float | str) -> str:
    """A measured value as the tables show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report() -> str:
    """The whole file."""
    parts = [HEADER]
    for folder in sorted(path for path in (HERE / "results").glob("*") if path.is_dir()):
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        if results:
            parts.append(f"## {results[0]['environment']['machine']}\n")
            parts += [table(result) for result in results]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    content = report()
    if parser.parse_args().check:
        if not TARGET.exists() or TARGET.read_text() != content:
            raise SystemExit("benchmarks/RESULTS.md is out of date: run python benchmarks/report.py")
        return
    TARGET.write_text(content)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
