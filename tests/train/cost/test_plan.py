"""The plan of a run: memory against hand formulas and a real pass on the CPU, FLOPs against docs/performance.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from u4d import presets
from u4d.errors import UserError
from u4d.live_bytes import LiveBytes
from u4d.memory import GB, codec_activations
from u4d.model.transformer import Transformer
from u4d.train.activations import keep_activations
from u4d.train.cost.activation_bytes import activation_bytes, drop_gradient, parameter_bytes, training_model
from u4d.train.cost.flops import forward_flops
from u4d.train.cost.plan import ALLOWANCE, TrainingPlan, format_plan, mean_step_flops, plan_training, step_flops
from u4d.train.recipe import FineTuning, Phase, Recipe, debug_run, tiny_procedural, wan_1_3b_mixture

WAN = presets.wan_1_3b().transformer
PARAMETERS = 5_675_987_200  # of wan-1.3b
BLOCK = 4 * (8 * 1536**2 + 2 * 1536 * 8960 + 21 * 1536 + 8960)  # of each of its 30 blocks
TOKENS = 16_800
LAYERS = 2


def shallow_wan(**changes: Any) -> Recipe:
    """The seed's recipe with two layers: enough to see what grows with them."""
    recipe = wan_1_3b_mixture()
    preset = replace(recipe.preset, transformer=replace(WAN, num_layers=LAYERS))
    return replace(recipe, preset=preset, **changes)


def test_the_flops_of_a_forward_are_those_of_the_budget() -> None:
    """performance.md: linear layers 42.0, self-attention 52.0, cross-attention 1.6, in all 95.6 TFLOP."""
    linear, attention = forward_flops(WAN, 50)
    assert linear == pytest.approx(42.0e12, rel=0.01) and attention == pytest.approx((52.0 + 1.6) * 1e12, rel=0.01)
    assert linear + attention == pytest.approx(95.6e12, rel=0.01)
    width, hidden, text = 1536, 8960, 512
    self_attention, ends = 4 * TOKENS**2 * width, 2 * TOKENS * 2 * 64 * width
    assert linear == 30 * 2 * TOKENS * (6 * width**2 + 2 * width * hidden) + ends
    assert attention == 30 * (self_attention + 4 * TOKENS * text * width)


def test_the_flops_of_a_training_step_are_those_of_the_budget() -> None:
    assert step_flops(WAN, 50, 4) == pytest.approx(1147e12, rel=0.01)
    assert step_flops(WAN, 50, 16) == 4 * step_flops(WAN, 50, 4) == mean_step_flops(wan_1_3b_mixture())
    linear, attention = forward_flops(WAN, 50)
    assert step_flops(WAN, 50, 1, adapters=True) == 2 * linear + 3 * attention


def test_flops_are_those_that_torch_counts() -> None:
    """A forward and backward pass of a small model, by torch's own counter; time embeddings are what is left out."""
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(presets.tiny().transformer, motion_features=False, rgb_to_geometry=False, num_layers=2)
    model = training_model(config).to_empty(device="cpu")
    latents, times = torch.zeros(1, 4, 16, 6, 12, 16), torch.zeros(1, 4, 6)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(latents, times).sum().backward()
    # One text token is one value for all: cross-attention is next to nothing.
    assert counted.get_total_flops() == pytest.approx(step_flops(config, 18, 1), rel=0.05)


def test_the_mean_over_phases_and_lengths() -> None:
    short, long = (step_flops(debug_run().preset.transformer, frames, 2) for frames in (3, 6))
    phases = (
        Phase(steps=3, patterns={"joint": 1.0}, frames={3: 1.0, 6: 3.0}),
        Phase(steps=1, patterns={"joint": 1.0}, frames={3: 1.0}),
    )
    expected = 0.75 * (0.25 * short + 0.75 * long) + 0.25 * short
    assert mean_step_flops(replace(debug_run(), phases=phases)) == pytest.approx(expected)


def test_the_weights_of_wan() -> None:
    model = training_model(WAN)
    assert parameter_bytes(model) == parameter_bytes(model, trained=True) == 4 * PARAMETERS
    assert {parameter_bytes(block) for block in model.blocks} == {4 * BLOCK}


def test_parts_on_four_gpus_by_hand() -> None:
    plan = plan_training(shallow_wan(), 4)
    parameters = PARAMETERS - 28 * BLOCK
    assert (plan.micro_batch, plan.micro_batches) == (1, 4)
    assert plan.weights == plan.average == plan.moments / 2 == parameters  # 4 bytes over 4 GPUs
    assert plan.gradients == 4 * parameters  # whole, while micro-batches add up
    root = PARAMETERS - 30 * BLOCK
    assert plan.gathered == 4 * (root + 3 * BLOCK) and plan.reduced == 4 * 2 * BLOCK
    assert plan.clips == 2 * 50 * 240 * 320 * 4 * 4
    assert plan.encoding == codec_activations(None, 50, (240, 320))[0] and plan.codec == 126_892_531 * 4
    staying = 8 * parameters + plan.codec + plan.clips
    for policy, activations in plan.activations.items():
        assert plan.peak(policy) == staying + plan.gathered + plan.reduced + activations


def test_the_plan_follows_the_recipe() -> None:
    recipe = replace(debug_run(), batch=16, compute=replace(debug_run().compute, micro_batch=1))
    whole = plan_training(recipe, 4)
    at_once = plan_training(replace(recipe, compute=replace(recipe.compute, micro_batch=0)), 4)
    assert (at_once.micro_batch, at_once.micro_batches) == (4, 1)
    assert at_once.gradients == whole.gradients / 4 == whole.weights  # nothing has to be added up
    assert at_once.activations["all"] > 2.8 * whole.activations["all"]
    alone = plan_training(recipe, 1)
    assert alone.gathered == alone.reduced == 0 and alone.weights == 4 * whole.weights
    assert (alone.micro_batches, alone.flops) == (16, whole.flops)
    adapters = plan_training(replace(recipe, start=FineTuning("mine", 1)), 4)
    model = training_model(recipe.preset.transformer, 1)
    assert adapters.average == parameter_bytes(model, trained=True) / 4 == adapters.moments / 2 < whole.average / 4
    assert 0.5 * whole.weights < adapters.weights < 0.8 * whole.weights  # the frozen ones are bfloat16, most of them
    assert 0.6 * whole.flops < adapters.flops < whole.flops


@pytest.mark.parametrize("gpus", [3, 32])
def test_a_batch_that_cannot_be_shared_is_refused(gpus: int) -> None:
    with pytest.raises(UserError, match=f"gpus: expected a divisor of the batch of 16 clips, got {gpus}"):
        plan_training(wan_1_3b_mixture(), gpus)


def test_what_the_policies_keep() -> None:
    """Each layer adds its input with "none", attention's two results with "attention", and with "all" much more."""

    def per_layer(policy: str) -> int:
        counts = [activation_bytes(replace(WAN, num_layers=n), 50, 1, policy, "bf16") for n in (2, 3)]
        return counts[1] - counts[0]

    tokens = TOKENS * 1536 * 2  # one number of each channel in bfloat16
    sums = TOKENS * 12 * 4  # one float32 for each query and head: cross-attention's; ours keeps none
    modulation = 4 * 14 * 6 * 1536 * 4
    assert tokens <= per_layer("none") <= tokens + modulation
    assert per_layer("attention") - per_layer("none") == pytest.approx(2 * tokens + sums, rel=0.01)
    hidden = 2 * TOKENS * 8960 * 2  # before and after the GELU
    weights = 2 * BLOCK  # copies in bfloat16
    assert hidden + weights + 14 * tokens < per_layer("all") < hidden + weights + 24 * tokens  # counted as kernels do


@pytest.mark.parametrize("policy", ["all", "attention", "none"])
def test_the_meta_device_counts_what_a_real_pass_takes(policy: str) -> None:
    """The same pass on the CPU under autocast, with torch's fused attention."""
    config = replace(presets.tiny().transformer, num_layers=3, motion_features=False, text_length=8)
    torch.manual_seed(0)
    model = Transformer(config).train()
    keep_activations(model, policy)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), LiveBytes() as counted:
        latents, times = torch.zeros(2, 4, 16, 4, 12, 16), torch.zeros(2, 4, 4)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            velocity = model(latents, times)
        velocity.float().square().mean().backward()
    planned = activation_bytes(config, 10, 2, policy, "bf16")
    assert planned == pytest.approx(counted.peak, rel=0.05)


def test_time_is_model_flops_over_what_the_gpus_do() -> None:
    plan = plan_training(debug_run(), 2)
    assert plan.seconds(0.4, 989e12) == pytest.approx(plan.flops / (2 * 989e12 * 0.4))
    assert plan.again["all"] == 0 and plan.again["none"] == pytest.approx(1 / 3)


def test_a_plan_in_words() -> None:
    plan = plan_training(tiny_procedural(), 2)
    text = format_plan(plan, mfu=0.25)
    for words in ("tiny, 8 clips a step", "GPUs: 2, clips of each: 1 times 4", "(`all`, the recipe)", "at 25% MFU"):
        assert words in text
    assert f"| weights | {plan.weights / GB:.3f} |" in text and f"| {plan.peak('none') / GB:.3f} | yes |" in text
    assert f"{ALLOWANCE / GB:g} GB set aside" in text and "an assumption" in text


@pytest.mark.slow
def test_the_seeds_run_on_four_h200() -> None:
    """The numbers that decide what the recipe keeps; see its docstring."""
    plan = plan_training(wan_1_3b_mixture(), 4)
    assert fitting(plan, 141 * GB) == ["all", "attention", "none"] and plan.policy == "attention"
    assert plan.peak("all") == pytest.approx(108.4 * GB, rel=0.01)
    assert plan.peak("attention") == pytest.approx(57.2 * GB, rel=0.01)
    assert plan.again["attention"] == pytest.approx(0.146, abs=0.002)
    assert 1 / plan.seconds(0.4, 989e12) == pytest.approx(0.345, rel=0.01)


def fitting(plan: TrainingPlan, memory_bytes: int) -> list[str]:
    return [policy for policy in plan.activations if plan.fits(policy, memory_bytes)]
