"""Attention shared by all streams, with visibility decided per group.

A group is one latent frame of one stream; groups are ordered stream by stream (`g = stream * F + latent_frame`), and
so are the tokens of the joint sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def group_attention(q: Tensor, k: Tensor, v: Tensor, group_size: int, group_mask: Tensor | None = None) -> Tensor:
    """Softmax attention in which whole groups of tokens see or do not see each other.

    Args:
        q, k, v: `[B,heads,T,d]` with `T = G * group_size`.
        group_size: tokens in a group.
        group_mask: bool; `[B,G]` says which groups exist as keys, `[B,G,G]` which query group sees which key group;
            None lets every token see every other.
    Returns:
        `[B,heads,T,d]`; a query that sees nothing gives zeros.
    Raises:
        ValueError: T is no multiple of group_size, or the mask has another shape or dtype.
    """
    batch, tokens = q.shape[0], q.shape[2]
    groups, rest = divmod(tokens, group_size)
    if rest:
        raise ValueError(f"q: expected [B,heads,T,d] with T a multiple of group_size {group_size}, got {list(q.shape)}")
    if group_mask is None:
        return scaled_dot_product_attention(q, k, v)
    wanted = ((batch, groups), (batch, groups, groups))
    if group_mask.dtype != torch.bool or tuple(group_mask.shape) not in wanted:
        raise ValueError(
            f"group_mask: expected bool {list(wanted[0])} or {list(wanted[1])} for {tokens} tokens in groups of "
            f"{group_size}, got {group_mask.dtype} {list(group_mask.shape)}"
        )
    by_query = group_mask if group_mask.ndim == 3 else group_mask[:, None]
    sees_any = by_query.any(-1)  # a row without any key would be 0/0: let it see all, then zero it
    mask = (by_query | ~sees_any[..., None]).repeat_interleave(group_size, dim=-1)
    if group_mask.ndim == 3:
        mask = mask.repeat_interleave(group_size, dim=1)
        sees_any = sees_any.repeat_interleave(group_size, dim=1)
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return attended * sees_any[:, None, :, None]


def rotary_table(frames: int, rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 3-D rotary embedding, with Wan's split of the head dimension.

    Returns:
        two float32 `[frames*rows*columns, head_dim/2]` tables, tokens in (frame, row, column) order.
    """
    spatial = 2 * (head_dim // 6)
    angles = []
    for size, width, view in (
        (frames, head_dim - 2 * spatial, (frames, 1, 1, -1)),
        (rows, spatial, (1, rows, 1, -1)),
        (columns, spatial, (1, 1, columns, -1)),
    ):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        position = torch.arange(size, dtype=torch.float64, device=device)
        angle = torch.outer(position, 10000.0**-exponent)
        angles.append(angle.view(*view).expand(frames, rows, columns, -1))
    joint = torch.cat(angles, dim=-1).flatten(0, 2)
    return joint.cos().float(), joint.sin().float()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary table `[T,d/2]` to `[S,B,T,heads,d]`; neighbouring channels form a pair."""
    cos, sin = (part[:, None] for part in table)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
