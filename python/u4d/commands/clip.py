"""From what the user gave to a scene that fits the model: frames sampled, observation and cameras checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u4d.errors import UserError

if TYPE_CHECKING:
    from u4d.sample.observation import Observation
    from u4d.scene import Scene

MODALITIES = ("rgb", "depth", "camera")


@dataclass(frozen=True, eq=False)
class Clip:
    """An input, cut down to the frames that the model can take.

    Attributes:
        scene: the frames that were kept, with all that is known about them.
        observation: what of them is observed.
        source: path, number of frames and which were kept, and the observation as the user wrote it; for the report.
        notes: what was left out.
        completed: whether the input is itself a completion: what it holds is then no truth to compare with.
    """

    scene: Scene
    observation: Observation
    source: dict[str, Any]
    notes: list[str]
    completed: bool


def read_clip(
    path: Path, cameras: Path | None, observe: str, most: int | None, image_size: tuple[int, int] | None = None
) -> Clip:
    """Read an input, holding no more than `most` evenly spaced frames of a longer one.

    Args:
        path: as for `Scene.load`.
        cameras: a camera path to attach, or None.
        observe: observation spec; its indices are frames of the input, also of those that are not kept.
        most: frames to keep; None for all.
        image_size: (H, W) to bring it to while it is read; None to leave it as it is.
    Raises:
        UserError: unreadable input, a spec that does not fit it, or one whose frames are all among those left out.
    """
    from u4d.data.footage import even_indices, kept_fps
    from u4d.data.scene_folder import MARKER
    from u4d.sample.observation import check_scene_has, parse_observation
    from u4d.scene import Scene

    if (path / MARKER).is_file():
        whole = Scene.load(path, cameras=cameras, image_size=image_size)
        total, kept = whole.num_frames, even_indices(whole.num_frames, most)
        scene = whole if len(kept) == total else replace(whole.frames(kept), fps=kept_fps(whole.fps, total, len(kept)))
    else:
        scene = Scene.load(path, cameras=cameras, max_frames=most, image_size=image_size)
        total, kept = scene.report["source"]["frames"], list(scene.report["source"]["kept"])
    asked = parse_observation(observe, total)
    observation, notes = keep_frames(asked, kept)
    if cameras is not None and scene.intrinsics is None and bool(observation.camera.any()):
        raise UserError(
            f"{cameras}: expected poses and intrinsics to observe cameras, got poses alone (a TUM trajectory has no "
            "more); give a nerfstudio json or RealEstate10K text, or leave camera out of the observation"
        )
    check_scene_has(observation, scene)
    source = {"path": str(path), "frames": total, "kept": kept, "observe": asked.spec}
    return Clip(scene, observation, source, notes, completed="observe" in scene.report)


def keep_frames(asked: Observation, kept: list[int]) -> tuple[Observation, list[str]]:
    """The observation over the kept frames, and notes on observed frames that are not among them.

    Raises:
        UserError: none of a modality's observed frames is kept.
    """
    from u4d.sample.observation import Observation

    masks = {name: getattr(asked, name)[kept] for name in MODALITIES}
    notes = []
    for name, mask in masks.items():
        given = getattr(asked, name)
        if bool(given.any()) and not bool(mask.any()):
            raise UserError(
                f"observe: none of the {int(given.sum())} observed {name} frames is among the {len(kept)} that are "
                f"taken of {asked.num_frames}, which are {', '.join(map(str, kept))}; observe one of these, "
                "or cut the input to the part that matters"
            )
        lost = int(given.sum() - mask.sum())
        if lost and not bool(given.all()):
            notes.append(
                f"{name}: {lost} of {int(given.sum())} observed frames are left out, since {asked.num_frames} frames "
                f"are sampled down to {len(kept)}"
            )
    return Observation(**masks), notes
