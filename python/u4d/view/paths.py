"""Camera paths made comparable, and the pieces of them that get drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.geometry.alignment import umeyama

STILL_SPREAD = 1e-6


def path_spread(cam_to_world: Tensor) -> float:
    """Root mean square distance of the camera centres [N,4,4] from their mean."""
    centres = cam_to_world[:, :3, 3].double()
    return float((centres - centres.mean(0)).square().sum(-1).mean().sqrt())


def align_path(cam_to_world: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Lay one path over another by a similarity, for looking at.

    The fit (Umeyama 1991) is given the ends of each camera's axes beside its centre, as long as its own path is wide:
    so a straight, still or noisy path, whose centres leave the turn open, comes to lie the right way round too.

    Args:
        cam_to_world: [N,4,4].
        target: [N,4,4], same frames.
    Returns:
        [N,4,4] float64 in the target's world and unit, and the scale that was applied.
    """
    source_poses, target_poses = cam_to_world.double(), target.double()
    spreads = [path_spread(source_poses), path_spread(target_poses)]
    moving = all(spread > STILL_SPREAD for spread in spreads)
    reaches = spreads if moving else [1.0, 1.0]
    source_points, target_points = (
        torch.cat([poses[:, None, :3, 3] + side * reach * poses[:, :3, :3].mT for side in (-1.0, 0.0, 1.0)], 1)
        for poses, reach in zip((source_poses, target_poses), reaches, strict=True)
    )
    source_points, target_points = source_points.flatten(0, 1), target_points.flatten(0, 1)
    scale, rotation, translation = umeyama(source_points, target_points, with_scale=moving)
    aligned = source_poses.clone()
    aligned[:, :3, :3] = rotation @ source_poses[:, :3, :3]
    aligned[:, :3, 3] = scale * (source_poses[:, :3, 3] @ rotation.T) + translation
    return aligned, float(scale)


def frustum_corners(intrinsics: Tensor, cam_to_world: Tensor, image_size: tuple[int, int], reach: float) -> Tensor:
    """World corners of the picture held `reach` in front of each camera.

    Args:
        intrinsics: [N,3,3], pixels.
        cam_to_world: [N,4,4].
        image_size: (H, W).
        reach: distance along the optical axis.
    Returns:
        [N,4,3]: top left, top right, bottom right, bottom left.
    """
    height, width = image_size
    pixels = torch.tensor([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=torch.float64)
    rays = pixels @ torch.linalg.inv(intrinsics.double()).mT * reach
    corners: Tensor = rays @ cam_to_world[:, :3, :3].double().mT + cam_to_world[:, None, :3, 3].double()
    return corners
