"""Flow matching, conditioning patterns, losses and the UniPC table: pure functions."""

from u4d.diffusion.flow import clean_from_velocity, noisy_latents, shift_time, velocity_target
from u4d.diffusion.losses import flow_matching_loss
from u4d.diffusion.patterns import draw_batch
from u4d.diffusion.unipc import unipc_table

__all__ = [
    "clean_from_velocity",
    "draw_batch",
    "flow_matching_loss",
    "noisy_latents",
    "shift_time",
    "unipc_table",
    "velocity_target",
]
