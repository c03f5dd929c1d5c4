"""Early halving of candidates: those that agree least with themselves are given up before the last step.

Between two steps the model's last answer tells the clean latents of every candidate (z_0 = z_t - t v), at no forward's
cost. Decoded and warped onto each other like results, they rank the candidates, and only the best go on. Candidate k
keeps its noise, so those that are left are what the full search would have made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from u4d.errors import UserError
from u4d.model.latents import Codec
from u4d.sample.search import CandidateScores, choose_candidate

DIVISOR = 4
FIRST_CUT, LAST_CUT = 1 / 8, 3 / 8  # of the steps; see docs/tiny.md for what they cost and lose


@dataclass(frozen=True)
class Cut:
    """After so many steps, keep so many candidates."""

    after: int
    keep: int


@dataclass(frozen=True)
class Round:
    """What a cut found and decided.

    Attributes:
        after: steps done.
        candidates: numbers of those that were compared.
        errors, overlap: of their one-step estimates, as in `CandidateScores`, means over pairs.
        kept: numbers of those that went on.
    """

    after: int
    candidates: list[int]
    errors: list[float]
    overlap: list[float]
    kept: list[int]

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def plan_cuts(candidates: int, steps: int, halving: bool | Sequence[int]) -> tuple[Cut, ...]:
    """When candidates are given up, and how many stay.

    Args:
        candidates: drawn, L.
        steps: of the sampler.
        halving: False for none; True for a quarter each time down to one, as 16 -> 4 -> 1; or the counts themselves,
            the first of which is L.
    Raises:
        UserError: one candidate, counts that do not fall from L, or fewer steps than there are counts.
    """
    if not halving:
        return ()
    if candidates < 2:
        raise UserError(f"halving: expected at least 2 candidates, of which some are given up, got {candidates}")
    counts = usual_counts(candidates) if halving is True else list(halving)
    falling = all(few < many for many, few in pairwise(counts))
    if counts[0] != candidates or counts[-1] < 1 or not falling:
        raise UserError(
            f"halving: expected counts that begin with candidates = {candidates} and fall, at least 1, got "
            f"{' -> '.join(map(str, counts))}"
        )
    cuts = len(counts) - 1
    if steps <= cuts:
        raise UserError(
            f"halving: expected more than {cuts} steps, since candidates are compared between steps, got {steps}"
        )
    shares = [FIRST_CUT + (LAST_CUT - FIRST_CUT) * k / max(cuts - 1, 1) for k in range(cuts)]
    after: list[int] = []
    for k, share in enumerate(shares):  # with few steps the cuts move apart, and leave a step for each that follows
        earliest = after[-1] + 1 if after else 1
        after.append(min(max(round(share * steps), earliest), steps - cuts + k))
    return tuple(Cut(step, keep) for step, keep in zip(after, counts[1:], strict=True))


def usual_counts(candidates: int) -> list[int]:
    """16 -> 4 -> 1: a quarter each time, rounded up."""
    counts = [candidates]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // DIVISOR))
    return counts


def keep_best(scores: CandidateScores, numbers: Sequence[int], cut: Cut) -> tuple[Round, list[int]]:
    """The record of a cut, and the places (not numbers) of those that stay, in order."""
    places = sorted(choose_candidate(scores).order[: cut.keep].tolist())
    overlap = scores.overlap.mean(-1).tolist() if scores.overlap.shape[-1] else []
    kept = [numbers[place] for place in places]
    return Round(cut.after, list(numbers), scores.error.tolist(), overlap, kept), places


@dataclass(frozen=True, eq=False)
class KnownImages:
    """A codec that is given the images instead of decoding them: half the work where all of them are observed.

    Attributes:
        codec: decodes the rest.
        images: [1,N,3,H,W] in [-1,1].
    """

    codec: Codec
    images: Tensor

    def encode(self, clip: Tensor, stream: str) -> Tensor:
        return self.codec.encode(clip, stream)

    def decode(self, latents: Tensor, stream: str, num_frames: int) -> Tensor:
        if stream != "rgb":
            return self.codec.decode(latents, stream, num_frames)
        return self.images.expand(len(latents), *self.images.shape[1:]).to(latents.dtype)


def without_known_images(codec: Codec, rgb: Tensor | None, observed: Tensor) -> Codec:
    """The codec, spared the images where every frame `[N]` is observed; rgb `[1,N,3,H,W]` in [0,1]."""
    if rgb is None or not bool(torch.as_tensor(observed).all()):
        return codec
    return KnownImages(codec, rgb * 2 - 1)
