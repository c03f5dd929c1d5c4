"""What `accelerate` takes and refuses, and how it lives with other people's hooks."""

from __future__ import annotations

import functools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="needs diffusers, whose model is accelerated; it is not installed")
from diffusers import WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel

import u4d
import u4d_fast
from model.wan_models import small_wan, velocity, wan_inputs
from u4d import presets


def accelerated_blocks(model: nn.Module) -> int:
    return sum("forward" in vars(block) for block in model.blocks)


def test_pipelines_with_one_or_two_transformers() -> None:
    first, second = small_wan(0), small_wan(1)
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipe = WanPipeline(**nothing, transformer=first, transformer_2=second)
    assert u4d_fast.accelerate(pipe) is pipe
    assert accelerated_blocks(first) == accelerated_blocks(second) == 2
    names = {f"{part}.blocks.{number}" for part in ("transformer", "transformer_2") for number in range(2)}
    assert set(u4d_fast.acceleration(pipe).blocks) == names
    assert u4d_fast.acceleration(pipe).left == {}
    u4d_fast.restore(SimpleNamespace(transformer=None, transformer_2=second))
    assert (accelerated_blocks(first), accelerated_blocks(second)) == (2, 0)


def test_wrapped_models_are_found() -> None:
    model = small_wan()
    wrapped = nn.Sequential(model)
    u4d_fast.accelerate(wrapped)
    assert accelerated_blocks(model) == 2
    assert u4d_fast.acceleration(wrapped).blocks == ("0.blocks.0", "0.blocks.1")


def test_u4d_runs_on_the_ops_anyway() -> None:
    model = u4d.Transformer(presets.debug().transformer)
    pipe = SimpleNamespace(transformer=model)
    assert u4d_fast.accelerate(pipe) is pipe and u4d_fast.restore(pipe) is pipe
    assert accelerated_blocks(model) == 0
    report = u4d_fast.acceleration(pipe)
    assert report.blocks == tuple(f"transformer.blocks.{number}" for number in range(len(model.blocks)))
    assert report.left == {}


class FluxTransformer2DModel(nn.Module):
    """A transformer that is not Wan."""


@pytest.mark.parametrize("call", (u4d_fast.accelerate, u4d_fast.restore, u4d_fast.acceleration))
@pytest.mark.parametrize(
    ("given", "name"),
    [
        (FluxTransformer2DModel(), "FluxTransformer2DModel"),
        (SimpleNamespace(transformer=FluxTransformer2DModel()), "FluxTransformer2DModel"),
        (SimpleNamespace(unet=nn.Linear(2, 2)), "SimpleNamespace"),
        ("wan", "str"),
    ],
)
def test_other_models_are_refused_by_name(call: Any, given: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"expected diffusers' WanTransformer3DModel.* got {name}"):
        call(given)


def test_a_relative_of_wan_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = WanVACETransformer3DModel(
            num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8, text_dim=8, vace_layers=[0]
        )
    with pytest.raises(TypeError, match="got WanVACETransformer3DModel"):
        u4d_fast.accelerate(model)


def test_blocks_that_compute_something_else_are_refused() -> None:
    model = small_wan()
    kind = type(model.blocks[1])
    model.blocks[1].__class__ = type("GatedBlock", (kind,), {"forward": lambda self, *args: kind.forward(self, *args)})
    with pytest.raises(TypeError, match=r"blocks\.1: .*GatedBlock"):
        u4d_fast.accelerate(model)
    assert accelerated_blocks(model) == 0  # nothing is half done


def test_a_wan_without_its_blocks_is_refused() -> None:
    model = small_wan()
    model.blocks = nn.ModuleList([nn.Identity()])
    with pytest.raises(TypeError, match="WanTransformer3DModel: expected blocks of class WanTransformerBlock"):
        u4d_fast.accelerate(model)


def wrap(block: nn.Module) -> None:
    """As caches and offloading of diffusers do it."""
    inner = block.forward
    block.forward = functools.update_wrapper(functools.partial(lambda *args: inner(*args)), inner)


def test_a_forward_that_somebody_replaced_is_not_lost() -> None:
    model = small_wan()
    own = vars(model.blocks[1])["forward"] = lambda *args: args[0]
    with pytest.raises(ValueError, match=r"blocks\.1: its forward was replaced"):
        u4d_fast.accelerate(model)
    u4d_fast.restore(model)
    assert model.blocks[1].forward is own and accelerated_blocks(model) == 1


def test_restore_does_not_reach_under_what_was_put_around() -> None:
    model = u4d_fast.accelerate(small_wan())
    inputs = wan_inputs(model)
    found = velocity(model, inputs)
    wrap(model.blocks[0])
    assert torch.equal(velocity(model, inputs), found)
    with pytest.raises(ValueError, match=r"blocks\.0: .*remove that first"):
        u4d_fast.restore(model)
    assert accelerated_blocks(model) == 2


@pytest.mark.parametrize("hooked_first", (True, False))
def test_hooks_of_offloading_stay_in_place(hooked_first: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = small_wan()
    inputs = wan_inputs(model)
    before = velocity(model, inputs)
    found = velocity(u4d_fast.accelerate(model), inputs)
    u4d_fast.restore(model)
    seen: list[str] = []

    class Seen(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    def add() -> None:
        for module in (model.blocks[0], model.blocks[1].attn1.to_q):
            hooks.add_hook_to_module(module, Seen())

    for step in (
        (add, lambda: u4d_fast.accelerate(model)) if hooked_first else (lambda: u4d_fast.accelerate(model), add)
    ):
        step()
    assert torch.equal(velocity(model, inputs), found) and seen == ["WanTransformerBlock", "Linear"]
    assert len(u4d_fast.acceleration(model).blocks) == 2
    u4d_fast.restore(model)
    assert torch.equal(velocity(model, inputs), before) and len(seen) == 4
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(velocity(model, inputs), before) and len(seen) == 4


def test_weights_on_their_way_are_not_read() -> None:
    """Sequential offloading keeps weights away until a module's own forward is called."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = small_wan()
    inputs = wan_inputs(model)
    before = velocity(model, inputs)
    u4d_fast.accelerate(model)
    for module in model.blocks[0].modules():
        if list(module.parameters(recurse=False)):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", offload=True))
    assert model.blocks[0].norm2.weight.is_meta
    assert torch.allclose(velocity(model, inputs), before, rtol=1e-5, atol=1e-6)
    assert isinstance(model, WanTransformer3DModel)


def test_nothing_is_imported_for_it() -> None:
    """`import u4d_fast` knows diffusers by names alone (test_layering checks the rest)."""
    code = "import sys, u4d_fast; print('diffusers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
