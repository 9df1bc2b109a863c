"""Laws of diffusion models as flows, in float64: the chain and its limit, its samplers, and one field for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.field import Time
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import OU, VP, AffinePath, CondOT, Cosine, VelocityOf
from flowmatch_core.solvers import DDPM, Constant, Memoryless, Warped, ddim, solve, solve_sde
from tests.support.random import generator, randn

PATHS = [CondOT(), Cosine(), VP(), OU(horizon=4.0)]
EVERY_PATH = pytest.mark.parametrize("path", PATHS, ids=repr)
BETAS = torch.linspace(1e-3, 0.3, 12, dtype=torch.float64)


def mixture() -> GaussianMixture:
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-1.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    covariances = torch.tensor([[[0.2, 0.1], [0.1, 0.3]], [[0.3, 0.0], [0.0, 0.1]]], dtype=torch.float64)
    return GaussianMixture(weights, means, covariances)


def linear_rate(s: Tensor) -> Tensor:
    """The rate of `VP()` in the time of diffusion."""
    return 0.1 + 19.9 * s


# ---- the chain ----


def test_marginals_of_the_chain_are_its_steps_composed() -> None:
    """Mean and variance by recursion over the transitions, without the product formula."""
    chain, mean, variance = DDPM(BETAS), 1.0, 0.0
    assert chain.alpha.shape == chain.sigma.shape == (13,)
    for i in range(13):
        assert float(chain.alpha[i]) == pytest.approx(mean, rel=1e-12)
        assert float(chain.sigma[i]) == pytest.approx(math.sqrt(variance), rel=1e-12)
        if i < 12:
            beta = float(BETAS[i])
            mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta


def test_simulated_chain_has_its_marginals() -> None:
    chain, n, x = DDPM(BETAS), 200_000, torch.full((200_000,), 2.0, dtype=torch.float64)
    g = generator()
    for i in range(1, 13):
        x = chain.step(x, i, generator=g)
    sigma = float(chain.sigma[-1])
    assert float(x.mean()) == pytest.approx(2 * float(chain.alpha[-1]), abs=5 * sigma / math.sqrt(n))
    assert float(x.std()) == pytest.approx(sigma, abs=4 * sigma / math.sqrt(n))


@pytest.mark.parametrize("i", [1, 5, 12])
def test_a_step_adds_its_own_noise(i: int) -> None:
    x = torch.zeros(100_000, dtype=torch.float64)
    assert float(DDPM(BETAS).step(x, i, generator=generator()).var()) == pytest.approx(float(BETAS[i - 1]), rel=0.02)


def test_limit_of_the_chain_is_the_path_of_the_sde() -> None:
    """beta_i = beta(i / n) / n converges to VP with the first order, at all times."""
    errors = []
    for steps in (500, 1000, 2000):
        chain = DDPM.of_rate(linear_rate, steps)
        t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        errors.append(max((chain.alpha - VP().alpha(t)).abs().max(), (chain.sigma - VP().sigma(t)).abs().max()))
    assert errors[-1] < 5e-3
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_a_step_of_the_chain_is_a_step_of_the_sde() -> None:
    r"""Increments have the mean -beta x / 2 ds and the variance beta ds of dx = -beta x / 2 ds + sqrt(beta) dB."""
    steps, n = 100_000, 400_000
    chain, i, x = DDPM.of_rate(linear_rate, steps), 60_000, torch.full((400_000,), 3.0, dtype=torch.float64)
    moved = chain.step(x, i, generator=generator()) - x
    beta = float(linear_rate(torch.tensor(i / steps)))
    assert float(moved.var()) * steps == pytest.approx(beta, rel=0.01)
    error = 5 * math.sqrt(beta / steps / n)
    assert float(moved.mean()) == pytest.approx(-beta * 3 / 2 / steps, abs=error)


@pytest.mark.parametrize("path", [Cosine(), VP(), OU(horizon=4.0), CondOT()], ids=repr)
def test_times_have_the_ratio_of_the_chain(path: AffinePath) -> None:
    chain = DDPM(BETAS)
    t0, grid = chain.grid(path)
    t = torch.tensor([t0 + (1 - t0) * s for s in grid.nodes(12)], dtype=torch.float64)
    ratio = path.sigma(t) / path.alpha(t)
    torch.testing.assert_close(ratio, (chain.sigma / chain.alpha).flip(0), rtol=1e-9, atol=1e-9)


# ---- ancestral sampling and DDIM ----


@pytest.mark.parametrize("path", [Cosine(), VP(), OU(horizon=4.0)], ids=repr)
def test_ancestral_sampling_is_that_of_ddpm(path: AffinePath) -> None:
    """Ho et al., algorithm 2 with the posterior variance, from the noise that the field stands for."""
    chain, data, x = DDPM(BETAS), mixture(), randn(40, 2)
    t0, grid = chain.grid(path)
    field = data.velocity_field(path)
    ours = ddim(field, x, path=path, eta=1.0, t0=t0, steps=12, grid=grid, generator=generator(1), save=True)
    assert ours.t is not None
    kept, g = chain.alpha**2, generator(1)
    for i in range(12, 0, -1):
        t = float(ours.t[12 - i])
        epsilon = -data.score(t, x, path) * float(chain.sigma[i])
        beta = BETAS[i - 1]
        mean = (x - beta / (1 - kept[i]).sqrt() * epsilon) / (1 - beta).sqrt()
        posterior = (1 - kept[i - 1]) / (1 - kept[i]) * beta
        x = mean + posterior.sqrt() * torch.randn(x.shape, generator=g, dtype=x.dtype)
    torch.testing.assert_close(ours.x, x, rtol=1e-8, atol=1e-8)


@EVERY_PATH
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_is_that_of_ddim(path: AffinePath, eta: float) -> None:
    """Song et al., equations 12 and 16, for the two weights of any path."""
    data, x, s, t = mixture(), randn(30, 2), 0.3, 0.55
    (a, sa), (b, sb) = ((float(path.alpha(u)), float(path.sigma(u))) for u in (s, t))
    ours = ddim(data.velocity_field(path), x, path=path, eta=eta, t0=s, t1=t, steps=1, generator=generator(1)).x
    epsilon = -data.score(s, x, path) * sa
    clean = (x - sa * epsilon) / a
    # in the equations the state is divided by alpha: noise levels are sigma / alpha
    std = eta * sb / sa * math.sqrt(sa**2 - (a * sb / b) ** 2)
    z = torch.randn(x.shape, generator=generator(1), dtype=x.dtype)
    expected = b * clean + math.sqrt(sb**2 - std**2) * epsilon + std * z
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@EVERY_PATH
def test_the_two_ends_of_eta(path: AffinePath) -> None:
    field, x = mixture().velocity_field(path), randn(20, 2)
    given = {"path": path, "steps": 9, "grid": Warped()}
    flow = solve_sde(field, x, diffusion=Constant(0.0), generator=generator(1), **given)  # type: ignore[arg-type]
    ancestral = solve_sde(field, x, diffusion=Memoryless(), generator=generator(1), **given)  # type: ignore[arg-type]
    torch.testing.assert_close(ddim(field, x, generator=generator(1), **given).x, flow.x)  # type: ignore[arg-type]
    torch.testing.assert_close(
        ddim(field, x, eta=1.0, generator=generator(1), **given).x, ancestral.x  # type: ignore[arg-type]
    )  # fmt: skip
    torch.testing.assert_close(ddim(field, x, generator=generator(2), **given).x, flow.x)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [Cosine(), CondOT()], ids=repr)
def test_ancestral_steps_are_the_posterior_of_the_reverse_chain(path: AffinePath) -> None:
    """q(x_t | x_s, x_1) by conditioning the forward diffusion from t to s, for data of one point."""
    x1, s, t, n = 0.8, 0.3, 0.6, 200_000
    a, sa, b, sb = (float(f(u)) for u in (s, t) for f in (path.alpha, path.sigma))
    ratio = a / b  # the forward step multiplies by it and adds the missing variance
    added = sa**2 - ratio**2 * sb**2
    gain = sb**2 * ratio / (ratio**2 * sb**2 + added)
    x = torch.full((n, 1), 0.2, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    field = GaussianMixture(one, x1 * one[:, None], 0 * one[:, None, None]).velocity_field(path)
    end = ddim(field, x, path=path, eta=1.0, t0=s, t1=t, steps=1, generator=generator()).x
    std = math.sqrt(sb**2 * added / sa**2)
    assert float(end.mean()) == pytest.approx(b * x1 + gain * (0.2 - a * x1), abs=5 * std / math.sqrt(n))
    assert float(end.std()) == pytest.approx(std, abs=4 * std / math.sqrt(n))


def test_ddim_backward_finds_the_noise_of_data() -> None:
    path, x = Cosine(), randn(20, 2)
    field = mixture().velocity_field(path)
    errors = []
    for steps in (50, 200):
        data = ddim(field, x, path=path, t0=0.05, t1=0.95, steps=steps).x
        errors.append(float((ddim(field, data, path=path, t0=0.95, t1=0.05, steps=steps).x - x).norm()))
    assert math.log2(errors[0] / errors[1]) / 2 > 0.8 and errors[1] < 0.1


def test_ddim_converges_to_the_probability_flow() -> None:
    field, x = mixture().velocity_field(Cosine()), randn(20, 2)
    exact = solve(field, x, t1=0.95, solver="rk4", steps=500).x
    errors = [
        float((ddim(field, x, path=Cosine(), t1=0.95, steps=steps).x - exact).norm()) for steps in (100, 200, 400)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


# ---- one field, four names, three equations ----


def scale(path: AffinePath, t: Time, x: Tensor) -> tuple[Tensor, Tensor]:
    s = expand_time(t, x)
    return path.alpha(s), path.sigma(s)


def of_score(data: GaussianMixture, path: AffinePath) -> Callable[[Time, Tensor, Tensor | None], Tensor]:
    return lambda t, x, cond=None: data.score(t, x, path)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.9])
def test_ornstein_uhlenbeck_as_a_flow(t: float) -> None:
    """dx = -x ds + sqrt(2) dB is the flow u = -(x + score) in s, so v = horizon (x + score) in t."""
    data, path, x = mixture(), OU(horizon=4.0), randn(30, 2)
    expected = 4.0 * (x + data.score(t, x, path))
    torch.testing.assert_close(data.velocity(t, x, path), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(VelocityOf(of_score(data, path), path, "score")(t, x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.9])
def test_probability_flow_of_ddpm(t: float) -> None:
    """dx = (-beta x - beta score) / 2 ds, with s = 1 - t."""
    data, path, x = mixture(), VP(), randn(30, 2)
    beta = float(linear_rate(torch.tensor(1 - t, dtype=torch.float64)))
    expected = beta / 2 * (x + data.score(t, x, path))
    torch.testing.assert_close(data.velocity(t, x, path), expected, rtol=1e-8, atol=1e-8)


def test_reverse_sde_of_ddpm() -> None:
    """Memoryless noise on VP has w^2 = beta, and one fine step the drift beta x / 2 + beta score in t."""
    data, path, x, t, step = mixture(), VP(), randn(30, 2), 0.4, 1e-7
    beta = float(linear_rate(torch.tensor(1 - t, dtype=torch.float64)))
    assert float(Memoryless().w(path, torch.tensor(t, dtype=torch.float64))) == pytest.approx(math.sqrt(beta))
    z = torch.randn(x.shape, generator=generator(1), dtype=x.dtype)
    end = solve_sde(data.velocity_field(path), x, path=path, t0=t, t1=t + step, steps=1, generator=generator(1)).x
    drift = (end - x - math.sqrt(beta * step) * z) / step
    torch.testing.assert_close(drift, beta / 2 * x + beta * data.score(t, x, path), rtol=0, atol=2e-2)


@EVERY_PATH
@pytest.mark.parametrize("prediction", ["noise", "score", "data", "velocity"])
def test_every_prediction_samples_alike(path: AffinePath, prediction: str) -> None:
    """A network of noise, score, data or velocity, each in closed form, gives the same samples."""
    data, x = mixture(), randn(20, 2)

    def network(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = scale(path, t, x)
        score = data.score(t, x, path)
        noise = -sigma * score
        values = {"noise": noise, "score": score, "velocity": data.velocity(t, x, path)}
        return values[prediction] if prediction in values else (x - sigma * noise) / alpha

    field = VelocityOf(network, path, prediction)  # type: ignore[arg-type]
    given = {"path": path, "eta": 0.7, "t0": 0.1, "steps": 6}
    end = ddim(field, x, generator=generator(1), **given).x  # type: ignore[arg-type]
    exact = ddim(data.velocity_field(path), x, generator=generator(1), **given).x  # type: ignore[arg-type]
    torch.testing.assert_close(end, exact, rtol=1e-7, atol=1e-7)


def test_dtype_path_and_condition_are_kept() -> None:
    seen: list[Tensor | None] = []

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append(cond)
        return -x

    cond = torch.zeros(3, 1)
    solution = ddim(field, torch.ones(3, 1, 2), path=Cosine(), eta=0.5, cond=cond, steps=4, save=True)
    assert solution.x.dtype == torch.float32 and solution.nfe == 4
    assert solution.path is not None and solution.path.shape == (5, 3, 1, 2)
    assert all(c is cond for c in seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDPM(torch.zeros(3)), r"betas holds values outside \(0, 1\)"),
        (lambda: DDPM(torch.ones(3)), r"betas holds values outside \(0, 1\)"),
        (lambda: DDPM(torch.full((2, 2), 0.5)), r"betas has shape \(2, 2\)"),
        (lambda: DDPM(torch.zeros(0)), r"betas has shape \(0,\)"),
        (lambda: DDPM(BETAS).step(torch.zeros(1), 0), "i is 0"),
        (lambda: DDPM(BETAS).step(torch.zeros(1), 13), "from 1 to 12"),
        (lambda: ddim(lambda t, x, c: x, torch.zeros(1, 1), path=CondOT(), eta=1.5), "eta is 1.5"),
        (lambda: ddim(lambda t, x, c: x, torch.zeros(1, 1), path=CondOT(), eta=math.nan), "eta is nan"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("path", [VP(), OU()], ids=["vp", "ou"])
@pytest.mark.parametrize(
    "chain",
    [
        DDPM(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        DDPM.of_rate(lambda s: 0.1 + 19.9 * s, 1000),
    ],
    ids=["linear", "rate"],
)
def test_chain_that_ends_in_more_noise_than_the_path_starts_with_has_a_grid(chain: DDPM, path: AffinePath) -> None:
    t0, grid = chain.grid(path)
    steps = len(grid.times) - 1
    assert t0 == 0.0
    assert 900 < steps <= 1000
    times = torch.tensor([(1 - s) * t0 + s for s in grid.nodes(steps)], dtype=torch.float64)
    ratio = path.alpha(times[1:-1]) / path.sigma(times[1:-1])
    expected = (chain.alpha / chain.sigma).flip(0)[-steps:-1]
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0.0)
