"""Counting live bytes: on examples counted by hand and against PyTorch's own profiler; the plan for 24 GB."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from model.model_samples import random_transformer, small_config
from u4d import presets
from u4d.errors import UserError
from u4d.live_bytes import LiveBytes
from u4d.memory import (
    ALLOWANCE,
    GB,
    TextEncoderConfig,
    as_loaded,
    build_transformer,
    codec_activations,
    meta_vae,
    plan_completion,
    sampler_state,
    transformer_activations,
    weight_bytes,
)
from u4d.model.text import TextKeys
from u4d.model.transformer import Transformer
from u4d.model.wan_codec import WanCodec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
WAN = presets.wan_1_3b()
DEVICES = ("cpu", "meta")


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_count_until_they_are_gone(device: str) -> None:
    with LiveBytes() as counted:
        first = torch.empty(10, 10, device=device)
        assert (counted.live, counted.peak) == (400, 400)
        second = first.double() + 1  # a copy that dies at once, and the sum
        assert (counted.live, counted.peak) == (1200, 2000)
        del first
        assert (counted.live, counted.peak) == (800, 2000)
        del second
        assert (counted.live, counted.peak) == (0, 2000)


@pytest.mark.parametrize("device", DEVICES)
def test_views_cost_nothing_and_keep_their_storage_alive(device: str) -> None:
    with LiveBytes() as counted:
        whole = torch.empty(4, 6, device=device)
        view, parts = whole[1:].T, whole.unbind(0)  # parts: several results at once
        wide = whole.expand(5, 4, 6)
        assert counted.live == 4 * 24
        del whole, parts, wide
        assert counted.live == 4 * 24
        copy = view.contiguous()
        assert counted.live == 4 * 24 + 4 * 18
        del view
        assert counted.live == copy.nbytes


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_operations_make_nothing_new(device: str) -> None:
    given = torch.zeros(100, device=device)
    with LiveBytes() as counted:
        made = torch.zeros(100, device=device)
        made.add_(1).mul_(made)
        made[3:] += 2
        torch.mul(given, 2, out=given)
        given.add_(made)
        assert counted.live == counted.peak == 400
        made.resize_(300)
        assert counted.live == 1200


@pytest.mark.parametrize("device", DEVICES)
def test_results_in_tuples_and_lists_are_all_counted(device: str) -> None:
    with LiveBytes() as counted:
        values, places = torch.empty(5, 8, device=device).topk(2)
        assert counted.live == 5 * 2 * 4 + 5 * 2 * 8 and counted.peak == 160 + counted.live
        copies = torch._foreach_add([values, values], 1.0)
        assert counted.live == 3 * values.nbytes + places.nbytes and len(copies) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_there_before_is_not_counted(device: str) -> None:
    weight = torch.zeros(8, 8, device=device)
    with LiveBytes() as counted:
        views = (weight.T, weight[2:], weight.view(64), weight.detach())
        assert counted.live == counted.peak == 0 and len(views) == 4
        product = weight.T @ weight
        assert counted.live == product.nbytes


@pytest.mark.parametrize("device", DEVICES)
def test_what_autograd_saves_is_alive(device: str) -> None:
    weight = torch.zeros(50, requires_grad=True, device=device)
    with LiveBytes() as counted:
        result = weight.exp().sin()  # sin keeps exp's result, which exp itself keeps, too
        assert counted.live == 2 * 200
        result.detach_()
        assert counted.live == 200


def test_nothing_is_counted_outside() -> None:
    with LiveBytes() as counted:
        kept = torch.zeros(10)
    other = torch.zeros(1000)
    assert counted.peak == counted.live == kept.nbytes
    del kept
    assert counted.live == 0 and len(other) == 1000


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_attention_on_meta_is_one_result(dtype: torch.dtype) -> None:
    """Taken apart it would also store two float32 tables of [T,T] for each head."""
    query = torch.empty(2, 3, 1000, 16, dtype=dtype, device="meta")
    key, value = (torch.empty(2, 3, 700, width, dtype=dtype, device="meta") for width in (16, 24))
    mask = torch.zeros(2, 1, 1, 700, dtype=torch.bool, device="meta")
    for given in ({}, {"attn_mask": mask}, {"is_causal": False, "scale": 0.5}):
        with LiveBytes() as counted:
            result = scaled_dot_product_attention(query, key, value, **given)
        assert (result.shape, result.dtype) == ((2, 3, 1000, 24), dtype)
        assert counted.live == counted.peak == result.nbytes
    with LiveBytes() as counted:
        result = scaled_dot_product_attention(query=query, key=key, value=value)
        assert counted.peak == result.nbytes


def test_attention_on_the_cpu_is_really_computed() -> None:
    query = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = scaled_dot_product_attention(query, query, query)
    with LiveBytes():
        assert torch.equal(scaled_dot_product_attention(query, query, query), expected)


def profiled_peak(work: Any) -> int:
    """Most bytes that the CPU's allocator had given out, from the profiler's record of every allocation."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes
    total = peak = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    return peak


@torch.no_grad()
def test_equals_the_allocations_of_a_small_model() -> None:
    """Element-wise steps, norms and products whose kernels take nothing beside their results."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64), nn.Softmax(dim=-1))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def work() -> Tensor:
        doubled = torch.cat((x, x * 2), dim=0)
        return (model(doubled).unflatten(0, (2, -1)).float() + x).sum()

    work()  # whatever is made once
    with LiveBytes() as counted:
        work()
    assert counted.peak == profiled_peak(work)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_meta_counts_what_the_cpu_allocates_for_a_transformer(dtype: torch.dtype) -> None:
    """Three ways to one number: on the meta device, on the CPU, and by the record of the CPU's allocator.

    The feed-forward is wide enough to be the peak: attention's kernel on the CPU takes a little memory for itself. So
    do oneDNN's products in bfloat16, which are switched off here.
    """
    config = small_config(ffn_dim=1200)
    latents, times = torch.zeros(2, 4, 16, 3, 16, 16, dtype=dtype), torch.zeros(2, 4, 3)
    model = as_loaded(random_transformer(ffn_dim=1200), dtype)
    expected = transformer_activations(config, tuple(latents.shape), dtype, text_tokens=0)
    with LiveBytes() as counted:
        model(latents.clone(), times.clone())
    assert counted.peak == pytest.approx(expected, rel=0.01)
    given = latents.nbytes + times.nbytes  # inside transformer_activations, outside here
    with torch.backends.mkldnn.flags(enabled=False):
        assert profiled_peak(lambda: model(latents, times)) + given == pytest.approx(expected, rel=0.01)


@torch.no_grad()
def test_two_layers_take_what_thirty_take() -> None:
    shape, config = (2, 4, 16, 14, 30, 40), WAN.transformer
    key = torch.empty(4, 1, 512, 1536, dtype=torch.bfloat16, device="meta")
    model = build_transformer(config, torch.bfloat16)
    with LiveBytes() as counted:
        latents = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        model(latents, torch.empty(2, 4, 14, device="meta"), TextKeys(((key, key),) * config.num_layers))
    assert len(model.blocks) == 30
    assert counted.peak == transformer_activations(config, shape, torch.bfloat16, text_tokens=512)


def test_weights_are_counted_as_they_are_loaded(tmp_path: Path) -> None:
    """What must stay float32 is float32 after `from_pretrained(dtype=bfloat16)`, too; all else takes two bytes."""
    random_transformer(motion_features=True).save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    built = build_transformer(small_config(motion_features=True), torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert types == {name: tensor.dtype for name, tensor in built.state_dict().items()}
    assert set(types.values()) == {torch.float32, torch.bfloat16}
    assert weight_bytes(built) == weight_bytes(loaded)


def test_the_text_encoder_has_the_size_of_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = TextEncoderConfig()
    sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 256384}
    with torch.device("meta"):
        umt5 = transformers.UMT5Config(**sizes, feed_forward_proj="gated-gelu", attn_implementation="eager")
        encoder = transformers.UMT5EncoderModel(umt5)
    assert config.parameters() == sum(parameter.numel() for parameter in encoder.parameters())
    for parameter in encoder.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with torch.no_grad(), LiveBytes() as counted:
        encoder.eval()(torch.empty(1, config.tokens, dtype=torch.int64, device="meta"))
    assert counted.peak <= 2 * config.activations() <= 2 * counted.peak


def test_the_sampler_needs_a_few_copies_of_the_latents() -> None:
    shape = (4, 16, 3, 4, 6)
    one = 4 * torch.Size(shape).numel()
    assert 4 * one < sampler_state(shape, guidance=False) < sampler_state(shape, guidance=True) < 24 * one


def test_wan_fits_into_24_gb_with_offload() -> None:
    """One candidate under guidance. Without offload the text encoder is too much beside the transformer."""
    plan = plan_completion(WAN)
    assert (plan.frames, plan.size, plan.candidates, plan.guidance, plan.offload) == (50, (240, 320), 1, True, True)
    assert [stage.name for stage in plan.stages] == ["text", "encode", "denoise", "decode"]
    assert plan.peak + ALLOWANCE < 16 * GB and plan.fits(24 * GB)
    assert plan_completion(WAN, candidates=4).fits(24 * GB)  # what the pipeline draws at once
    assert not plan_completion(WAN, offload=False).fits(24 * GB)
    assert plan_completion(WAN, offload=False, prompt=False).fits(24 * GB)


def test_the_parts_of_the_plan_for_wan() -> None:
    """Weights by hand from the known numbers of parameters; activations cannot be less than the FFN's hidden layer."""
    plan = plan_completion(WAN)
    assert plan.vae_weights == 126_892_531 * 4
    assert plan.text_encoder_weights == 5_680_910_336 * 2
    model = build_transformer(WAN.transformer, torch.float32)
    kept = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if {"time_embedder", "scale_shift_table", "norm2"} & set(name.split("."))
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    null_text = WAN.transformer.text_dim
    assert (parameters, plan.transformer_weights) == (5_675_987_200, 2 * (parameters + kept + null_text))
    assert plan.clip == 50 * 240 * 320 * 4 * 4
    hidden = 2 * 16_800 * 8960 * 2
    assert hidden < plan.transformer_activations < 4 * hidden
    assert plan.text_keys == 30 * 2 * 4 * 512 * 1536 * 2
    assert plan.encode_activations > plan.clip and plan.decode_activations > plan.clip


def test_the_plan_follows_its_arguments() -> None:
    plan = plan_completion(WAN)
    staying = plan.vae_weights + plan.transformer_weights
    weights = [stage.weights for stage in replace(plan, offload=False).stages]
    assert weights == [plan.text_encoder_weights + staying, staying, staying, staying]
    wordless = plan_completion(WAN, prompt=False)
    assert [stage.name for stage in wordless.stages] == ["encode", "denoise", "decode"]
    assert wordless.text_keys == 0 and wordless.peak == pytest.approx(plan.peak - plan.text_keys, rel=0.01)
    unguided = plan_completion(WAN, guidance=False)
    assert unguided.transformer_activations == pytest.approx(plan.transformer_activations / 2, rel=0.02)
    two = plan_completion(WAN, candidates=2)
    assert two.transformer_activations == pytest.approx(2 * plan.transformer_activations, rel=0.02)
    assert two.sampler_state == 2 * plan.sampler_state and two.decode_activations == plan.decode_activations
    single = plan_completion(presets.debug(), dtype=torch.float32)
    assert single.transformer_weights > 1.5 * plan_completion(presets.debug()).transformer_weights
    longer = plan_completion(presets.debug(), frames=10, size=(64, 48))
    assert longer.clip == 10 * 64 * 48 * 16 and longer.decode_activations > single.decode_activations


def test_presets_with_a_codec_of_their_own_take_no_prompt() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        plan = plan_completion(presets.tiny())
        assert torch.equal(torch.get_rng_state(), before)  # planning changes nothing
    assert plan.text_encoder_weights == plan.text_keys == 0
    assert [stage.name for stage in plan.stages] == ["encode", "denoise", "decode"]
    assert plan.peak < 0.2 * GB


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"candidates": 0}, "candidates: expected at least 1, got 0"),
        ({"size": (240, 300)}, r"size: expected \(height, width\), multiples of 16, got \(240, 300\)"),
        ({"size": (0, 16)}, "size: expected"),
    ],
)
def test_plans_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_completion(presets.debug(), **given)


@torch.no_grad()
def test_tiles_bound_the_memory_of_wans_vae() -> None:
    """diffusers' tiles are 256 wide: of a picture of 1024 they take little more than half."""
    latents = torch.empty(1, 16, 1, 2, 128, device="meta")
    peaks = []
    for above in (16 * 1024, 16 * 1024 - 1):
        with LiveBytes() as counted:
            WanCodec(meta_vae(None), tile_above=above).decode(latents, "rgb", 1)
        peaks.append(counted.peak)
    assert peaks[0] > 1.5 * peaks[1]


@pytest.mark.slow
@torch.no_grad()
def test_depth_takes_no_more_than_the_plan_says() -> None:
    encode, decode = codec_activations(None, 50, (240, 320))
    codec = WanCodec(meta_vae(None))
    rgb, depth = (torch.empty(1, 50, channels, 240, 320, device="meta") for channels in (3, 1))
    with LiveBytes() as counted:
        latents = codec.encode(rgb, "rgb"), codec.encode(depth, "depth")
    assert 0.9 * encode < counted.peak <= encode
    with LiveBytes() as counted:
        images = codec.decode(latents[0], "rgb", 50), codec.decode(latents[1], "depth", 50)
    assert 0.9 * decode < counted.peak <= decode and len(images) == 2


def test_the_page_shows_what_the_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The page's own commands print its tables, to the last digit. Where this fails, run them and paste."""
    page = PAGE.read_text()
    (commands,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(commands, {})
    printed = capsys.readouterr().out.splitlines()

    def tables(lines: list[str]) -> list[str]:
        return [line for line in lines if line.startswith("|")]

    assert tables(page.splitlines()) == tables(printed)
    assert printed[0] in page and len(tables(printed)) > 20
    assert "24 GB" in page and f"{ALLOWANCE / GB:g} GB" in page
