"""How far predicted frames are from true ones."""

from __future__ import annotations

import torch
from torch import Tensor

from u4d.errors import UserError

PSNR_CEILING_DB = 100.0  # equal images have no finite PSNR; the ceiling keeps means finite and JSON valid


def psnr(prediction: Tensor, truth: Tensor, *, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB: per frame, then the mean over frames; at most 100 per frame.

    Args:
        prediction, truth: [N, ...] frames, the same shape.
        peak: the range of the values (1 for RGB in [0, 1], 2 for the depth channel in [-1, 1]).
    Raises:
        UserError: shapes disagree, no frame, or values that are not finite.
    """
    _check_pair(prediction, truth)
    error = (prediction.double() - truth.double()).flatten(1).square().mean(1)
    floor = peak**2 * 10 ** (-PSNR_CEILING_DB / 10)
    return float((10 * torch.log10(peak**2 / error.clamp_min(floor))).mean())


def ssim(prediction: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of [N, C, H, W] frames in [0, 1], averaged over frames and channels.

    Gaussian windows of 11x11 with sigma 1.5, K = (0.01, 0.03), population moments, whole windows only: the paper's
    choice, and what torchmetrics and scikit-image (`gaussian_weights=True, use_sample_covariance=False`) give.

    Raises:
        UserError: shapes disagree, values that are not finite, or frames smaller than the window.
    """
    _check_pair(prediction, truth)
    if truth.ndim != 4 or min(truth.shape[-2:]) < 11:
        raise UserError(f"truth: expected [N, C, H, W] of at least 11x11 pixels, got {list(truth.shape)}")
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=truth.device)
    window = torch.exp(-0.5 * (offsets / 1.5).square())
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        x = torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        return torch.nn.functional.conv2d(x, window.view(1, 1, 1, 11))

    x, y = prediction.double(), truth.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _check_pair(prediction: Tensor, truth: Tensor) -> None:
    if prediction.shape != truth.shape or truth.ndim < 2 or truth.shape[0] == 0:
        raise UserError(f"prediction: expected frames like truth {list(truth.shape)}, got {list(prediction.shape)}")
    if not bool(torch.isfinite(prediction).all() and torch.isfinite(truth).all()):
        raise UserError("prediction, truth: expected finite values, got NaN or infinity")
