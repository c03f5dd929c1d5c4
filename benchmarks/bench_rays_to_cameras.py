"""rays_to_cameras: time and accuracy, beside the textbook linear fit in torch and the reference.

python benchmarks/bench_rays_to_cameras.py [--device cpu|cuda] [--threads N] [--rounds N] [--save]

The textbook version is what people write: for every frame the direct linear transform by an SVD of the stacked
equations, K and R by a QR decomposition, the centre by linear least squares. It is neither robust nor refined, so its
errors stand beside its time: the median rotation error in degrees with 2 % of noise, and the same with 10 % of the
cells random.
"""

from __future__ import annotations

import functools
import sys

import harness
import torch
from torch import Tensor

sys.path.insert(0, str(harness.ROOT / "tests" / "kernels"))

from ray_cameras import Cameras, random_cameras, rays_by_definition, rotation_error_deg, with_noise

from u4d_fast import rays_to_cameras, reference

SIZE = (240, 320)
FRAMES = 50


def textbook(directions: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Intrinsics [M,3,3] (normalised image coordinates) and cam_to_world [M,4,4], linear least squares throughout."""
    rows, columns = directions.shape[3:]
    d = directions.flatten(0, 1).flatten(2).mT
    m = moments.flatten(0, 1).flatten(2).mT
    v, u = torch.meshgrid(torch.linspace(-0.75, 0.75, rows), torch.linspace(-1.0, 1.0, columns), indexing="ij")
    p = torch.stack([u, v, torch.ones_like(u)], dim=-1).flatten(0, 1).to(d)
    zero = torch.zeros_like(d[..., :1] * p)
    x, y, z = (d[..., k : k + 1] * p for k in range(3))
    equations = torch.cat([torch.cat([zero, -z, y], dim=-1), torch.cat([z, zero, -x], dim=-1)], dim=1)
    matrix = torch.linalg.svd(equations, full_matrices=False).Vh[:, -1].unflatten(-1, (3, 3))
    agreement = (d * (p @ matrix.mT)).sum((1, 2))
    matrix = matrix * agreement.sign()[:, None, None]
    rotation, upper = torch.linalg.qr(matrix)
    signs = upper.diagonal(dim1=-2, dim2=-1).sign()
    rotation, upper = rotation * signs[:, None], upper * signs[..., None]
    across = torch.eye(3, device=d.device) - d[..., None] * d[..., None, :]
    centre = torch.linalg.lstsq(across.sum(1), torch.linalg.cross(d, m).sum(1)[..., None]).solution
    pose = torch.eye(4, device=d.device).repeat(len(d), 1, 1)
    pose[:, :3, :3], pose[:, :3, 3:] = rotation, centre
    return torch.linalg.inv(upper / upper[:, 2:, 2:]), pose


def spoilt(directions: Tensor, moments: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A share of the cells replaced by random rays."""
    g = torch.Generator().manual_seed(1)
    wrong = torch.rand(*directions.shape[:2], 1, *directions.shape[3:], generator=g) < share
    junk = torch.randn(directions.shape, generator=g, dtype=directions.dtype)
    return torch.where(wrong, junk, directions), torch.where(wrong, 50 * junk.flip(2), moments)


def error(call, rays: tuple[Tensor, Tensor], cameras: Cameras, device: str) -> float:
    """Median rotation error in degrees."""
    pose = call(*(value.float().to(device) for value in rays))[1]
    return rotation_error_deg(pose.reshape(1, FRAMES, 4, 4).cpu(), cameras.cam_to_world).median().item()


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    fit = functools.partial(rays_to_cameras, image_size=SIZE, backend=options.device)
    versions = {
        f"{options.device} kernel": fit,
        "kernel, shared K": functools.partial(fit, shared_intrinsics=True),
        "kernel, not robust": functools.partial(fit, robust=False),
        "reference": functools.partial(reference.rays_to_cameras, image_size=SIZE),
        "textbook linear fit": textbook,
    }
    cameras = random_cameras(1, FRAMES, SIZE, seed=3, one_per_clip=True, fov_deg=(60.0, 60.0))
    exact = rays_by_definition(cameras)
    noisy = with_noise(*exact, 0.02)
    wild = spoilt(*noisy, 0.1)
    for name in (f"{options.device} kernel", "reference"):
        found = versions[name](*(value.float().to(options.device) for value in exact))
        harness.check_close((cameras.cam_to_world,), (found[1].cpu(),), 1e-4, name)
    given = [value.float().to(options.device) for value in noisy]
    calls = {name: functools.partial(call, *given) for name, call in versions.items()}
    times = harness.measure(calls, options.device, options.rounds)
    rows = []
    for name, call in versions.items():
        notes = {
            "rotation_deg_2pc": error(call, noisy, cameras, options.device),
            "rotation_deg_outliers": error(call, wild, cameras, options.device),
        }
        rows.append(harness.row(f"1 x {FRAMES} frames, 30x40 cells", name, times[name], **notes))
    harness.show("rays_to_cameras", rows, options)


if __name__ == "__main__":
    main()
