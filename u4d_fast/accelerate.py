"""Puts the ops of this library into diffusers' Wan transformer, or into a pipeline that has one, and takes them out.

Parameters stay where they are: what changes is the forward of each block, as an attribute of the block itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from torch import nn

from u4d_fast.wan_block import block_forward
from u4d_fast.wan_parts import (
    ARGUMENTS,
    PARTS,
    attention_kept,
    block_kept,
    feed_forward_kept,
    is_diffusers,
)

Model = TypeVar("Model")
PIPELINE_PARTS = ("transformer", "transformer_2")
WAN, WAN_BLOCK = "WanTransformer3DModel", "WanTransformerBlock"
U4D = ("u4d.model.transformer", "Transformer")
UNDER_HOOKS = "_old_forward"  # where Hugging Face's accelerate keeps the forward that its hooks call


@dataclass(frozen=True)
class Acceleration:
    """What of a model runs on the ops of this library.

    Attributes:
        blocks: names of the blocks that do.
        left: {name of a block or of a part of it: why it runs as it did}.
        precision: of the matrix products, as in `accelerate`.
    """

    blocks: tuple[str, ...]
    left: dict[str, str]
    precision: str = "exact"


def accelerate(model_or_pipeline: Model, *, precision: Literal["exact", "fp8", "fp8-linear"] = "exact") -> Model:
    """Run a Wan transformer's blocks on the ops of this library; see `restore` for the way back.

    Parameters and their names stay. Results differ by rounding, and there are fewer roundings. Works with gradients,
    gradient checkpointing, LoRA, `torch.compile` and offloading; called again it changes nothing.

    In fp8 results differ by more than rounding, and there are no gradients: measure what it does to yours.

    Args:
        model_or_pipeline: diffusers' `WanTransformer3DModel`, a pipeline with one (or two), or a module that wraps
            one. u4d's own transformer and pipeline run on the ops anyway: for them there is only the precision.
        precision: "exact"; "fp8": matrix products of linear layers and self-attention from e4m3; "fp8-linear": those
            of linear layers alone. fp8 is for u4d's transformer.
    Returns:
        the argument.
    Raises:
        TypeError: there is no such transformer in it, or its blocks are not as this version knows them.
        ValueError: something was put in place of a block's forward, which would be lost; a precision that the
            transformer has not.
    """
    blocks = wan_blocks(model_or_pipeline)
    for name, block in blocks.items():
        check_block(name, block)
    if blocks and precision != "exact":
        raise ValueError(f"precision: expected 'exact' for diffusers' {WAN} (fp8 is for u4d's), got {precision!r}")
    for model in u4d_transformers(model_or_pipeline):
        model.set_precision(precision)
    for block in blocks.values():
        set_forward(block, partial(block_forward, block))
    return model_or_pipeline


def restore(model_or_pipeline: Model) -> Model:
    """Undo `accelerate`: the forward of every block is its class's own again, and exact.

    Returns:
        the argument.
    Raises:
        TypeError: there is no Wan transformer in it.
        ValueError: something was put around a block's forward since; that has to go first.
    """
    blocks = wan_blocks(model_or_pipeline)
    for name, block in blocks.items():
        if not is_accelerated(block) and is_ours(inspect.unwrap(block.forward)):
            raise ValueError(f"{name}: expected the accelerated forward, got one put around it; remove that first")
    for block in blocks.values():
        if is_accelerated(block):
            set_forward(block, None)
    for model in u4d_transformers(model_or_pipeline):
        model.set_precision("exact")
    return model_or_pipeline


def acceleration(model_or_pipeline: Any) -> Acceleration:
    """What of a model or pipeline runs on the ops of this library now, and what does not and why.

    Raises:
        TypeError: there is no Wan transformer in it.
    """
    reasons = {name: reasons_kept(block) for name, block in wan_blocks(model_or_pipeline).items()}
    on_ops = [name for name, kept in reasons.items() if "" not in kept]
    for prefix, model in transformers(model_or_pipeline).items():
        if is_u4d(model):
            on_ops += [f"{prefix}blocks.{number}" for number in range(len(model.blocks))]
    left = {f"{name}.{part}".rstrip("."): why for name, kept in reasons.items() for part, why in kept.items()}
    precisions = {model.precision for model in u4d_transformers(model_or_pipeline)} or {"exact"}
    return Acceleration(tuple(on_ops), left, " and ".join(sorted(precisions)))


def reasons_kept(block: Any) -> dict[str, str]:
    """What of a block runs as it did: {its part, or "" for all of it: why}."""
    whole = block_kept(block) if is_accelerated(block) else "it is not accelerated"
    if whole:
        return {"": whole}
    parts = {"attn1": attention_kept(block.attn1), "attn2": attention_kept(block.attn2)}
    parts["ffn"] = feed_forward_kept(block.ffn)
    return {part: why for part, why in parts.items() if why}


def transformers(model_or_pipeline: Any) -> dict[str, Any]:
    """Wan transformers, of diffusers or u4d, by the prefix of their parameters' names.

    Raises:
        TypeError: there is none.
    """
    if isinstance(model_or_pipeline, nn.Module):
        roots = {"": model_or_pipeline}
    else:
        parts = {f"{part}.": getattr(model_or_pipeline, part, None) for part in PIPELINE_PARTS}
        roots = {prefix: part for prefix, part in parts.items() if isinstance(part, nn.Module)}
    found = {
        f"{prefix}{name}.".lstrip("."): module
        for prefix, root in roots.items()
        for name, module in root.named_modules()
        if is_diffusers(module, WAN) or is_u4d(module)
    }
    if not found:
        classes = " and ".join(type(root).__name__ for root in roots.values() or [model_or_pipeline])
        wanted = f"diffusers' {WAN}, u4d's Transformer or a pipeline with one"
        raise TypeError(f"model_or_pipeline: expected {wanted}, got {classes}")
    return {prefix.replace("..", "."): module for prefix, module in found.items()}


def u4d_transformers(model_or_pipeline: Any) -> list[Any]:
    """u4d's own transformers in a model or pipeline."""
    return [model for model in transformers(model_or_pipeline).values() if is_u4d(model)]


def wan_blocks(model_or_pipeline: Any) -> dict[str, Any]:
    """The blocks of diffusers' Wan transformers, by name.

    Raises:
        TypeError: there is no Wan transformer, or one without such blocks.
    """
    blocks: dict[str, Any] = {}
    for prefix, model in transformers(model_or_pipeline).items():
        mine = {f"{prefix}{name}": block for name, block in model.named_modules() if is_diffusers(block, WAN_BLOCK)}
        if not mine and not is_u4d(model):
            raise TypeError(f"{type(model).__name__}: expected blocks of class {WAN_BLOCK}, got none")
        blocks.update(mine)
    return blocks


def is_u4d(module: object) -> bool:
    """Whether this is u4d's own transformer, which calls the ops itself."""
    return any((base.__module__, base.__name__) == U4D for base in type(module).__mro__)


def check_block(name: str, block: Any) -> None:
    """Refuse a block that is not diffusers' own of the version that we know, or whose forward is somebody else's.

    Raises:
        TypeError: its class is another.
        ValueError: its forward is another.
    """
    kind: Any = type(block)
    origin = next(base for base in kind.__mro__ if base.__name__ == WAN_BLOCK)
    if kind.forward is not origin.forward:
        raise TypeError(f"{name}: expected the forward of diffusers' {WAN_BLOCK}, got another in {kind.__name__}")
    missing = [part for part in PARTS if not hasattr(block, part)]
    arguments = tuple(inspect.signature(kind.forward).parameters)
    if missing or arguments != ARGUMENTS:
        what = f"no {missing[0]}" if missing else f"forward({', '.join(arguments)})"
        raise TypeError(f"{name}: expected the {WAN_BLOCK} of diffusers 0.42, got one with {what}")
    forward = own_forward(block)
    if forward is not None and not is_ours(forward) and getattr(forward, "__func__", None) is not kind.forward:
        raise ValueError(f"{name}: its forward was replaced (by a cache?); remove that, accelerate, and put it back")


def own_forward(block: Any) -> Any:
    """What was put in place of a class's forward, below the hooks of Hugging Face's accelerate; None for nothing."""
    return vars(block).get(UNDER_HOOKS, vars(block).get("forward"))


def set_forward(block: Any, forward: Any) -> None:
    """Put a forward in place of the class's own (None: take it away), below the hooks of Hugging Face's accelerate."""
    if UNDER_HOOKS in vars(block):
        setattr(block, UNDER_HOOKS, forward or type(block).forward.__get__(block))
    elif forward is not None:
        block.forward = forward
    else:
        del block.forward


def is_ours(forward: Any) -> bool:
    """Whether a forward is what `accelerate` puts in place."""
    return isinstance(forward, partial) and forward.func is block_forward


def is_accelerated(block: Any) -> bool:
    """Whether `restore` has something to undo."""
    return is_ours(own_forward(block))
