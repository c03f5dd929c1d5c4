"""A pipeline's parts with random weights, made where they are to run: for benchmarks of the whole system."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS
from u4d.memory import build_transformer
from u4d.model.codec import CELL, TinyCodec
from u4d.model.latents import Codec, Statistics
from u4d.model.streams import Streams
from u4d.model.transformer import Transformer
from u4d.model.wan_codec import as_codec
from u4d.presets import Preset
from u4d_fast.time_layout import latent_frames


@dataclass(frozen=True, eq=False)
class System:
    """The parts of a pipeline with random weights, and one clip's latents."""

    preset: Preset
    device: str
    model: Transformer
    codec: Codec
    statistics: Statistics
    text: Tensor | None
    streams: Streams
    clean: Tensor
    observed: Tensor

    @property
    def frames(self) -> int:
        return int(self.preset.transformer.num_frames)


@torch.no_grad()
def random_model(preset: Preset, device: str) -> Transformer:
    """The transformer in bfloat16 (float32 on a CPU), filled where it stands: no float32 copy of 23 GB is made."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build_transformer(preset.transformer, dtype).to_empty(device=device)
    assert isinstance(model, Transformer)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1)
        else:
            weight.normal_(std=1 / math.sqrt(weight.shape[-1] if weight.ndim < 4 else weight[0, 0].numel()))
    for values in model.buffers():
        values.zero_()
    return model.eval()


def random_codec(preset: Preset, device: str) -> Codec:
    """The preset's codec in float32, as the pipeline has it."""
    with torch.device(device):
        if preset.codec is not None:
            return as_codec(TinyCodec(**asdict(preset.codec)).eval())
        from diffusers import AutoencoderKLWan

        return as_codec(AutoencoderKLWan().eval())


def unit_statistics(preset: Preset) -> Statistics:
    """Statistics that leave latents as they are."""
    return Statistics(torch.zeros(4, 16), torch.ones(4, 16), preset.transformer.reference_fov_rad)


def random_system(preset: Preset, device: str, text_tokens: int) -> System:
    """Everything that a completion needs."""
    config = preset.transformer
    height, width = config.image_size
    codec = random_codec(preset, device)
    with torch.device(device):
        shape = (1, len(STREAMS), LATENT_CHANNELS, latent_frames(config.num_frames), height // CELL, width // CELL)
        rays = 0.3 * torch.randn(2, 1, *shape[2:])
        rgb = torch.rand(1, config.num_frames, 3, height, width) * 2 - 1
        streams = Streams(rgb=rgb, depth=rgb[:, :, :1], ray_dir=rays[0], ray_moment=rays[1])
        text = None
        if config.text_length > 1 and text_tokens:
            text = torch.zeros(1, config.text_length, config.text_dim)
            text[:, :text_tokens] = torch.randn(1, min(text_tokens, config.text_length), config.text_dim)
        observed = torch.zeros(len(STREAMS), shape[3], dtype=torch.bool)
        observed[0] = True
    clean = torch.randn(shape, device=device)
    model, statistics = random_model(preset, device), unit_statistics(preset)
    return System(preset, device, model, codec, statistics, text, streams, clean, observed)
