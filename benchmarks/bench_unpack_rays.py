"""unpack_rays against the reference in eager torch and under torch.compile.

python benchmarks/bench_unpack_rays.py [--device cpu|cuda] [--threads N] [--rounds N] [--save]
"""

from __future__ import annotations

import harness
import torch

from u4d_fast import reference, unpack_rays
from u4d_fast.time_layout import latent_frames

CASES = [(1, 50, 30, 40), (16, 50, 30, 40), (1, 18, 12, 16)]  # wan-1.3b, 16 candidates of it, tiny


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    compiled = torch.compile(reference.unpack_rays, dynamic=False)
    rows = []
    for batch, frames, height, width in CASES:
        g = torch.Generator().manual_seed(0)
        shape = (batch, 16, latent_frames(frames), height, width)
        ray_dir, ray_moment = (torch.randn(shape, generator=g).to(options.device) for _ in range(2))
        given = (ray_dir, ray_moment, frames, torch.full((batch,), 2.0, device=options.device))
        versions = {
            f"{options.device} kernel": lambda given=given: unpack_rays(*given, backend=options.device),
            "torch eager": lambda given=given: reference.unpack_rays(*given),
            "torch.compile": lambda given=given: compiled(*given),
        }
        exact = reference.unpack_rays(ray_dir.double(), ray_moment.double(), frames, given[3].double())
        for name, call in versions.items():
            harness.check_close(exact, call(), 1e-5, name)
        times = harness.measure(versions, options.device, options.rounds)
        moved = 2 * 4 * (ray_dir.numel() * 12 // 16 + exact[0].numel())
        case = f"{batch} x {frames} frames, {height}x{width} cells"
        rows += [harness.row(case, name, times[name], moved, copy_rate) for name in versions]
    harness.show("unpack_rays", rows, options)


if __name__ == "__main__":
    main()
