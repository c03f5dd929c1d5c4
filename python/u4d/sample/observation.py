"""Observation specs: which frames of a scene are given. Everything else is completed.

The text form is a list of clauses `modality:frames`; commas, semicolons and spaces all separate:

    rgb:all                   all images
    rgb:0,-1                  the first and the last image; negative indices count from the end
    camera:all,rgb:0          all cameras and the first image
    rgb:0:5 depth:::2         Python slices, the end not included: images 0 to 4, and every second depth map
    none (or nothing)         nothing is observed

`camera` means intrinsics and pose, so both ray streams. Source: spec.md section 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d_fast.time_layout import frame_groups, latent_frame_of

if TYPE_CHECKING:
    from u4d.scene import Scene

MODALITIES = ("rgb", "depth", "camera")
_OTHER_WORDS = MappingProxyType(
    {"pose": "camera", "poses": "camera", "rays": "camera", "image": "rgb", "images": "rgb", "video": "rgb"}
)
_INDEX = re.compile(r"[+-]?\d+")
_SLICE = re.compile(r"([+-]?\d+)?:([+-]?\d+)?(?::(\d+)?)?")


@dataclass(frozen=True)
class Task:
    """A named observation spec, for `--task`."""

    observe: str
    description: str


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "pose": Task("rgb:all", "cameras (and depth) of a video"),
        "depth": Task("rgb:all", "depth (and cameras) of a video"),
        "sparse": Task("rgb:0,-1", "depth and cameras from the first and the last image alone"),
        "interpolate": Task("rgb:0,-1", "the images between the first and the last, with depth and cameras"),
        "camera_control": Task(
            "camera:all,rgb:0,-1", "the images seen along a given camera path, from the two end images"
        ),
        "generate": Task("rgb:0", "a 4D scene that starts with the first image (and follows the prompt)"),
        "continue": Task("rgb:0,depth:0,camera:0", "a 4D scene that starts with the first image, depth and camera"),
        "imagine": Task("none", "a 4D scene from the prompt alone"),
    }
)


@dataclass(frozen=True)
class Observation:
    """Which frames of each modality are given, each [N] bool."""

    rgb: Tensor
    depth: Tensor
    camera: Tensor

    @property
    def num_frames(self) -> int:
        return len(self.rgb)

    @property
    def spec(self) -> str:
        """The observation in the text form that `parse_observation` reads; "none" where nothing is given."""
        clauses = []
        for modality in MODALITIES:
            frames: list[int] = getattr(self, modality).nonzero()[:, 0].tolist()
            if frames:
                named = "all" if len(frames) == self.num_frames else ",".join(map(str, frames))
                clauses.append(f"{modality}:{named}")
        return ",".join(clauses) or "none"


def parse_observation(spec: str, num_frames: int) -> Observation:
    """Read an observation spec for a clip of `num_frames` frames; see the top of this file for the form.

    Raises:
        UserError: unknown modality, unreadable or missing frames, or frames outside the clip.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
    masks = {name: torch.zeros(num_frames, dtype=torch.bool) for name in MODALITIES}
    if spec.strip().lower() not in ("", "none"):
        for modality, selections in _clauses(spec):
            for selection in selections:
                masks[modality][_frames(selection, modality, num_frames)] = True
    return Observation(**masks)


def observed_groups(observation: Observation) -> Tensor:
    """[4,F] bool over (stream, latent frame): observed where all frames of the latent frame are."""
    groups = frame_groups(observation.num_frames)
    by_modality = {name: getattr(observation, name)[groups].all(-1) for name in MODALITIES}
    camera = by_modality["camera"]
    return torch.stack([by_modality["rgb"], by_modality["depth"], camera, camera])


def usable_frames(observation: Observation) -> Observation:
    """The frames that the model is really given: those of latent frames that are observed as a whole."""
    owner = latent_frame_of(observation.num_frames)
    rgb, depth, camera, _ = observed_groups(observation)[:, owner]
    return Observation(rgb=rgb, depth=depth, camera=camera)


def partially_observed(observation: Observation) -> list[str]:
    """One line for every latent frame of which some but not all frames are given; those frames go unused."""
    notes = []
    for modality in MODALITIES:
        given: Tensor = getattr(observation, modality)
        for group in frame_groups(observation.num_frames):
            frames = group.unique()
            missing = frames[~given[frames]].tolist()
            used = frames[given[frames]].tolist()
            if missing and used:
                first, last = int(frames[0]), int(frames[-1])
                notes.append(
                    f"{modality}: of frames {first} to {last}, which share a latent frame, {', '.join(map(str, used))} "
                    f"are given and {', '.join(map(str, missing))} are not; the whole group is completed as if "
                    f"unobserved (give {modality}:{first}:{last + 1} to use it)"
                )
    return notes


def check_scene_has(observation: Observation, scene: Scene) -> None:
    """Raise UserError unless everything observed exists in the scene.

    Raises:
        UserError: the clip lengths differ, the scene lacks an observed modality (the message tells what it holds), or
            an observed depth map has no valid pixel.
    """
    if scene.num_frames != observation.num_frames:
        raise UserError(f"observe: expected one entry per frame ({scene.num_frames}), got {observation.num_frames}")
    has = {
        "rgb": scene.rgb is not None,
        "depth": scene.depth is not None,
        "camera": scene.intrinsics is not None and scene.cam_to_world is not None,
    }
    for modality in MODALITIES:
        if bool(getattr(observation, modality).any()) and not has[modality]:
            held = ", ".join(name for name in MODALITIES if has[name]) or "none of rgb, depth, camera"
            raise UserError(
                f"observe: expected {modality} in the input because {observation.spec!r} observes it, "
                f"got a scene with {held}; observe something else or add {modality} to the input"
            )
    if scene.depth is not None:
        valid = (torch.isfinite(scene.depth) & (scene.depth > 0)).flatten(1).any(-1).cpu()
        empty = (observation.depth & ~valid).nonzero()[:, 0].tolist()
        if empty:
            raise UserError(
                f"depth: expected valid (finite, positive) pixels in every observed frame, got none in "
                f"frame {empty[0]}; leave it out of the observation"
            )


def _clauses(spec: str) -> list[tuple[str, list[str]]]:
    """ "rgb:0,-1 camera:all" -> [("rgb", ["0", "-1"]), ("camera", ["all"])]."""
    clauses: list[tuple[str, list[str]]] = []
    joined = re.sub(r"([A-Za-z_])\s*:\s*", r"\1:", spec)
    for token in re.split(r"[\s,;]+", joined.strip(" \t\n,;")):
        name, colon, first = token.partition(":")
        if colon and name and not _INDEX.fullmatch(name):
            clauses.append((_modality(name, spec), [first] if first else []))
        elif token.lower() in MODALITIES:
            raise UserError(f"observe: expected frames after {token!r}, as in '{token}:all', got {spec!r}")
        elif not clauses:
            raise UserError(f"observe: expected modality:frames, as in 'rgb:all' or 'rgb:0,-1', got {spec!r}")
        else:
            clauses[-1][1].append(token)
    for modality, selections in clauses:
        if not selections:
            raise UserError(f"observe: expected frames after '{modality}:', as in '{modality}:all', got {spec!r}")
    return clauses


def _modality(name: str, spec: str) -> str:
    lowered = name.lower()
    if lowered in MODALITIES:
        return lowered
    nearest = _OTHER_WORDS.get(lowered) or next(iter(get_close_matches(lowered, MODALITIES, n=1)), None)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    raise UserError(f"observe: expected one of {', '.join(MODALITIES)}, got {name!r} in {spec!r}{hint}")


def _frames(selection: str, modality: str, num_frames: int) -> Tensor:
    """Indices [K] that one selection ("all", "3", "-1", "0:5") names."""
    shown = f"{modality}:{selection}"
    length = f"the clip has {num_frames} frame{'s' if num_frames > 1 else ''} (0 to {num_frames - 1})"
    if selection.lower() == "all":
        return torch.arange(num_frames)
    if _INDEX.fullmatch(selection):
        index = int(selection)
        if not -num_frames <= index < num_frames:
            raise UserError(f"observe: {shown!r} is outside the clip: {length}")
        return torch.tensor([index % num_frames])
    match = _SLICE.fullmatch(selection)
    if match is None:
        hint = f"; for a range write {modality}:0:5" if re.fullmatch(r"\d+-\d+", selection) else ""
        raise UserError(f"observe: expected 'all', an index or a slice like 0:5, got {shown!r}{hint}")
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    if step == 0:
        raise UserError(f"observe: expected a step of at least 1, got {shown!r}")
    if any(bound is not None and abs(bound) > num_frames for bound in (start, stop)):
        raise UserError(f"observe: {shown!r} reaches outside the clip: {length}")
    chosen = torch.arange(num_frames)[slice(start, stop, step)]
    if len(chosen) == 0:
        raise UserError(f"observe: {shown!r} names no frame: {length}")
    return chosen
