"""Model FLOPs of a training step: what the mathematics asks for, whatever is computed again or left out by kernels."""

from __future__ import annotations

from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS
from u4d.memory import token_width
from u4d.model.codec import CELL
from u4d.model.transformer import PATCH
from u4d.presets import TransformerConfig
from u4d_fast.time_layout import latent_frames


def step_flops(config: TransformerConfig, frames: int, clips: int, *, adapters: bool = False) -> float:
    """Model FLOPs of one step, forward and backward; what is computed again does not count.

    The backward pass takes twice the forward's products: for the gradient of each input and of each weight. With
    adapters alone to be trained, linear layers take the first only. See `forward_flops`.

    Args:
        config: sizes.
        frames: of each clip.
        clips: of the step, over all GPUs.
        adapters: only those are trained; their own work is left out.
    """
    linear, attention = forward_flops(config, frames)
    return clips * ((2 if adapters else 3) * linear + 3 * attention)


def forward_flops(config: TransformerConfig, frames: int) -> tuple[float, float]:
    """FLOPs of the linear layers, and of attention, in one clip's forward; a multiplication and a sum are two.

    Of T tokens in 4 streams, with width D, feed-forward width E, K layers and L text tokens:

        linear     2 T (K (4 D D + 2 D D + 2 D E) + 2 * 64 D)    self q, k, v, o; cross q, o; feed-forward; both ends
        attention  K (4 T T D + 4 T L D)                          scores and sums of values; self and cross

    A text of one token needs neither cross q nor scores. Left out, below 1 % together: the text's keys and values, time
    and text embeddings, everything element by element, local motion and the link of tiny.
    """
    width, layers, text = token_width(config), config.num_layers, config.text_length
    height, columns = (side // (CELL * PATCH) for side in config.image_size)
    tokens = len(STREAMS) * latent_frames(frames) * height * columns
    cross = 2 * width * width if text > 1 else 0
    ends = 2 * LATENT_CHANNELS * PATCH**2 * width
    linear = 2 * tokens * (layers * (4 * width * width + cross + 2 * width * config.ffn_dim) + ends)
    return linear, layers * 4 * tokens * (tokens + (text if text > 1 else 0)) * width
