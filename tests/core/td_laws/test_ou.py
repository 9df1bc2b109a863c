"""The Ornstein-Uhlenbeck process and Brownian motion, watched at short intervals: td-flows 4.2."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from flowmatch_core.oracles import LinearGaussianMDP
from tests.support.random import tensor


def ou(kappa: float, sigma: float, mean: float, interval: float) -> LinearGaussianMDP:
    """dX = -kappa (X - mean) dt + sigma dB at the times of an interval; there is nothing to act on."""
    if kappa == 0:
        F, variance = 1.0, sigma**2 * interval
    else:
        F = math.exp(-kappa * interval)
        variance = sigma**2 * (1 - F**2) / (2 * kappa)
    one, zero = tensor([1.0]), tensor(0.0)
    return LinearGaussianMDP(A=F * one, B=one, c=tensor((1 - F) * mean), W=variance * one, K=0 * one, k=zero)


@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_density_nears_that_of_an_exponential_horizon(kappa: float) -> None:
    """With gamma = exp(-lambda D) and D -> 0 the horizon is Exp(lambda); the error halves with D."""
    sigma, mean, rate, start = 0.8, 0.5, 1.5, tensor([-1.0])
    x = torch.linspace(-3, 2, 11, dtype=torch.float64)[:, None]

    def later(t: float, point: float) -> float:
        spread = sigma**2 * t if kappa == 0 else sigma**2 * (1 - math.exp(-2 * kappa * t)) / (2 * kappa)
        centre = mean + (-1.0 - mean) * math.exp(-kappa * t) if kappa else -1.0
        return float(stats.norm.pdf(point, centre, math.sqrt(spread)) * rate * math.exp(-rate * t))

    truth = tensor(*[integrate.quad(later, 0, 20, args=(float(p),), points=[0.01, 0.1, 1], limit=200)[0] for p in x])
    if kappa == 0:  # a Laplace density of scale sigma / sqrt(2 lambda)
        scale = sigma / math.sqrt(2 * rate)
        torch.testing.assert_close(truth, tensor(*stats.laplace.pdf(x[:, 0], -1.0, scale)), atol=1e-6, rtol=0)
    away = (x[:, 0] + 1).abs() > 0.3  # at the start itself the first step is a peak
    errors = []
    for interval in (0.04, 0.02):
        mdp = ou(kappa, sigma, mean, interval)
        m = mdp.successor(start, None, math.exp(-rate * interval), tolerance=1e-10)
        errors.append(float((m.log_prob(x[:, None]).exp()[:, 0] - truth)[away].abs().max()))
    assert errors[1] < 0.01
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_mean_and_variance_are_those_of_the_resolvent() -> None:
    """E[X] = mean + (x - mean) lambda / (lambda + kappa) for D -> 0."""
    kappa, rate, interval = 0.7, 1.5, 1e-4
    m = ou(kappa, 0.8, 0.5, interval).successor(tensor([-1.0]), None, math.exp(-rate * interval), tolerance=1e-1)
    assert float(m.mean) == pytest.approx(0.5 - 1.5 * rate / (rate + kappa), abs=1e-3)
    # d E[X^2] / dt = -2 kappa E[X^2] + 2 kappa mean E[X] + sigma^2, weighed by the horizon
    second = (rate * 1.0 + 2 * kappa * 0.5 * float(m.mean) + 0.8**2) / (rate + 2 * kappa)
    assert float(m.second_moment) == pytest.approx(second, abs=1e-3)
