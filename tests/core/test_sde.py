"""Laws of the stochastic samplers, in float64: the flow's marginals, the textbook's paths, orders, both ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmatch_core.couplings import Independent
from flowmatch_core.field import Time
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives import sf2m_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import OU, VE, VP, AffinePath, CondOT, Cosine, Polynomial
from flowmatch_core.solvers import (
    EDM,
    SDE_SOLVERS,
    Constant,
    Custom,
    Diffusion,
    Memoryless,
    Nodes,
    Proportional,
    SolverError,
    solve,
    solve_sde,
)
from tests.core.test_bridge import gaussian_bridge
from tests.support.checks import BOUND, z_scores
from tests.support.random import generator, randn

PATHS = [CondOT(), CondOT(sigma_min=0.1), Cosine(), VP(), OU(horizon=4.0)]
DIFFUSIONS = [
    Constant(0.0),
    Constant(1.5),
    Memoryless(),
    Memoryless(eta=0.5),
    Proportional(2.0),
    Custom(lambda t: 2 * torch.cos(3 * t).abs() + 0.1),
]
EVERY_PATH = pytest.mark.parametrize("path", PATHS, ids=repr)
EVERY_DIFFUSION = pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: repr(d)[:20])
EVERY_SOLVER = pytest.mark.parametrize("solver", SDE_SOLVERS)


def gaussian(mean: float = 0.7, std: float = 0.5) -> GaussianMixture:
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, mean * one[:, None], std**2 * one[:, None, None])


def mixture() -> GaussianMixture:
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-1.5], [1.0]], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.tensor([[[0.09]], [[0.25]]], dtype=torch.float64))


def mixture_cdf(path: AffinePath, t: float, x: Tensor) -> Tensor:
    """The exact distribution function of the marginal of `mixture` at time t."""
    data, alpha, sigma = mixture(), path.alpha(t), path.sigma(t)
    std = (alpha**2 * data.covariances.flatten() + sigma**2).sqrt()
    z = (x[:, None] - alpha * data.means.flatten()) / std
    return (torch.special.ndtr(z) * data.weights).sum(1)


def moments(monkeypatch: pytest.MonkeyPatch, **arguments: object) -> tuple[float, float]:
    """The exact mean and variance of the end of `solve_sde` when the field is affine and the start is N(0, 1).

    The end is then affine in the start and in the noise of each step, so one unit at a time gives them all.
    """
    steps, step = int(str(arguments["steps"])), itertools.count(2)

    def unit(shape: torch.Size, **_: object) -> Tensor:
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[next(step)] = 1
        return noise

    start = torch.zeros(steps + 2, 1, dtype=torch.float64)
    start[1] = 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", unit)
        end = solve_sde(x=start, **arguments).x.squeeze(1)  # type: ignore[arg-type]
    return float(end[0]), float((end[1:] - end[0]).square().sum())


def slopes(monkeypatch: pytest.MonkeyPatch, path: AffinePath, mean: float, variance: float, **given: object) -> float:
    """The least order that mean and variance of Gaussian data show when the steps are halved."""
    errors = []
    for steps in (64, 128, 256):
        found = moments(monkeypatch, field=gaussian().velocity_field(path), path=path, steps=steps, **given)
        errors.append(abs(found[0] - mean) + abs(found[1] - variance))
    return min(math.log2(a / b) for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=repr)
@pytest.mark.parametrize(
    "diffusion",
    [Constant(0.0), Memoryless(), Memoryless(eta=0.5), Proportional(2.0), Custom(lambda t: 2 * (1 - t))],
    ids=lambda d: repr(d)[:20],
)
@pytest.mark.parametrize(("solver", "order"), [("euler_maruyama", 1.0), ("heun", 2.0)])
def test_weak_order_from_end_to_end(
    path: AffinePath, diffusion: Diffusion, solver: str, order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step, where no noise is left to correct, costs the second order a logarithm."""
    slope = slopes(monkeypatch, path, 0.7, 0.25, diffusion=diffusion, solver=solver)
    assert order - (0.2 if order == 1 else 0.5) < slope < order + 0.2


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=repr)
@EVERY_DIFFUSION
@pytest.mark.parametrize(("solver", "order"), [("euler_maruyama", 1.0), ("heun", 2.0)])
def test_weak_order_up_to_some_noise(
    path: AffinePath, diffusion: Diffusion, solver: str, order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha, sigma = float(path.alpha(0.7)), float(path.sigma(0.7))
    mean, variance = alpha * 0.7, alpha**2 * 0.25 + sigma**2
    assert slopes(monkeypatch, path, mean, variance, diffusion=diffusion, solver=solver, t1=0.7) > order - 0.25


@EVERY_PATH
@EVERY_DIFFUSION
@EVERY_SOLVER
def test_one_point_of_data_is_exact_in_one_step(path: AffinePath, diffusion: Diffusion, solver: str) -> None:
    """Every marginal is then Gaussian with the coefficients of the path, whatever the step and the noise."""
    point, n = 0.7, 40_000
    for t0, t1 in ((0.0, 1.0), (0.0, 0.6), (0.3, 0.8)):
        x = path.alpha(t0) * point + path.sigma(t0) * randn(n, 1)
        field = gaussian(point, 0.0).velocity_field(path)
        end = solve_sde(
            field, x, path=path, diffusion=diffusion, solver=solver, t0=t0, t1=t1, steps=1, generator=generator(1)
        ).x
        mean, std = float(path.alpha(t1)) * point, float(path.sigma(t1))
        assert float(end.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(n) + 1e-7)
        assert float(end.std()) == pytest.approx(std, abs=4 * std / math.sqrt(n) + 1e-7)


@EVERY_PATH
@EVERY_DIFFUSION
def test_marginals_are_those_of_the_flow(path: AffinePath, diffusion: Diffusion) -> None:
    """Kolmogorov and Smirnov against the exact marginals of a mixture, on the way and at the end."""
    n, steps = 4000, 60
    x = path.sigma(0.0) * randn(n, 1) + path.alpha(0.0) * mixture().sample(n, generator=generator(2))
    field = mixture().velocity_field(path)
    solution = solve_sde(
        field, x, path=path, diffusion=diffusion, solver="heun", steps=steps, generator=generator(1), save=True
    )
    assert solution.path is not None and solution.t is not None
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    # OU's noise vanishes as a root, so that its last steps would have to be shorter
    for i in (steps // 3, 2 * steps // 3, steps)[: 2 if isinstance(path, OU) else 3]:
        cdf = mixture_cdf(path, float(solution.t[i]), solution.path[i].flatten().sort().values)
        assert float((cdf - level).abs().max()) * math.sqrt(n) < 2.0  # p = 0.0007


@pytest.mark.parametrize("path", [Cosine(), VP()], ids=repr)
@EVERY_DIFFUSION
@EVERY_SOLVER
def test_paths_are_those_of_the_textbook_method(path: AffinePath, diffusion: Diffusion, solver: str) -> None:
    """Euler and Maruyama's method, with the score in closed form and the same noise, on fine steps."""
    data, steps, t0, t1 = mixture(), 250, 0.4, 0.7
    field, x = data.velocity_field(path), randn(20, 1)
    ours = solve_sde(
        field, x, path=path, diffusion=diffusion, solver=solver, t0=t0, t1=t1, steps=steps, generator=generator(1)
    ).x
    g, step = generator(1), (t1 - t0) / steps
    for i in range(steps):
        t = torch.tensor(t0 + i * step, dtype=torch.float64)
        w = diffusion.w(path, t)
        drift = data.velocity(t, x, path) + w**2 / 2 * data.score(t, x, path)
        x = x + step * drift + w * math.sqrt(step) * torch.randn(x.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(ours, x, rtol=0, atol=3e-2)


@EVERY_PATH
@EVERY_DIFFUSION
def test_what_is_kept_is_the_integral_of_the_noise(path: AffinePath, diffusion: Diffusion) -> None:
    r"""d log kappa / dt = -w^2 / (2 sigma^2), and kappa is multiplicative."""
    s, m, t = (torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.4, 0.5))
    t.requires_grad_()
    kept = diffusion.noise_retention(path, s, t)
    (slope,) = torch.autograd.grad(kept.log().sum(), t, materialize_grads=True, allow_unused=True)
    expected = -(diffusion.w(path, t).detach() ** 2) / (2 * path.sigma(t).detach() ** 2)
    torch.testing.assert_close(slope, expected, rtol=1e-2, atol=1e-12)
    product = diffusion.noise_retention(path, s, m) * diffusion.noise_retention(path, m, t)
    torch.testing.assert_close(kept, product, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(
    ("diffusion", "w", "integral"),
    [
        (Constant(1.5), 1.5, 1.5**2 * (1 / 0.4 - 1 / 0.6)),  # of w^2 / (1 - t)^2 from 0.4 to 0.6
        (Proportional(2.0), 2 * 0.6, 2.0**2 * 0.2),
        (Custom(lambda t: 3 * (1 - t) ** 2), 3 * 0.6**2, 3 * (0.6**3 - 0.4**3)),
        (Memoryless(), math.sqrt(2 * 0.6 / 0.4), 2 * math.log(0.6 * 0.6 / (0.4 * 0.4))),
        (Memoryless(0.5), 0.5 * math.sqrt(2 * 0.6 / 0.4), 0.5 * math.log(0.6 * 0.6 / (0.4 * 0.4))),
    ],
)
def test_noise_on_the_straight_path(diffusion: Diffusion, w: float, integral: float) -> None:
    s, t = (torch.tensor(v, dtype=torch.float64) for v in (0.4, 0.6))
    assert float(diffusion.w(CondOT(), s)) == pytest.approx(w)
    assert float(diffusion.noise_retention(CondOT(), s, t)) == pytest.approx(math.exp(-integral / 2), rel=1e-4)


@EVERY_PATH
def test_no_noise_is_the_probability_flow(path: AffinePath) -> None:
    field, x = mixture().velocity_field(path), randn(50, 1)
    exact = solve(field, x, t1=0.9, solver="rk4", steps=200).x
    for solver, tolerance in (("euler_maruyama", 4e-2), ("heun", 6e-4)):
        end = solve_sde(field, x, path=path, diffusion=Constant(0.0), solver=solver, t1=0.9, steps=300).x
        torch.testing.assert_close(end, exact, rtol=0, atol=tolerance)


def test_no_noise_on_the_straight_path_is_eulers_method() -> None:
    field, x = mixture().velocity_field(CondOT()), randn(50, 1)
    end = solve_sde(field, x, path=CondOT(), diffusion=Constant(0.0), steps=7).x
    torch.testing.assert_close(end, solve(field, x, solver="euler", steps=7).x, rtol=1e-12, atol=1e-12)


def test_memoryless_forgets_where_it_came_from_and_the_flow_does_not() -> None:
    """From starts far in one tail: the reverse SDE ends in the data all the same, the flow at their edge."""
    field = gaussian().velocity_field(CondOT())
    x = torch.full((20_000, 1), 3.0, dtype=torch.float64)
    end = solve_sde(field, x, path=CondOT(), solver="heun", steps=64, generator=generator()).x
    assert float(end.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(end.std()) == pytest.approx(0.5, abs=0.02)
    still = solve_sde(field, x[:1], path=CondOT(), diffusion=Constant(0.0), solver="heun", steps=64).x
    assert float(still) == pytest.approx(0.7 + 3.0 * 0.5, abs=0.01)


def test_variance_exploding_path_from_its_wide_source() -> None:
    path, n = VE(sigma_min=0.01, sigma_max=20.0), 20_000
    field = mixture().velocity_field(path)
    x = float(path.sigma(0.0)) * randn(n, 1)
    end = solve_sde(field, x, path=path, solver="heun", steps=80, generator=generator()).x
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((mixture_cdf(path, 1.0, end.flatten().sort().values) - level).abs().max()) * math.sqrt(n) < 2.0


# --- a learned score: couplings and bridges --------------------------------------------------------------------------


def transported(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """The velocity of the optimal transport of N(0, 1) to N(0, 0.3^2), a straight line from x0 to 0.3 x0."""
    return -0.7 * x / (1 - 0.7 * torch.as_tensor(t))


def score_of_transported(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return -x / (1 - 0.7 * torch.as_tensor(t)) ** 2


@pytest.mark.parametrize(
    ("diffusion", "wrong"),
    [(Memoryless(1.0), 0.180), (Memoryless(0.5), 0.247), (Proportional(1.0), None)],
    ids=["memoryless", "half", "proportional"],
)
@EVERY_SOLVER
def test_a_coupled_field_needs_its_score(
    diffusion: Diffusion, wrong: float | None, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"field": transported, "path": CondOT(), "diffusion": diffusion, "steps": 400, "solver": solver}
    mean, variance = moments(monkeypatch, score=score_of_transported, **given)
    assert mean == 0 and math.sqrt(variance) == pytest.approx(0.3, abs=3e-3)
    without = math.sqrt(moments(monkeypatch, **given)[1])
    assert abs(without - 0.3) > 0.015
    if wrong is not None:
        assert without == pytest.approx(wrong, abs=6e-3)


@pytest.mark.parametrize(
    ("path", "diffusion"), [(CondOT(), Proportional(1.0)), (CondOT(), Memoryless()), (None, Constant(0.7))]
)
@pytest.mark.parametrize(("solver", "order"), [("euler_maruyama", 1.0), ("heun", 2.0)])
@pytest.mark.parametrize("t1", [0.6, 1.0])
def test_weak_order_with_the_score_of_a_coupling(
    path: AffinePath | None,
    diffusion: Diffusion,
    solver: str,
    order: float,
    t1: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a path the last step, where no noise is left to correct, costs the second order a part."""
    errors = []
    for steps in (64, 256):
        given = {"path": path, "score": score_of_transported, "diffusion": diffusion, "solver": solver, "t1": t1}
        found = moments(monkeypatch, field=transported, steps=steps, **given)
        errors.append(abs(found[1] - (1 - 0.7 * t1) ** 2))
    measured = math.log2(errors[0] / errors[1]) / 2
    assert measured > order - (0.6 if path and t1 == 1 else 0.25)


@EVERY_PATH
@EVERY_DIFFUSION
@EVERY_SOLVER
def test_the_exact_score_changes_nothing_without_a_coupling(
    path: AffinePath, diffusion: Diffusion, solver: str
) -> None:
    data, x = mixture(), randn(20, 1)
    given = {"path": path, "diffusion": diffusion, "solver": solver, "steps": 7, "t1": 0.9}

    def score(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return data.score(t, x, path)

    learned = solve_sde(data.velocity_field(path), x, score=score, generator=generator(1), **given)  # type: ignore[arg-type]
    derived = solve_sde(data.velocity_field(path), x, generator=generator(1), **given)  # type: ignore[arg-type]
    torch.testing.assert_close(learned.x, derived.x, rtol=1e-7, atol=1e-7)


SIGMA = 0.8
BRIDGE = gaussian_bridge(2, SIGMA)


def bridge_velocity(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return BRIDGE.velocity(torch.as_tensor(t, dtype=torch.float64), x, None)


def bridge_score(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return BRIDGE.score(torch.as_tensor(t, dtype=torch.float64), x, None)


def bridge_law(steps: int, solver: str, t0: float, t1: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The exact mean and covariance of the end, and its covariance with the start, of the simulated bridge.

    The end is affine in the start and in the noise of each step, so one unit at a time gives them all.
    """
    step = itertools.count(3, 2)

    def unit(shape: torch.Size, **_: object) -> Tensor:
        noise, first = torch.zeros(shape, dtype=torch.float64), next(step)
        noise[first : first + 2] = torch.eye(2, dtype=torch.float64)
        return noise

    mean, covariance = BRIDGE.moments(torch.tensor(t0, dtype=torch.float64))
    root = torch.linalg.cholesky(covariance)
    start = torch.zeros(2 * steps + 3, 2, dtype=torch.float64)
    start[1:3] = root.T
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", unit)
        end = solve_sde(
            bridge_velocity, mean + start, score=bridge_score, diffusion=Constant(SIGMA), solver=solver, t0=t0, t1=t1,
            steps=steps,
        ).x  # fmt: skip
    units = end[1:] - end[0]
    return torch.stack([end[0].expand(2, 2), units.T @ units, units[:2].T @ root.T])


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.0, 1.0), (1.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize(("solver", "order"), [("euler_maruyama", 1.0), ("heun", 2.0)])
def test_a_gaussian_schrodinger_bridge_both_ways(
    t0: float, t1: float, solver: str, order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean, covariance and joint covariance of the ends, in closed form (Bunne et al., 2023), and the weak order."""
    mean, covariance = BRIDGE.moments(torch.tensor(t1, dtype=torch.float64))
    errors = []
    for steps in (25, 100):
        found = bridge_law(steps, solver, t0, t1, monkeypatch)
        error = (found[0, 0] - mean).norm() + (found[1] - covariance).norm()
        if abs(t1 - t0) == 1:
            error = error + (found[2] - (BRIDGE.cross.T if t1 == 1 else BRIDGE.cross)).norm()
        errors.append(float(error))
    assert errors[1] < (0.02 if order == 1 else 4e-4)
    assert math.log2(errors[0] / errors[1]) / 2 > order - 0.25


def test_a_bridge_returns_to_where_it_came_from() -> None:
    """There and back with independent noise: the law of the start, at other points."""
    n = 20_000
    x0 = BRIDGE.ends(n, seed=3)[0]
    given = {"score": bridge_score, "diffusion": Constant(SIGMA), "solver": "heun", "steps": 30}
    x1 = solve_sde(bridge_velocity, x0, generator=generator(1), **given).x  # type: ignore[arg-type]
    back = solve_sde(bridge_velocity, x1, t0=1.0, t1=0.0, generator=generator(2), **given).x  # type: ignore[arg-type]
    assert (z_scores(back, BRIDGE.m0).abs() < BOUND).all()
    products = ((back - BRIDGE.m0)[:, :, None] * (back - BRIDGE.m0)[:, None]).flatten(1)
    assert (z_scores(products, BRIDGE.s0.flatten()).abs() < BOUND).all()
    assert (back - x0).norm(dim=1).mean() > 0.3


def test_a_bridge_with_a_diffusion_of_time() -> None:
    """The same marginals for any diffusion: there is but one velocity and one score."""
    n = 20_000
    x0 = BRIDGE.ends(n, seed=3)[0]
    for diffusion in (Custom(lambda t: 1.5 * t), Constant(0.0)):
        solution = solve_sde(
            bridge_velocity, x0, score=bridge_score, diffusion=diffusion, solver="heun", steps=40,
            times=[0.0, 0.5, 0.8], generator=generator(1),
        )  # fmt: skip
        assert solution.path is not None and solution.t is not None and solution.t.tolist() == [0.0, 0.5, 0.8]
        for t, states in zip(solution.t[1:], solution.path[1:], strict=True):
            mean, covariance = BRIDGE.moments(t)
            assert (z_scores(states, mean).abs() < BOUND).all()
            assert (z_scores((states - mean).square(), covariance.diagonal()).abs() < BOUND).all()


def test_fields_trained_by_sf2m_are_sampled_both_ways() -> None:
    """From training to samples with the library's own parts; the pairs are those of the static bridge."""
    field, score = (MLPField(2, (32,), generator=generator(i)) for i in (0, 1))
    optimizer = torch.optim.Adam([*field.parameters(), *score.parameters()], 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    g = generator(2)
    for i in range(200):
        x0, x1 = (end.float() for end in BRIDGE.ends(512, seed=i))
        optimizer.zero_grad()
        sf2m_loss(field, score, x1, x0, sigma=SIGMA, coupling=Independent(), generator=g).backward()
        optimizer.step()
        schedule.step()
    starts = BRIDGE.ends(8000, seed=1000)
    for solver, (t0, t1) in itertools.product(SDE_SOLVERS, ((0.0, 1.0), (1.0, 0.0))):
        start = starts[int(t0)]
        with torch.no_grad():
            end = solve_sde(
                field, start.float(), score=score, diffusion=Constant(SIGMA), t0=t0, t1=t1, solver=solver, steps=50,
                generator=generator(3),
            ).x.double()  # fmt: skip
        mean, covariance = BRIDGE.moments(torch.tensor(t1, dtype=torch.float64))
        joint, cross = (start - start.mean(0)).T @ (end - end.mean(0)) / len(end), BRIDGE.cross
        cross = cross if t1 == 1 else cross.T
        assert float((end.mean(0) - mean).norm()) < 0.1
        assert float((torch.cov(end.T) - covariance).norm() / covariance.norm()) < 0.12
        assert float((joint - cross).norm() / cross.norm()) < 0.12


# --- backward along a path, and output times -------------------------------------------------------------------------


@EVERY_PATH
@EVERY_SOLVER
def test_memoryless_backward_is_the_noising_of_any_field(path: AffinePath, solver: str) -> None:
    """Its drift is linear: x_t | x_1 is N(alpha_t x_1, sigma_t^2), for any field and any steps."""
    n, x1 = 40_000, 1.7
    x = torch.full((n, 1), x1, dtype=torch.float64)
    if float(path.sigma(1.0)) > 0:  # the state at t = 1 is not the data
        x = path.alpha(1.0) * x + path.sigma(1.0) * randn(n, 1)
    end = solve_sde(
        lambda t, x, cond: torch.sin(3 * x), x, path=path, t0=1.0, t1=0.3, solver=solver, steps=4,
        generator=generator(1),
    ).x  # fmt: skip
    assert abs(float(z_scores(end, path.alpha(0.3) * x1))) < BOUND
    assert float(end.std()) == pytest.approx(float(path.sigma(0.3)), rel=4 / math.sqrt(n))


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=repr)
@EVERY_DIFFUSION
@pytest.mark.parametrize(("solver", "order"), [("euler_maruyama", 1.0), ("heun", 2.0)])
def test_weak_order_backward(
    path: AffinePath, diffusion: Diffusion, solver: str, order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From N(0, 1), which is not the marginal at 0.8: an affine map of it and of the noise."""
    given = {"path": path, "diffusion": diffusion, "solver": solver, "t0": 0.8, "t1": 0.2}
    field = gaussian().velocity_field(path)
    found = [torch.tensor(moments(monkeypatch, field=field, steps=n, **given)) for n in (32, 128, 512)]
    errors = [float((law - found[-1]).abs().sum()) for law in found[:-1]]
    assert errors[1] < 1e-9 or math.log2(errors[0] / errors[1]) / 2 > order - 0.25


@EVERY_PATH
@EVERY_DIFFUSION
def test_marginals_backward_are_those_of_the_flow(path: AffinePath, diffusion: Diffusion) -> None:
    n = 4000
    g = generator(2)
    start = path.alpha(0.9) * mixture().sample(n, generator=g) + path.sigma(0.9) * randn(n, 1)
    given = {"path": path, "diffusion": diffusion, "solver": "heun", "steps": 60}
    solution = solve_sde(
        mixture().velocity_field(path), start, times=[0.9, 0.5, 0.1], generator=generator(1), **given  # type: ignore[arg-type]
    )  # fmt: skip
    assert solution.path is not None
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for t, states in zip((0.5, 0.1), solution.path[1:], strict=True):
        cdf = mixture_cdf(path, t, states.flatten().sort().values)
        assert float((cdf - level).abs().max()) * math.sqrt(n) < 2.0


def test_output_times_divide_the_steps() -> None:
    field, x = mixture().velocity_field(CondOT()), randn(8, 1)
    given = {"path": CondOT(), "diffusion": Constant(0.0), "solver": "heun"}
    times = torch.tensor([0.1, 0.33, 0.8], dtype=torch.float64)
    solution = solve_sde(field, x, times=times, steps=200, **given)  # type: ignore[arg-type]
    assert solution.path is not None and solution.t is not None and torch.equal(solution.t, times)
    for t, state in zip(times[1:], solution.path[1:], strict=True):
        exact = solve(field, x, t0=0.1, t1=float(t), solver="rk4", steps=100).x
        torch.testing.assert_close(state, exact, rtol=0, atol=1e-4)
    saved = solve_sde(field, x, steps=4, save=True, **given)  # type: ignore[arg-type]
    same = solve_sde(field, x, steps=4, times=[0.0, 0.25, 0.5, 0.75, 1.0], **given)  # type: ignore[arg-type]
    assert same.path is not None and saved.path is not None
    torch.testing.assert_close(same.path, saved.path)
    assert same.nfe == saved.nfe


@EVERY_PATH
@EVERY_DIFFUSION
@EVERY_SOLVER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_are_safe(path: AffinePath, diffusion: Diffusion, solver: str, dtype: torch.dtype) -> None:
    """Finite states and gradients from the first time to the last, for atoms and for spread data."""
    for std in (0.0, 0.5):
        data = gaussian(0.7, std)
        data = GaussianMixture(data.weights.to(dtype), data.means.to(dtype), data.covariances.to(dtype))
        x = randn(5, 1).to(dtype).requires_grad_()
        solution = solve_sde(
            data.velocity_field(path), x, path=path, diffusion=diffusion, solver=solver, steps=5, generator=generator(),
            save=True,
        )  # fmt: skip
        assert solution.path is not None and torch.isfinite(solution.path).all()
        assert solution.x.dtype == dtype
        (gradient,) = torch.autograd.grad(solution.x.sum(), x)
        assert torch.isfinite(gradient).all()


@EVERY_SOLVER
def test_the_field_is_never_asked_where_there_is_no_noise_left(solver: str) -> None:
    times: list[float] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert isinstance(t, float)
        times.append(t)
        return -x

    nfe = solve_sde(field, randn(3, 1), path=CondOT(), solver=solver, steps=4).nfe
    assert nfe == len(times) == (4 if solver == "euler_maruyama" else 7)
    assert min(times) == 0 and max(times) < 1
    times.clear()
    solve_sde(field, randn(3, 1), path=CondOT(), solver=solver, t1=0.8, steps=4)
    assert len(times) == (4 if solver == "euler_maruyama" else 8)


def test_events_conditions_grid_and_saved_path() -> None:
    x, cond = randn(3, 2, 2), randn(3, 4, seed=1)
    seen: list[Tensor | None] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append(cond)
        return -x

    nodes = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    arguments = {"path": CondOT(), "cond": cond, "steps": 3, "grid": Nodes(nodes), "save": True}
    solution = solve_sde(field, x, generator=generator(), **arguments)  # type: ignore[arg-type]
    assert solution.path is not None and solution.t is not None
    torch.testing.assert_close(solution.t, nodes)
    assert solution.path.shape == (4, 3, 2, 2)
    torch.testing.assert_close(solution.path[0], x)
    torch.testing.assert_close(solution.path[-1], solution.x)
    assert all(c is cond for c in seen)
    again = solve_sde(field, x, generator=generator(), **arguments)  # type: ignore[arg-type]
    assert torch.equal(again.x, solution.x)
    other = solve_sde(field, x, generator=generator(1), **arguments)  # type: ignore[arg-type]
    assert not torch.equal(other.x, solution.x)
    unsaved = solve_sde(field, x, path=CondOT(), steps=3, generator=generator())
    assert unsaved.path is None and unsaved.t is None


@EVERY_SOLVER
def test_a_solve_compiles_whole_and_waits_for_nothing(solver: str) -> None:
    """In one graph, and on the meta device, which has no values to wait for."""

    def sample(x: Tensor) -> Tensor:
        return solve_sde(lambda t, x, cond: -x, x, path=Cosine(), solver=solver, steps=3, check=False).x

    with torch.random.fork_rng():
        compiled = torch.compile(sample, backend="aot_eager", fullgraph=True)(torch.ones(4, 2))
    assert compiled.shape == (4, 2) and torch.isfinite(compiled).all()
    assert sample(torch.ones(4, 2, device="meta")).device.type == "meta"


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    solve_sde(lambda t, x, cond: -x, randn(3, 1), path=CondOT(), steps=3, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_independent_of_their_batch() -> None:
    """Row by row the noise differs, but with it taken away the answer is the same alone and together."""
    field, x = mixture().velocity_field(CondOT()), randn(8, 1)
    together = solve_sde(field, x, path=CondOT(), diffusion=Constant(0.0), solver="heun").x
    alone = solve_sde(field, x[:1], path=CondOT(), diffusion=Constant(0.0), solver="heun").x
    torch.testing.assert_close(alone, together[:1])


def test_nan_is_an_error_not_a_hang() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.where(x > 0, math.nan, x)

    x = torch.tensor([[1.0], [-1.0]])
    arguments = {"path": CondOT(), "diffusion": Constant(0.0), "steps": 2}
    with pytest.raises(SolverError, match="in 1 of 2 samples; look for NaN"):
        solve_sde(field, x, **arguments)  # type: ignore[arg-type]
    unchecked = solve_sde(field, x, check=False, **arguments)  # type: ignore[arg-type]
    assert unchecked.x[0].isnan() and unchecked.status == "unchecked"
    assert solve_sde(field, x[1:], **arguments).status == "finished"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: solve_sde(f, x, path=CondOT(), solver="euler"), "solver is 'euler'"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), steps=0), "steps is 0"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), t0=0.5, t1=0.5), "t0 and t1 are 0.5 and 0.5"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), t1=1.5), "between 0 and 1"),
        (lambda f, x: solve_sde(f, x), "path is None, but should be the path of the field unless score is given"),
        (lambda f, x: solve_sde(f, x, score=f), r"diffusion is Memoryless\(eta=1.0\).*Constant or Custom"),
        (lambda f, x: solve_sde(f, x, score=f, diffusion=Proportional(1.0)), r"use Constant\(sigma\)"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), score=lambda t, x: x), r"score takes the arguments \(t, x\)"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), score=lambda t, x, c: x[:1]), "the result of score has shape"),
        (lambda f, x: solve_sde(f, x.long(), path=CondOT()), "x has dtype"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), times=[0.0, 0.0]), "that increase or decrease"),
        (lambda f, x: solve_sde(f, x, path=CondOT(), times=[0.0, 2.0]), "between 0 and 1"),
        (lambda f, x: solve_sde(lambda t, x, c: x[:1], x, path=CondOT()), "the result of field has shape"),
        (lambda f, x: Constant(-1.0), "value is -1.0"),
        (lambda f, x: Memoryless(math.nan), "eta is nan"),
        (lambda f, x: Proportional(math.inf), "factor is inf"),
    ],
)
def test_bad_arguments_are_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda t, x, cond: -x, randn(3, 1))


@pytest.mark.parametrize("solver", SDE_SOLVERS)
@pytest.mark.parametrize(
    "diffusion", [Memoryless(), Constant(0.0), Proportional(1.0)], ids=["reverse", "flow", "sigma"]
)
def test_path_that_starts_at_rest(diffusion: Diffusion, solver: str) -> None:
    """Its velocity at t = 0 says nothing of the data, whose mean, zero, stands in for one step."""
    path = Polynomial(2)
    law = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.full((1, 1, 1), 0.25).double())
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    field = law.velocity_field(path)
    x = solve_sde(field, x0, path=path, diffusion=diffusion, solver=solver, steps=300, generator=g).x
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": CondOT}, "path is the class CondOT, but should be an object"),
        ({"path": CondOT(), "diffusion": Memoryless}, "diffusion is the class Memoryless, but should be an object"),
        ({"path": CondOT(), "grid": EDM}, "grid is the class EDM, but should be an object"),
    ],
)
def test_a_class_in_place_of_an_object_is_named(options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        solve_sde(lambda t, x, cond: x, randn(3, 2), **options)
