"""Depth errors by hand, and what each alignment must not notice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from u4d.errors import UserError
from u4d.evaluate.depth_metrics import depth_metrics


def clip(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(seed)) * 5 + 1


@pytest.mark.parametrize("alignment", ["none", "scale", "scale_shift"])
def test_truth_has_no_error(alignment: str) -> None:
    result = depth_metrics(clip(), clip(), alignment=alignment)
    assert result["abs_rel"] == pytest.approx(0, abs=1e-12)
    assert result["rmse"] == pytest.approx(0, abs=1e-12)
    assert result["delta_1_25"] == 1.0


def test_numbers_by_hand() -> None:
    truth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    prediction = torch.tensor([[[1.2, 1.0, 5.1, 9.0]]])
    result = depth_metrics(prediction, truth, alignment="none")
    assert result["abs_rel"] == pytest.approx((0.2 / 1 + 1 / 2 + 1.1 / 4) / 3)
    assert result["rmse"] == pytest.approx(math.sqrt((0.04 + 1 + 1.21) / 3))
    assert result["delta_1_25"] == pytest.approx(1 / 3)
    assert result["alignment"].startswith("none")


def test_scale_alignment_does_not_see_the_unit() -> None:
    base = depth_metrics(clip(1), clip(), alignment="scale")
    scaled = depth_metrics(1000 * clip(1), clip(), alignment="scale")
    assert scaled["abs_rel"] == pytest.approx(base["abs_rel"], rel=1e-5)
    assert base["abs_rel"] > 0.1
    assert depth_metrics(1000 * clip(1), clip(), alignment="none")["abs_rel"] > 100
    assert "median" in base["alignment"]


def test_scale_is_the_ratio_of_medians_over_valid_pixels_of_the_whole_clip() -> None:
    truth, prediction = clip(0), clip(1)
    truth[:, :3] = 0
    valid = truth.numpy() > 0
    t, p = truth.numpy()[valid], prediction.numpy()[valid]
    # An even count of pixels: both medians are the lower of the two middle ones.
    p = p * np.sort(t)[(t.size - 1) // 2] / np.sort(p)[(p.size - 1) // 2]
    result = depth_metrics(prediction, truth, alignment="scale")
    assert result["abs_rel"] == pytest.approx(float(np.mean(np.abs(p - t) / t)), rel=1e-5)


def test_scale_and_shift_is_numpys_least_squares_in_depth() -> None:
    truth, prediction = clip(0), clip(1)
    slope, shift = np.polyfit(prediction.numpy().ravel().astype(float), truth.numpy().ravel().astype(float), 1)
    aligned = slope * prediction + shift
    result = depth_metrics(prediction, truth, alignment="scale_shift")
    assert result["rmse"] == pytest.approx(float((aligned - truth).square().mean().sqrt()), rel=1e-5)
    assert depth_metrics(3 * truth - 2, truth, alignment="scale_shift")["rmse"] == pytest.approx(0, abs=1e-5)
    assert "least squares in depth" in result["alignment"]


def test_a_flat_prediction_with_shift_is_the_mean() -> None:
    result = depth_metrics(torch.full((3, 8, 10), 7.0), clip(), alignment="scale_shift")
    assert result["rmse"] == pytest.approx(float(clip().std(correction=0)), rel=1e-5)


def test_invalid_truth_does_not_count() -> None:
    truth, prediction = clip(), clip(1)
    base = depth_metrics(prediction[:, :6], truth[:, :6])
    for row, bad in ((6, math.nan), (7, math.inf)):
        truth[:, row] = bad
        prediction[:, row] = math.nan
    assert depth_metrics(prediction, truth) == base


def test_depth_that_is_not_positive_fails_delta() -> None:
    truth = torch.tensor([[[1.0, 1.0]]])
    assert depth_metrics(torch.tensor([[[-1.0, 1.0]]]), truth, alignment="none")["delta_1_25"] == 0.5


def test_bad_input_is_named() -> None:
    bad = clip(1)
    bad[1, 2, 3] = math.nan
    with pytest.raises(UserError, match="prediction: expected finite"):
        depth_metrics(bad, clip())
    with pytest.raises(UserError, match="at least one valid pixel"):
        depth_metrics(clip(), torch.zeros(3, 8, 10))
    with pytest.raises(UserError, match=r"\[3, 8, 10\], got \[3, 8, 9\]"):
        depth_metrics(clip()[:, :, :9], clip())
    with pytest.raises(UserError, match="got 'median'"):
        depth_metrics(clip(), clip(), alignment="median")
    with pytest.raises(UserError, match="median that is not positive"):
        depth_metrics(-clip(), clip(), alignment="scale")
