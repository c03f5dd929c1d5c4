"""UniPC as a table: a sampler whose every step is a linear combination with coefficients known beforehand.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (2023), data
prediction, B(h) = e^h - 1 ("bh2"), on the flow-matching path alpha = 1 - t, sigma = t. The table depends on the
schedule alone and equals diffusers' `UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift,
prediction_type="flow_prediction")`. The Python loop, a graph-captured loop and the C++ runtime apply the same one.

Derivation. With lambda = log(alpha / sigma) and m(lambda) the predicted clean sample, going from s to t is exactly

    x_t = sigma_t / sigma_s x_s + sigma_t * integral of e^lambda m(lambda) d lambda    over [lambda_s, lambda_t].

With h = lambda_t - lambda_s and m constant the integral is -alpha_t expm1(-h) m_s. UniPC adds
differences of m at p other times, lambda_k = lambda_s + r_k h:

    x_t = sigma_t / sigma_s x_s - alpha_t expm1(-h) m_s - alpha_t B * sum_k rho_k (m_k - m_s) / r_k,   B = expm1(-h)

where rho solves the order conditions  sum_k rho_k r_k^(n-1) = b_n,  b_n = n! (-h) phi_(n+1)(-h) / B,  n = 1..p, and
phi_1(z) = expm1(z) / z, phi_(n+1)(z) = (phi_n(z) - 1/n!) / z. The predictor UniP of order p uses the p - 1 times before
s (r < 0); the corrector UniC redoes the step that led here with the new prediction m_t as well (r = 1). For p = 2 in
the predictor and p = 1 in the corrector UniPC fixes rho = 1/2, the value for h -> 0. The step to t = 0 is of order 1
and simply returns the predicted clean sample; order also grows from 1 as history comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from u4d.diffusion.flow import DEFAULT_SHIFT

SMALLEST_TIME = 1e-3  # Wan's schedule is cut from 1000 training steps; 1 / 1000 is its last one
FIRST_STEP_BACK = 1e-6  # the first time is 1 - 1e-6, as in diffusers: at t = 1 lambda is infinite
HIGHEST_ORDER = 3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class UniPCTable:
    """Times and coefficients of every step, float64. At step i, with m_k the clean prediction made at step k:

    corrected  = corrector_current[i] * x_i + corrector_last[i] * corrected_(i-1)
                 + sum over k of corrector_clean[i, k] * m_(i-k)            k = 0..order
    x_(i+1)    = predictor_sample[i] * corrected + sum over k of predictor_clean[i, k] * m_(i-k)      k = 0..order-1

    where m_i = x_i - times[i] * velocity(x_i, times[i]). Coefficients of history that does not exist yet are 0.
    """

    times: Array  # [steps+1], flow times from (nearly) 1 down to 0
    corrector_current: Array  # [steps], 1 in the first step and 0 after
    corrector_last: Array  # [steps]
    corrector_clean: Array  # [steps, order+1]
    predictor_sample: Array  # [steps]
    predictor_clean: Array  # [steps, order]

    @property
    def steps(self) -> int:
        return len(self.corrector_last)

    @property
    def order(self) -> int:
        return int(self.predictor_clean.shape[1])


@dataclass(frozen=True)
class UniPCState:
    """What a step needs of the steps before it."""

    sample: Tensor  # x_i, where the model is asked next
    last: Tensor  # the corrected sample of the step before
    clean: tuple[Tensor, ...]  # the last `order` clean predictions, newest first


def unipc_times(steps: int, shift: float = DEFAULT_SHIFT) -> Array:
    """The shifted times [steps+1] from (nearly) 1 down to 0, as diffusers computes them: rounded to float32.

    (The rounding is kept because the first step's lambda = log((1 - t) / t) feels it.)
    """
    linear = np.linspace(1.0, SMALLEST_TIME, steps + 1)[:-1]
    times = shift * linear / (1 + (shift - 1) * linear)
    times[0] -= FIRST_STEP_BACK
    return np.append(times, 0.0).astype(np.float32).astype(np.float64)


def unipc_table(steps: int = 40, shift: float = DEFAULT_SHIFT, order: int = 2) -> UniPCTable:
    """The coefficients of a whole trajectory.

    Args:
        steps: number of model calls, >= 1.
        shift: of the schedule, > 0.
        order: of the solver, 1 to 3.
    Raises:
        ValueError: an argument is out of its range.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift: expected a positive number, got {shift}")
    if not 1 <= order <= HIGHEST_ORDER:
        raise ValueError(f"order: expected 1 to {HIGHEST_ORDER}, got {order}")
    times = unipc_times(steps, shift)
    # Few points are known at the start, and the step to t = 0 (infinite lambda) admits order 1 only.
    orders = [min(order, i + 1, steps - i) for i in range(steps)]

    corrector_current, corrector_last = np.zeros(steps), np.zeros(steps)
    corrector_clean, predictor_clean = np.zeros((steps, order + 1)), np.zeros((steps, order))
    predictor_sample = np.zeros(steps)
    corrector_current[0] = 1
    for i in range(steps):
        if i > 0:  # redo the step from i-1 to i, of that step's order, with the prediction at i
            past = times[i - orders[i - 1] : i][::-1]
            corrector_last[i], newest, older = _step_coefficients(past, times[i], correct=True)
            corrector_clean[i, : len(older) + 1] = [newest, *older]
        past = times[i + 1 - orders[i] : i + 1][::-1]
        predictor_sample[i], _, older = _step_coefficients(past, times[i + 1], correct=False)
        predictor_clean[i, : len(older)] = older
    return UniPCTable(times, corrector_current, corrector_last, corrector_clean, predictor_sample, predictor_clean)


def unipc_start(noise: Tensor, table: UniPCTable) -> UniPCState:
    """The state before the first step: the sample is the noise, the history (never used with weight) is zero."""
    empty = noise.new_zeros(()).expand_as(noise)
    return UniPCState(sample=noise, last=empty, clean=(empty,) * table.order)


def unipc_step(state: UniPCState, velocity: Tensor, table: UniPCTable, index: int) -> UniPCState:
    """One step: correct the sample with the velocity found at it, then predict the next one.

    Args:
        state: of step `index`.
        velocity: the model's answer at (state.sample, table.times[index]), of the sample's shape.
        table: from `unipc_table`.
        index: 0..steps-1, one after the other.
    Returns:
        The state of step index + 1; after the last step its `sample` is the result.
    """
    newest = state.sample - float(table.times[index]) * velocity
    clean = (newest, *state.clean)
    corrected = float(table.corrector_current[index]) * state.sample + float(table.corrector_last[index]) * state.last
    corrected = _add_weighted(corrected, table.corrector_clean[index], clean)
    following = _add_weighted(float(table.predictor_sample[index]) * corrected, table.predictor_clean[index], clean)
    return UniPCState(sample=following, last=corrected, clean=clean[: table.order])


def _add_weighted(total: Tensor, weights: Array, terms: tuple[Tensor, ...]) -> Tensor:
    for weight, term in zip(weights.tolist(), terms, strict=False):  # the predictor looks back one less
        total = total + weight * term
    return total


def _step_coefficients(past: Array, target: float, *, correct: bool) -> tuple[float, float, list[float]]:
    """Coefficients of the step from past[0] to target, of order len(past).

    Args:
        past: times where clean predictions are known, newest first; past[0] is where the step starts.
        target: time where it ends, below all of them.
        correct: whether the prediction at the target is used, too (UniC) or not (UniP).
    Returns:
        (of the sample at past[0], of the clean prediction at target, of those at past).
    """
    start = float(past[0])
    if target == 0:  # h is infinite: all that is left is the clean prediction
        assert not correct and len(past) == 1
        return 0.0, 0.0, [1.0]
    h = _log_snr(target) - _log_snr(start)
    alpha, growth = 1 - target, math.expm1(-h)  # growth is B(h)
    ratios = [(_log_snr(t) - _log_snr(start)) / h for t in past[1:].tolist()]
    ratios += [1.0] if correct else []
    weights = _difference_weights(ratios, h, correct=correct)
    slopes = [-alpha * growth * weight / ratio for weight, ratio in zip(weights, ratios, strict=True)]
    at_start = -alpha * growth - sum(slopes)
    at_target = slopes.pop() if correct else 0.0
    return target / start, at_target, [at_start, *slopes]


def _difference_weights(ratios: list[float], h: float, *, correct: bool) -> list[float]:
    """rho of the order conditions, for the differences at r_k; the simplest case is fixed to 1/2."""
    count = len(ratios)
    if count == 0:
        return []
    if count == 1:
        return [0.5]
    growth = math.expm1(-h)
    phi = growth / -h
    conditions = []
    for n in range(1, count + 1):
        phi = (phi - 1 / math.factorial(n)) / -h
        conditions.append(math.factorial(n) * -h * phi / growth)
    powers = np.vander(np.asarray(ratios), count, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.asarray(conditions))]


def _log_snr(time: float) -> float:
    return math.log1p(-time) - math.log(time)
