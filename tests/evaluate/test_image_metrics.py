"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import math

import pytest
import torch

from u4d.errors import UserError
from u4d.evaluate.image_metrics import PSNR_CEILING_DB, psnr, ssim


def frames(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(seed))


def blurred(seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(frames(seed), 3, stride=1, padding=1)


def test_psnr_is_scikit_images_per_frame_mean() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image (a test-only oracle) is not installed")
    pairs = zip(frames(0).numpy(), blurred(0).numpy(), strict=True)
    expected = [metrics.peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    assert psnr(blurred(0), frames(0)) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_psnr_knows_the_range_of_values() -> None:
    truth = torch.zeros(2, 4, 5)
    assert psnr(truth + 0.1, truth) == pytest.approx(20, rel=1e-5)
    assert psnr(truth + 0.1, truth, peak=2.0) == pytest.approx(20 + 20 * math.log10(2), rel=1e-5)
    assert psnr(truth, truth) == pytest.approx(PSNR_CEILING_DB)


def test_ssim_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image (a test-only oracle) is not installed")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = zip(frames(0).double().numpy(), blurred(0).double().numpy(), strict=True)
    expected = [metrics.structural_similarity(a, b, channel_axis=0, **options) for a, b in pairs]
    assert ssim(blurred(0), frames(0)) == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert ssim(frames(0), frames(0)) == pytest.approx(1)


def test_bad_frames_are_named() -> None:
    broken = frames()
    broken[0, 0, 0, 0] = math.nan
    for metric in (psnr, ssim):
        with pytest.raises(UserError, match="finite"):
            metric(broken, frames())
        with pytest.raises(UserError, match="frames like truth"):
            metric(frames()[:2], frames())
    with pytest.raises(UserError, match="11x11"):
        ssim(frames()[..., :8], frames()[..., :8])
