"""What a completion needs of a GPU's memory, by accounting: no GPU and no memory is needed to know it.

Models are built and run on the meta device, where tensors have shapes and no values, while `LiveBytes` counts what is
alive. Not in the count: CUDA's own context, what operations take and give back inside (workspaces of convolutions and
matrix products), what the caching allocator rounds up or cannot reuse, cameras, and the scoring of candidates.
`ALLOWANCE` is set aside for them; nothing was measured on a GPU yet. All is exact: fp8 weights, which are kept beside
the others and half as large as those in bfloat16, come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from torch import nn

from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS
from u4d.diffusion.unipc import unipc_table
from u4d.errors import UserError
from u4d.live_bytes import LiveBytes
from u4d.model.codec import CELL, TinyCodec
from u4d.model.latents import Codec
from u4d.model.text import TextKeys
from u4d.model.transformer import Transformer
from u4d.model.wan_codec import as_codec
from u4d.presets import CodecConfig, Preset, TransformerConfig
from u4d.sample.denoise import DEFAULT_GUIDANCE, denoise
from u4d_fast.time_layout import latent_frames

GB = 10**9
ALLOWANCE = GB
FLOAT32 = 4
VAE_DTYPE = torch.float32  # the pipeline's default: depth needs more than bfloat16's 8 bits
TEXT_DTYPE = torch.bfloat16

PARTS = {
    "text_encoder_weights": "weights of the text encoder",
    "vae_weights": "weights of the VAE",
    "transformer_weights": "weights of the transformer",
    "clip": "one clip: RGB and depth in float32",
    "text_activations": "activations of the text encoder (upper bound)",
    "encode_activations": "activations of the VAE, encoding a clip",
    "transformer_activations": "activations of the transformer, one forward",
    "text_keys": "keys and values of the longest prompt",
    "latents": "latents",
    "sampler_state": "the sampler's own tensors",
    "decode_activations": "activations of the VAE, decoding a clip",
}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of UMT5-XXL's encoder, which Wan uses, and of the longest prompt; transformers need not be installed."""

    vocabulary: int = 256384
    width: int = 4096
    hidden: int = 10240
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    distance_buckets: int = 32
    tokens: int = 512

    def parameters(self) -> int:
        """Token embeddings; per layer q, k, v, o, distance biases, a gated feed-forward and two norms; a last norm."""
        attention = 4 * self.width * self.heads * self.head_dim + self.distance_buckets * self.heads
        layer = attention + 3 * self.width * self.hidden + 2 * self.width
        return self.vocabulary * self.width + self.layers * layer + self.width

    def activations(self) -> int:
        """Numbers alive in one pass, an upper bound: scores `[heads,T,T]` stored in all forms, one of them float32."""
        return self.tokens * (5 * self.heads * self.tokens + 4 * self.hidden + 8 * self.width)


@dataclass(frozen=True)
class Stage:
    """Bytes of one stage of a completion: weights that are on the GPU, and all else that is alive at its worst."""

    name: str
    weights: int
    working: int

    @property
    def peak(self) -> int:
        """Both together."""
        return self.weights + self.working


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a completion takes, part by part; see `plan_completion`.

    Attributes:
        candidates: drawn at once.
        dtype: of the transformer.
        text_encoder_weights, vae_weights, transformer_weights: as the pipeline loads them; without a prompt there is
            no text encoder.
        clip: RGB and depth of one clip in float32.
        text_activations, encode_activations, transformer_activations, decode_activations: the most that one pass of
            that component makes, its results included.
        text_keys: keys and values of the longest prompt in all blocks, kept while denoising.
        latents: of all candidates, in float32.
        sampler_state: the most that the sampler has alive, its inputs and the model's answer included.
    """

    preset: str
    frames: int
    size: tuple[int, int]
    candidates: int
    guidance: bool
    dtype: torch.dtype
    offload: bool
    text_encoder_weights: int
    vae_weights: int
    transformer_weights: int
    clip: int
    text_activations: int
    encode_activations: int
    transformer_activations: int
    text_keys: int
    latents: int
    sampler_state: int
    decode_activations: int

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Encoding the prompt, encoding the clip, denoising, decoding.

        With offload each has only its own weights. Without, VAE and transformer stay; the text encoder, which the
        pipeline loads for a prompt and frees after it, comes on top of them.
        """
        text = self.clip + self.text_activations
        encode = 3 * self.clip + self.encode_activations  # as given, with gaps filled, and as images in [-1,1]
        denoise = self.clip + self.text_keys + self.sampler_state + self.transformer_activations
        images = self.candidates * self.clip  # of the candidates; they are copied once when all are there
        decode = self.clip + self.latents + max(images + self.decode_activations, 2 * images)
        worked = (
            ("text", self.text_encoder_weights, text),
            ("encode", self.vae_weights, encode),
            ("denoise", self.transformer_weights, denoise),
            ("decode", self.vae_weights, decode),
        )
        staying = self.vae_weights + self.transformer_weights
        without = {"text": self.text_encoder_weights + staying}
        return tuple(
            Stage(name, weights if self.offload else without.get(name, staying), working)
            for name, weights, working in worked
            if name != "text" or self.text_encoder_weights
        )

    @property
    def peak(self) -> int:
        """The most of all stages."""
        return max(stage.peak for stage in self.stages)

    def fits(self, memory_bytes: int, allowance: int = ALLOWANCE) -> bool:
        """Whether the peak and what is not counted go into that much memory."""
        return self.peak + allowance <= memory_bytes


def plan_completion(
    preset: Preset,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    candidates: int = 1,
    guidance: bool = True,
    prompt: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    offload: bool = True,
) -> MemoryPlan:
    """Account for a completion's memory on the GPU.

    Args:
        preset: such as `u4d.presets.wan_1_3b()`.
        frames, size: of the clip, (height, width); by default the preset's.
        candidates: drawn at once.
        guidance: history guidance, which doubles the batch.
        prompt: whether there is one; the longest is assumed. Presets with a codec of their own take none.
        dtype: of the transformer's weights.
        offload: whether text encoder, VAE and transformer are on the GPU one at a time.
    Raises:
        UserError: a number of frames or candidates below 1, or a size that is no multiple of 16.
    """
    config = preset.transformer
    frames = config.num_frames if frames is None else frames
    size = config.image_size if size is None else size
    for name, value in (("frames", frames), ("candidates", candidates)):
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    if len(size) != 2 or any(side < 16 or side % 16 for side in size):
        raise UserError(f"size: expected (height, width), multiples of 16, got {size!r}")
    text = TextEncoderConfig() if prompt and preset.codec is None else None
    tokens = text.tokens if text else 0
    shape = (len(STREAMS), LATENT_CHANNELS, latent_frames(frames), size[0] // CELL, size[1] // CELL)
    encode, decode = codec_activations(preset.codec, frames, size)
    return MemoryPlan(
        preset=preset.name,
        frames=frames,
        size=size,
        candidates=candidates,
        guidance=guidance,
        dtype=dtype,
        offload=offload,
        text_encoder_weights=text.parameters() * TEXT_DTYPE.itemsize if text else 0,
        vae_weights=weight_bytes(meta_vae(preset.codec)),
        transformer_weights=transformer_weights(config, dtype),
        clip=frames * size[0] * size[1] * 4 * FLOAT32,
        text_activations=text.activations() * TEXT_DTYPE.itemsize if text else 0,
        encode_activations=encode,
        transformer_activations=transformer_activations(config, (candidates * (1 + guidance), *shape), dtype, tokens),
        text_keys=config.num_layers * 2 * len(STREAMS) * tokens * token_width(config) * dtype.itemsize,
        latents=candidates * torch.Size(shape).numel() * FLOAT32,
        sampler_state=candidates * sampler_state(shape, guidance),
        decode_activations=decode,
    )


def token_width(config: TransformerConfig) -> int:
    """Channels of a token."""
    return config.num_attention_heads * config.attention_head_dim


def as_loaded(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give every weight the type that diffusers' `from_pretrained(dtype=...)` gives it."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return module.eval()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def build_transformer(config: TransformerConfig, dtype: torch.dtype, device: str = "meta") -> nn.Module:
    """An untrained transformer, on the meta device with shapes and types and no values."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return as_loaded(Transformer(config), dtype)


@cache
def transformer_weights(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of the transformer's parameters and buffers."""
    return weight_bytes(build_transformer(config, dtype))


@cache
def meta_vae(config: CodecConfig | None) -> nn.Module:
    """Wan's VAE, or the preset's own codec, with shapes and types, and no values."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return as_loaded(AutoencoderKLWan() if config is None else TinyCodec(**asdict(config)), VAE_DTYPE)


@cache
@torch.no_grad()
def transformer_activations(
    config: TransformerConfig, shape: tuple[int, ...], dtype: torch.dtype, text_tokens: int
) -> int:
    """Most bytes alive in one forward on latents `[B,4,16,F,h,w]`, which are counted, too; the text's keys are not.

    Two layers are enough: without gradients nothing of a block outlives it but its result.
    """
    config = replace(config, num_layers=min(config.num_layers, 2))
    # Local motion switches autocast off, which the meta device does not know; only small models have it.
    device = "cpu" if config.motion_features else "meta"
    model = build_transformer(config, dtype, device)
    key = torch.empty(len(STREAMS), 1, text_tokens, token_width(config), dtype=dtype, device=device)
    text = TextKeys(((key, key),) * config.num_layers) if text_tokens else None
    with LiveBytes() as counted:
        latents = torch.zeros(shape, dtype=dtype, device=device)
        times = torch.zeros(shape[0], shape[1], shape[3], device=device)
        model(latents, times, text)
    return counted.peak


@cache
@torch.no_grad()
def codec_activations(config: CodecConfig | None, frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """Most bytes alive while one clip's RGB and depth are encoded, and while they are decoded, results included.

    Depth goes the way of RGB with fewer channels at its ends, so RGB is measured and the first result added for depth.
    """
    codec: Codec = as_codec(meta_vae(config))
    clip = torch.empty(1, frames, 3, *size, device="meta")
    with LiveBytes() as encoding:
        latents = codec.encode(clip, "rgb")
    with LiveBytes() as decoding:
        codec.decode(latents, "rgb", frames)
    return encoding.peak + latents.nbytes, decoding.peak + clip.nbytes


@cache
def sampler_state(shape: tuple[int, ...], guidance: bool) -> int:
    """Most bytes that one candidate has alive in the sampler: it is run on the CPU with a model that answers zero."""
    observed = torch.zeros(shape[0], shape[2], dtype=torch.bool)
    observed[0, 0] = True
    with LiveBytes() as counted:
        noise, clean = torch.zeros(1, *shape), torch.zeros(1, *shape)
        weight = DEFAULT_GUIDANCE if guidance else 1.0
        table = unipc_table(4, shift=3.0)  # enough steps for a full history
        denoise(lambda latents, _: torch.zeros_like(latents), clean, observed, table, noise=noise, guidance=weight)
    return counted.peak


def format_memory_plan(plan: MemoryPlan) -> str:
    """The plan as two Markdown tables, its parts and its stages, under one line that says what is planned."""
    height, width = plan.size
    title = (
        f"{plan.preset}, {plan.frames} frames of {height}x{width}, {str(plan.dtype).removeprefix('torch.')}, "
        f"candidates at once: {plan.candidates}, guidance: {yes_no(plan.guidance)}, offload: {yes_no(plan.offload)}"
    )
    parts = ["| part | GB |", "| --- | ---: |"]
    parts += [f"| {words} | {gigabytes(getattr(plan, name))} |" for name, words in PARTS.items()]
    stages = ["| stage | weights, GB | working, GB | peak, GB |", "| --- | ---: | ---: | ---: |"]
    stages += [
        f"| {stage.name} | {gigabytes(stage.weights)} | {gigabytes(stage.working)} | {gigabytes(stage.peak)} |"
        for stage in plan.stages
    ]
    return "\n".join([title, "", *parts, "", *stages])


def format_candidates(preset: Preset, counts: tuple[int, ...] = (1, 2, 4, 8), memory_bytes: int = 24 * GB) -> str:
    """Peaks by the number of candidates drawn at once, with guidance, as a Markdown table."""
    cases = {  # offload, prompt
        "with offload": (True, True),
        "without, no prompt": (False, False),
        "without, with a prompt": (False, True),
    }
    columns = [f"{name}, GB | fits {memory_bytes / GB:g} GB" for name in cases]
    rows = [f"| candidates at once | {' | '.join(columns)} |", "| ---: |" + " ---: | --- |" * len(cases)]
    for count in counts:
        plans = [
            plan_completion(preset, candidates=count, offload=offload, prompt=prompt)
            for offload, prompt in cases.values()
        ]
        cells = [f"{gigabytes(plan.peak)} | {yes_no(plan.fits(memory_bytes))}" for plan in plans]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(rows)


def gigabytes(count: int) -> str:
    """In units of 10^9 bytes, to the megabyte."""
    return f"{count / GB:.3f}"


def yes_no(value: bool) -> str:
    """In words."""
    return "yes" if value else "no"
