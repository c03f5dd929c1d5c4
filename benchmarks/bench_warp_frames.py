"""warp_frames, forward and backward, against torch's grid_sample over all pairs at once and against the reference.

    python benchmarks/bench_warp_frames.py [--batch 1] [--device cpu|cuda] [--threads N] [--rounds N] [--save]

Eight anchors at 240x320 and all 56 ordered pairs; the backward pass gives the gradients of rgb and depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import harness
import torch
from bench_reprojection_error import HEIGHT, OCCLUSION, WIDTH
from torch import Tensor
from torch.nn import functional

from u4d.commands.op_cases import Clip, wavy_clip
from u4d_fast import reference, warp_frames


def kernel(clip: Clip) -> tuple[Tensor, Tensor]:
    return warp_frames(*clip, occlusion=OCCLUSION, backend=clip[0].device.type)


def plain(clip: Clip) -> tuple[Tensor, Tensor]:
    return reference.warp_frames(*clip, occlusion=OCCLUSION)


def grid_sampled(clip: Clip) -> tuple[Tensor, Tensor]:
    """The same with torch's own operators."""
    rgb, depth, intrinsics, cam_to_world, pairs = clip
    batch, _, _, height, width = rgb.shape
    i, j = pairs.unbind(1)
    v, u = torch.meshgrid(
        torch.arange(height, device=rgb.device) + 0.5, torch.arange(width, device=rgb.device) + 0.5, indexing="ij"
    )
    pixels = torch.stack((u, v, torch.ones_like(u))).flatten(1)
    relative = torch.linalg.inv(cam_to_world[:, i]) @ cam_to_world[:, j]
    rays = (intrinsics[:, i] @ relative[..., :3, :3] @ torch.linalg.inv(intrinsics[:, j])) @ pixels
    points = intrinsics[:, i] @ relative[..., :3, 3:] + rays * depth[:, j].flatten(2)[:, :, None]
    x, y, z = points.flatten(0, 1).unbind(1)
    x, y = x / z, y / z
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), -1).view(-1, height, width, 2)
    options = {"padding_mode": "border", "align_corners": False}
    warped = functional.grid_sample(rgb[:, i].flatten(0, 1), grid, mode="bilinear", **options)
    surface = functional.grid_sample(depth[:, i].flatten(0, 1)[:, None], grid.detach(), mode="nearest", **options)
    valid = (z > 0) & (x >= 0.49) & (x <= width - 0.49) & (y >= 0.49) & (y <= height - 0.49)
    valid &= (depth[:, j].reshape(x.shape) > 0) & (z <= surface[:, 0].flatten(1) * (1 + OCCLUSION))
    valid = valid.view(batch, -1, height, width)
    return warped.view(batch, -1, 3, height, width) * valid[:, :, None], valid


Version = Callable[[Clip], tuple[Tensor, Tensor]]
VERSIONS: dict[str, Version] = {
    "kernel": kernel,
    "grid_sample, batched": grid_sampled,
    "reference": plain,
}


def check(clip: Clip) -> None:
    """All versions give the same images, or the times mean nothing."""
    expected, expected_valid = kernel(clip)
    for name, version in VERSIONS.items():
        warped, valid = version(clip)
        common = (valid & expected_valid)[:, :, None]
        apart = ((warped - expected) * common).abs().max()
        if apart > 1e-3 or (valid != expected_valid).float().mean() > 2e-3:
            raise SystemExit(f"{name} disagrees with the kernel: nothing was measured")


def forward(version: Version, clip: Clip) -> Tensor:
    """The warped frames, with what a backward pass needs."""
    rgb, depth = clip[0].detach().requires_grad_(), clip[1].detach().requires_grad_()
    return version((rgb, depth, *clip[2:]))[0]


def forward_backward(version: Version, clip: Clip) -> tuple[Tensor, ...]:
    """The gradients of rgb and depth."""
    rgb, depth = clip[0].detach().requires_grad_(), clip[1].detach().requires_grad_()
    warped = version((rgb, depth, *clip[2:]))[0]
    return torch.autograd.grad(warped, (rgb, depth), torch.ones_like(warped))


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1, help="clips in one call")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clip = wavy_clip(options.batch, HEIGHT, WIDTH, options.device)
    check(clip)
    rows = []
    for what, run in (("forward", forward), ("forward + backward", forward_backward)):
        versions = {name: partial(run, version, clip) for name, version in VERSIONS.items()}
        times = harness.measure(versions, options.device, options.rounds)
        case = f"{what}, {options.batch} x {len(clip[4])} pairs, {HEIGHT}x{WIDTH}"
        rows += [harness.row(case, name, times[name]) for name in VERSIONS]
    harness.show("warp_frames", rows, options)


if __name__ == "__main__":
    main()
