"""What belongs to (seed, step, place): everything random about a training sample.

A place is an index into the global batch. Each has a random generator of its own, so neither the number of processes
nor the size of micro-batches changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor

from u4d.clips import Clips
from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS, draw_noise, draw_uniform
from u4d.diffusion.patterns import ConditioningBatch, draw_batch
from u4d.errors import UserError
from u4d.geometry.cameras import relative_to_first
from u4d.geometry.depth import valid_depth
from u4d.model.codec import CELL
from u4d.train.data.captions import Captions
from u4d.train.recipe import Phase, Recipe
from u4d.train.world import World
from u4d_fast.time_layout import latent_frames

DEPTH = STREAMS.index("depth")
Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class TrainingClips:
    """Clips for training. What a clip does not have is filled with something harmless that nobody learns from.

    Attributes:
        clips: all four parts; a missing depth is 0 everywhere (invalid), a missing camera the identity.
        available: bool `[B,4]`, which streams are real.
        numbers: int64 `[B]`, each clip's number in the run.
        captions: words for each clip, "" where there are none; by default for all.
    """

    clips: Clips
    available: Tensor
    numbers: Tensor
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.captions:
            object.__setattr__(self, "captions", ("",) * len(self.numbers))

    def pick(self, index: slice | Tensor) -> TrainingClips:
        """Some of the clips."""
        rows = torch.arange(len(self.numbers))[index].tolist()
        return TrainingClips(
            self.clips.map(lambda part: part[index]),
            self.available[index],
            self.numbers[index],
            tuple(self.captions[row] for row in rows),
        )


@dataclass(frozen=True)
class Samples:
    """Training samples of some places of one step: all that the loss depends on, besides the model.

    Attributes:
        places: their indices in the global batch.
        clips: cut to the step's length, cameras relative to the first frame.
        task: which groups are context, their noise levels, what is supervised.
        noise: `[B,4,16,F,h,w]`.
        texts: embeddings `[T,text_dim]` of each clip's caption; None for the null text.
    """

    places: range
    clips: TrainingClips
    task: ConditioningBatch
    noise: Tensor
    texts: tuple[Tensor | None, ...]

    @property
    def frames(self) -> int:
        """Frames of each clip."""
        return self.clips.clips.everything()[0].shape[1]

    @property
    def group_counts(self) -> Tensor:
        """Supervised groups of each stream: `[4]`."""
        return self.task.supervised.sum(dim=(0, 2)).float()

    def split(self, size: int) -> list[Samples]:
        """Micro-batches of at most `size` samples; 0 leaves all together."""
        size = size or len(self.places)
        return [self.pick(slice(start, start + size)) for start in range(0, len(self.places), size)]

    def pick(self, index: slice) -> Samples:
        """Some of the samples."""
        task = ConditioningBatch(**{name: part[index] for name, part in vars(self.task).items()})
        return Samples(self.places[index], self.clips.pick(index), task, self.noise[index], self.texts[index])


def generator(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that belongs to these numbers alone; other purposes are independent."""
    # torch's Mersenne twister uses 32 bits of its seed, so the numbers are hashed to these.
    digest = blake2b(repr((purpose, numbers)).encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def places_of(batch: int, world: World) -> range:
    """The places of the global batch that a process works on.

    Raises:
        UserError: the batch can't be shared out evenly.
    """
    if batch < 1 or batch % world.size:
        raise UserError(
            f"batch: expected a multiple of the number of processes ({world.size}), got {batch}; "
            "change --set batch=... or the number of processes"
        )
    share = batch // world.size
    return range(world.rank * share, (world.rank + 1) * share)


def draw_samples(
    recipe: Recipe,
    step: int,
    places: range,
    clips: TrainingClips,
    device: torch.device | str = "cpu",
    captions: Captions | None = None,
) -> Samples:
    """Cut, availability, task, noise and text of these places of a step.

    Args:
        recipe: its seed and the step's phase say how.
        step: 0 .. steps - 1.
        places: of the global batch.
        clips: one for each place, at full length.
        device: where noise is drawn, which on a CPU takes longer than a step of a small model on a GPU. Another kind of
            device has other random numbers.
        captions: embeddings of the clips' captions; None gives all clips the null text.
    Raises:
        UserError: the phase has no pattern for a clip of that length and those streams.
    """
    phase = recipe.phase_at(step)
    own = [generator("sample", recipe.seed, step, place) for place in places]
    total = clips.clips.everything()[0].shape[1]
    cut = hide_geometry(cut_clips(clips, draw_length(recipe, step, total), own), phase.rgb_only, own)
    batch, frames, _, height, width = cut.clips.everything()[0].shape
    task = draw_task(phase, cut.available, latent_frames(frames), own)
    shape = (batch, len(STREAMS), LATENT_CHANNELS, latent_frames(frames), height // CELL, width // CELL)
    noise = [generator("noise", recipe.seed, step, place, device=device) for place in places]
    texts = draw_texts(recipe, step, places, cut.captions, captions)
    return Samples(places, cut, task, draw_noise(shape, noise), texts)


def draw_texts(
    recipe: Recipe, step: int, places: range, words: Sequence[str], captions: Captions | None
) -> tuple[Tensor | None, ...]:
    """Each clip's caption; None, the null text, for clips without one and now and then for the others, too.

    So a model that is given no prompt later meets what it was trained with.
    """
    if captions is None:
        return (None,) * len(places)
    own = [generator("text", recipe.seed, step, place) for place in places]
    told = (draw_uniform(len(own), 1, own)[:, 0] >= recipe.phase_at(step).null_text).tolist()
    return tuple(captions.embeddings(word) if word and tell else None for word, tell in zip(words, told, strict=True))


def draw_length(recipe: Recipe, step: int, total: int) -> int:
    """Frames of a step's clips, the same for all places; at most `total`."""
    phase = recipe.phase_at(step)
    lengths = sorted(phase.frames)
    odds = torch.tensor([phase.frames[length] for length in lengths])
    drawn = int(torch.multinomial(odds, 1, generator=generator("length", recipe.seed, step)))
    return min(lengths[drawn], total)


def cut_clips(clips: TrainingClips, frames: int, own: Generators) -> TrainingClips:
    """A random stretch of each clip, its cameras relative to its first frame.

    A stretch in which no pixel has a depth has no depth stream.
    """
    rgb, *_ = clips.clips.everything()
    batch, total = rgb.shape[:2]
    starts = (draw_uniform(batch, 1, own) * (total - frames + 1)).long().clamp_max(total - frames)  # [B,1]
    rows, columns = torch.arange(batch)[:, None], starts + torch.arange(frames)
    cut = clips.clips.map(lambda part: part[rows, columns])
    _, depth, _, cam_to_world = cut.everything()
    available = clips.available.clone()
    available[:, DEPTH] &= valid_depth(depth).flatten(1).any(-1)
    return replace(clips, clips=replace(cut, cam_to_world=relative_to_first(cam_to_world)), available=available)


def hide_geometry(clips: TrainingClips, rgb_only: float, own: Generators) -> TrainingClips:
    """Treat some clips as RGB-only ones: "the first image alone" is met nowhere else."""
    hidden = draw_uniform(len(own), 1, own)[:, 0] < rgb_only
    available = clips.available.clone()
    available[hidden, 1:] = False
    return replace(clips, available=available)


def draw_task(phase: Phase, available: Tensor, num_latent_frames: int, own: Generators) -> ConditioningBatch:
    """Context, noise levels and supervision of samples with these streams `[B,4]`.

    Raises:
        UserError: no pattern of the phase fits a sample.
    """
    try:
        return draw_batch(
            available,
            num_latent_frames,
            generator=own,
            weights=phase.patterns,
            target_floor=phase.target_floor,
            clean_context_prob=phase.clean_context_prob,
            supervise_context=phase.target_floor == "uniform",
        )
    except ValueError as error:
        raise UserError(f"phase of the recipe: {error}") from error
