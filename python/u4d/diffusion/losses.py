"""The training loss: masked flow matching, equally weighted over the streams.

L = sum over streams of 1/4 of the mean squared velocity error over the stream's supervised groups.
Source: the seed's loss and its availability mask a_j; spec.md section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.diffusion.flow import LATENT_CHANNELS, channel_mask


@dataclass(frozen=True)
class FlowLoss:
    """What `flow_matching_loss` returns."""

    total: Tensor  # [], to be minimised
    per_stream: Tensor  # [S], 0 where a stream has nothing supervised; sum(stream_weights * per_stream) = total
    group_counts: Tensor  # [S], supervised groups of this batch


def group_errors(prediction: Tensor, target: Tensor, channel_weights: Tensor | None = None) -> Tensor:
    """Mean squared velocity error of every group, in float32: [B,S,C,F,h,w] twice -> [B,S,F].

    The mean is over latent cells and, weighted, over the stream's live channels (weights are relative: only their
    ratios within a stream matter, and one of them must be positive). Channels that are always empty are left out.

    Raises:
        ValueError: shapes disagree.
    """
    if prediction.ndim != 6 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction: expected [B,S,C,F,h,w] like target {list(target.shape)}, got {list(prediction.shape)}"
        )
    weights = channel_mask(prediction.device)
    if weights.shape != prediction.shape[1:3]:
        raise ValueError(f"prediction: expected 4 streams of {LATENT_CHANNELS} channels, got {list(prediction.shape)}")
    if channel_weights is not None:
        if channel_weights.shape != weights.shape:
            raise ValueError(f"channel_weights: expected {list(weights.shape)}, got {list(channel_weights.shape)}")
        weights = weights * channel_weights.to(weights)
    squared = (prediction.float() - target.float()).square().mean(dim=(-2, -1))
    return torch.einsum("bscf,sc->bsf", squared, weights / weights.sum(-1, keepdim=True))


def flow_matching_loss(
    prediction: Tensor,
    target: Tensor,
    supervised: Tensor,
    channel_weights: Tensor | None = None,
    stream_weights: Tensor | None = None,
    *,
    group_counts: Tensor | None = None,
) -> FlowLoss:
    """Mean velocity error over each stream's supervised groups, then the weighted sum over the streams.

    A stream without a supervised group contributes exactly 0 and gets no gradient, and so does every single group
    that is not supervised. Each stream is divided by its own number of groups, so mixing RGB-only clips with fully
    annotated ones changes no stream's scale: a mixed batch's stream loss is the mean of its parts' losses, weighted by
    their numbers of groups.

    Args:
        prediction, target: [B,S,16,F,h,w] velocities.
        supervised: [B,S,F] bool.
        channel_weights: [S,16] relative weights of the channels within a stream; None: all live ones alike.
        stream_weights: [S], the seed's lambda; None: 1/S each.
        group_counts: [S], what to divide each stream by, instead of this batch's own count: pass the counts of the
            whole global batch where it is cut over processes or accumulation steps, and the parts' losses add up
            to exactly the loss of the whole.
    Raises:
        ValueError: shapes disagree.
    """
    errors = group_errors(prediction, target, channel_weights)
    if supervised.shape != errors.shape or supervised.dtype != torch.bool:
        raise ValueError(
            f"supervised: expected {list(errors.shape)} bool, got {list(supervised.shape)} {supervised.dtype}"
        )
    counts = supervised.sum(dim=(0, 2)).to(errors.dtype)
    divisor = counts if group_counts is None else group_counts.to(counts)
    per_stream = (errors * supervised).sum(dim=(0, 2)) / divisor.clamp_min(1)
    if stream_weights is None:
        stream_weights = torch.full_like(per_stream, 1 / len(per_stream))
    elif stream_weights.shape != per_stream.shape:
        raise ValueError(f"stream_weights: expected {list(per_stream.shape)}, got {list(stream_weights.shape)}")
    return FlowLoss(
        total=(stream_weights.to(per_stream) * per_stream).sum(), per_stream=per_stream, group_counts=counts
    )
