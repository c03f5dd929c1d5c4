"""pack_rays against the reference in eager torch and under torch.compile.

python benchmarks/bench_pack_rays.py [--device cpu|cuda] [--threads N] [--rounds N] [--save]
"""

from __future__ import annotations

import harness
import torch
from torch import Tensor

from u4d_fast import pack_rays, reference

CASES = [(1, 50, 240, 320), (16, 50, 240, 320), (1, 18, 96, 128)]  # wan-1.3b, 16 candidates of it, tiny


def cameras(batch: int, frames: int, height: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A path of cameras that turn and move."""
    angle = torch.linspace(0.0, 1.0, frames)
    pose = torch.eye(4).repeat(batch, frames, 1, 1)
    pose[..., 0, 0] = pose[..., 2, 2] = angle.cos()
    pose[..., 0, 2], pose[..., 2, 0] = angle.sin(), -angle.sin()
    pose[..., 0, 3] = angle
    intrinsics = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]])
    return intrinsics.repeat(batch, frames, 1, 1).to(device), pose.to(device), torch.ones(batch, device=device)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    compiled = torch.compile(reference.pack_rays, dynamic=False)
    rows = []
    for case in CASES:
        given = cameras(*case, options.device)
        size = case[2:]
        versions = {
            f"{options.device} kernel": lambda given=given, size=size: pack_rays(*given, size, backend=options.device),
            "torch eager": lambda given=given, size=size: reference.pack_rays(*given, size),
            "torch.compile": lambda given=given, size=size: compiled(*given, size),
        }
        exact = reference.pack_rays(*(value.double() for value in given), size)
        for name, call in versions.items():
            harness.check_close(exact, call(), 1e-5, name)
        times = harness.measure(versions, options.device, options.rounds)
        moved = sum(out.numel() * 4 for out in exact)
        shape = "{} x {} frames, {}x{}".format(*case)
        rows += [harness.row(shape, name, times[name], moved, copy_rate) for name in versions]
    harness.show("pack_rays", rows, options)


if __name__ == "__main__":
    main()
