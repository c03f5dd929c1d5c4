"""Where the frames of a user's scene stand in the clip that the model completes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.errors import UserError
from u4d.sample.observation import Observation
from u4d.scene import Scene


@dataclass(frozen=True)
class Placement:
    """Frame `kept[k]` of the scene stands at frame `slots[k]` of a clip of `num_frames` frames."""

    kept: Tensor  # [K] int64
    slots: Tensor  # [K] int64, increasing
    num_frames: int


def place_frames(available: int, wanted: int | None, most: int) -> Placement:
    """Spread a scene's frames evenly over the model's clip, first on first and last on last.

    A longer scene is sampled; a shorter one leaves frames to generate between its own. One frame alone comes first.

    Args:
        available: frames of the scene.
        wanted: frames of the completed clip; None for as many as the scene has, at most `most`.
        most: frames that the model can complete at once.
    Raises:
        UserError: wanted is outside 1..most.
    """
    if wanted is None:
        wanted = min(available, most)
    if not 1 <= wanted <= most:
        raise UserError(f"frames: expected 1 to {most} for this checkpoint, got {wanted}")
    if wanted >= available:
        return Placement(torch.arange(available), spread(wanted, available), wanted)
    return Placement(spread(available, wanted), torch.arange(wanted), wanted)


def spread(length: int, count: int) -> Tensor:
    """`count` whole numbers from 0 to length - 1, as evenly as they go."""
    return torch.linspace(0, length - 1, count, dtype=torch.float64).round().long()


def place_observation(observation: Observation, placement: Placement) -> tuple[Observation, list[str]]:
    """The observation over the clip's frames, and a note for every modality that loses observed frames.

    Raises:
        UserError: a modality loses all of them.
    """
    masks, notes = {}, []
    for name in ("rgb", "depth", "camera"):
        given: Tensor = getattr(observation, name)
        mask = torch.zeros(placement.num_frames, dtype=torch.bool)
        mask[placement.slots] = given[placement.kept]
        masks[name] = mask
        lost = int(given.sum() - mask.sum())
        if lost and not bool(mask.any()):
            raise UserError(
                f"observe: none of the {lost} observed {name} frames is among the {placement.num_frames} that "
                f"{observation.num_frames} frames are sampled down to ({', '.join(map(str, placement.kept.tolist()))})"
            )
        if lost:
            notes.append(
                f"{name}: {lost} of {int(given.sum())} observed frames are left out, "
                f"since {observation.num_frames} frames are sampled down to {placement.num_frames}"
            )
    return Observation(**masks), notes


def observed_clip(scene: Scene, placement: Placement, observation: Observation, image_size: tuple[int, int]) -> Clips:
    """What is observed of a scene, at the model's size, as a batch of one clip. It holds nothing else.

    Other frames are black, without depth, with an identity camera; a modality that is not observed at all is None.
    """
    scene = (scene if scene.rgb is None and scene.depth is None else scene.resized(image_size)).frames(placement.kept)
    blanks = {
        "rgb": (observation.rgb, torch.zeros(3, *image_size)),
        "depth": (observation.depth, torch.zeros(image_size)),
        "intrinsics": (observation.camera, torch.eye(3)),
        "cam_to_world": (observation.camera, torch.eye(4)),
    }
    parts: dict[str, Tensor] = {}
    for name, (observed, blank) in blanks.items():
        values: Tensor | None = getattr(scene, name)
        if values is None or not bool(observed.any()):
            continue
        placed = blank.repeat(placement.num_frames, *[1] * blank.ndim)
        shown = observed[placement.slots]
        placed[placement.slots[shown]] = values[shown].to(placed)
        parts[name] = placed[None]
    return Clips(**parts)
