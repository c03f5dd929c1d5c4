"""What a training sample is given and what it is asked for: context, noise levels, supervision.

A *group* is a (stream, latent frame). A conditioning pattern names which groups are context; all other groups that
the sample's data set annotates are targets. Source: the seed's section on diffusion forcing, spec.md section 3.
Every draw is a fixed number of uniform numbers per sample, so a sample's draw depends on its generator alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from u4d.diffusion.flow import DEFAULT_SHIFT, STREAMS, Generators, draw_uniform, shift_time

PATTERNS = ("joint", "first_frames", "geometry_dense", "camera_control", "geometry_sparse")
CONTEXT_CEILING = 0.3  # imperfect history: noisy context has t ~ U(0, 0.3)
CLEAN_CONTEXT_PROB = 0.5

_RGB, _DEPTH, _RAY_DIR, _RAY_MOMENT = range(len(STREAMS))


@dataclass(frozen=True)
class ConditioningBatch:
    """The conditioning of a batch of training samples; see `draw_batch`."""

    context: Tensor  # [B,S,F] bool: given to the model, clean or nearly so
    times: Tensor  # [B,S,F] float32 noise levels in [0, 1]
    supervised: Tensor  # [B,S,F] bool: carries loss
    pattern: Tensor  # [B] int64: index into PATTERNS


def context_groups(pattern: Tensor, available: Tensor, num_latent_frames: int, history: Tensor) -> Tensor:
    """The groups that each sample's pattern gives as context.

    Args:
        pattern: [B] int, index into PATTERNS.
        available: [B,S] bool, the streams that the sample has.
        num_latent_frames: F.
        history: [B] int, how many first latent frames `first_frames` gives (the other patterns ignore it).
    Returns:
        [B,S,F] bool. Only `first_frames` restricts itself to the available streams: the streams that the other
        patterns give are what `allowed_patterns` asks for.
    """
    device = available.device
    frame = torch.arange(num_latent_frames, device=device)
    ends = (frame == 0) | (frame == num_latent_frames - 1)
    fixed = torch.zeros(len(PATTERNS), len(STREAMS), num_latent_frames, dtype=torch.bool, device=device)
    fixed[PATTERNS.index("geometry_dense"), _RGB] = True
    fixed[PATTERNS.index("camera_control"), _RGB] = ends
    fixed[PATTERNS.index("camera_control"), _RAY_DIR:] = True
    fixed[PATTERNS.index("geometry_sparse"), _RGB] = ends
    first = available[:, :, None] & (frame < history[:, None])[:, None, :]
    is_first_frames = pattern == PATTERNS.index("first_frames")
    return torch.where(is_first_frames[:, None, None], first, fixed[pattern])


def allowed_patterns(available: Tensor, num_latent_frames: int) -> Tensor:
    """Which patterns a sample admits: all context exists, and at least one available group is left as a target.

    So `geometry_dense` needs RGB and some geometry, `camera_control` needs RGB and both ray streams,
    `geometry_sparse` needs RGB, and clips of one or two latent frames lose the patterns that leave nothing to learn.

    Args:
        available: [...,S] bool, the streams that the sample has.
        num_latent_frames: F >= 1.
    Returns:
        [...,5] bool in the order of PATTERNS.
    Raises:
        ValueError: available is not [...,4] bool, or num_latent_frames < 1.
    """
    if available.shape[-1:] != (len(STREAMS),) or available.dtype != torch.bool:
        raise ValueError(f"available: expected [...,4] bool, got {list(available.shape)} {available.dtype}")
    if num_latent_frames < 1:
        raise ValueError(f"num_latent_frames: expected at least 1, got {num_latent_frames}")
    samples = available.reshape(-1, 1, len(STREAMS)).expand(-1, len(PATTERNS), -1).reshape(-1, len(STREAMS))
    pattern = torch.arange(len(PATTERNS), device=available.device).repeat(len(samples) // len(PATTERNS))
    context = context_groups(pattern, samples, num_latent_frames, torch.ones_like(pattern))
    context_exists = ~(context.any(-1) & ~samples).any(-1)
    target_left = (~context & samples[:, :, None]).any(-1).any(-1)
    return (context_exists & target_left).reshape(*available.shape[:-1], len(PATTERNS))


def draw_context(
    pattern: str,
    available: Tensor,
    num_latent_frames: int,
    generator: Generators,
    *,
    longest_history: int | None = None,
) -> Tensor:
    """The context of one sample under a named pattern.

    Args:
        pattern: one of PATTERNS.
        available: [S] bool.
        num_latent_frames: F.
        generator: used by `first_frames`, whose history is uniform in 1..longest_history.
        longest_history: at most F - 1; by default F // 2 (at least 1).
    Returns:
        [S,F] bool.
    Raises:
        ValueError: unknown pattern, or one that this sample does not admit.
    """
    index = _pattern_index(pattern)
    if not allowed_patterns(available, num_latent_frames)[index]:
        raise ValueError(
            f"pattern: {pattern!r} leaves nothing to learn or needs a stream that is missing, with streams "
            f"{_stream_names(available)} and {num_latent_frames} latent frames; see allowed_patterns"
        )
    uniform = draw_uniform(1, 1, generator).to(available.device)[:, 0]
    history = _history(uniform, num_latent_frames, longest_history)
    chosen = torch.tensor([index], device=available.device)
    return context_groups(chosen, available[None], num_latent_frames, history)[0]


def draw_times(
    context: Tensor,
    available: Tensor,
    *,
    generator: Generators,
    shift: float = DEFAULT_SHIFT,
    clean_context_prob: float = CLEAN_CONTEXT_PROB,
    target_floor: str | float = "uniform",
    context_ceiling: float = CONTEXT_CEILING,
) -> Tensor:
    """Noise levels of a batch.

    Context: per sample, with probability `clean_context_prob` exactly 0 everywhere, otherwise independently
    U(0, context_ceiling) per group (imperfect history). Targets: t = lo + (1 - lo) shift_time(u), u ~ U(0, 1) per
    group, with one floor lo per sample, so that "everything still noise" is really trained. Missing streams: t = 1.

    Args:
        context: [B,S,F] bool.
        available: [B,S] bool.
        generator: one, or one per sample.
        target_floor: "uniform" for lo ~ U(0, 1), or a number in [0, 1] that fixes lo (0.9: nearly regression).
        context_ceiling: in [0, 1].
    Returns:
        [B,S,F] float32 in [0, 1].
    Raises:
        ValueError: shapes disagree, or a setting is out of its range.
    """
    _check_groups(context, available)
    fixed_floor = _fixed_floor(target_floor)
    for name, value in (("clean_context_prob", clean_context_prob), ("context_ceiling", context_ceiling)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    batch, streams, frames = context.shape
    uniform = draw_uniform(batch, 2 + 2 * streams * frames, generator).to(context.device)
    clean = uniform[:, 0] < clean_context_prob
    floor = uniform[:, 1] if fixed_floor is None else torch.full_like(uniform[:, 1], fixed_floor)
    context_level, target_level = uniform[:, 2:].reshape(batch, 2, streams, frames).unbind(1)

    history = torch.where(clean[:, None, None], torch.zeros_like(context_level), context_ceiling * context_level)
    floor = floor[:, None, None]
    targets = floor + (1 - floor) * shift_time(target_level, shift)
    times = torch.where(context, history, targets)
    return torch.where(available[:, :, None], times, torch.ones_like(times))


def draw_batch(
    available: Tensor,
    num_latent_frames: int,
    *,
    generator: Generators,
    weights: Mapping[str, float] | None = None,
    shift: float = DEFAULT_SHIFT,
    clean_context_prob: float = CLEAN_CONTEXT_PROB,
    target_floor: str | float = "uniform",
    context_ceiling: float = CONTEXT_CEILING,
    longest_history: int | None = None,
    supervise_context: bool = True,
) -> ConditioningBatch:
    """Draw pattern, context, noise levels and supervision of a batch of training samples.

    A group carries loss where its stream is available and its noise level is above 0. Noisy context is therefore
    supervised: the seed's a_j says only whether a token has ground truth, and spec.md exempts the groups at t = 0,
    where the velocity is pure chance. Low levels are met in the last steps of sampling, too, and hardly anywhere else
    in training. `supervise_context=False` leaves the loss to the targets alone.

    Args:
        available: [B,S] bool, on any device; the results are on the same one.
        num_latent_frames: F >= 1.
        generator: one for the batch, or one per sample (then a sample's draw does not depend on the batch it is in).
        weights: relative frequency of each pattern among those a sample admits; patterns left out are not drawn.
            None: all alike.
        shift, clean_context_prob, target_floor, context_ceiling: see `draw_times`.
        longest_history: see `draw_context`.
    Raises:
        ValueError: a sample admits no pattern of positive weight, an unknown pattern, a bad weight or setting.
    """
    if available.ndim != 2:
        raise ValueError(f"available: expected [B,4] bool, got {list(available.shape)}")
    odds = _pattern_weights(weights).to(available.device) * allowed_patterns(available, num_latent_frames)
    _check_some_pattern(odds, available, num_latent_frames)
    batch = available.shape[0]
    uniform = draw_uniform(batch, 2, generator).to(available.device)
    pattern = _choose(odds, uniform[:, 0])
    history = _history(uniform[:, 1], num_latent_frames, longest_history)
    context = context_groups(pattern, available, num_latent_frames, history)
    times = draw_times(
        context,
        available,
        generator=generator,
        shift=shift,
        clean_context_prob=clean_context_prob,
        target_floor=target_floor,
        context_ceiling=context_ceiling,
    )
    supervised = available[:, :, None] & (times > 0)
    if not supervise_context:
        supervised &= ~context
    return ConditioningBatch(context=context, times=times, supervised=supervised, pattern=pattern)


def _choose(odds: Tensor, uniform: Tensor) -> Tensor:
    """[B,P] weights and [B] numbers in [0, 1) -> [B] indices, each with its share of the sum of its row."""
    cumulative = odds.double().cumsum(-1)
    threshold = uniform.double() * cumulative[:, -1]
    return (threshold[:, None] >= cumulative).sum(-1)


def _history(uniform: Tensor, num_latent_frames: int, longest: int | None) -> Tensor:
    """[B] numbers in [0, 1) -> [B] history lengths, uniform in 1..longest."""
    if longest is None:
        longest = max(1, num_latent_frames // 2)
    elif not 1 <= longest <= max(1, num_latent_frames - 1):
        raise ValueError(f"longest_history: expected 1..{max(1, num_latent_frames - 1)}, got {longest}")
    return 1 + (uniform * longest).long().clamp_max(longest - 1)


def _fixed_floor(target_floor: str | float) -> float | None:
    if target_floor == "uniform":
        return None
    if isinstance(target_floor, str) or not 0 <= target_floor <= 1:
        raise ValueError(f'target_floor: expected "uniform" or a number in [0, 1], got {target_floor!r}')
    return float(target_floor)


def _pattern_weights(weights: Mapping[str, float] | None) -> Tensor:
    if weights is None:
        return torch.ones(len(PATTERNS), dtype=torch.float64)
    values = torch.zeros(len(PATTERNS), dtype=torch.float64)
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: expected a finite number >= 0 for {name!r}, got {weight}")
        values[_pattern_index(name)] = weight
    return values


def _pattern_index(name: str) -> int:
    if name not in PATTERNS:
        nearest = get_close_matches(name, PATTERNS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {name!r}{hint}")
    return PATTERNS.index(name)


def _check_groups(context: Tensor, available: Tensor) -> None:
    if context.ndim != 3 or context.dtype != torch.bool or context.shape[1] != len(STREAMS):
        raise ValueError(f"context: expected [B,4,F] bool, got {list(context.shape)} {context.dtype}")
    if available.shape != context.shape[:2] or available.dtype != torch.bool:
        raise ValueError(
            f"available: expected {list(context.shape[:2])} bool to match context, "
            f"got {list(available.shape)} {available.dtype}"
        )


def _check_some_pattern(odds: Tensor, available: Tensor, num_latent_frames: int) -> None:
    none_left = odds.sum(-1) <= 0
    if none_left.any():
        sample = int(none_left.nonzero()[0])
        raise ValueError(
            f"weights: no pattern of positive weight is left for sample {sample} with streams "
            f"{_stream_names(available[sample])} and {num_latent_frames} latent frames; give 'joint' some weight"
        )


def _stream_names(available: Tensor) -> str:
    names = [name for name, has in zip(STREAMS, available.tolist(), strict=True) if has]
    return ", ".join(names) or "none"
