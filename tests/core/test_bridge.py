"""Laws of Brownian and Schrödinger bridges: calculus, finite sets of ends, and the closed form between Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import as_time, expand_time
from flowmatch_core.couplings import Independent, SchrodingerBridge
from flowmatch_core.field import Time
from flowmatch_core.objectives.bridge import BrownianBridge, sb_cfm_loss, sf2m_loss
from tests.support.random import generator, randn

Field = Callable[[Time, Tensor, Tensor | None], Tensor]


def inner_times(n: int, **options: object) -> Tensor:
    """Uniform times that leave out the ends, where the closed forms below are infinite."""
    return 0.01 + 0.98 * torch.rand(n, **options)  # type: ignore[call-overload]


# --- one bridge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 2.0])
@pytest.mark.parametrize("event", [(2,), (1, 2, 3), ()])
def test_the_velocity_is_the_time_derivative_and_the_score_that_of_the_density(
    sigma: float, event: tuple[int, ...]
) -> None:
    bridge = BrownianBridge(sigma)
    x0, x1, z = randn(3, 6, *event)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    sample = bridge.sample(x0, x1, t, z)
    derivative = torch.func.jvp(lambda t: bridge.sample(x0, x1, t, z).x_t, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(sample.velocity, derivative)

    point, s = sample.x_t.clone().requires_grad_(), expand_time(t, x1)
    density = torch.distributions.Normal((1 - s) * x0 + s * x1, (sigma**2 * s * (1 - s)).sqrt())
    (score,) = torch.autograd.grad(density.log_prob(point).sum(), point)
    torch.testing.assert_close(sample.score, score)


def test_a_bridge_has_the_covariance_of_a_brownian_motion_that_returns() -> None:
    sigma, n = 1.5, 200_000
    zero = torch.zeros(n, 1, dtype=torch.float64)
    for t in (0.1, 0.5, 0.8):
        x_t = BrownianBridge(sigma).sample(zero, zero, t, randn(n, 1)).x_t
        assert float(x_t.var()) == pytest.approx(sigma**2 * t * (1 - t), rel=0.02)


def test_a_bridge_starts_and_ends_at_its_ends() -> None:
    x0, x1, z = randn(3, 5, 2)
    assert torch.equal(BrownianBridge().sample(x0, x1, 0.0, z).x_t, x0)
    assert torch.equal(BrownianBridge().sample(x0, x1, 1.0, z).x_t, x1)


# --- the losses on a finite set of ends, whose marginal laws are known -----------------------------------------------


def statistic(gradient: Callable[[int], list[Tensor]], batches: int = 30) -> float:
    """The mean of the squared t statistics of all entries of a gradient, 1.08 where all their means are zero."""
    drawn = torch.stack([torch.cat([g.flatten() for g in gradient(seed)]) for seed in range(batches)])
    t = drawn.mean(0) / (drawn.std(0) / math.sqrt(batches))
    return float(t.square().mean())


def perturbed(truth: Field, dim: int) -> tuple[Field, list[Tensor]]:
    """The truth plus all affine functions, with parameters that are zero."""
    weight = torch.zeros(dim, dim, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
    slope = torch.zeros(dim, dtype=torch.float64, requires_grad=True)

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return truth(t, x, cond) + x @ weight + bias + expand_time(t, x) * slope

    return field, [weight, bias, slope]


@dataclass(frozen=True)
class FiniteEnds:
    """Bridges between `k` equally likely pairs: the exact density, score and velocity of their mixture."""

    starts: Tensor
    ends: Tensor
    sigma: float

    def log_prob(self, t: Tensor, x: Tensor) -> Tensor:
        mean, variance = self._moments(t)
        distance = (x[:, None] - mean).square().sum(-1) / variance[:, None]
        return (-distance / 2).logsumexp(1) - x.shape[1] / 2 * (2 * math.pi * variance).log() - math.log(mean.shape[1])

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = t[:, None, None]
        return (1 - s) * self.starts + s * self.ends, self.sigma**2 * t * (1 - t)

    def score(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(as_time(t, x), point).sum(), point)
        return gradient

    def velocity(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        t = as_time(t, x)
        mean, variance = self._moments(t)
        posterior = (-(x[:, None] - mean).square().sum(-1) / (2 * variance[:, None])).softmax(1)
        tilt = (1 - 2 * t) / (2 * t * (1 - t))
        each = tilt[:, None, None] * (x[:, None] - mean) + self.ends - self.starts
        return (posterior[..., None] * each).sum(1)

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.starts), (n,), generator=generator(seed))
        return self.starts[index], self.ends[index]


FINITE = FiniteEnds(starts=randn(4, 2), ends=2 * randn(4, 2, seed=1) + 1, sigma=0.8)


def test_the_velocity_and_the_density_of_finite_ends_obey_the_continuity_equation() -> None:
    x, t = randn(50, 2), torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    rate = torch.func.jvp(lambda t: FINITE.log_prob(t, x), (t,), (torch.ones_like(t),))[1]

    def one(t: Tensor, x: Tensor) -> Tensor:
        return FINITE.velocity(t[None], x[None], None)[0]

    jacobian = torch.func.vmap(torch.func.jacrev(one, argnums=1))(t, x)
    divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    flux = (FINITE.velocity(t, x, None) * FINITE.score(t, x, None)).sum(1)
    torch.testing.assert_close(rate, -divergence - flux)


def test_the_marginal_velocity_and_score_minimise_the_losses() -> None:
    def gradient(velocity: Field, score: Field) -> Callable[[int], list[Tensor]]:
        (v, a), (s, b) = perturbed(velocity, 2), perturbed(score, 2)

        def draw(seed: int) -> list[Tensor]:
            x0, x1 = FINITE.draw(4000, seed)
            loss = sf2m_loss(
                v, s, x1, x0, sigma=0.8, coupling=Independent(), time=inner_times, generator=generator(seed)
            )
            return list(torch.autograd.grad(loss, [*a, *b]))

        return draw

    assert statistic(gradient(FINITE.velocity, FINITE.score)) < 3
    assert statistic(gradient(lambda *a: 1.1 * FINITE.velocity(*a), FINITE.score)) > 20
    assert statistic(gradient(FINITE.velocity, lambda *a: 1.1 * FINITE.score(*a))) > 20


def test_the_loss_of_both_is_the_sum_of_the_two() -> None:
    x0, x1 = FINITE.draw(64, 0)
    common = {"sigma": 0.8, "coupling": Independent()}
    both = sf2m_loss(FINITE.velocity, FINITE.score, x1, x0, **common, time=inner_times, generator=generator(3))
    flow = sb_cfm_loss(FINITE.velocity, x1, x0, **common, time=inner_times, generator=generator(3))
    g = generator(3)
    t, z = inner_times(64, generator=g, dtype=torch.float64), torch.randn(64, 2, generator=g, dtype=torch.float64)
    bridge = BrownianBridge(0.8)
    sample, std = bridge.sample(x0, x1, t, z), bridge.std(t)[:, None]
    score = (std * (FINITE.score(t, sample.x_t, None) - sample.score)).square().mean()
    torch.testing.assert_close(both, flow + score)
    weight = 1 / (1 + 0.8**2 * (1 - 2 * t) ** 2 / (4 * t * (1 - t)))
    error = (FINITE.velocity(t, sample.x_t, None) - sample.velocity).square().mean(1)
    torch.testing.assert_close(flow, (weight * error).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_finite_at_the_ends(dtype: torch.dtype) -> None:
    x0, x1 = (x.to(dtype) for x in FINITE.draw(6, 0))
    field, parameters = perturbed(lambda t, x, cond: torch.zeros_like(x), 2)
    t = torch.tensor([0.0, 1e-30, 1e-7, 0.5, 1 - 1e-7, 1.0], dtype=dtype)
    loss = sf2m_loss(field, field, x1.double(), x0.double(), sigma=0.5, time=t.double(), generator=generator())
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, parameters))
    assert sb_cfm_loss(lambda t, x, cond: x, x1, x0, time=t, generator=generator()).dtype == dtype


# --- the closed form between Gaussians -------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianBridge:
    """The Schrödinger bridge between two Gaussians (Bunne et al., 2023, theorem 3), for a Brownian motion."""

    m0: Tensor
    s0: Tensor
    m1: Tensor
    s1: Tensor
    sigma: float

    @cached_property
    def cross(self) -> Tensor:
        """Cov(x0, x1)."""
        eye = torch.eye(len(self.m0), dtype=torch.float64)
        root = power(self.s0, 0.5)
        d = power(4 * root @ self.s1 @ root + self.sigma**4 * eye, 0.5)
        return (root @ d @ power(self.s0, -0.5) - self.sigma**2 * eye) / 2

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        c, eye = self.cross, torch.eye(len(self.m0), dtype=torch.float64)
        covariance = (1 - t) ** 2 * self.s0 + t**2 * self.s1 + t * (1 - t) * (c + c.T + self.sigma**2 * eye)
        return (1 - t) * self.m0 + t * self.m1, covariance

    def score(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        mean, covariance = self.moments(only(t))
        return -torch.linalg.solve(covariance, (x - mean).T).T

    def drift(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        """The drift of the diffusion forward in time, as in the theorem."""
        s, c, eye = only(t), self.cross, torch.eye(len(self.m0), dtype=torch.float64)
        gain = s * self.s1 + (1 - s) * c.T - (1 - s) * self.s0 - s * c - self.sigma**2 * s * eye
        return self.m1 - self.m0 - self.score(t, x, cond) @ gain.T

    def velocity(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        """The probability flow: the forward drift less half the noise's share."""
        return self.drift(t, x, cond) - self.sigma**2 / 2 * self.score(t, x, cond)

    def ends(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draws from the static bridge."""
        joint = torch.cat([torch.cat([self.s0, self.cross], 1), torch.cat([self.cross.T, self.s1], 1)])
        x = randn(n, 2 * len(self.m0), seed=seed) @ torch.linalg.cholesky(joint).T
        return self.m0 + x[:, : len(self.m0)], self.m1 + x[:, len(self.m0) :]

    def independent_ends(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        z0, z1 = randn(2, n, len(self.m0), seed=seed)
        return self.m0 + z0 @ torch.linalg.cholesky(self.s0).T, self.m1 + z1 @ torch.linalg.cholesky(self.s1).T


def only(t: Time) -> Tensor:
    """The time of a batch that has but one: the closed form solves a system for each."""
    assert isinstance(t, Tensor) and bool((t == t.flatten()[0]).all())
    return t.flatten()[0]


def one_time(n: int, **options: object) -> Tensor:
    return inner_times(1, **options).expand(n)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return axes * values**exponent @ axes.T


def gaussian_bridge(dim: int, sigma: float) -> GaussianBridge:
    a, b = randn(2, dim, dim, seed=7) / math.sqrt(dim)
    eye = torch.eye(dim, dtype=torch.float64)
    shift = 0.2 * randn(2, dim, seed=8)
    return GaussianBridge(shift[0], eye / 2 + a @ a.T / 2, shift[1], eye + b @ b.T / 2, sigma)


def test_the_closed_form_is_the_bridge() -> None:
    bridge = gaussian_bridge(50, 1.3)
    joint = torch.cat([torch.cat([bridge.s0, bridge.cross], 1), torch.cat([bridge.cross.T, bridge.s1], 1)])
    # density(x0, x1) = f(x0) g(x1) exp(-|x1 - x0|^2 / 2 sigma^2): only the last factor joins the ends
    precision = torch.linalg.inv(joint)[:50, 50:]
    torch.testing.assert_close(precision, -torch.eye(50, dtype=torch.float64) / 1.3**2)
    t = torch.tensor(0.3, dtype=torch.float64)
    mean, covariance = bridge.moments(t)
    rate = torch.func.jvp(lambda t: bridge.moments(t)[1], (t,), (torch.ones_like(t),))[1]
    gain = torch.func.jacrev(lambda x: bridge.velocity(t, x[None], None)[0])(mean)
    torch.testing.assert_close(rate, gain @ covariance + covariance @ gain.T)


def gradient_at(velocity: Field, score: Field, ends: Callable[[int], tuple[Tensor, Tensor]], **options: object):  # type: ignore[no-untyped-def]
    dim = ends(0)[0].shape[1]
    (v, a), (s, b) = perturbed(velocity, dim), perturbed(score, dim)

    def draw(seed: int) -> list[Tensor]:
        x0, x1 = ends(seed)
        loss = sf2m_loss(v, s, x1, x0, time=one_time, generator=generator(seed), **options)  # type: ignore[arg-type]
        return list(torch.autograd.grad(loss, [*a, *b]))

    return draw


def test_the_gaussian_bridge_in_50_dimensions_minimises_the_losses() -> None:
    bridge = gaussian_bridge(50, 1.3)

    def at(velocity: Field, score: Field) -> float:
        given = {"sigma": 1.3, "coupling": Independent()}
        return statistic(gradient_at(velocity, score, lambda seed: bridge.ends(4000, seed), **given))

    assert at(bridge.velocity, bridge.score) < 1.2
    assert at(lambda *a: 1.1 * bridge.velocity(*a), bridge.score) > 1.5
    assert at(bridge.velocity, lambda *a: 1.1 * bridge.score(*a)) > 1.5
    assert at(bridge.drift, bridge.score) > 1.5


def test_the_coupling_finds_the_gaussian_bridge_in_50_dimensions() -> None:
    bridge = gaussian_bridge(50, 2.0)
    moments = []
    for seed in range(8):
        x0, x1 = bridge.independent_ends(512, seed)
        y0, y1, _ = SchrodingerBridge(2.0)(x0, x1, generator=generator(seed))
        moments.append((y0 - bridge.m0).T @ (y1 - bridge.m1) / 512)
    found, truth = torch.stack(moments).mean(0), bridge.cross
    # the part of the found cross-covariance along the true one
    assert float((found * truth).sum() / truth.square().sum()) == pytest.approx(1, abs=0.05)
    other = gaussian_bridge(50, 2.0 / math.sqrt(2)).cross  # half the regularisation
    assert float((other * truth).sum() / truth.square().sum()) > 1.4


def test_the_whole_finds_the_gaussian_bridge_in_50_dimensions() -> None:
    bridge = gaussian_bridge(50, 2.0)

    def at(velocity: Field, score: Field) -> float:
        return statistic(
            gradient_at(velocity, score, lambda seed: bridge.independent_ends(512, seed), sigma=2.0), batches=20
        )

    wrong = gaussian_bridge(50, 2.0 / math.sqrt(2))
    assert at(bridge.velocity, bridge.score) < 1.35
    assert at(wrong.velocity, wrong.score) > 1.6


# --- what a caller relies on -----------------------------------------------------------------------------------------


def test_the_condition_stays_with_the_data_and_the_start_defaults_to_noise() -> None:
    x1 = 10 * randn(32, 2)
    cond = torch.arange(32.0)[:, None]
    seen: list[Tensor] = []

    def field(t: Time, x: Tensor, given: Tensor | None) -> Tensor:
        assert given is cond
        seen.append(x)
        return torch.zeros_like(x)

    given = {"cond": cond, "sigma": 0.1, "coupling": SchrodingerBridge(0.1)}
    sb_cfm_loss(field, x1, **given, time=torch.ones(32, dtype=torch.float64), generator=generator())
    torch.testing.assert_close(seen[0], x1)
    sb_cfm_loss(field, x1, **given, time=torch.zeros(32, dtype=torch.float64), generator=generator())
    noise = torch.randn(32, 2, generator=generator(), dtype=torch.float64)
    assert {tuple(row) for row in seen[1].tolist()} <= {tuple(row) for row in noise.tolist()}


def test_the_default_coupling_is_the_bridge_of_the_same_scale() -> None:
    x0, x1 = randn(2, 64, 2)
    losses = [
        sb_cfm_loss(lambda t, x, cond: x, x1, x0, sigma=0.4, coupling=coupling, generator=generator())
        for coupling in (None, SchrodingerBridge(0.4), SchrodingerBridge(0.8))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_randomness_comes_from_the_generator_alone() -> None:
    x1, state = randn(16, 2), torch.get_rng_state()
    losses = [sb_cfm_loss(lambda t, x, cond: x, x1, generator=generator(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state())


def test_bad_arguments_are_named() -> None:
    x1 = randn(4, 2)

    def same(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return x

    with pytest.raises(ValueError, match="the result of field has shape"):
        sb_cfm_loss(lambda t, x, cond: x[:, :1], x1)
    with pytest.raises(ValueError, match="the result of score has shape"):
        sf2m_loss(same, lambda t, x, cond: x[:, :1], x1)
    with pytest.raises(ValueError, match="sigma is 0, but should be positive"):
        sb_cfm_loss(same, x1, sigma=0)
    with pytest.raises(ValueError, match="x0 has shape"):
        sb_cfm_loss(same, x1, x1[:2])
    with pytest.raises(ValueError, match=r"score takes the arguments .*t comes first"):
        sf2m_loss(same, lambda x, t: x, x1)  # type: ignore[misc, arg-type]
    for loss in (sb_cfm_loss, partial(sf2m_loss, same)):
        with pytest.raises(ValueError, match="cond is given without a coupling, but the default"):
            loss(same, x1, cond=x1)
    with pytest.raises(ValueError, match="noise has shape"):
        BrownianBridge().sample(x1, x1, 0.5, x1[:2])
