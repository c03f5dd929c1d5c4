"""The four-stream diffusion transformer: Wan2.1's video DiT with one set of weights per stream and shared attention.

Parameter names are those of diffusers' `WanTransformer3DModel`; every tensor has one leading stream dimension, so
taking stream 0 of each gives a Wan checkpoint back. Source: the seed, "Base" and "Initialization"; spec.md section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

import u4d_fast
from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS
from u4d.model.arithmetic import Rows, arithmetic_of
from u4d.model.motion import MotionFeatures
from u4d.model.rotary import rotary_table
from u4d.model.stacked import StackedLayerNorm, StackedLinear, StackedRMSNorm
from u4d.model.text import Prompt, TextKeys, collapse_padding, split_log
from u4d.presets import Precision, TransformerConfig, read_config
from u4d_fast import Fp8Rows
from u4d_fast.backend import SINGLE_AND_HALF, resolve

PATCH = 2
EPS = 1e-6


class Transformer(ModelMixin, ConfigMixin):
    """Velocity of all four streams at any per-(stream, latent frame) noise level.

    Args:
        config: sizes, such as `u4d.presets.tiny().transformer`; by default those of Wan2.1-T2V-1.3B.
    """

    _supports_gradient_checkpointing = True
    # Lists, not tuples: diffusers silently ignores anything else.
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["time_embedder", "scale_shift_table", "norm2", "motion"]

    def __init__(self, config: TransformerConfig | None = None) -> None:
        super().__init__()
        config = config or TransformerConfig()
        self.register_to_config(**asdict(config))
        streams, heads = len(STREAMS), config.num_attention_heads
        width = heads * config.attention_head_dim
        self.patch_embedding = StackedPatchEmbedding(streams, LATENT_CHANNELS, width)
        self.condition_embedder = ConditionEmbedder(streams, width, config.freq_dim, config.text_dim)
        self.blocks = nn.ModuleList(Block(streams, width, config.ffn_dim, heads, EPS) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(streams, 1, 2, width) / math.sqrt(width))
        self.proj_out = StackedLinear(streams, width, LATENT_CHANNELS * PATCH**2)
        self.start_as_passthrough()
        self.motion = MotionFeatures(width, LATENT_CHANNELS) if config.motion_features else None
        self.link = StreamLink(streams - 1, width) if config.rgb_to_geometry else None
        self.register_buffer("null_text", torch.zeros(1, config.text_dim))
        self.gradient_checkpointing = False
        self.precision: Precision = "exact"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Transformer:
        """Build from a saved configuration (`config.json`), as diffusers does when it loads a checkpoint.

        Raises:
            UserError: a field that this version does not know, or a value that makes no sense.
        """
        return cls(read_config(TransformerConfig, {**config, **overrides}))

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        text: Tensor | Prompt | TextKeys | None = None,
        group_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity `noise - clean`.

        Args:
            latents: `[B,4,16,F,h,w]` normalised latents; h and w even.
            times: `[B,4,F]` noise level of every group in [0,1]; 0 is clean.
            text: `[B,T,text_dim]` prompt embeddings, a `Prompt` of them with its padding collapsed, what `text_keys`
                made of them (better where the same prompt is used more than once), or None for the null text.
            group_mask: bool `[B,4F]` (which groups exist as keys) or `[B,4F,4F]` (which query group sees which key
                group), groups ordered stream by stream; better on the CPU, see `u4d_fast.multi_stream_attention`.
        Returns:
            `[B,4,16,F,h,w]` like latents.
        Raises:
            ValueError: a shape does not fit.
        """
        self._check(latents, times, text)
        batch, _, _, frames, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        time, modulation = self.condition_embedder(times.transpose(0, 1))
        if not isinstance(text, TextKeys):
            text = self.embedded_text(text)
        x = self.patch_embedding(latents)
        if self.motion is not None:
            x = torch.cat((x[:1] + self.motion(latents[:, 0], times[:, 0]).type_as(x), x[1:]))
        if self.link is not None:
            x = torch.cat((x[:1], x[1:] + self.link(x[0], 1 - times[:, 0])))
        table = rotary_table(frames, rows, columns, self.config.attention_head_dim, latents.device)
        for block, keys in zip(self.blocks, text.blocks, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, modulation, keys, text.bias, table, group_mask)
            else:
                x = block(x, modulation, keys, text.bias, table, group_mask)
        shift, scale = (self.scale_shift_table[:, None] + time[..., None, :]).unbind(-2)
        x = self.proj_out(u4d_fast.ada_layer_norm(x, shift, scale, EPS))
        patches = x.reshape(len(STREAMS), batch, frames, rows, columns, PATCH, PATCH, -1)
        return patches.permute(1, 0, 7, 2, 3, 5, 4, 6).reshape(latents.shape)

    def set_precision(self, precision: Precision) -> None:
        """Compute the blocks' matrix products in fp8 from now on, or exactly again; parameters stay as they are.

        Args:
            precision: "exact"; "fp8": linear layers and self-attention; "fp8-linear": linear layers alone. In fp8
                there are no gradients, and the weights' fp8 form is kept beside them (half as large as bfloat16).
        Raises:
            ValueError: there is no such precision.
        """
        arithmetic = arithmetic_of(precision)
        for part in self.modules():
            if isinstance(part, Block | Attention):
                part.arithmetic = arithmetic
            elif isinstance(part, StackedLinear) and precision == "exact":
                part.forget_fp8()
        self.precision = precision

    def text_keys(self, text: Tensor | None) -> TextKeys:
        """Keys and values of a prompt in every block, its padding collapsed; None stands for the null text.

        Args:
            text: `[B,T,text_dim]`; zero rows at the end are padding. B may be 1 for one prompt shared by a batch.
        """
        prompt = self.null_prompt() if text is None else collapse_padding(text, self.score_dtype)
        embedded = self.condition_embedder.embed_text(prompt.embeddings)
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return TextKeys(tuple(block.attn2.keys_of(embedded) for block in blocks), prompt.bias)

    def embedded_text(self, text: Tensor | Prompt | None) -> TextKeys:
        """The same for a prompt that is used once: every block makes its keys when it runs, padding stays as it is."""
        prompt = self.null_prompt() if text is None else text if isinstance(text, Prompt) else Prompt(text)
        embedded = self.condition_embedder.embed_text(prompt.embeddings)
        return TextKeys((embedded,) * len(self.blocks), prompt.bias)

    def null_prompt(self) -> Prompt:
        """The checkpoint's null text `[1,L,text_dim]` and its padding."""
        padding = split_log(self.config.text_length - 1, self.score_dtype)
        if not padding:
            return Prompt(self.null_text[None])
        embeddings = torch.cat((self.null_text, self.null_text.new_zeros(len(padding), self.config.text_dim)))
        return Prompt(embeddings[None], torch.tensor([[0.0, *padding]], device=embeddings.device))

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of attention's scores: autocast's where it is on, else the weights'."""
        device = self.null_text.device.type
        by_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if by_autocast else self.dtype

    @torch.no_grad()
    def start_as_passthrough(self) -> None:
        """Let an untrained head return the noisy latents: the best constant guess of a velocity at t = 1."""
        embedding = self.patch_embedding.weight.permute(0, 1, 3, 4, 5, 2).flatten(2)
        self.proj_out.weight.copy_(torch.linalg.pinv(embedding.float()))

    def _check(self, latents: Tensor, times: Tensor, text: Tensor | Prompt | TextKeys | None) -> None:
        channels, text_dim = LATENT_CHANNELS, self.config.text_dim
        shape = tuple(latents.shape)
        if len(shape) != 6 or shape[1:3] != (len(STREAMS), channels) or shape[4] % PATCH or shape[5] % PATCH:
            raise ValueError(f"latents: expected [B,4,{channels},F,h,w] with even h and w, got {list(shape)}")
        if tuple(times.shape) != (shape[0], shape[1], shape[3]):
            raise ValueError(f"times: expected [B,4,F] = {[shape[0], 4, shape[3]]}, got {list(times.shape)}")
        text = text.embeddings if isinstance(text, Prompt) else text
        if isinstance(text, Tensor) and (text.ndim != 3 or text.shape[0] != shape[0] or text.shape[2] != text_dim):
            raise ValueError(f"text: expected [B,T,{text_dim}] with B = {shape[0]}, got {list(text.shape)}")
        if isinstance(text, TextKeys) and len(text.blocks) != len(self.blocks):
            raise ValueError(f"text: expected keys of {len(self.blocks)} blocks, got those of {len(text.blocks)}")


class StackedPatchEmbedding(nn.Module):
    """Wan's strided Conv3d over [1,2,2] patches, one per stream: weight `[S,D,C,1,2,2]`."""

    def __init__(self, streams: int, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(streams, width, channels, 1, PATCH, PATCH))
        self.bias = nn.Parameter(torch.zeros(streams, width))
        nn.init.normal_(self.weight, std=1 / math.sqrt(channels * PATCH**2))

    def forward(self, latents: Tensor) -> Tensor:
        """`[B,S,C,F,h,w]` -> `[S,B,F*P,D]`."""
        batch, streams, channels, frames, height, width = latents.shape
        patches = latents.reshape(batch, streams, channels, frames, height // PATCH, PATCH, width // PATCH, PATCH)
        patches = patches.permute(1, 0, 3, 4, 6, 2, 5, 7).reshape(streams, -1, channels * PATCH**2)
        embedded = torch.baddbmm(self.bias[:, None], patches, self.weight.flatten(2).transpose(1, 2))
        return embedded.unflatten(1, (batch, -1))


class StreamLink(nn.Module):
    """Adds the RGB token of the same place to every geometry token, as far as RGB is signal and not noise (1 - t).

    It does not look at the group mask: hide RGB from geometry by its time t = 1, as history guidance does.

    Attention finds that pairing by itself, but only after very many clips; a small model is handed it.
    """

    def __init__(self, targets: int, width: int) -> None:
        super().__init__()
        self.linear = StackedLinear(targets, width, width)
        nn.init.zeros_(self.linear.weight)

    def forward(self, rgb: Tensor, signal: Tensor) -> Tensor:
        """rgb `[B,F*P,D]`, signal `[B,F]` (1 - t) -> `[targets,B,F*P,D]`."""
        scaled = (rgb.unflatten(1, (signal.shape[1], -1)) * signal[..., None, None]).flatten(1, 2).type_as(rgb)
        return self.linear(scaled.expand(self.linear.weight.shape[0], *scaled.shape))


class ConditionEmbedder(nn.Module):
    """Time and text embeddings of every stream, under the names of diffusers' `WanTimeTextImageEmbedding`."""

    def __init__(self, streams: int, width: int, freq_dim: int, text_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = StackedMLP(streams, freq_dim, width, width)
        self.time_proj = StackedLinear(streams, width, 6 * width)
        self.text_embedder = StackedMLP(streams, text_dim, width, width)

    def forward(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """`[S,B,F]` -> time embedding `[S,B,F,D]`, modulation `[S,B,F,6,D]`."""
        half = self.freq_dim // 2
        frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=times.device))
        angle = 1000 * times.float()[..., None] * frequency
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)
        time = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype), silu)
        modulation = self.time_proj(silu(time).to(self.time_proj.weight.dtype)).unflatten(-1, (6, -1))
        return time, modulation

    def embed_text(self, text: Tensor) -> Tensor:
        """`[B,T,text_dim]` -> `[S,B,T,D]`."""
        weight = self.text_embedder.linear_1.weight
        by_stream = text.to(weight.dtype).expand(weight.shape[0], -1, -1, -1)
        embedded: Tensor = self.text_embedder(by_stream, lambda x: gelu(x, approximate="tanh"))
        return embedded


class StackedMLP(nn.Module):
    """Two stacked linear layers with an activation between them."""

    def __init__(self, streams: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = StackedLinear(streams, in_features, hidden)
        self.linear_2 = StackedLinear(streams, hidden, out_features)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return self.linear_2(activation(self.linear_1(x)))


class Block(nn.Module):
    """Self-attention over all streams, cross-attention to text, feed-forward; all weights are per stream."""

    def __init__(self, streams: int, width: int, ffn_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.arithmetic = arithmetic_of("exact")
        self.attn1 = Attention(streams, width, heads, eps)
        self.attn2 = Attention(streams, width, heads, eps)
        self.norm2 = StackedLayerNorm(streams, width, eps)
        self.ffn = FeedForward(streams, width, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(streams, 1, 6, width) / math.sqrt(width))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        text_bias: Tensor | None,
        table: tuple[Tensor, Tensor],
        group_mask: Tensor | None,
    ) -> Tensor:
        """`[S,B,T,D]` -> `[S,B,T,D]`; modulation `[S,B,F,6,D]`; text `[S,B,L,D]` or this block's keys of it."""
        # Tables `[S,B,F,D]` per (stream, clip, latent frame): never expanded to tokens.
        parts = (self.scale_shift_table[:, None] + modulation.float()).unbind(-2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        normed = self.arithmetic.norm(x, shift, scale, self.eps)
        update = self.attn1.over_streams(normed, table, modulation.shape[2], group_mask)
        keys = self.attn2.keys_of(text) if isinstance(text, Tensor) else text
        if keys[0].shape[2] == 1:  # softmax over one key is 1: neither queries nor their norm are needed
            x = u4d_fast.gated_residual(x, update, gate) + self.attn2.to_out[0](keys[1])
            normed = self.arithmetic.norm(x, ffn_shift, ffn_scale, self.eps)
        else:
            x, normed = self.arithmetic.residual_norm(x, update, gate, *self.norm2.tables(gate), self.eps)
            update = self.attn2.to_text(normed, keys, text_bias)
            open_gate = torch.ones_like(gate[:, :1, :1]).expand_as(gate)
            x, normed = self.arithmetic.residual_norm(x, update, open_gate, ffn_shift, ffn_scale, self.eps)
        del update  # memory: the feed-forward is where a block takes most
        update = self.ffn(normed)
        del normed
        return u4d_fast.gated_residual(x, update, ffn_gate)


class Attention(nn.Module):
    """Projections of one attention; Wan uses the same module for self- and cross-attention."""

    def __init__(self, streams: int, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.arithmetic = arithmetic_of("exact")
        self.to_q = StackedLinear(streams, width, width)
        self.to_k = StackedLinear(streams, width, width)
        self.to_v = StackedLinear(streams, width, width)
        self.to_out = nn.ModuleList([StackedLinear(streams, width, width)])
        self.norm_q = StackedRMSNorm(streams, width, eps)
        self.norm_k = StackedRMSNorm(streams, width, eps)

    def over_streams(self, x: Rows, table: tuple[Tensor, Tensor], frames: int, group_mask: Tensor | None) -> Tensor:
        """Every token of every stream attends to every other: `[S,B,T,D]` -> `[S,B,T,D]`."""
        q = u4d_fast.qk_norm_rope(self.to_q(x), self.norm_q.weight, *table, self.heads, self.norm_q.eps)
        k = u4d_fast.qk_norm_rope(self.to_k(x), self.norm_k.weight, *table, self.heads, self.norm_k.eps)
        v = self.to_v(x)
        streams, _, tokens, _ = v.shape
        v = v.transpose(0, 1).flatten(1, 2).unflatten(-1, (self.heads, -1))
        attended = self.arithmetic.attention(q, k, v, tokens // frames, group_mask)
        attended = attended.unflatten(1, (streams, tokens)).transpose(0, 1).flatten(-2)
        return self.to_out[0](self.arithmetic.rows(attended))

    def keys_of(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of text tokens: `[S,B,L,D]` -> `[S,B,L,D]` each."""
        return self.norm_k(self.to_k(text)), self.to_v(text)

    def to_text(self, x: Rows, keys: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """Every token attends to its stream's text tokens: `[S,B,T,D]`, keys of `keys_of`, bias `[B,L]`."""
        q = self.norm_q(self.to_q(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (q, *keys))
        k, v = (part.expand(*q.shape[:3], *part.shape[3:]).flatten(0, 1) for part in (k, v))
        if bias is not None:
            bias = bias.type_as(q).expand(*q.shape[:2], -1).flatten(0, 1)[:, None, None]
        attended = scaled_dot_product_attention(q.flatten(0, 1), k, v, attn_mask=bias)
        attended = attended.transpose(1, 2).flatten(-2).unflatten(0, q.shape[:2])
        return self.to_out[0](self.arithmetic.rows(attended))


class FeedForward(nn.Module):
    """Two linear layers with a tanh GELU; names as in diffusers (`net.0.proj`, `net.2`)."""

    def __init__(self, streams: int, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(streams, width, hidden), nn.Identity(), StackedLinear(streams, hidden, width)
        )

    def forward(self, x: Rows) -> Tensor:
        return self.net(x)


class GELUProjection(nn.Module):
    """Linear layer and tanh GELU."""

    def __init__(self, streams: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = StackedLinear(streams, in_features, out_features)

    def forward(self, x: Rows) -> Rows:
        if isinstance(x, Fp8Rows):
            return self.in_fp8(x)
        # The hidden layer is the largest tensor of the model: in place where no gradient needs it without the GELU.
        # Without a kernel bias_gelu would store it in float32; adapters come after the bias.
        inplace = not torch.is_grad_enabled()
        if type(self.proj) is StackedLinear and resolve("bias_gelu", "auto", x, dtypes=SINGLE_AND_HALF) != "reference":
            return u4d_fast.bias_gelu(self.proj.product(x), self.proj.bias, inplace=inplace)
        hidden = self.proj(x)
        return torch.ops.aten.gelu_(hidden, approximate="tanh") if inplace else gelu(hidden, approximate="tanh")

    def in_fp8(self, x: Fp8Rows) -> Fp8Rows:
        """The same from fp8 rows to fp8 rows."""
        if type(self.proj) is StackedLinear:
            return u4d_fast.bias_gelu_fp8(self.proj.product(x), self.proj.bias)
        return u4d_fast.quantize_rows(torch.ops.aten.gelu_(self.proj(x), approximate="tanh"))
