"""Sources of training clips: our own renderings, and folders of scenes, videos and images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from u4d.clips import Clips, join
from u4d.data import nerfstudio
from u4d.data.images import image_files
from u4d.data.open_scene import NO_CLIP_SUFFIXES
from u4d.data.procedural import render_clips
from u4d.data.procedural.randomness import SPLIT_LENGTHS
from u4d.data.scene_folder import MARKER
from u4d.errors import UserError
from u4d.scene import Scene
from u4d.train.data.captions import caption_of
from u4d.train.data.samples import TrainingClips, generator
from u4d.train.recipe import Recipe

RENDER_CHUNK = 8
COMPILE_FROM = 32  # clips: below this, compiling the tracer takes longer than it saves
MOST_IN_A_ROW = 64  # clips that may be unreadable one after the other


@dataclass(frozen=True)
class Sources:
    """The sources of a run, their folders listed. A clip depends on these fields and its number alone.

    Attributes:
        weights: how often each source is drawn.
        entries: of each source the files and folders that hold a clip each; empty for our own renderings.
        compiled: whether the tracer is compiled; pixels may differ by rounding.
    """

    weights: tuple[float, ...]
    entries: tuple[tuple[Path, ...], ...]
    seed: int
    frames: int
    image_size: tuple[int, int]
    compiled: bool

    @property
    def clips(self) -> list[Path]:
        """All files and folders that hold a clip each."""
        return [entry for entries in self.entries for entry in entries]

    def source_of(self, number: int) -> int:
        """The source that a clip comes from."""
        if len(self.weights) == 1:
            return 0
        return int(torch.multinomial(torch.tensor(self.weights), 1, generator=generator("source", self.seed, number)))

    def candidates(self, number: int) -> Iterator[Path]:
        """The entry that a clip number stands for, then those to take where it can't be read.

        Numbers pass over all entries in random order, again and again.
        """
        source = self.source_of(number)
        entries = self.entries[source]
        for later in range(number, number + min(len(entries), MOST_IN_A_ROW)):
            round_, position = divmod(later, len(entries))
            yield entries[random_order(self.seed, source, round_, len(entries))[position]]


@dataclass(frozen=True)
class ReadClips:
    """What reading gave: the clips (None if one could not be had at all), and why others could not be read."""

    clips: TrainingClips | None
    bad: tuple[str, ...] = ()


def open_sources(recipe: Recipe) -> Sources:
    """List the recipe's sources.

    Raises:
        UserError: a folder that is not there, or one without clips.
    """
    sources = recipe.data.sources
    return Sources(
        weights=tuple(source.weight for source in sources),
        entries=tuple(list_clips(source.path) if source.kind == "scenes" else () for source in sources),
        seed=recipe.seed,
        frames=recipe.preset.transformer.num_frames,
        image_size=recipe.preset.transformer.image_size,
        compiled=recipe.data.window * recipe.batch >= COMPILE_FROM,
    )


def list_clips(path: str) -> tuple[Path, ...]:
    """The clips in a folder, by name; a folder that is a clip itself is the only one.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"data.sources: path: expected a folder of scenes, videos and folders of images, got {path!r}")
    if (folder / MARKER).is_file() or (folder / nerfstudio.FILE_NAME).is_file() or image_files(folder):
        return (folder,)
    entries = tuple(part for part in sorted(folder.iterdir()) if may_be_clip(part))
    if not entries:
        raise UserError(f"data.sources: path: no scene, video or folder of images in {folder}")
    return entries


def may_be_clip(path: Path) -> bool:
    """Whether to try to read that: a folder, or a file that is no text or table. Hidden ones are passed over."""
    return not path.name.startswith(".") and (
        path.is_dir() or path.suffix.lower() not in NO_CLIP_SUFFIXES | {".json", ".jsonl", ".md", ""}
    )


@lru_cache(maxsize=4)
def random_order(seed: int, source: int, round_: int, count: int) -> list[int]:
    """The order in which a round passes over a source's entries."""
    order: list[int] = torch.randperm(count, generator=generator("order", seed, source, round_)).tolist()
    return order


def read_clips(sources: Sources, numbers: Sequence[int]) -> ReadClips:
    """Make or read the clips with those numbers, in that order."""
    own = [number for number in numbers if not sources.entries[sources.source_of(number)]]
    clips = {int(clip.numbers): clip for clip in render(sources, own)}
    bad: list[str] = []
    for number in numbers:
        if number not in clips:
            found = read_scene(sources, number, bad)
            if found is None:
                return ReadClips(None, tuple(bad))
            clips[number] = found
    return ReadClips(join_clips([clips[number] for number in numbers]), tuple(bad))


def render(sources: Sources, numbers: Sequence[int]) -> Iterator[TrainingClips]:
    """Our own scenes, one by one, in any order. Numbers beyond the split go on in another world."""
    length = SPLIT_LENGTHS["train"]
    for world in {number // length for number in numbers}:
        own = [number for number in numbers if number // length == world]
        indices = [number % length for number in own]
        clips = render_window(indices, sources.frames, sources.image_size, compiled=sources.compiled, seed=world)
        rendered = TrainingClips(clips, torch.ones(len(own), 4, dtype=torch.bool), torch.tensor(own))
        yield from (rendered.pick(slice(row, row + 1)) for row in range(len(own)))


def render_window(
    indices: Sequence[int],
    frames: int,
    image_size: tuple[int, int],
    split: str = "train",
    *,
    compiled: bool | None = None,
    seed: int = 0,
) -> Clips:
    """Render those clips in chunks of one shape, so that the compiled tracer is compiled once (None: where it pays)."""
    compiled = len(indices) >= COMPILE_FROM if compiled is None else compiled
    parts = [
        render_clips(indices[start : start + RENDER_CHUNK], split, frames, image_size, seed=seed, compile=compiled)
        for start in range(0, len(indices), RENDER_CHUNK)
    ]
    return join(parts)


def read_scene(sources: Sources, number: int, bad: list[str]) -> TrainingClips | None:
    """The first readable one of a number's candidates; those before it are added to `bad`. None if there is none."""
    for path in sources.candidates(number):
        try:
            return training_clip(open_clip(path, sources.frames, sources.image_size), number, caption_of(path))
        except (UserError, OSError) as error:
            bad.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    return None


def open_clip(path: Path, frames: int, image_size: tuple[int, int]) -> Scene:
    """So many frames of a scene, evenly spaced over its length, brought to that size while they are read.

    Raises:
        UserError: it can't be read, has no pictures, or is too short.
    """
    scene = Scene.load(path, max_frames=frames, image_size=image_size)
    if scene.rgb is None or scene.num_frames < frames:
        raise UserError(f"{path}: expected pictures of at least {frames} frames, got {describe(scene.rgb)}")
    return scene


def describe(rgb: Tensor | None) -> str:
    """How many frames a scene has."""
    return "none" if rgb is None else str(len(rgb))


def training_clip(scene: Scene, number: int, caption: str) -> TrainingClips:
    """A scene as a batch of one, with whatever it holds."""
    assert scene.rgb is not None
    frames, (height, width) = scene.num_frames, scene.image_size
    cameras = scene.intrinsics is not None and scene.cam_to_world is not None
    plain = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]]).repeat(frames, 1, 1)
    clips = Clips(
        rgb=scene.rgb,
        depth=torch.zeros(frames, height, width) if scene.depth is None else scene.depth,
        intrinsics=scene.intrinsics if cameras else plain,
        cam_to_world=scene.cam_to_world if cameras else torch.eye(4).repeat(frames, 1, 1),
    )
    available = torch.tensor([[True, scene.depth is not None, cameras, cameras]])
    return TrainingClips(clips.map(lambda part: part[None]), available, torch.tensor([number]), (caption,))


def join_clips(parts: Sequence[TrainingClips]) -> TrainingClips:
    """Several batches as one."""
    return TrainingClips(
        join([part.clips for part in parts]),
        torch.cat([part.available for part in parts]),
        torch.cat([part.numbers for part in parts]),
        tuple(caption for part in parts for caption in part.captions),
    )
