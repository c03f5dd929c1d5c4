"""Each stream of the transformer is Wan: against diffusers' own class, with different random weights per stream."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from model_samples import own_stream_mask, randomise, relative_error
from torch import Tensor

from u4d import presets
from u4d.model.transformer import Transformer
from u4d.presets import TransformerConfig, read_config

BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 4, 6
TOKENS_PER_FRAME = (HEIGHT // 2) * (WIDTH // 2)
CONFIGS = (
    TransformerConfig(num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=40, text_dim=16, freq_dim=16),
    TransformerConfig(num_layers=3, num_attention_heads=3, attention_head_dim=20, ffn_dim=64, text_dim=24, freq_dim=32),
    TransformerConfig(num_layers=2, num_attention_heads=1, attention_head_dim=128, ffn_dim=96, text_dim=8),
)


def wan_class(config: TransformerConfig) -> WanTransformer3DModel:
    """diffusers' Wan of those sizes."""
    return WanTransformer3DModel(
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
    )


@dataclass(frozen=True)
class Case:
    """Our model, the four Wans it is made of, and an input."""

    wans: list[WanTransformer3DModel]
    ours: Transformer
    latents: Tensor
    text: Tensor


def make_case(config: TransformerConfig) -> Case:
    wans = [randomise(wan_class(config), seed=stream).eval() for stream in range(4)]
    with torch.device("meta"):
        ours = Transformer(config).eval()
    stacked = {name: torch.stack([wan.state_dict()[name] for wan in wans]) for name in wans[0].state_dict()}
    generator = torch.Generator().manual_seed(9)
    ours.load_state_dict(stacked | {"null_text": torch.randn(1, config.text_dim, generator=generator)}, assign=True)
    latents = torch.randn(BATCH, 4, 16, FRAMES, HEIGHT, WIDTH, generator=generator)
    return Case(wans, ours, latents, torch.randn(BATCH, 5, config.text_dim, generator=generator))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: f"{config.num_layers}x{config.attention_head_dim}")
def case(request: pytest.FixtureRequest) -> Case:
    config = request.param
    return make_case(config)


@torch.no_grad()
def errors(case: Case, times: Tensor, text: Tensor, per_token: bool) -> list[float]:
    """Relative error of each stream against its Wan; times `[B,4,F]`."""
    ours = case.ours(case.latents, times, text, own_stream_mask(BATCH, FRAMES))
    found = []
    for stream, wan in enumerate(case.wans):
        timestep = 1000 * times[:, stream]
        timestep = timestep.repeat_interleave(TOKENS_PER_FRAME, dim=1) if per_token else timestep[:, 0]
        truth = wan(case.latents[:, stream], timestep, text, return_dict=False)[0]
        found.append(relative_error(ours[:, stream], truth))
    return found


def test_scalar_timestep(case: Case) -> None:
    times = torch.rand(BATCH, 4, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, FRAMES)
    assert max(errors(case, times, case.text, per_token=False)) < 1e-5


def test_per_token_timesteps(case: Case) -> None:
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(2))
    times[:, 1, 0], times[:, 2, -1] = 0, 1
    assert max(errors(case, times, case.text, per_token=True)) < 1e-5


@pytest.mark.parametrize("tokens", (1, 5))
def test_text_lengths_and_padding(case: Case, tokens: int) -> None:
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(3))
    text = case.text[:, :tokens]
    padded = torch.cat((text, torch.zeros_like(case.text[:, :4])), dim=1)
    assert max(errors(case, times, text, per_token=True)) < 1e-5
    assert max(errors(case, times, padded, per_token=True)) < 1e-5


def test_no_text_is_wan_with_the_null_text(case: Case) -> None:
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours = case.ours(case.latents, times, None, own_stream_mask(BATCH, FRAMES))
        null = case.ours.null_text.expand(BATCH, 1, -1)
        for stream, wan in enumerate(case.wans):
            timestep = 1000 * times[:, stream].repeat_interleave(TOKENS_PER_FRAME, dim=1)
            truth = wan(case.latents[:, stream], timestep, null, return_dict=False)[0]
            assert relative_error(ours[:, stream], truth) < 1e-5


@pytest.mark.slow
def test_full_width() -> None:
    """1536 wide, 12 heads of 128, FFN 8960, text 4096: two of Wan's 30 layers."""
    case = make_case(TransformerConfig(num_layers=2))
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(5))
    padded = torch.cat((case.text, torch.zeros(BATCH, 100, 4096)), dim=1)
    assert max(errors(case, times[..., :1].expand(-1, -1, FRAMES), padded, per_token=False)) < 1e-5
    assert max(errors(case, times, padded, per_token=True)) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_exact_as_diffusers(case: Case, tmp_path: Path) -> None:
    """Both loaded in bfloat16 from float32 files, against float64: our error is at most 1.5 times theirs."""
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(6))
    text = torch.cat((case.text, torch.zeros(BATCH, 300, case.text.shape[-1])), dim=1)
    case.ours.save_pretrained(tmp_path / "ours")
    ours = Transformer.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    mask = own_stream_mask(BATCH, FRAMES)
    latents, text16 = case.latents.bfloat16(), text.bfloat16()
    plain, collapsed = (ours(latents, times, given, mask).double() for given in (text16, ours.text_keys(text16)))
    for stream, wan in enumerate(case.wans):
        timestep = 1000 * times[:, stream].repeat_interleave(TOKENS_PER_FRAME, dim=1)
        wan.save_pretrained(tmp_path / "wan")
        wan16 = WanTransformer3DModel.from_pretrained(tmp_path / "wan", torch_dtype=torch.bfloat16)
        theirs = wan16(latents[:, stream], timestep, text16, return_dict=False)[0].double()
        exact = deepcopy(wan).double()
        truth = exact(case.latents[:, stream].double(), timestep.double(), text.double(), return_dict=False)[0]
        allowed = 1.5 * float((theirs - truth).norm() / truth.norm())
        for found in (plain, collapsed):
            assert float((found[:, stream] - truth).norm() / truth.norm()) < allowed


@torch.no_grad()
def test_collapsed_padding_equals_the_padded_text(case: Case) -> None:
    """Prompts of different lengths in one batch, one that fills all tokens, one without any."""
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(7))
    for lengths in ((5, 5), (5, 2), (1, 4), (0, 3), (40, 4)):
        text = torch.zeros(BATCH, 40, case.text.shape[-1])
        for clip, length in enumerate(lengths):
            text[clip, :length] = torch.randn(length, text.shape[-1], generator=torch.Generator().manual_seed(clip))
        keys = case.ours.text_keys(text)
        assert keys.blocks[0][0].shape[2] == min(40, max(lengths) + 1)
        assert relative_error(case.ours(case.latents, times, keys), case.ours(case.latents, times, text)) < 1e-5


@torch.no_grad()
def test_null_text_with_padding(case: Case) -> None:
    """Wan's own null prompt is one token and 511 zeros; here it is two keys."""
    ours = case.ours
    times = torch.rand(BATCH, 4, FRAMES, generator=torch.Generator().manual_seed(8))
    padded = torch.cat((ours.null_text, torch.zeros(511, ours.null_text.shape[1])))[None].expand(BATCH, -1, -1)
    truth = ours(case.latents, times, padded)
    with_padding = Transformer(replace(read_config(TransformerConfig, ours.config), text_length=512)).eval()
    with_padding.load_state_dict(ours.state_dict())
    assert relative_error(ours(case.latents, times), truth) > 1e-3
    for text in (None, with_padding.text_keys(None)):
        assert relative_error(with_padding(case.latents, times, text), truth) < 1e-5
    assert with_padding.text_keys(None).blocks[0][0].shape[1:3] == (1, 2)


def test_without_the_mask_streams_do_see_each_other(case: Case) -> None:
    """Otherwise the parity above would hold for a model without joint attention, too."""
    times = torch.full((BATCH, 4, FRAMES), 0.5)
    with torch.no_grad():
        apart = case.ours(case.latents, times, case.text, own_stream_mask(BATCH, FRAMES))
        joint = case.ours(case.latents, times, case.text)
    for stream in range(4):
        assert relative_error(joint[:, stream], apart[:, stream]) > 1e-2


def test_full_size_tensors_are_wans_with_one_leading_dimension() -> None:
    with torch.device("meta"):
        ours = Transformer(presets.wan_1_3b().transformer)
        wan = wan_class(presets.wan_1_3b().transformer)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes["blocks.0.attn1.to_q.weight"] == (4, 1536, 1536)
    assert shapes.pop("null_text") == (1, 4096)
    assert shapes == {name: (4, *tensor.shape) for name, tensor in wan.state_dict().items()}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 4 * 1_418_996_800


def test_tiny_adds_nothing_but_motion_the_rgb_link_and_the_null_text() -> None:
    config = presets.tiny().transformer
    with torch.device("meta"):
        ours, wan = Transformer(config), wan_class(config)
    assert set(wan.state_dict()) <= set(ours.state_dict())
    assert set(ours.state_dict()) - set(wan.state_dict()) == {
        "null_text",
        "motion.grey_single",
        "motion.grey_group",
        "motion.embed.weight",
        "motion.embed.bias",
        "link.linear.weight",
        "link.linear.bias",
    }
