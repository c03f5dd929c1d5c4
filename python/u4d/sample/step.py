"""One step of the sampler as a pure function of tensors.

Nothing in it asks the host: the number of the step is a tensor on the device, and selects its row of UniPC's table
there. So one recording of the function serves every step (captured.py), and the same function runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from u4d.diffusion.flow import channel_mask
from u4d.diffusion.unipc import UniPCState, UniPCTable

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B,4,16,F,h,w], times [B,4,F]) -> velocity like the latents."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """What stays the same over all steps of a batch of B clips.

    Attributes:
        velocity: the model. It must do the same work at every step: what it decides on the host is recorded once.
        held: [B,4,16,F,h,w], clean latents of the observed groups; elsewhere anything, NaN included.
        observed: [B,4,F] bool.
        guidance: w of history guidance.
        guided: whether both branches are asked.
        table: [steps, 2 order + 5], rows of `device_table`.
        order: of the solver.
        alive: [1,4,16,1,1,1], 0 in the channels that are always empty.
    """

    velocity: Velocity
    held: Tensor
    observed: Tensor
    guidance: float
    guided: bool
    table: Tensor
    order: int
    alive: Tensor

    @property
    def cells(self) -> Tensor:
        """`observed` as [B,4,1,F,1,1]."""
        return self.observed[:, :, None, :, None, None]


def conditions(
    velocity: Velocity,
    observed_latents: Tensor,
    observed: Tensor,
    table: UniPCTable,
    *,
    like: Tensor,
    guidance: float,
) -> Conditions:
    """Bring everything that a trajectory needs to its device, once.

    Args:
        velocity: the model.
        observed_latents: [B,4,16,F,h,w].
        observed: [B,4,F] bool.
        table: from `unipc_table`.
        like: the noise: its device and its dtype, float32 or float64.
        guidance: w.
    """
    return Conditions(
        velocity=velocity,
        held=observed_latents.to(like),
        observed=observed.to(like.device),
        guidance=guidance,
        guided=guidance != 1 and bool(observed.any()),
        table=device_table(table, like.device, like.dtype),
        order=table.order,
        alive=channel_mask(like.device, like.dtype)[None, :, :, None, None, None],
    )


def device_table(table: UniPCTable, device: torch.device, dtype: torch.dtype) -> Tensor:
    """UniPC's table as one tensor, a row for each step: time, weight of x_i and of the last corrected sample in the
    corrector, weight of the corrected sample in the predictor, then those of the clean predictions in both."""
    columns = (
        torch.from_numpy(table.times[: table.steps, None]),
        torch.from_numpy(table.corrector_current[:, None]),
        torch.from_numpy(table.corrector_last[:, None]),
        torch.from_numpy(table.predictor_sample[:, None]),
        torch.from_numpy(table.corrector_clean),
        torch.from_numpy(table.predictor_clean),
    )
    return torch.cat(columns, dim=1).to(device=device, dtype=dtype)


@torch.no_grad()
def denoising_step(given: Conditions, counter: Tensor, noise: Tensor, state: UniPCState) -> UniPCState:
    """Ask the model and take UniPC's step.

    Args:
        given: what stays the same.
        counter: [1] int64, the step's number, on the device.
        noise: [B,4,16,F,h,w], what the branch without history sees in the observed groups.
        state: before the step.
    Returns:
        The state after it, in new tensors.
    """
    row = given.table.index_select(0, counter)[0]
    velocity = (guided_velocity(given, noise, state.sample, row[0].float()) * given.alive).masked_fill_(given.cells, 0)
    return weighted_step(state, velocity, row, given.order)


def guided_velocity(given: Conditions, noise: Tensor, sample: Tensor, time: Tensor) -> Tensor:
    """The model's answer at `sample` and the float32 scalar `time`; with guidance both branches go in one batch."""
    latents, times = torch.where(given.cells, given.held, sample), times_of(given.observed, time, at_observed=0.0)
    if not given.guided:
        return given.velocity(latents, times).to(noise.dtype)
    blind = torch.where(given.cells, noise * given.alive, sample)
    blind_times = times_of(given.observed, time, at_observed=1.0)
    answer = given.velocity(torch.cat([latents, blind]), torch.cat([times, blind_times])).to(noise.dtype)
    with_history, without = answer.chunk(2)
    return without + given.guidance * (with_history - without)


def times_of(observed: Tensor, time: Tensor, *, at_observed: float) -> Tensor:
    """[B,4,F] float32: `time`, but `at_observed` in the observed groups."""
    return time.expand(observed.shape).masked_fill(observed, at_observed)


def weighted_step(state: UniPCState, velocity: Tensor, row: Tensor, order: int) -> UniPCState:
    """`unipc_step` with its coefficients in a row of `device_table`: the same sums, bit for bit."""
    time, current, last, onward, *clean_weights = row.unbind()
    newest = state.sample - time * velocity
    clean = (newest, *state.clean)
    corrected = (current * state.sample).add_(last * state.last)
    for weight, term in zip(clean_weights[: order + 1], clean, strict=True):
        corrected.add_(weight * term)
    following = onward * corrected
    for weight, term in zip(clean_weights[order + 1 :], clean[:order], strict=True):
        following.add_(weight * term)
    return UniPCState(sample=following, last=corrected, clean=clean[:order])
