"""Completing a clip of any length, window by window, into one result in one world frame and one unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from u4d.sample.chaining import Film, offset, window_scene
from u4d.sample.observation import check_scene_has, parse_observation
from u4d.sample.window_plan import (
    check_first_window,
    from_user,
    plan_windows,
    unused_notes,
    used_observation,
    usual_overlap,
    window_observation,
    window_seed,
)
from u4d.sample.window_report import joint_report, window_entry
from u4d.scene import Scene

Progress = Callable[[str, int, int], None]


def complete_windows(
    complete: Callable[..., Scene],
    scene: Scene,
    observe: str = "rgb:all",
    *,
    window: int,
    overlap: int | None = None,
    image_size: tuple[int, int] | None = None,
    original_size: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Scene:
    """Complete every frame of a scene, however many there are.

    Each window is given part of the result so far as if it were observed, so that cameras and depth go on in one
    frame and one unit: those of the first window. Frames that are done stay as they are. See window_plan.py for what
    is shared, and chaining.py for the offset that is taken out.

    Args:
        complete: `Pipeline.complete`; called as complete(scene, observe=, seed=, progress=, **settings).
        scene: N frames.
        observe: what of these is given; see `parse_observation`.
        window: frames of a window, at most what the model takes at once.
        overlap: frames that neighbours share; 2 + 4 m wastes none. None: `usual_overlap`.
        image_size: (H, W) of the model, to which the scene is brought first. None: it has that size.
        original_size: return images, depth and intrinsics at the scene's own size.
        seed: of the first window; later ones have seeds that follow from it.
        progress: called as progress(stage, done, total) over all windows.
        settings: passed on.
    Returns:
        The complete scene. Its report is that of `Pipeline.complete` for the whole clip, and `windows` lists them. A
        scene that fits one window gives what `complete` gives.
    Raises:
        UserError: the observation does not fit the scene, or its first window tells no world frame or no unit
            although later ones do.
        ValueError: a window or overlap that can't be; see `check_window`.
    """
    asked = parse_observation(observe, scene.num_frames)
    check_scene_has(asked, scene)
    windows = plan_windows(scene.num_frames, window, usual_overlap(window) if overlap is None else overlap)
    if len(windows) == 1:
        return complete(scene, observe=observe, seed=seed, original_size=original_size, progress=progress, **settings)
    check_first_window(asked, windows, scene)
    pictured = scene.rgb is not None or scene.depth is not None
    own = scene.resized(image_size) if image_size is not None and pictured else scene

    def ask(number: int, given: Scene) -> Scene:
        """A window's answers, in the frame and unit of what it is given."""

        def over_all(stage: str, done: int, total: int) -> None:
            if progress is not None:
                progress(stage, number * total + done, len(windows) * total)

        return complete(
            given,
            observe=window_observation(asked, windows[number]).spec,
            seed=window_seed(seed, number),
            progress=over_all,
            **settings,
        )

    first = ask(0, own.frames(windows[0].frames))
    film = Film.like(first, scene.num_frames)
    film.put(first, windows[0])
    entries = [window_entry(windows[0], first, None)]
    for number, part in enumerate(windows[1:], start=1):
        fresh = ask(number, window_scene(own, film, part))
        off = offset(film, fresh, part, from_user(asked, part))
        film.put(fresh if off is None else off.move(fresh), part)
        entries.append(window_entry(part, fresh, off))
    notes = unused_notes(asked, used_observation(asked, windows), window)
    result = Scene(
        rgb=film.rgb,
        depth=film.depth,
        intrinsics=film.intrinsics,
        cam_to_world=film.cam_to_world,
        caption=first.caption,
        fps=scene.fps,
        scale=first.scale,
        report=joint_report(asked.spec, first, film, entries, notes, seed),
    )
    return result.resized(scene.image_size) if original_size and pictured else result
