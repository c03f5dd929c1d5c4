"""The processes of a run: one, or as many as torchrun starts. All call the same functions in the same order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from u4d.errors import UserError

MAIN_SPEAKS_FIRST = 30.0  # seconds; on a busy machine it takes the main process long to end
PATIENCE = timedelta(hours=2)  # of processes that wait while the main one trains a codec or writes a checkpoint


@dataclass(frozen=True)
class World:
    """One process among `size`, on its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes what is written once."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on each of them; the same tensor where there is one process."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def start_world(device: str | torch.device) -> Iterator[World]:
    """The processes that `torchrun` has started, or this one alone; their group ends with the block.

    Under torchrun "cuda" means the GPU of the process's local rank; communication is NCCL's there, gloo's on the CPU.
    A UserError that all processes raise is told by the main one alone.
    """
    kind = torch.device(device).type
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(torch.device(device))
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(place, dist.get_rank(), dist.get_world_size())
    except UserError:
        # What one process refuses, most often all do. torchrun ends the others once the main one has told it.
        if dist.get_rank() != 0:
            time.sleep(MAIN_SPEAKS_FIRST)
        raise
    finally:
        dist.destroy_process_group()
