"""What a saved state is made of, as names and tensors that do not depend on how a model is sharded or wrapped."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from u4d.errors import UserError

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what torch puts into the names of wrapped modules
PARTLY = StateDictOptions(strict=False)


@dataclass(frozen=True)
class Parts:
    """What a state is made of.

    Attributes:
        model: where any of its parameters is frozen, only the others are saved, and no buffers: the rest is the
            checkpoint's that the run began with. Otherwise all parameters and buffers are.
        average: its running average, of the same structure; the same names are saved.
        optimizer: of the model's trained parameters.
    """

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer


def state_of(parts: Parts) -> dict[str, Any]:
    """The parts' own tensors, not copies, under the names of a model that is neither sharded nor wrapped."""
    names = saved_names(parts.model)
    # An optimiser that never stepped has no state; asked for it, torch would make it step.
    optimizer = get_optimizer_state_dict(parts.model, parts.optimizer) if parts.optimizer.state else {}
    return {
        "model": tensors_of(parts.model, names),
        "average": tensors_of(parts.average, names),
        "optimizer": optimizer,
    }


def load_parts(path: Path, parts: Parts, group: dist.ProcessGroup | None) -> None:
    """Fill the parts with a state, whoever wrote it.

    Parameters that never had a gradient have no state in the optimiser, then as now: a later first gradient must meet
    the same.

    Raises:
        CheckpointException: names or shapes differ.
    """
    reader = FileSystemReader(path)
    known = {key.rpartition(".")[0] for key in reader.read_metadata().state_dict_metadata}
    parts.optimizer.state.clear()
    parts.optimizer.zero_grad(set_to_none=True)
    names = saved_names(parts.model)
    state: dict[str, Any] = {
        "model": tensors_of(parts.model, names),
        "average": tensors_of(parts.average, names),
        "optimizer": get_optimizer_state_dict(parts.model, parts.optimizer),  # makes a state for every parameter
    }
    moments = state["optimizer"]["state"]
    state["optimizer"]["state"] = {name: moments[name] for name in moments if f"optimizer.state.{name}" in known}
    if not state["optimizer"]["state"]:
        del state["optimizer"]
        parts.optimizer.state.clear()
    load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    for module, name in ((parts.model, "model"), (parts.average, "average")):
        set_model_state_dict(module, state[name], options=PARTLY)
    if "optimizer" in state:
        set_optimizer_state_dict(parts.model, parts.optimizer, state["optimizer"], options=PARTLY)


def load_weights(path: Path, model: nn.Module, part: str) -> None:
    """Fill one model, in one process, with the "model" or the "average" of a state that any number wrote.

    Raises:
        UserError: names or shapes differ.
    """
    ignore_single_process_warnings()
    state = {part: tensors_of(model, saved_names(model))}
    try:
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
    except CheckpointException as error:
        raise UserError(f"{path}: does not fit this model: {reason(error)}") from error
    set_model_state_dict(model, state[part], options=PARTLY)


def saved_names(model: nn.Module) -> set[str]:
    """Names of what is saved of a model: see `Parts`."""
    trained = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return trained if frozen else set(get_model_state_dict(model))


def tensors_of(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Those of a model's tensors."""
    return {name: tensor for name, tensor in get_model_state_dict(model).items() if name in names}


def plain_name(name: str) -> str:
    """A parameter's name without those that torch's wrappers add."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def reason(error: BaseException) -> str:
    """What went wrong, without the traceback that DCP puts into its messages."""
    if isinstance(error, CheckpointException):
        return "; ".join(dict.fromkeys(str(failure) for failure, _ in error.failures.values()))
    return str(error)


def ignore_single_process_warnings() -> None:
    """DCP warns where it works in one process, which is meant. A filter for a block would not be safe in threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)", category=UserWarning)
