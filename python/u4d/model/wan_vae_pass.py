"""Wan's VAE over many frames at a time: the arithmetic of diffusers' `AutoencoderKLWan`, in fewer and larger steps.

diffusers goes from latent frame to latent frame, and every causal convolution joins what it kept of earlier frames to
what is new. Here a clip is one chunk, or a few if it is large. Activations are `[B,T,H,W,C]`, channels last, as fast
convolutions want them (cuDNN 9.8 to 9.14 is not even asked for others in half precision, see pytorch#163581); norm,
SiLU, causal padding, biases and residual sums are one op, `causal_norm_silu`. Weights stay in diffusers' modules and
are read there; `wan_vae_kept` says which modules are not what this file takes them for.
Source: diffusers/models/autoencoders/autoencoder_kl_wan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, interpolate, pad

from u4d.model.codec import CELL
from u4d_fast import causal_norm_silu, residual_causal_norm_silu
from u4d_fast.reference.causal_norm_silu import FRONT
from u4d_fast.time_layout import FRAMES_PER_GROUP

LARGEST_PICTURES = 3 * 2**28  # bytes of features in full size: 13 latent frames of 240x320 in bfloat16


class Past:
    """The last frames that each causal convolution has read: what a clip's next chunk needs of this one."""

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Tensor] = {}
        self.last_chunk = False

    def before(self, conv: nn.Module) -> Tensor | None:
        """What stands in front of a convolution's next frames; None at the beginning of a clip."""
        return self.frames.pop(conv, None)

    def keep(self, conv: nn.Module, seen: Tensor, frames: int = FRONT) -> None:
        """Remember the last frames of what a convolution has read."""
        if not self.last_chunk:
            self.frames[conv] = seen[:, -frames:].clone()  # a view would keep all of it alive


@dataclass(eq=False)
class Sum:
    """Activations `[B,T,H,W,C]` as terms that are not added up yet: the next norm does it in the same pass.

    They can be used once. Whoever does takes them out, so that they are gone as soon as they are added up.

    Attributes:
        terms: one, or what is kept and its update.
        bias: `[C]` of the convolution that gave the update.
    """

    terms: tuple[Tensor, ...]
    bias: Tensor | None = None

    def take(self) -> tuple[Tensor, ...]:
        """The terms, which are then no longer here."""
        terms, self.terms = self.terms, ()
        return terms

    def total(self) -> Tensor:
        """The sum."""
        x, *updates = self.take()
        for update in updates:  # a convolution's result, which nobody else has
            x = (update if self.bias is None else update.add_(self.bias)).add_(x)
        return x

    def normed(self, norm: Any, conv: nn.Module, past: Past) -> tuple[Tensor, Tensor]:
        """The sum, and what the convolution behind norm and SiLU reads, `[B,2+T,H,W,C]`."""
        x, *updates = self.take()
        gamma, before = norm.gamma.flatten(), past.before(conv)
        if updates:
            x, normed = residual_causal_norm_silu(x, updates[0], gamma, self.bias, before)
        else:
            normed = causal_norm_silu(x, gamma, before=before)
        past.keep(conv, normed)
        return x, normed


def decode_clip(vae: Any, latents: Tensor) -> Tensor:
    """`vae.decode(latents).sample` without a batch's slices and a picture's tiles.

    Args:
        vae: an `AutoencoderKLWan` that `wan_vae_kept` has nothing against.
        latents: [B,16,F,h,w] in the weights' dtype.
    Returns:
        [B,3,1+4(F-1),8h,8w] in [-1,1].
    """
    x = channels_last(vae.post_quant_conv(latents))
    past, parts = Past(), []
    chunks = x.split(chunk_size(x, CELL**2 * FRAMES_PER_GROUP * vae.decoder.conv_out.in_channels), dim=1)
    for number, chunk in enumerate(chunks, 1):
        past.last_chunk = number == len(chunks)
        parts.append(decode_chunk(vae.decoder, chunk, past))
    return channels_first(parts).clamp_(-1, 1)


def encode_clip(vae: Any, images: Tensor) -> Tensor:
    """The moments behind `vae.encode(images).latent_dist`, without a batch's slices and a picture's tiles.

    Args:
        vae: an `AutoencoderKLWan` that `wan_vae_kept` has nothing against.
        images: [B,3,1+4k,H,W] in the weights' dtype.
    Returns:
        [B,32,1+k,H/8,W/8], mean and logarithm of the variance.
    """
    x = channels_last(images)
    size = FRAMES_PER_GROUP * chunk_size(x, FRAMES_PER_GROUP * vae.encoder.conv_in.out_channels)
    past, parts = Past(), []
    first = 1 + size - FRAMES_PER_GROUP
    chunks = (x[:, :first], *x[:, first:].split(size, dim=1)) if first < x.shape[1] else (x,)
    for number, chunk in enumerate(chunks, 1):
        past.last_chunk = number == len(chunks)
        parts.append(encode_chunk(vae.encoder, chunk, past))
    return cast(Tensor, vae.quant_conv(channels_first(parts)))


def chunk_size(x: Tensor, factor: int) -> int:
    """How many latent frames are worked on at once, if in full size each makes `factor` planes like those of x."""
    return max(1, LARGEST_PICTURES // (factor * x[:, 0, :, :, 0].numel() * x.element_size()))


def decode_chunk(decoder: Any, x: Tensor, past: Past) -> Tensor:
    """The next latent frames `[B,t,h,w,16]` -> the next images."""
    stream = middle(decoder.mid_block, Sum((causal(decoder.conv_in, x, past),)), past)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            stream = residual_block(resnet, stream, past)
        if block.upsamplers is not None:
            stream = Sum((upsampled(block.upsamplers[0], stream.total(), past),))
    return head(decoder, stream, past)


def encode_chunk(encoder: Any, x: Tensor, past: Past) -> Tensor:
    """The next images `[B,t,H,W,3]` -> the next latent frames' moments."""
    stream = Sum((causal(encoder.conv_in, x, past),))
    for block in encoder.down_blocks:
        if type(block).__name__ == "WanResample":
            stream = Sum((downsampled(block, stream.total(), past),))
        else:
            stream = residual_block(block, stream, past)
    return head(encoder, middle(encoder.mid_block, stream, past), past)


def middle(block: Any, stream: Sum, past: Past) -> Sum:
    """`WanMidBlock`: residual blocks with attention between them."""
    stream = residual_block(block.resnets[0], stream, past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        stream = residual_block(resnet, Sum((attended(attention, stream.total()),)), past)
    return stream


def head(coder: Any, stream: Sum, past: Past) -> Tensor:
    """Norm, SiLU and the last convolution."""
    return convolved(coder.conv_out, stream.normed(coder.norm_out, coder.conv_out, past)[1])


def residual_block(block: Any, stream: Sum, past: Past) -> Sum:
    """`WanResidualBlock`, its last sum left to the next norm."""
    x, normed = stream.normed(block.norm1, block.conv1, past)
    hidden = convolved(block.conv1, normed, with_bias=False)
    before = past.before(block.conv2)
    normed = causal_norm_silu(hidden, block.norm2.gamma.flatten(), block.conv1.bias, before)
    del hidden  # memory
    past.keep(block.conv2, normed)
    update = convolved(block.conv2, normed, with_bias=False)
    shortcut = block.conv_shortcut
    return Sum((x if isinstance(shortcut, nn.Identity) else convolved(shortcut, x), update), block.conv2.bias)


def attended(block: Any, x: Tensor) -> Tensor:
    """`WanAttentionBlock`, frame by frame; small, so diffusers' own."""
    return channels_last(block(x.movedim(-1, 1)))


def upsampled(resample: Any, x: Tensor, past: Past) -> Tensor:
    """`WanResample` to twice the size and, as "upsample3d", to twice the frames but for the clip's first."""
    if resample.mode == "upsample3d":
        x = more_frames(resample.time_conv, x, past)
    size, conv = x.shape[:2], resample.resample[1]
    larger = interpolate(images(x), scale_factor=2.0, mode="nearest-exact")
    del x  # memory: here it is needed most
    return clips(conv2d(larger, conv.weight, conv.bias, padding=conv.padding), size)


def more_frames(time_conv: Any, x: Tensor, past: Past) -> Tensor:
    """Every frame becomes two; a clip's first stays one, and the convolution does not see it."""
    alone = x[:, :0] if time_conv in past.frames else x[:, :1]
    x = x[:, alone.shape[1] :]
    seen = behind(past.before(time_conv), x)
    past.keep(time_conv, seen)
    if x.shape[1] == 0:
        return alone
    pairs = convolved(time_conv, seen).unflatten(-1, (2, -1))
    return torch.cat((alone, pairs.movedim(-2, 2).flatten(1, 2)), dim=1)


def downsampled(resample: Any, x: Tensor, past: Past) -> Tensor:
    """`WanResample` to half the size and, as "downsample3d", to half the frames but for the clip's first."""
    x = clips(resample.resample(images(x)), x.shape[:2])
    if resample.mode != "downsample3d":
        return x
    conv = resample.time_conv
    before = past.before(conv)
    seen = x if before is None else torch.cat((before, x), dim=1)
    past.keep(conv, seen, frames=1)
    alone = x[:, :1] if before is None else x[:, :0]
    return torch.cat((alone, convolved(conv, seen)), dim=1) if seen.shape[1] > 1 else alone


def causal(conv: Any, x: Tensor, past: Past) -> Tensor:
    """A causal convolution of what no norm comes before."""
    seen = behind(past.before(conv), x)
    past.keep(conv, seen)
    return convolved(conv, seen)


def behind(before: Tensor | None, x: Tensor) -> Tensor:
    """x behind two earlier frames, or behind zeros."""
    return pad(x, (0, 0) * 3 + (FRONT, 0)) if before is None else torch.cat((before, x), dim=1)


def convolved(conv: Any, x: Tensor, with_bias: bool = True) -> Tensor:
    """`WanCausalConv3d` of frames that already stand behind the earlier ones."""
    width, _, height, *_ = conv._padding
    bias = conv.bias if with_bias else None
    return channels_last(conv3d(x.movedim(-1, 1), conv.weight, bias, conv.stride, (0, height, width)))


def channels_last(x: Tensor) -> Tensor:
    """`[B,C,T,H,W]`, in any layout, -> `[B,T,H,W,C]`; no copy where the channels were last in memory."""
    last = x.movedim(1, -1)
    # Convolutions on the meta device do not tell that they keep channels last; there only shapes and bytes count.
    return x.reshape(last.shape) if x.is_meta else last.contiguous()


def channels_first(parts: list[Tensor]) -> Tensor:
    """A clip's chunks `[B,t,H,W,C]` -> `[B,C,T,H,W]`."""
    return torch.cat([part.movedim(-1, 1).contiguous() for part in parts], dim=2)


def images(x: Tensor) -> Tensor:
    """`[B,T,H,W,C]` -> `[B*T,C,H,W]`, channels last in memory."""
    return x.flatten(0, 1).movedim(-1, 1)


def clips(frames: Tensor, size: tuple[int, ...]) -> Tensor:
    """`[B*T,C,H,W]` -> `[B,T,H,W,C]`, with that B and T."""
    return channels_last(frames[:, :, None])[:, 0].unflatten(0, size)
