"""What is kept for the backward pass changes memory, never gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from u4d.model.transformer import Transformer
from u4d.train.activations import attention_ops, compile_blocks, efficient_attention, keep_activations
from u4d.train.recipe import ACTIVATIONS, debug_run

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Iterator[Transformer]:
    """With text of several tokens, so that cross-attention has something to attend to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield Transformer(debug_run().preset.transformer)


class Counted(TorchDispatchMode):
    """Counts fused attentions, and products as a measure of all else."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attentions += func in attention_ops()
        self.products += func in (torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def gradients(model: Transformer, attention: str) -> tuple[dict[str, torch.Tensor], Counted]:
    """Of a plain loss, and what was computed on the way."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 3, 4, 6, generator=generator)
    times, text = torch.rand(2, 4, 3, generator=generator), torch.randn(2, 5, 8, generator=generator)
    model.zero_grad()
    with efficient_attention(CPU, attention), Counted() as counted:
        model(latents, times, text).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, counted


def test_gradients_do_not_depend_on_what_is_kept(model: Transformer) -> None:
    found = {}
    for policy in ACTIVATIONS:
        keep_activations(model, policy)
        found[policy] = gradients(model, "attention")
    wanted, plain = found["all"]
    blocks = debug_run().preset.transformer.num_layers
    for policy in ("attention", "none"):
        mine, counted = found[policy]
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in mine.items())
        assert counted.products > plain.products  # something is computed again
    assert plain.attentions == found["attention"][1].attentions == 2 * blocks  # self- and cross-attention, once
    assert found["none"][1].attentions == 4 * blocks


def test_the_attention_of_small_models_differs_by_rounding(model: Transformer) -> None:
    wanted, _ = gradients(model, "attention")
    for name, gradient in gradients(model, "all")[0].items():
        assert torch.allclose(gradient, wanted[name], atol=1e-6 * float(gradient.abs().max()) + 1e-9, rtol=1e-4), name


def test_all_is_what_a_model_does_by_itself(model: Transformer) -> None:
    keep_activations(model, "none")
    assert model.gradient_checkpointing
    keep_activations(model, "all")
    assert not model.gradient_checkpointing


@pytest.mark.parametrize("policy", ACTIVATIONS)
def test_compiled_blocks_compute_the_same(policy: str, model: Transformer) -> None:
    """By a backend that traces and does not generate code: what matters here is that blocks can be traced."""
    keep_activations(model, policy)
    wanted, _ = gradients_alone(model)
    names = set(model.state_dict())
    compile_blocks(model, backend="aot_eager")
    found, _ = gradients_alone(model)
    assert set(model.state_dict()) == names
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], atol=1e-6 * float(gradient.abs().max()) + 1e-9, rtol=1e-4), name


def gradients_alone(model: Transformer) -> tuple[dict[str, torch.Tensor], None]:
    """The same without counting: a dispatch mode would be in the compiler's way."""
    generator = torch.Generator().manual_seed(1)
    latents, times = torch.randn(1, 4, 16, 3, 4, 6, generator=generator), torch.rand(1, 4, 3, generator=generator)
    model.zero_grad()
    with efficient_attention(CPU, "attention"):
        model(latents, times).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, None
