"""The sampling loop: from noise to a completed scene, with what is observed held fast.

Observed groups are clamped to their clean latents at every step with t = 0, all others share the step's t. History
guidance (the seed's w_hist): v = v_0 + w (v_H - v_0), where v_H sees the observed groups and v_0 sees noise at t = 1
in their place; both are asked in one batch. Source: the seed's section on inference, spec.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from u4d.diffusion.unipc import UniPCState, UniPCTable, unipc_start
from u4d.sample.captured import Denoiser
from u4d.sample.step import Conditions, Velocity, conditions

DEFAULT_GUIDANCE = 2.0

__all__ = ["DEFAULT_GUIDANCE", "Velocity", "checked_groups", "clean_estimate", "denoise", "result_of"]


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
    capture: bool | None = None,
) -> Tensor:
    """Complete the unobserved groups.

    Args:
        velocity: the model; asked once per step, with a batch of 2B under guidance: first the B clips with their
            history, then the same clips without.
        observed_latents: [B,4,16,F,h,w], normalised clean latents; where unobserved anything, NaN included.
        observed: [4,F] or [B,4,F] bool.
        table: from `unipc_table`; its length is the number of steps.
        noise: like observed_latents, float32 or float64, from `draw_noise`. In the observed groups it is what v_0
            sees, so it is the same in every step and a candidate's result depends on its noise alone.
        guidance: w; 1 is no guidance (one forward per step instead of two), 0 ignores what is observed.
        progress: called as progress(steps done, steps in all) after every step.
        capture: whether steps run as a recorded CUDA graph (captured.py). None: on a GPU, where nothing prevents it.
    Returns:
        [B,4,16,F,h,w] in the noise's dtype; the observed groups are observed_latents, bit for bit.
    Raises:
        ValueError: shapes disagree, guidance is not finite, or the noise has another dtype.
        CaptureError: capture was asked for and can't be had.
    """
    observed = checked_groups(observed_latents, observed, noise, guidance)
    if bool(observed.all()):
        return observed_latents.to(noise)
    given = conditions(velocity, observed_latents, observed, table, like=noise, guidance=guidance)
    denoiser = Denoiser(given, noise, capture=capture)

    def tell(step: int) -> None:
        if progress is not None:
            progress(step + 1, table.steps)

    denoiser.run(noise, unipc_start(noise * given.alive, table), 0, table.steps, None if progress is None else tell)
    return result_of(given, denoiser.state)


def result_of(given: Conditions, state: UniPCState) -> Tensor:
    """The completed latents, after the last step."""
    return torch.where(given.cells, given.held, state.sample)


def clean_estimate(given: Conditions, state: UniPCState) -> Tensor:
    """What the result would be by the last answer of the model alone: z_0 = z_t - t v. The model is not asked again."""
    return torch.where(given.cells, given.held, state.clean[0])


def checked_groups(observed_latents: Tensor, observed: Tensor, noise: Tensor, guidance: float) -> Tensor:
    """`observed` as [B,4,F] bool beside the noise, once the shapes are known to agree.

    Raises:
        ValueError: see `denoise`.
    """
    if noise.ndim != 6 or observed_latents.shape != noise.shape:
        raise ValueError(
            f"observed_latents: expected [B,4,16,F,h,w] like noise {list(noise.shape)}, "
            f"got {list(observed_latents.shape)}"
        )
    if noise.dtype not in (torch.float32, torch.float64):  # a step's weights have its dtype
        raise ValueError(f"noise: expected float32 or float64, got {noise.dtype}")
    groups = [noise.shape[0], noise.shape[1], noise.shape[3]]
    if observed.dtype != torch.bool or list(observed.shape) not in (groups, groups[1:]):
        raise ValueError(
            f"observed: expected {groups[1:]} or {groups} bool, got {list(observed.shape)} {observed.dtype}"
        )
    if not abs(guidance) < float("inf"):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    return observed.to(noise.device).expand(groups)
