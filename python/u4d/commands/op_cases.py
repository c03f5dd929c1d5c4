"""One call of every op, at the sizes of a preset: what `u4d bench ops` and the benchmarks give to ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import u4d_fast
from u4d.presets import TransformerConfig
from u4d_fast.time_layout import latent_frames

STREAMS = 4
TOKEN_PIXELS = 16  # a patch is 2x2 latent cells
ANCHORS = 8
DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VAE_WIDTH = 192  # of Wan's VAE where pictures have half their size

Clip = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""rgb [B,N,3,H,W], depth [B,N,H,W], intrinsics, cam_to_world, and pairs [M,2] of the clip's frames."""


@dataclass(frozen=True)
class Sizes:
    """A clip of a preset; activations `[4,batch,frames*patches,heads*head_dim]` of one dtype.

    Attributes:
        batch: clips.
        frames, patches: latent frames, and tokens of each in a stream.
        heads, head_dim, hidden: of a block.
        dtype: of activations; tables, cameras and images are float32.
        num_frames, image_size: of the clip.
    """

    batch: int
    frames: int
    patches: int
    heads: int
    head_dim: int
    hidden: int
    dtype: torch.dtype
    device: str
    num_frames: int
    image_size: tuple[int, int]

    @staticmethod
    def of(config: TransformerConfig, batch: int, dtype: torch.dtype, device: str) -> Sizes:
        """A preset's."""
        height, width = config.image_size
        return Sizes(
            batch=batch,
            frames=latent_frames(config.num_frames),
            patches=(height // TOKEN_PIXELS) * (width // TOKEN_PIXELS),
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            hidden=config.ffn_dim,
            dtype=dtype,
            device=device,
            num_frames=config.num_frames,
            image_size=config.image_size,
        )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def __str__(self) -> str:
        return f"B={self.batch} F={self.frames} P={self.patches}, {DTYPE_NAMES[self.dtype]}"

    def activations(self, count: int, width: int | None = None) -> list[Tensor]:
        """Random rows, `width` columns or the model's."""
        generator = torch.Generator().manual_seed(0)
        shape = (STREAMS, self.batch, self.frames * self.patches, width or self.width)
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(count)]

    def tables(self, count: int) -> tuple[Tensor, ...]:
        """The first `count` of a block's six float32 tables, which lie beside each other in memory."""
        generator = torch.Generator().manual_seed(1)
        six = torch.randn(STREAMS, self.batch, self.frames, 6, self.width, generator=generator).to(self.device)
        return six.unbind(-2)[:count]

    def scales(self, width: int) -> Tensor:
        """A number from 0 to 1 for each channel of each stream: [4,width]."""
        generator = torch.Generator().manual_seed(2)
        return torch.rand(STREAMS, width, generator=generator).to(self.device, self.dtype)

    def weights(self, outputs: int, inputs: int) -> Tensor:
        """Weights of a linear layer, which leave activations as large as they are: [4,outputs,inputs]."""
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(STREAMS, outputs, inputs, generator=generator) / math.sqrt(inputs)
        return drawn.to(self.device, self.dtype)

    def features(self, count: int) -> list[Tensor]:
        """Features of the VAE at half the pictures' size, channels last: [B,N,H/2,W/2,C]."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.num_frames, *(size // 2 for size in self.image_size), VAE_WIDTH)
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(count)]

    def channel_scales(self) -> list[Tensor]:
        """Scale and bias of the VAE's channels: [C] each."""
        generator = torch.Generator().manual_seed(1)
        return [torch.rand(VAE_WIDTH, generator=generator).to(self.device, self.dtype) for _ in range(2)]

    def qkv(self) -> list[Tensor]:
        """Queries, keys and values of a clip's tokens: [B,T,heads,d]."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, STREAMS * self.frames * self.patches, self.heads, self.head_dim)
        return [torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3)]

    def rotations(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T,d/2] of angles of the size that rotary positions have."""
        generator = torch.Generator().manual_seed(1)
        angles = 20 * torch.rand(self.frames * self.patches, self.head_dim // 2, generator=generator)
        return angles.cos().to(self.device), angles.sin().to(self.device)


def camera_path(batch: int, frames: int, height: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Intrinsics, poses and scales of cameras that turn and move."""
    angle = torch.linspace(0.0, 1.0, frames)
    pose = torch.eye(4).repeat(batch, frames, 1, 1)
    pose[..., 0, 0] = pose[..., 2, 2] = angle.cos()
    pose[..., 0, 2], pose[..., 2, 0] = angle.sin(), -angle.sin()
    pose[..., 0, 3] = angle
    intrinsics = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]])
    return intrinsics.repeat(batch, frames, 1, 1).to(device), pose.to(device), torch.ones(batch, device=device)


def wavy_clip(batch: int, height: int, width: int, device: str) -> Clip:
    """Smooth noise over a wavy surface, seen by cameras that move sideways and turn; all ordered pairs of anchors."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch * ANCHORS, 4, 15, 20, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").unflatten(0, (batch, ANCHORS))
    rgb, depth = fine[:, :, :3].clamp(0, 1).contiguous(), (2.0 + 0.5 * fine[:, :, 3]).contiguous()
    angle = 0.02 * torch.arange(ANCHORS)
    pose = torch.eye(4).repeat(batch, ANCHORS, 1, 1)
    pose[..., 0, 0] = pose[..., 2, 2] = angle.cos()
    pose[..., 0, 2], pose[..., 2, 0] = angle.sin(), -angle.sin()
    pose[..., 0, 3] = 0.05 * torch.arange(ANCHORS)
    intrinsics = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]])
    pairs = torch.tensor([(i, j) for i in range(ANCHORS) for j in range(ANCHORS) if i != j])
    parts = (rgb, depth, intrinsics.repeat(batch, ANCHORS, 1, 1), pose, pairs)
    rgb, depth, intrinsics, pose, pairs = (part.to(device) for part in parts)
    return rgb, depth, intrinsics, pose, pairs


@dataclass(frozen=True)
class OpCase:
    """One call of an op.

    Attributes:
        module: in `u4d_fast.ops`, where the op is.
        arguments: what it is given.
        twin: the op whose reference is the eager twin: its own, or where an op rounds to 8 bits the exact one.
        twin_arguments: what the twin is given; by default the same.
        outputs: so many of the results are compared; 0 for all. Residuals of a fit are noise.
        compiled: worth compiling; False for twins that are many small steps.
    """

    module: str
    arguments: Callable[[Sizes], tuple[Any, ...]]
    twin: str = ""
    twin_arguments: Callable[[Sizes], tuple[Any, ...]] | None = None
    outputs: int = 0
    compiled: bool = True


def _rays(sizes: Sizes) -> tuple[Tensor, Tensor]:
    intrinsics, poses, scale = camera_path(sizes.batch, sizes.num_frames, *sizes.image_size, sizes.device)
    return u4d_fast.pack_rays(intrinsics, poses, scale, sizes.image_size)


def _unpacked(sizes: Sizes) -> tuple[Any, ...]:
    return *_rays(sizes), sizes.num_frames, torch.ones(sizes.batch, device=sizes.device)


def _normed(sizes: Sizes) -> tuple[Any, ...]:
    return *sizes.activations(1), sizes.scales(sizes.width)


def _linear(sizes: Sizes) -> tuple[Any, ...]:
    return *sizes.activations(1), sizes.weights(sizes.hidden, sizes.width), sizes.scales(sizes.hidden)


def _linear_fp8(sizes: Sizes) -> tuple[Any, ...]:
    from u4d_fast.ops.quantize_rows import quantize_rows

    x, weight, bias = _linear(sizes)
    return quantize_rows(x), quantize_rows(weight), bias


def _biased(sizes: Sizes) -> tuple[Any, ...]:
    return *sizes.activations(1, sizes.hidden), sizes.scales(sizes.hidden)


def _attended(sizes: Sizes) -> tuple[Any, ...]:
    return *sizes.qkv(), sizes.patches


def _turned(sizes: Sizes) -> tuple[Any, ...]:
    return *_normed(sizes), *sizes.rotations(), sizes.heads


def _packed(sizes: Sizes) -> tuple[Any, ...]:
    cameras = camera_path(sizes.batch, sizes.num_frames, *sizes.image_size, sizes.device)
    return *cameras, sizes.image_size


def _fitted(sizes: Sizes) -> tuple[Any, ...]:
    return *u4d_fast.unpack_rays(*_unpacked(sizes)), sizes.image_size


def _warped(sizes: Sizes) -> tuple[Any, ...]:
    return wavy_clip(sizes.batch, *sizes.image_size, sizes.device)


def _filmed(features: int) -> Callable[[Sizes], tuple[Any, ...]]:
    return lambda sizes: (*sizes.features(features), *sizes.channel_scales())


def _rows(activations: int, tables: int) -> Callable[[Sizes], tuple[Any, ...]]:
    return lambda sizes: (*sizes.activations(activations), *sizes.tables(tables))


CASES: dict[str, OpCase] = {
    "pack_rays": OpCase("pack_rays", _packed),
    "unpack_rays": OpCase("unpack_rays", _unpacked),
    "rays_to_cameras": OpCase("rays_to_cameras", _fitted, outputs=2, compiled=False),
    "warp_frames": OpCase("warp_frames", _warped, compiled=False),
    "reprojection_error": OpCase("reprojection_error", _warped, compiled=False),
    "multi_stream_attention": OpCase("multi_stream_attention", _attended),
    "qk_norm_rope": OpCase("qk_norm_rope", _turned),
    "rms_norm": OpCase("rms_norm", _normed),
    "ada_layer_norm": OpCase("ada_layer_norm", _rows(1, 2)),
    "gated_residual": OpCase("gated_residual", _rows(2, 1)),
    "gated_residual_norm": OpCase("gated_residual_norm", _rows(2, 3)),
    "bias_gelu": OpCase("bias_gelu", _biased),
    "causal_norm_silu": OpCase("causal_norm_silu", _filmed(1)),
    "residual_causal_norm_silu": OpCase("causal_norm_silu", _filmed(2)),
    "grouped_linear": OpCase("grouped_linear", _linear),
    "grouped_linear_fp8": OpCase("grouped_linear", _linear_fp8, "grouped_linear", _linear),
    "multi_stream_attention_fp8": OpCase("multi_stream_attention_fp8", _attended, "multi_stream_attention"),
    "quantize_rows": OpCase("quantize_rows", _rows(1, 0)),
    "ada_layer_norm_fp8": OpCase("ada_layer_norm_fp8", _rows(1, 2)),
    "gated_residual_norm_fp8": OpCase("gated_residual_norm_fp8", _rows(2, 3)),
    "bias_gelu_fp8": OpCase("bias_gelu_fp8", _biased),
    "qk_norm_rope_fp8": OpCase("qk_norm_rope_fp8", _turned),
}
"""By the op's name, in the order in which the table shows them."""
