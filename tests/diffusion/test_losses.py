"""Laws of the masked flow-matching loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from u4d.diffusion.flow import CHANNEL_MASK
from u4d.diffusion.losses import flow_matching_loss
from u4d.diffusion.patterns import draw_batch

SHAPE = (6, 4, 16, 5, 2, 3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A mixed batch: three full clips, three with RGB alone."""
    prediction, target = torch.randn(2, *SHAPE, generator=seeded(seed))
    available = torch.tensor([[1, 1, 1, 1]] * 3 + [[1, 0, 0, 0]] * 3, dtype=torch.bool)
    return prediction, target, draw_batch(available, SHAPE[3], generator=seeded(seed)).supervised


def test_equals_the_plain_sum_over_groups() -> None:
    """The oracle walks over groups one by one, as the spec says it in words."""
    prediction, target, supervised = random_case()
    loss = flow_matching_loss(prediction, target, supervised)
    for stream in range(4):
        live = int(CHANNEL_MASK[stream].sum())
        errors = [
            (prediction[b, stream, :live, f] - target[b, stream, :live, f]).square().mean()
            for b in range(SHAPE[0])
            for f in range(SHAPE[3])
            if supervised[b, stream, f]
        ]
        torch.testing.assert_close(loss.per_stream[stream], torch.stack(errors).mean())
        assert loss.group_counts[stream] == len(errors)
    torch.testing.assert_close(loss.total, loss.per_stream.mean())


def test_mixing_rgb_only_and_full_clips_equals_the_weighted_sum_of_each_alone() -> None:
    prediction, target, supervised = random_case()
    mixed = flow_matching_loss(prediction, target, supervised)
    full = flow_matching_loss(prediction[:3], target[:3], supervised[:3])
    rgb_only = flow_matching_loss(prediction[3:], target[3:], supervised[3:])
    share = full.group_counts / mixed.group_counts
    torch.testing.assert_close(mixed.per_stream, share * full.per_stream + (1 - share) * rgb_only.per_stream)
    assert share[1:].tolist() == [1, 1, 1] and 0 < share[0] < 1


def test_parts_of_a_global_batch_add_up_to_its_loss_and_gradient() -> None:
    prediction, target, supervised = random_case()
    prediction.requires_grad_()
    whole = flow_matching_loss(prediction, target, supervised)
    (gradient,) = torch.autograd.grad(whole.total, prediction)
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        piece = flow_matching_loss(prediction[part], target[part], supervised[part], group_counts=whole.group_counts)
        total = total + piece.total
    torch.testing.assert_close(total, whole.total)
    torch.testing.assert_close(torch.autograd.grad(total, prediction)[0], gradient)


def test_gradient_reaches_supervised_groups_and_live_channels_and_nothing_else() -> None:
    prediction, target, supervised = random_case()
    prediction.requires_grad_()
    flow_matching_loss(prediction, target, supervised).total.backward()
    assert prediction.grad is not None
    reached = prediction.grad.abs().sum(dim=(-2, -1)) > 0  # [B,S,C,F]
    assert torch.equal(reached, supervised[:, :, None, :] & CHANNEL_MASK.bool()[None, :, :, None])


def test_a_stream_with_nothing_supervised_is_zero_and_finite() -> None:
    prediction, target, supervised = random_case()
    supervised = supervised.clone()
    supervised[:, 2:] = False
    prediction.requires_grad_()
    loss = flow_matching_loss(prediction, target, supervised)
    loss.total.backward()
    assert loss.per_stream[2:].tolist() == [0, 0] and bool((loss.per_stream[:2] > 0).all())
    assert prediction.grad is not None and bool(prediction.grad.isfinite().all())
    nothing = flow_matching_loss(prediction, target, torch.zeros_like(supervised))
    assert nothing.total.item() == 0


def test_a_perfect_prediction_costs_nothing_and_a_unit_error_one() -> None:
    _, target, supervised = random_case()
    assert float(flow_matching_loss(target, target, supervised).total) == 0
    off_by_one = flow_matching_loss(target + 1, target, supervised)
    torch.testing.assert_close(off_by_one.per_stream, torch.ones(4))
    torch.testing.assert_close(off_by_one.total, torch.ones(()))


def test_channel_weights_are_relative_within_a_stream() -> None:
    prediction, target, supervised = random_case()
    plain = flow_matching_loss(prediction, target, supervised)
    doubled = flow_matching_loss(prediction, target, supervised, torch.full((4, 16), 2.0))
    torch.testing.assert_close(doubled.per_stream, plain.per_stream)
    first_only = torch.zeros(4, 16)
    first_only[:, 0] = 5
    chosen = flow_matching_loss(prediction, target, supervised, first_only)
    errors = (prediction - target)[:, :, 0].square().mean(dim=(-2, -1))
    expected = torch.stack([errors[:, s][supervised[:, s]].mean() for s in range(4)])
    torch.testing.assert_close(chosen.per_stream, expected)


def test_stream_weights_replace_the_quarter() -> None:
    prediction, target, supervised = random_case()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    loss = flow_matching_loss(prediction, target, supervised, stream_weights=weights)
    torch.testing.assert_close(loss.total, (weights * loss.per_stream).sum())


def test_low_precision_predictions_are_compared_in_float32() -> None:
    prediction, target, supervised = random_case()
    low = flow_matching_loss(prediction.bfloat16(), target.bfloat16(), supervised)
    exact = flow_matching_loss(prediction.bfloat16().float(), target.bfloat16().float(), supervised)
    assert low.total.dtype == torch.float32 and torch.equal(low.total, exact.total)


def test_a_non_finite_prediction_is_never_hidden() -> None:
    prediction, target, supervised = random_case()
    prediction[0, 0, 0, 0, 0, 0] = float("nan")
    supervised = supervised.clone()
    supervised[0, 0, 0] = True
    assert not bool(flow_matching_loss(prediction, target, supervised).total.isfinite())


def test_wrong_shapes_are_named() -> None:
    prediction, target, supervised = random_case()
    with pytest.raises(ValueError, match=r"prediction: expected \[B,S,C,F,h,w\] like target"):
        flow_matching_loss(prediction[:1], target, supervised)
    with pytest.raises(ValueError, match=r"supervised: expected \[6, 4, 5\] bool, got \[6, 4, 5\] torch.float32"):
        flow_matching_loss(prediction, target, supervised.float())
    with pytest.raises(ValueError, match=r"channel_weights: expected \[4, 16\], got \[16\]"):
        flow_matching_loss(prediction, target, supervised, torch.ones(16))
    with pytest.raises(ValueError, match=r"stream_weights: expected \[4\], got \[3\]"):
        flow_matching_loss(prediction, target, supervised, stream_weights=torch.ones(3))
