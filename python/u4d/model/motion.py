"""Local motion of observed RGB as an input feature.

A small model learns motion through attention only after very many clips; Lucas-Kanade flow per latent cell hands it
over. The features are computed from the RGB latents themselves (decoded linearly to grey), so the model's signature
does not change, and they are zero wherever RGB is not observed. An option of the configuration: off for `wan-1.3b`.
Source: B. Lucas and T. Kanade, "An iterative image registration technique", 1981.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pixel_shuffle

from u4d_fast.time_layout import FRAMES_PER_GROUP

CELL = 8
LEVELS = (1, 2, 4)  # flow at full, half and quarter resolution: fine for slow, coarse for fast motion
FEATURES = 3 * len(LEVELS)


class MotionFeatures(nn.Module):
    """RGB latents `[B,16,F,h,w]` -> token features `[B,F*P,D]`.

    The affine grey decoders are fitted by least squares to the codec (train/codec.py) and stored as buffers.
    """

    grey_single: Tensor
    grey_group: Tensor

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("grey_single", torch.zeros(CELL**2, channels + 1))
        self.register_buffer("grey_group", torch.zeros(FRAMES_PER_GROUP * CELL**2, channels + 1))
        self.embed = nn.Conv2d(FEATURES, width, kernel_size=2, stride=2)
        nn.init.zeros_(self.embed.get_parameter("bias"))

    def forward(self, latents: Tensor, times: Tensor) -> Tensor:
        """latents `[B,16,F,h,w]`, times `[B,F]`; a latent frame counts as observed at t = 0."""
        batch, _, frames, _, _ = latents.shape
        # Differences of frames would drown in bfloat16's rounding.
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            features = flow_features(latents.float(), self.grey_single.float(), self.grey_group.float())
        features = features.flatten(0, 1).type_as(self.embed.weight)
        tokens = self.embed(features).flatten(2).mT.unflatten(0, (batch, frames))
        observed = times == 0
        usable = torch.cat((torch.zeros_like(observed[:, :1]), observed[:, 1:] & observed[:, :-1]), dim=1)
        return (tokens * usable[..., None, None]).flatten(1, 2)


def flow_features(latents: Tensor, grey_single: Tensor, grey_group: Tensor) -> Tensor:
    """Flow (u, v, confidence) per latent cell and pyramid level: `[B,F,FEATURES,h,w]`, zero for latent frame 0.

    Args:
        latents: `[B,16,F,h,w]` RGB latents.
        grey_single, grey_group: affine decoders to the grey pixels of a cell, `[64,17]` and `[256,17]`.
    """
    batch, _, frames, height, width = latents.shape
    if frames == 1:
        return latents.new_zeros(batch, 1, FEATURES, height, width)
    latents = torch.cat((latents, torch.ones_like(latents[:, :1])), dim=1)
    single = torch.einsum("pc,bcfhw->bfphw", grey_single, torch.cat((latents[:, :, :1], latents[:, :, -1:]), dim=2))
    group = torch.einsum("pc,bcfhw->bfphw", grey_group, latents[:, :, 1:-1])
    first, last = pixel_shuffle(single, CELL).unbind(1)  # [B,1,H,W]
    middle = pixel_shuffle(group, CELL).flatten(1, 2)  # [B,4(F-2),H,W]
    clip = torch.cat((first, middle, last), dim=1)
    flows = []
    for level in LEVELS:
        tensor = structure_tensor(avg_pool2d(clip, level), CELL // level)
        inner = tensor[:, :-1].unflatten(1, (-1, FRAMES_PER_GROUP)).sum(2)
        flow = solve_flow(torch.cat((inner, tensor[:, -1:]), dim=1))
        flows.append(torch.cat((flow[:, :, :2] * level, flow[:, :, 2:]), dim=2))
    features = torch.cat(flows, dim=2)
    return torch.cat((torch.zeros_like(features[:, :1]), features), dim=1)


def structure_tensor(clip: Tensor, cell: int) -> Tensor:
    """Means of gradient products over each cell's 3x3 neighbourhood of cells (beyond the border counts as flat).

    Args:
        clip: `[B,N,H,W]` grey.
    Returns:
        `[B,N-1,5,H/cell,W/cell]`: xx, xy, yy, xt, yt for each pair of neighbouring frames.
    """
    mean = (clip[:, 1:] + clip[:, :-1]) / 2
    dt = clip[:, 1:] - clip[:, :-1]
    dx = torch.zeros_like(mean)
    dy = torch.zeros_like(mean)
    dx[..., 1:-1] = (mean[..., 2:] - mean[..., :-2]) / 2
    dy[..., 1:-1, :] = (mean[..., 2:, :] - mean[..., :-2, :]) / 2
    products = torch.stack((dx * dx, dx * dy, dy * dy, dx * dt, dy * dt), dim=2)
    per_cell = avg_pool2d(products.flatten(0, 2), cell)
    return avg_pool2d(per_cell[:, None], 3, stride=1, padding=1).view(*products.shape[:3], *per_cell.shape[-2:])


def solve_flow(tensor: Tensor, noise: float = 2e-4) -> Tensor:
    """Least-squares flow from a structure tensor `[B,F,5,h,w]` -> u, v in pixels per frame, log confidence.

    `noise` is the expected gradient energy of pure noise: it keeps flat cells at zero flow.
    """
    xx, xy, yy, xt, yt = tensor.unbind(2)
    xx, yy = xx + noise, yy + noise
    det = xx * yy - xy * xy
    u = (xy * yt - yy * xt) / det
    v = (xy * xt - xx * yt) / det
    confidence = (det / (xx + yy) / noise).log() / 4
    return torch.stack((u.clamp(-4, 4), v.clamp(-4, 4), confidence), dim=2)
