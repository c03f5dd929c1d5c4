"""pack_rays against the reference in eager torch and under torch.compile.

python benchmarks/bench_pack_rays.py [--device cpu|cuda] [--threads N] [--rounds N] [--save]
"""

from __future__ import annotations

import harness
import torch

from u4d.commands.op_cases import camera_path
from u4d_fast import pack_rays, reference

CASES = [(1, 50, 240, 320), (16, 50, 240, 320), (1, 18, 96, 128)]  # wan-1.3b, 16 candidates of it, tiny


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    copy_rate = harness.copy_bandwidth(options.device)
    compiled = torch.compile(reference.pack_rays, dynamic=False)
    rows = []
    for case in CASES:
        given = camera_path(*case, options.device)
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
