"""Rotations: all moments of the measure on the circle are known, td-flows 4.3."""

from __future__ import annotations

import math

import pytest
import torch

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.solvers import solve
from flowmatch_core.successor import geometric
from tests.support.checks import BOUND, z_scores
from tests.support.processes import Chain, circle
from tests.support.random import generator, randn, tensor


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_fourier_moments_of_a_noisy_ring(noise: float) -> None:
    """E[Z^k | z] = z^k (1-g) phi_k / (1 - g phi_k), phi_k = exp(i k D - k^2 s^2 / 2), at the state of step T."""
    gamma, angle, n = 0.9, 0.3, 100_000
    T = geometric(gamma, (n,), generator=generator())
    theta = 0.7 + T * angle + noise * T.double().sqrt() * randn(n, seed=1)
    for k in (1, 2, 3, 5):
        phi = torch.exp(torch.complex(tensor(-0.5 * k**2 * noise**2)[0], tensor(k * angle)[0]))
        truth = torch.exp(1j * tensor(0.7 * k))[0] * (1 - gamma) * phi / (1 - gamma * phi)
        for values, exact in (((k * theta).cos(), truth.real), ((k * theta).sin(), truth.imag)):
            assert abs(z_scores(values, exact)) < BOUND


def test_rotation_by_an_nth_of_a_turn_is_a_chain_of_n_states() -> None:
    """Mass (1-g) g^(j-1) / (1 - g^N) at the j-th place ahead: the formula, the matrix and the flow agree."""
    gamma, N, n = 0.8, 6, 2_000
    chain = Chain(torch.eye(N, dtype=torch.float64).roll(1, 1), circle(N))
    formula = tensor(*[(1 - gamma) * gamma**j / (1 - gamma**N) for j in range(N)])
    torch.testing.assert_close(chain.successor(gamma)[0].roll(-1), formula)
    x = solve(
        chain.field(gamma),
        randn(n, 2, seed=2),
        t1=0.999,
        cond=chain.places[0].expand(n, 2),
        solver="heun",
        steps=30,
    ).x
    error = (formula * (1 - formula) / n).sqrt()
    assert ((chain.shares(x).roll(-1) - formula).abs() <= BOUND * error).all()


def test_mean_of_a_rotation_of_the_plane_is_the_first_fourier_moment() -> None:
    """The linear-Gaussian oracle on F = rotation has the same mean: one formula checks the other."""
    gamma, angle = 0.9, 0.3
    F = tensor([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])
    zero = torch.zeros(2, dtype=torch.float64)
    mdp = LinearGaussianMDP(A=F, B=torch.eye(2).double(), c=zero, W=1e-4 * torch.eye(2).double(), K=0 * F, k=zero)
    mean = mdp.successor(tensor([math.cos(0.7), math.sin(0.7)]), None, gamma).mean[0]
    phi = complex(math.cos(angle), math.sin(angle))
    truth = complex(math.cos(0.7), math.sin(0.7)) * (1 - gamma) * phi / (1 - gamma * phi)
    torch.testing.assert_close(mean, tensor(truth.real, truth.imag), atol=1e-12, rtol=0)
