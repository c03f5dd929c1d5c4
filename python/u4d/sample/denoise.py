"""The sampling loop: from noise to a completed scene, with what is observed held fast.

Observed groups are clamped to their clean latents at every step with t = 0, all others share the step's t. History
guidance (the seed's w_hist): v = v_0 + w (v_H - v_0), where v_H sees the observed groups and v_0 sees noise at t = 1
in their place; both are asked in one batch. Source: the seed's section on inference, spec.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from u4d.diffusion.flow import channel_mask
from u4d.diffusion.unipc import UniPCTable, unipc_start, unipc_step

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B,4,16,F,h,w], times [B,4,F]) -> velocity like the latents."""

DEFAULT_GUIDANCE = 2.0


@torch.no_grad()
def denoise(
    velocity: Velocity,
    observed_latents: Tensor,
    observed: Tensor,
    table: UniPCTable,
    *,
    noise: Tensor,
    guidance: float = DEFAULT_GUIDANCE,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Complete the unobserved groups.

    Args:
        velocity: the model; asked once per step, with a batch of 2B under guidance: first the B clips with their
            history, then the same clips without.
        observed_latents: [B,4,16,F,h,w], normalised clean latents; where unobserved anything, NaN included.
        observed: [4,F] or [B,4,F] bool.
        table: from `unipc_table`; its length is the number of steps.
        noise: like observed_latents, from `draw_noise`. In the observed groups it is what v_0 sees, so it is the same
            in every step and a candidate's result depends on its noise alone.
        guidance: w; 1 is no guidance (one forward per step instead of two), 0 ignores what is observed.
        progress: called as progress(steps done, steps in all) after every step.
    Returns:
        [B,4,16,F,h,w] in the noise's dtype; the observed groups are observed_latents, bit for bit.
    Raises:
        ValueError: shapes disagree, or guidance is not finite.
    """
    observed = _check(observed_latents, observed, noise, guidance)
    observed_cells = observed[:, :, None, :, None, None]
    alive = channel_mask(noise.device, noise.dtype)[None, :, :, None, None, None]
    if bool(observed.all()):
        return observed_latents.to(noise)
    guided = guidance != 1 and bool(observed.any())

    def clamp(latents: Tensor, held: Tensor) -> Tensor:
        return torch.where(observed_cells, held, latents)

    held = observed_latents.to(noise)
    state = unipc_start(noise * alive, table)
    for step in range(table.steps):
        time = float(table.times[step])
        latents, times = clamp(state.sample, held), _times(observed, time, at_observed=0.0)
        if guided:
            blind, blind_times = clamp(state.sample, noise * alive), _times(observed, time, at_observed=1.0)
            answer = velocity(torch.cat([latents, blind]), torch.cat([times, blind_times])).to(noise.dtype)
            with_history, without = answer.chunk(2)
            answer = without + guidance * (with_history - without)
        else:
            answer = velocity(latents, times).to(noise.dtype)
        state = unipc_step(state, clamp(answer * alive, torch.zeros_like(held)), table, step)
        if progress is not None:
            progress(step + 1, table.steps)
    return clamp(state.sample, held)


def _times(observed: Tensor, time: float, *, at_observed: float) -> Tensor:
    """[B,4,F] float32: `time`, but `at_observed` in the observed groups."""
    times = torch.full(observed.shape, time, device=observed.device)
    return times.masked_fill(observed, at_observed)


def _check(observed_latents: Tensor, observed: Tensor, noise: Tensor, guidance: float) -> Tensor:
    """[B,4,F] bool, once the shapes are known to agree."""
    if noise.ndim != 6 or observed_latents.shape != noise.shape:
        raise ValueError(
            f"observed_latents: expected [B,4,16,F,h,w] like noise {list(noise.shape)}, "
            f"got {list(observed_latents.shape)}"
        )
    groups = [noise.shape[0], noise.shape[1], noise.shape[3]]
    if observed.dtype != torch.bool or list(observed.shape) not in (groups, groups[1:]):
        raise ValueError(
            f"observed: expected {groups[1:]} or {groups} bool, got {list(observed.shape)} {observed.dtype}"
        )
    if not abs(guidance) < float("inf"):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    return observed.to(noise.device).expand(groups)
