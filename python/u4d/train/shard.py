"""Weights over the processes of a run: FSDP2 where there are several, nothing where there is one.

Every process holds a part of each weight, of its average and of the optimiser's state. The loss of each process is its
share of the global batch's, so gradients are summed, not averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from u4d.model.transformer import Transformer
from u4d.train.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard(model: Transformer, world: World) -> None:
    """Cut the model's parameters over all processes, block by block; on the world's device in any case.

    Everything is gathered and reduced in float32, so that the number of processes changes rounding only.
    """
    if world.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))

        def placement(parameter: nn.Parameter) -> Shard:
            return shard_dimension(parameter, world.size)

        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, shard_placement_fn=placement)
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.to(world.device)


def shard_dimension(parameter: Tensor, processes: int) -> Shard:
    """The first dimension where it can be cut evenly: the streams are only four. Else the largest that can."""
    from torch.distributed.tensor import Shard

    sizes = list(parameter.shape)
    even = [dimension for dimension, size in enumerate(sizes) if size % processes == 0]
    if 0 in even or not even:
        return Shard(0)
    return Shard(max(even, key=lambda dimension: sizes[dimension]))


def from_main(value: Tensor, world: World) -> Tensor:
    """The main process's tensor, on all of them."""
    if world.size == 1:
        return value
    there = value.detach().to(world.device)
    return world.sum(there if world.main else torch.zeros_like(there)).to(value.device)


@torch.no_grad()
def start_alike(model: nn.Module, world: World) -> None:
    """Give every process the main one's weights, bit for bit: some are fitted, and LAPACK's last bits may differ."""
    if world.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(from_main(tensor, world))


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over the processes, or keeps adding them up."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    part: Any = tensor
    return part.to_local() if hasattr(part, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; every process has to ask. Any other tensor as it is."""
    whole: Any = tensor
    return whole.full_tensor() if hasattr(whole, "full_tensor") else tensor


def full_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The whole state on the CPU of the main process, gathered tensor by tensor; empty on the others."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = full(tensor.detach())
        if world.main:
            state[name] = whole.cpu()
    return state


@torch.no_grad()
def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the gradients down to a norm of at most `most`; returns the norm over all processes before that."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return full(nn.utils.clip_grad_norm_(trained, most))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Exponential moving average of what is trained; each process does its own part."""
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    mine, theirs = zip(*((local(a), local(b)) for a, b in pairs if b.requires_grad), strict=True)
    torch._foreach_lerp_(list(mine), list(theirs), 1 - keep)
