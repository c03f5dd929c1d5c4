"""What `Scene.report` says about a result that was put together from windows."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from u4d.sample.chaining import Film, Similarity
from u4d.sample.search import score_candidates
from u4d.sample.window_plan import Window
from u4d.scene import Scene

OF_A_WINDOW = (
    *("observe", "seed", "drawn", "best", "finished", "errors", "overlap", "halving"),
    *("consistency", "notes", "sampler", "precision", "camera_smoothing", "timings_s"),
)


def window_entry(window: Window, fresh: Scene, off: Similarity | None) -> dict[str, Any]:
    """One window: its frames (first, last), the first that it adds, its own report, and the offset taken out.

    `observe` counts the window's own frames, and holds what the earlier result gave it.
    """
    return {
        "frames": [window.start, window.stop - 1],
        "adds_from": window.start + window.kept,
        **{key: fresh.report[key] for key in OF_A_WINDOW if key in fresh.report},
        "offset": None if off is None else off.facts,
    }


def joint_report(
    observe: str, first: Scene, film: Film, entries: Sequence[dict[str, Any]], notes: list[str], seed: int
) -> dict[str, Any]:
    """The report of the whole clip, under the names that a single window's has.

    The clip counts as one candidate: every window keeps its own best one, and `windows` tells of the others.
    `errors`, `overlap` and the reprojection in `consistency` compare frames spread over the whole clip, so windows with
    each other as well; its `ray_residual_deg` is the median over windows, `frames_without_camera` their sum.
    """
    count = len(film.rgb)
    scores = score_candidates(*(part[None] for part in (film.rgb, film.depth, film.intrinsics, film.cam_to_world)))
    error, overlap = float(scores.error[0]), float(scores.overlap.mean())
    seconds: Counter[str] = Counter()
    for entry in entries:
        seconds.update(entry["timings_s"])
    agreements = [entry["consistency"] for entry in entries]
    report = {
        "observe": observe,
        "frames": list(range(count)),
        "slots": list(range(count)),
        "scale": first.report["scale"],
        "metric": first.report["metric"],
        "notes": list(dict.fromkeys([*notes, *(note for entry in entries for note in entry["notes"])])),
        **{key: first.report[key] for key in ("steps", "guidance")},
        "seed": seed,
        "timings_s": dict(seconds),
        "drawn": 1,
        "best": 0,
        "finished": [0],
        "errors": [error],
        "overlap": [overlap],
        "consistency": {
            "reprojection_error": error,
            "overlap": overlap,
            "ray_residual_deg": statistics.median(part["ray_residual_deg"] for part in agreements),
            "frames_without_camera": sum(part["frames_without_camera"] for part in agreements),
        },
        "windows": list(entries),
    }
    return report if film.spread is None else report | {"depth_spread": film.spread}
