"""Where the methods' gradients differ in variance, and by how much: theorems 2 and 3, td-flows 4.7.

Theorem 2 (TD-CFM against TD²-CFM) stands in `test_successor.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import AffinePath, CondOT, Cosine
from flowmatch_core.successor import Transitions, td2_cfm_loss, td_cfm_coupled_loss
from tests.support.random import generator, randn, tensor

N, TAU, MEAN = 20_000, 0.4, 1.0


def independent(d: int = 1) -> Transitions:
    """Next states N(1, tau^2 I), whatever the state."""
    next_state = MEAN + TAU * randn(N, d, seed=2)
    return Transitions(randn(N, d, seed=1), None, next_state, None)


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
def test_coupled_target_is_a_function_of_the_point_where_paths_do_not_cross(path: AffinePath) -> None:
    """x0 -> mu + tau x0 is monotone: the coupled velocity at X_t is known, and its regression leaves nothing."""
    oracle = GaussianMixture(tensor(1.0), tensor([MEAN]), tensor([[TAU**2]])).velocity_field(path)

    def straight(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        t = as_time(t, x)[:, None]
        a, b, d_a, d_b = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        x0 = (x - a * MEAN) / (a * TAU + b)
        return d_a * (MEAN + TAU * x0) + d_b * x0

    loss = td_cfm_coupled_loss(
        straight, oracle, independent(), gamma=0.8, path=path, solver="rk4", steps=30, generator=generator()
    )
    assert float(loss.bootstrap) < 1e-8
    assert float(loss.direct) > 0.1


def test_coupled_gradients_vary_where_paths_cross_by_the_amount_of_theorem_3() -> None:
    """A target that turns the plane by half a turn: at t = 1/2 all straight paths meet in 0, u = -2 X0 there.

    With v = theta . phi the bootstrap's gradient is -2 g phi (u - v), so its trace of variance is
    4 g^2 |phi|^2 Var u = 4 g^2 4; TD²-CFM's target is a function of the point, and its variance is nil.
    """
    gamma, theta = 0.8, torch.zeros(N, 2, dtype=torch.float64, requires_grad=True)

    def turn(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return math.pi * torch.stack([-x[:, 1], x[:, 0]], -1)

    def halves(n: int, **options: object) -> Tensor:
        return torch.full((n,), 0.5, dtype=torch.float64)

    def constant(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return theta.repeat(2, 1)

    def turning(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        return turn(t, x) + theta.repeat(2, 1)

    batch = independent(2)
    options = {"gamma": gamma, "time": halves, "solver": "rk4", "steps": 20}
    coupled = td_cfm_coupled_loss(constant, turn, batch, **options, generator=generator())  # type: ignore[arg-type]
    td2 = td2_cfm_loss(turning, turn, batch, **options, generator=generator())  # type: ignore[arg-type]
    spread = (N * gamma * torch.autograd.grad(coupled.bootstrap, theta, retain_graph=True)[0]).var(0).sum()
    assert float(spread) == pytest.approx(4 * gamma**2 * 2 * 4, rel=0.05)
    assert float(td2.bootstrap.detach()) < 1e-8
