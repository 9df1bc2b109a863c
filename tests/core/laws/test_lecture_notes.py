"""Equations of the lecture notes against the functions that bear their names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.normalizing import DiscreteTimeFlow, Planar
from flowmatch_core.objectives import posterior_cfm_loss
from flowmatch_core.paths import CondOT
from flowmatch_core.solvers import Constant, ddim, solve_sde
from tests.core.test_sde import mixture, mixture_cdf
from tests.support.fields import zero
from tests.support.random import generator, randn, tensor

CHANCE = 4.5  # standard errors


def target(x: Tensor, x1: Tensor, t: float, reference: Tensor | None = None) -> Tensor:
    """The target that `posterior_cfm_loss` has at the points x of the straight path, read from its gradient."""
    prediction = torch.zeros_like(x, requires_grad=True)
    x0 = (x - t * x1) / (1 - t)
    times = torch.full((len(x),), t, dtype=x.dtype)
    loss = posterior_cfm_loss(lambda t, x, cond: prediction, CondOT(), x1, x0, time=times, reference=reference)
    (gradient,) = torch.autograd.grad(loss, prediction)
    return -gradient * prediction.numel() / 2


def test_posterior_average_over_samples_tends_to_the_field() -> None:
    """v(t, x) ~ sum_i w_i v(t, x | x1_i) for data N(mu, I), whose field is known by Gaussian conditioning."""
    t, mu = 0.5, tensor(3.0, -1.0)
    x = t * mu + randn(5, 2)
    exact = mu + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - t * mu)
    errors = []
    for n in (100, 10_000, 400_000):
        data = randn(n, 2, seed=1) + mu
        errors.append(float((target(x, data[:5], t, data[5:]) - exact).norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.05


def test_noise_and_data_given_the_point_are_those_of_simulated_pairs() -> None:
    """p_t(x0, x1 | x) = pi_t p / p_t: of many pairs, those whose path passes x at time t have the target as mean."""
    t, x, n, half = 0.4, 1.0, 1_000_000, 0.02
    data = tensor(-1.0, 0.5, 2.0)[:, None]
    x0, x1 = randn(n), data[torch.randint(3, (n,), generator=generator(1)), 0]
    x_t = (1 - t) * x0 + t * x1
    pairs = (x1 - x0)[(x_t - x).abs() < half]
    at_x = target(torch.full_like(data, x), data, t)
    torch.testing.assert_close(at_x, at_x[:1].expand_as(at_x))  # the same point, whichever row generated it
    assert float(at_x[0]) == pytest.approx(float(pairs.mean()), abs=CHANCE * float(pairs.std()) / len(pairs) ** 0.5)
    assert abs(float(at_x[0]) - float((x1 - x0).mean())) > 0.2  # knowing the point matters


def test_a_flow_starts_at_standard_normal_noise() -> None:
    """Samples of the field 0 are the noise itself: N(0, I), by moments and by Kolmogorov and Smirnov."""
    n = 20_000
    x = ContinuousFlow(zero, (2,), "euler", 1).sample((n,), generator=generator()).double()
    torch.testing.assert_close(x.T @ x / n, torch.eye(2, dtype=torch.float64), rtol=0, atol=CHANCE * (2 / n) ** 0.5)
    assert float(x.mean(0).abs().max()) < CHANCE / n**0.5
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for column in x.T:
        assert float((torch.special.ndtr(column.sort().values) - level).abs().max()) * math.sqrt(n) < 2.0  # p = .0007


def test_likelihood_of_layers_is_highest_at_the_truth() -> None:
    """max_theta E log p_K: on samples of K planar layers no parameter has a slope, and others have less likelihood."""
    flow = DiscreteTimeFlow(Planar(transforms=3), 2, generator=generator(1)).double()
    with torch.no_grad():
        for index, parameter in enumerate(flow.parameters()):
            parameter.add_(randn(*parameter.shape, seed=index))
        x = flow.sample((20_000,), generator=generator(2))
    parameters = list(flow.parameters())
    blocks = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(flow.log_prob(block).mean(), parameters)])
            for block in x.chunk(50)
        ]
    )
    slope, error = blocks.mean(0), blocks.std(0) / len(blocks) ** 0.5
    assert (slope.abs() < CHANCE * error).all()
    with torch.no_grad():
        best = flow.log_prob(x)
        for parameter in parameters:
            truth = parameter.clone()
            for sign in (-1, 1):
                parameter.copy_(truth + sign * 0.3 * randn(*parameter.shape, seed=10))
                less = best - flow.log_prob(x)
                assert less.mean() > CHANCE * less.std() / len(x) ** 0.5
            parameter.copy_(truth)


def conditional(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    assert cond is not None
    return CondOT().conditional_velocity(t, x, cond)


def test_marginal_score_may_replace_the_conditional_one_in_langevin_dynamics() -> None:
    """Both have the marginals of the path, though only the conditional score knows where its particle goes."""
    path, n, t1 = CondOT(), 20_000, 0.9
    x, x1 = randn(n, 1), mixture().sample(n, generator=generator(1)).double()
    ends = [
        solve_sde(
            field, x, path=path, diffusion=Constant(1.0), t1=t1, cond=cond, solver="heun", steps=60,
            generator=generator(2),
        ).x
        for field, cond in ((conditional, x1), (mixture().velocity_field(path), None))
    ]  # fmt: skip
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for end in ends:
        cdf = mixture_cdf(path, t1, end.flatten().sort().values)
        assert float((cdf - level).abs().max()) * math.sqrt(n) < 2.0  # p = .0007
    near = [float((end - t1 * x1).std()) for end in ends]
    assert near[0] == pytest.approx(1 - t1, rel=0.05) and near[1] > 5 * near[0]


def test_marginal_score_is_the_posterior_mean_of_the_conditional_ones() -> None:
    """grad log p_t(x) = E[grad log p_t(x | x1) | x], the integral by the trapezoid rule."""
    t, path = 0.6, CondOT()
    x, x1 = torch.linspace(-3, 3, 13, dtype=torch.float64), torch.linspace(-8, 8, 8001, dtype=torch.float64)
    away = x[:, None] - t * x1
    weight = (mixture().log_prob(x1[:, None]) - away.square() / (2 * (1 - t) ** 2)).softmax(1)
    average = -(weight * away).sum(1) / (1 - t) ** 2
    torch.testing.assert_close(average, mixture().score(t, x[:, None], path)[:, 0], rtol=1e-8, atol=1e-8)


def wrong(size: float, first: float, last: float) -> VelocityField:
    """The exact field with a constant error between two times."""
    exact = mixture().velocity_field(CondOT())

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        s = expand_time(t, x)
        return exact(t, x, cond) + size * ((first <= s) & (s < last))

    return field


@pytest.mark.parametrize(
    ("field", "steps", "ode_is_better"),
    [
        (wrong(0.0, 0.0, 1.0), 4, True),  # an exact field: the ODE needs fewer evaluations
        (wrong(0.0, 0.0, 1.0), 16, True),
        (wrong(0.8, 0.0, 0.4), 64, False),  # an early error: noise forgets it
        (wrong(0.8, 0.6, 1.0), 64, True),  # a late one: the drift of the SDE weighs it more
    ],
    ids=["exact, 4", "exact, 16", "early error", "late error"],
)
def test_the_table_of_ode_and_sde_sampling(field: VelocityField, steps: int, ode_is_better: bool) -> None:
    """The distance to the data's distribution function, of DDIM and of the memoryless SDE at equal evaluations."""
    n = 20_000
    x, level = randn(n, 1), (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def distance(end: Tensor) -> float:
        return float((mixture_cdf(CondOT(), 1.0, end.flatten().sort().values) - level).abs().max())

    ode = distance(ddim(field, x, path=CondOT(), steps=steps).x)
    chance = 1 / math.sqrt(n)
    for noise in range(2):
        ancestral = ddim(field, x, path=CondOT(), eta=1.0, steps=steps, generator=generator(noise)).x
        sde = solve_sde(field, x, path=CondOT(), steps=steps, generator=generator(noise)).x
        for found in map(distance, (ancestral, sde)):
            assert found > ode + chance if ode_is_better else found < ode - chance
