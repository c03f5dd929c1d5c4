"""Text as cross-attention takes it: a prompt's embeddings with their padding collapsed, and every block's keys.

Wan fills each prompt up to 512 tokens with zeros. All zero rows give one and the same key and value, and n equal keys
weigh in a softmax as much as one whose score is raised by ln(n): exact, and 512 keys become a prompt's few dozen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Embeddings `[B,L,text_dim]` of a prompt, and `[B,L]` what is added to each token's score (None: nothing)."""

    embeddings: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class TextKeys:
    """What cross-attention needs of a prompt, computed once per clip by `Transformer.text_keys`.

    Attributes:
        blocks: for every block its key and value, each `[S,B,L,D]`, or the embedded text `[S,B,L,D]` that it makes
            them from; B may be 1 for one prompt shared by a batch.
        bias: float32 `[B,L]`, added to each token's score, or None.
    """

    blocks: tuple[Tensor | tuple[Tensor, Tensor], ...]
    bias: Tensor | None = None


def collapse_padding(text: Tensor, dtype: torch.dtype = torch.float32) -> Prompt:
    """Replace the zero rows at the end of each prompt by one that counts for all.

    Args:
        text: `[B,T,text_dim]` prompt embeddings.
        dtype: of the attention's scores; see `split_log`.
    """
    total = text.shape[1]
    filled = (text != 0).any(-1) * torch.arange(1, total + 1, device=text.device)
    lengths: list[int] = filled.amax(1).tolist()
    biases = [[0.0] * length + split_log(total - length, dtype) for length in lengths]
    kept = min(total, max(map(len, biases)))
    rows = [(row + [-math.inf] * kept)[:kept] for row in biases]
    bias = torch.tensor(rows, device=text.device)
    return Prompt(text[:, :kept], bias if bool(bias.any()) else None)


def split_log(count: int, dtype: torch.dtype) -> list[float]:
    """Scores of the keys that together stand for `count` equal keys with score 0: ln(count), as well as dtype has it.

    bfloat16 knows ln(511) to 0.2 % only, which is 1.2 % of the weight. A second key makes up the difference.
    """
    if count == 0:
        return []
    score = math.log(count)
    if dtype == torch.float32 or count == 1:
        return [score]
    rounded = float(torch.tensor(score, dtype=dtype))
    if math.exp(rounded) >= count:  # the second key can only add
        rounded = float(torch.nextafter(torch.tensor(rounded, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    return [rounded, math.log(count - math.exp(rounded))]
