"""diffusers' Wan on our ops computes what it did, keeps its parameters, and comes back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from model_samples import relative_error
from torch import Tensor
from wan_models import SIZES, converted, small_wan, velocity, wan_inputs

import u4d_fast

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
GRADIENT = {"rtol": 2e-4, "atol": 1e-5}


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("sizes", SIZES)
def test_float32_agrees_and_restore_is_exact(sizes: str, per_token: bool, backend: Any) -> None:
    model = small_wan(**SIZES[sizes])
    inputs = wan_inputs(model, per_token)
    before, state = velocity(model, inputs), dict(model.state_dict())
    assert u4d_fast.accelerate(model) is model
    with u4d_fast.use_backend(backend):
        found = velocity(model, inputs)
    assert relative_error(found, before) < 1e-5
    assert len(u4d_fast.acceleration(model).blocks) == len(model.blocks)
    kept = model.state_dict()
    assert list(kept) == list(state)
    assert all(kept[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert u4d_fast.restore(model) is model
    assert torch.equal(velocity(model, inputs), before)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("sizes", ("narrow", "head of 128"))
def test_bfloat16_is_no_less_exact(sizes: str, per_token: bool, tmp_path: Path) -> None:
    """Loaded in bfloat16 as pipelines do, against float64: the error is at most that of diffusers' own, and a bit."""
    model = small_wan(**SIZES[sizes])
    inputs = wan_inputs(model, per_token)
    model.save_pretrained(tmp_path)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    truth = velocity(model.double(), converted(inputs, torch.float64)).double()
    theirs = velocity(half, converted(inputs, torch.bfloat16)).double()
    ours = velocity(u4d_fast.accelerate(half), converted(inputs, torch.bfloat16)).double()
    assert not torch.equal(ours, theirs)
    assert (ours - truth).norm() < 1.15 * (theirs - truth).norm() < 0.05 * truth.norm()


def test_twice_is_once_and_a_copy_stands_alone() -> None:
    model = u4d_fast.accelerate(small_wan())
    inputs = wan_inputs(model)
    once = velocity(model, inputs)
    assert torch.equal(velocity(u4d_fast.accelerate(model), inputs), once)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(velocity(twin, inputs), once)
    u4d_fast.restore(u4d_fast.restore(twin))
    assert u4d_fast.acceleration(twin).blocks == () and len(u4d_fast.acceleration(model).blocks) == 2


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs)[0].square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("per_token", (False, True))
def test_gradients_agree(per_token: bool) -> None:
    model = small_wan().train()
    inputs = wan_inputs(model, per_token)
    wanted = gradients(model, inputs)
    assert set(wanted) == set(dict(model.named_parameters()))
    u4d_fast.accelerate(model)
    found = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    again = gradients(model, inputs)
    for name, gradient in wanted.items():
        size = float(gradient.abs().max())
        assert torch.allclose(found[name] / size, gradient / size, **GRADIENT), name
        assert torch.allclose(again[name], found[name]), name


@pytest.mark.parametrize("adapters_first", (True, False))
def test_adapters_are_called(adapters_first: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=list(PROJECTIONS), init_lora_weights=False)
    model = small_wan()
    plain = velocity(model, wan_inputs(model))
    if not adapters_first:
        u4d_fast.accelerate(model)
    model.add_adapter(config)
    u4d_fast.accelerate(model)
    found, left = velocity(model, wan_inputs(model)), u4d_fast.acceleration(model).left
    wanted = velocity(u4d_fast.restore(model), wan_inputs(model))
    assert relative_error(found, wanted) < 1e-5 < relative_error(plain, wanted)
    assert set(left) == {"blocks.0.ffn", "blocks.1.ffn"} and "linear layer" in left["blocks.0.ffn"]
    u4d_fast.accelerate(model)
    names = {name for name in gradients(model, wan_inputs(model)) if "lora" in name}
    assert len(names) == 2 * 2 * 10  # two factors for the ten projections of each of two blocks


@pytest.mark.parametrize("per_token", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_one_graph_under_compile(per_token: bool) -> None:
    """By a backend that traces and does not generate code; what was compiled before notices the change."""
    model = small_wan(num_layers=1)
    inputs = wan_inputs(model, per_token)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = velocity(compiled, inputs)
    u4d_fast.accelerate(compiled)
    eager = velocity(model, inputs)
    assert torch.allclose(velocity(compiled, inputs), eager, atol=1e-6) and not torch.equal(eager, before)
    u4d_fast.restore(compiled)
    assert torch.equal(velocity(compiled, inputs), before)


@pytest.mark.slow
def test_gradients_under_compile() -> None:
    model = u4d_fast.accelerate(small_wan(num_layers=1))
    wanted = gradients(model, wan_inputs(model))
    torch._dynamo.reset()
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), wan_inputs(model))
    for name, gradient in wanted.items():
        size = float(gradient.abs().max())
        assert torch.allclose(found[f"_orig_mod.{name}"] / size, gradient / size, **GRADIENT), name


def own_backend(model: WanTransformer3DModel) -> None:
    model.set_attention_backend("native")


def own_hook(model: WanTransformer3DModel) -> None:
    model.blocks[0].attn1.norm_q.register_forward_hook(lambda module, args, result: 2 * result)
    model.blocks[0].attn2.register_forward_hook(lambda module, args, result: 2 * result)


def own_norm(model: WanTransformer3DModel) -> None:
    model.blocks[0].norm1.register_forward_hook(lambda module, args, result: result + 1)
    model.blocks[1].norm2.register_forward_hook(lambda module, args, result: result + 1)


def fused_projections(model: WanTransformer3DModel) -> None:
    model.fuse_qkv_projections()


def parts(name: str) -> set[str]:
    return {f"blocks.{number}.{name}" for number in range(2)}


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (own_backend, parts("attn1") | parts("attn2")),
        (own_hook, {"blocks.0.attn1", "blocks.0.attn2"}),
        (own_norm, {"blocks.0"}),
        (fused_projections, set()),
    ],
)
def test_what_was_changed_is_left_as_it_is(change: Callable[[Any], None], left: set[str]) -> None:
    model = small_wan()
    change(model)
    inputs = wan_inputs(model)
    before = velocity(model, inputs)
    found = velocity(u4d_fast.accelerate(model), inputs)
    assert relative_error(found, before) < 1e-5
    report = u4d_fast.acceleration(model)
    assert set(report.left) == left and all(report.left.values())
    assert set(report.blocks) == {"blocks.0", "blocks.1"} - left


def test_attention_to_an_image_is_left_and_said() -> None:
    model = u4d_fast.accelerate(small_wan(**SIZES["image beside text"]))
    left = u4d_fast.acceleration(model).left
    assert set(left) == parts("attn2") and "image" in left["blocks.0.attn2"]


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_in_bfloat16() -> None:
    model = small_wan(num_attention_heads=2, attention_head_dim=128, ffn_dim=512).cuda()
    inputs = wan_inputs(model)
    truth = velocity(model, converted(inputs, torch.float32, "cuda")).double()
    half = model.to(torch.bfloat16)
    given = converted(inputs, torch.bfloat16, "cuda")
    theirs = velocity(half, given).double()
    with torch.cuda.stream(torch.cuda.Stream()):
        ours = velocity(u4d_fast.accelerate(half), given)
        again = velocity(half, given)
    torch.cuda.synchronize()
    assert torch.equal(ours, again)
    assert (ours.double() - truth).norm() < 1.15 * (theirs - truth).norm()
    assert torch.equal(velocity(u4d_fast.restore(half), given).double(), theirs)
