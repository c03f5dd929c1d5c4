"""reprojection_error against the same sum written with torch's grid_sample: time and peak memory, in one run.

    python benchmarks/bench_reprojection_error.py [--batch 1] [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The torch versions are written as one would: the cameras of all pairs in one batched product, one grid_sample for the
colours and one (nearest) for the occlusion test, over all pairs at once (`batched`) or pair by pair (`looped`, which
stays in the caches and needs far less memory). The kernel is compared with the faster of them.

Memory is what one call needs at its peak beyond its inputs, measured in a fresh process for each version, after a call
at 16x16 pixels has loaded the code and started the threads: the larger of the growth of the resident set at its highest
(VmHWM, reset before the call; it misses what fits into pages that the process already has) and of what torch's
allocator handed out (profiler; the kernels allocate nothing elsewhere). On a GPU it is torch's own count.

On a busy machine set OMP_WAIT_POLICY=passive, or torch's threads spin for each other and the kernel looks too good.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import torch
from torch import Tensor
from torch.nn import functional

from u4d.commands.op_cases import Clip, wavy_clip
from u4d_fast import reference, reprojection_error

HEIGHT, WIDTH = 240, 320
OCCLUSION = 0.05


def kernel(clip: Clip) -> tuple[Tensor, Tensor]:
    _, pair_error, overlap = reprojection_error(*clip, occlusion=OCCLUSION, backend=clip[0].device.type)
    return pair_error, overlap


def plain(clip: Clip) -> tuple[Tensor, Tensor]:
    _, pair_error, overlap = reference.reprojection_error(*clip, occlusion=OCCLUSION)
    return pair_error, overlap


def batched(clip: Clip) -> tuple[Tensor, Tensor]:
    rgb, depth, intrinsics, cam_to_world, pairs = clip
    batch = rgb.shape[0]
    i, j = pairs.unbind(1)
    cameras = (intrinsics[:, i], intrinsics[:, j], cam_to_world[:, i], cam_to_world[:, j])
    images = (rgb[:, i], depth[:, i], rgb[:, j], depth[:, j])
    error, overlap = compare(*(part.flatten(0, 1) for part in (*images, *cameras)))
    return error.view(batch, -1), overlap.view(batch, -1)


def looped(clip: Clip) -> tuple[Tensor, Tensor]:
    rgb, depth, intrinsics, cam_to_world, pairs = clip
    errors, overlaps = [], []
    for i, j in pairs.tolist():
        images = (rgb[:, i], depth[:, i], rgb[:, j], depth[:, j])
        error, overlap = compare(*images, intrinsics[:, i], intrinsics[:, j], cam_to_world[:, i], cam_to_world[:, j])
        errors.append(error)
        overlaps.append(overlap)
    return torch.stack(errors, 1), torch.stack(overlaps, 1)


def compare(
    rgb_i: Tensor, depth_i: Tensor, rgb_j: Tensor, depth_j: Tensor, k_i: Tensor, k_j: Tensor, t_i: Tensor, t_j: Tensor
) -> tuple[Tensor, Tensor]:
    """Error and overlap [P] of P pairs: the definition, with torch's own operators."""
    count, _, height, width = rgb_i.shape
    v, u = torch.meshgrid(
        torch.arange(height, device=rgb_i.device) + 0.5, torch.arange(width, device=rgb_i.device) + 0.5, indexing="ij"
    )
    pixels = torch.stack((u, v, torch.ones_like(u))).flatten(1)
    relative = torch.linalg.inv(t_i) @ t_j
    rays = (k_i @ relative[:, :3, :3] @ torch.linalg.inv(k_j)) @ pixels
    x, y, z = torch.addcmul(k_i @ relative[:, :3, 3:], rays, depth_j.view(count, 1, -1)).unbind(1)
    x, y = x / z, y / z
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), -1).view(count, height, width, 2)
    options = {"padding_mode": "border", "align_corners": False}
    warped = functional.grid_sample(rgb_i, grid, mode="bilinear", **options)
    surface = functional.grid_sample(depth_i[:, None], grid, mode="nearest", **options)[:, 0].flatten(1)
    valid = (depth_j.flatten(1) > 0) & (z > 0) & (x >= 0.49) & (x <= width - 0.49) & (y >= 0.49) & (y <= height - 0.49)
    valid &= (surface > 0) & (z <= surface * (1 + OCCLUSION))
    visible = valid.sum(1)
    difference = ((warped - rgb_j).abs().mean(1).flatten(1) * valid).sum(1)
    return torch.where(visible > 0, difference / visible.clamp(min=1), 1.0), visible / (height * width)


VERSIONS: dict[str, Callable[[Clip], tuple[Tensor, Tensor]]] = {
    "kernel": kernel,
    "grid_sample, batched": batched,
    "grid_sample, looped": looped,
    "reference": plain,
}


def check(clip: Clip) -> None:
    """All versions measure the same thing, or the times mean nothing."""
    expected_error, expected_overlap = kernel(clip)
    for name, version in VERSIONS.items():
        error, overlap = version(clip)
        if (error - expected_error).abs().max() > 2e-4 or (overlap - expected_overlap).abs().max() > 2e-3:
            raise SystemExit(f"{name} disagrees with the kernel: nothing was measured")


def status_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_memory(name: str, batch: int, device: str) -> int:
    """Bytes that one call needs at its peak beyond its inputs. To be called in a fresh process."""
    version = VERSIONS[name]
    version(wavy_clip(batch, 16, 16, device))
    clip = wavy_clip(batch, HEIGHT, WIDTH, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        version(clip)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = status_bytes("VmRSS")
    version(clip)
    grown = status_bytes("VmHWM") - before
    return max(grown, peak_allocation(lambda: version(clip)))


def peak_allocation(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had handed out to `call` at any moment."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def peak_memory_in_fresh_process(name: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--measure-memory-of", name, "--threads", str(options.threads)]
    command += ["--batch", str(options.batch), "--device", options.device]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1, help="clips (candidates) in one call")
    parser.add_argument("--measure-memory-of", choices=tuple(VERSIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure_memory_of:
        print(peak_memory(options.measure_memory_of, options.batch, options.device))
        return
    clip = wavy_clip(options.batch, HEIGHT, WIDTH, options.device)
    check(clip)
    versions = {name: partial(version, clip) for name, version in VERSIONS.items()}
    times = harness.measure(versions, options.device, options.rounds)
    case = f"{options.batch} x {len(clip[4])} pairs, {HEIGHT}x{WIDTH}"
    rows = [
        harness.row(case, name, times[name], peak_mb=peak_memory_in_fresh_process(name, options) / 1e6)
        for name in VERSIONS
    ]
    harness.show("reprojection_error", rows, options)


if __name__ == "__main__":
    main()
