"""What holds at the fixed point and on the way to it, in closed form: td-flows 4.6."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time, TimeSampler, VelocityField
from flowmatch_core.oracles import GaussianMixture, LinearGaussianMDP
from flowmatch_core.paths import AffinePath, CondOT, Cosine
from flowmatch_core.solvers import solve
from flowmatch_core.successor import (
    GeometricHorizonModel,
    SuccessorLoss,
    Transitions,
    td2_cfm_loss,
    td_cfm_loss,
)
from flowmatch_core.times import LogitNormalTime
from tests.support.checks import BOUND, z_scores
from tests.support.processes import Probe, scalar_process, transitions
from tests.support.random import generator, randn, tensor

GAMMA = 0.8


class Iterate:
    r"""The n-th iterate of TD²-CFM from the zero field, whose model at first is N(0, I) at every time.

    .. math:: m_t^{(n)} = \sum_{k \le n} (1-\gamma) \gamma^{k-1} N(\alpha_t \mu_k, \alpha_t^2 \Sigma_k + \sigma_t^2)
        + \gamma^n N(0, 1)
    """

    def __init__(self, mdp: LinearGaussianMDP, n: int, path: AffinePath = CondOT()) -> None:
        self.mdp, self.n, self.path = mdp, n, path

    def parts(self, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `(n,)`, means `(rows, n)` and variances `(n,)` of the steps that have been learned."""
        mdp = self.mdp
        state, action = cond[:, :1], cond[:, 1:] if cond.shape[1] > 1 else mdp.policy(cond[:, :1])
        mean, variance = (state * mdp.A + action * mdp.B + mdp.c)[:, 0], mdp.W[0, 0]
        means, variances = [], []
        for _ in range(self.n):
            means.append(mean)
            variances.append(variance)
            mean = mdp.A[0, 0] * mean + mdp.B[0, 0] * mdp.policy(mean[:, None])[:, 0] + mdp.c[0]
            variance = (mdp.A + mdp.B @ mdp.K)[0, 0] ** 2 * variance + mdp.W[0, 0]
        weights = (1 - GAMMA) * GAMMA ** torch.arange(self.n, dtype=torch.float64)
        if not means:
            return weights, state[:, :0], weights
        return weights, torch.stack(means, 1), torch.stack(variances)

    def both(self, t: Time, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """The density `(rows,)` and the velocity `(rows, 1)`."""
        weights, means, variances = self.parts(cond)
        t = as_time(t, x).expand(len(x))[:, None]
        alpha, d_alpha, sigma = self.path.alpha(t), self.path.d_alpha(t), self.path.sigma(t)
        spread = alpha**2 * variances + sigma**2
        gain = (alpha * d_alpha * variances + self.path.sigma_d_sigma(t)) / spread
        density = weights * torch.exp(-((x - alpha * means) ** 2) / (2 * spread)) / (2 * math.pi * spread).sqrt()
        untouched = GAMMA**self.n * torch.exp(-0.5 * x[:, 0] ** 2) / math.sqrt(2 * math.pi)
        total = density.sum(1) + untouched
        velocity = (density * (d_alpha * means + gain * (x - alpha * means))).sum(1) / total
        return total, velocity[:, None]

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        return self.both(t, x, cond)[1]


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_exact_backup_makes_the_next_iterate(n: int, path: AffinePath) -> None:
    """With iterate n-1 as target, iterate n is stationary for TD²-CFM: the known law of every iteration."""
    batch = transitions(scalar_process(), 20_000)
    probe = Probe(Iterate(scalar_process(), n, path), 20_000)
    loss = td2_cfm_loss(
        probe,
        Iterate(scalar_process(), n - 1, path),
        batch,
        gamma=GAMMA,
        path=path,
        solver="rk4",
        generator=generator(),
    )
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


@pytest.mark.parametrize("law", [torch.rand, LogitNormalTime()], ids=["uniform", "logit normal"])
def test_two_midpoint_steps_leave_the_fixed_point_stationary(law: TimeSampler) -> None:
    """K = 2: the points are off, but the value there is the target's own, so only the weights of points are."""
    batch, field = transitions(scalar_process(), 20_000), scalar_process().velocity_field(GAMMA)
    probe = Probe(field, 20_000)
    loss = td2_cfm_loss(probe, field, batch, gamma=GAMMA, steps=2, time=law, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


def test_an_iterate_is_not_the_next_ones_target() -> None:
    """The power of the test above: iterate 2 is refused where iterate 3 is due."""
    batch, probe = transitions(scalar_process(), 20_000), Probe(Iterate(scalar_process(), 2), 20_000)
    loss = td2_cfm_loss(probe, Iterate(scalar_process(), 2), batch, gamma=GAMMA, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() > 2 * BOUND


def test_flow_of_an_iterate_has_the_law_of_theory() -> None:
    """Samples of iterate 3 by its ODE: (sum of w_k N(mu_k, S_k)) + gamma^3 N(0, 1), by Kolmogorov and Smirnov."""
    field, n = Iterate(scalar_process(), 3), 4_000
    cond = tensor(1.5, -1.0).expand(n, 2)
    x = solve(field, randn(n, 1, seed=1), cond=cond, solver="rk4", steps=40).x[:, 0].numpy()
    weights, means, variances = field.parts(cond[:1])

    def cdf(values: np.ndarray) -> np.ndarray:
        z = (values[:, None] - means[0].numpy()) / variances.sqrt().numpy()
        return np.asarray(stats.norm.cdf(z) @ weights.numpy() + GAMMA**3 * stats.norm.cdf(values))

    assert stats.kstest(x, cdf).pvalue > 1e-3


def test_each_backup_contracts_the_distance_to_the_fixed_point() -> None:
    """sup over states of W1(m^(n+1), m) <= gamma sup W1(m^(n), m), by the distribution functions on a grid."""
    mdp, states = scalar_process(), torch.linspace(-3, 5, 17, dtype=torch.float64)[:, None]
    grid = torch.linspace(-25, 25, 5001, dtype=torch.float64)

    def distribution(weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        chances: Tensor = torch.special.ndtr((grid[:, None, None] - means) / variances.sqrt()) @ weights
        return chances

    m = mdp.successor(states, None, GAMMA, tolerance=1e-12)
    exact = distribution(m.weights, m.means[..., 0], m.covariances[:, 0, 0])
    distances = []
    for n in range(6):
        parts = distribution(*Iterate(mdp, n).parts(states)) + GAMMA**n * torch.special.ndtr(grid)[:, None]
        distances.append(float((parts - exact).abs().sum(0).max() * (grid[1] - grid[0])))
    for before, after in itertools.pairwise(distances):
        assert after <= GAMMA * before + 1e-9


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_velocity_is_a_density_weighted_average_and_no_plain_one(t: float) -> None:
    """v* = [(1-g) P_t v_P + g E m_t v*(S')] / m_t; without the densities it is another field."""
    mdp, n = scalar_process(), 20_000
    state, action, x = tensor([1.5]), tensor([-1.0]), tensor([0.3])
    m, one = mdp.successor(state, action, GAMMA), mdp.successor(state, action, 0.0)
    next_state = mdp.step(state.expand(n, 1), action.expand(n, 1), generator=generator())
    later = mdp.successor(next_state, None, GAMMA)
    points = x.expand(n, 1)
    density, velocity = later.marginal_log_prob(t, points).exp(), later.velocity(t, points)[:, 0]
    first, first_velocity = one.marginal_log_prob(t, x).exp(), one.velocity(t, x)[:, 0]
    exact = m.velocity(t, x)[:, 0] * m.marginal_log_prob(t, x).exp()
    weighted = (1 - GAMMA) * first * first_velocity + GAMMA * density * velocity
    plain = ((1 - GAMMA) * first_velocity + GAMMA * velocity) * m.marginal_log_prob(t, x).exp()
    assert abs(z_scores(weighted, exact)) < BOUND
    assert abs(z_scores(plain, exact)) > BOUND + 1


@pytest.mark.parametrize("td_loss", [td_cfm_loss, td2_cfm_loss], ids=lambda loss: loss.__name__)
def test_target_of_the_wrong_policy_is_not_stationary(td_loss: SuccessorLoss) -> None:
    """Bootstrapping at (S', A) in place of (S', pi(S')) has another fixed point: the test of stationarity sees it."""
    batch = transitions(scalar_process(), 10_000)
    wrong = Transitions(batch.state, batch.action, batch.next_state, batch.action)
    field = scalar_process().velocity_field(GAMMA)
    probe = Probe(field, 10_000)
    loss = td_loss(probe, field, wrong, gamma=GAMMA, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() > 2 * BOUND


def moved(mdp: LinearGaussianMDP, shift: Tensor, order: list[int]) -> LinearGaussianMDP:
    """The same process in the coordinates (s + shift)[order]."""
    A, B = mdp.A[order][:, order], mdp.B[order]
    return LinearGaussianMDP(
        A=A,
        B=B,
        c=(mdp.c + shift - mdp.A @ shift)[order],
        W=mdp.W[order][:, order],
        K=mdp.K[:, order],
        k=mdp.k - mdp.K @ shift,
    )


def test_relabelled_and_shifted_states_have_relabelled_and_shifted_samples() -> None:
    """Item 7: the measure of the moved process is the moved measure, and its velocity samples it."""
    angle = 0.4
    A = 0.9 * tensor([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])
    B, c, W = tensor([1.0, 0.5], [0.0, 1.0]), tensor(0.3, -0.1), tensor([0.3, 0.1], [0.1, 0.5])
    mdp = LinearGaussianMDP(A=A, B=B, c=c, W=W, K=tensor([-0.2, 0.1], [0.0, 0.3]), k=tensor(0.2, 0.1))
    shift, order = tensor(3.0, -5.0), [1, 0]
    other, state, action = moved(mdp, shift, order), randn(4, 2, seed=1), randn(4, 2, seed=2)
    there = (state + shift)[:, order]
    x = mdp.successor(state, action, GAMMA).sample(3, generator=generator())
    torch.testing.assert_close(
        other.successor(there, action, GAMMA).log_prob((x + shift)[..., order]),
        mdp.successor(state, action, GAMMA).log_prob(x),
    )
    model = GeometricHorizonModel(other.velocity_field(GAMMA), (2,), GAMMA, steps=20)
    samples = model.sample(there, action, 250, generator=generator())
    truth = (mdp.successor(state, action, GAMMA).mean + shift)[:, order]
    assert z_scores(samples, truth).abs().max() < BOUND


def test_the_model_of_a_known_target_can_be_sampled_or_scored_alike() -> None:
    """Forward (sample, then its likelihood) and backward (the likelihood of data) agree with the truth: 4.8."""
    mdp, n = scalar_process(), 150
    state, action = tensor(1.5).expand(n, 1), tensor(-1.0).expand(n, 1)
    m: GaussianMixture = mdp.successor(state, action, GAMMA)
    model = GeometricHorizonModel(mdp.velocity_field(GAMMA), (1,), GAMMA, "rk4", steps=20)
    with torch.no_grad():
        forward, data = (
            model.sample(state[:1], action[:1], n, generator=generator())[:, 0],
            m.sample(1, generator=generator(1))[0],
        )
        for x in (forward, data):
            torch.testing.assert_close(model.log_prob(x, state, action), m.log_prob(x), atol=1e-3, rtol=0)
    assert abs(z_scores(m.log_prob(forward) - m.log_prob(data), 0.0)) < BOUND


def fields() -> list[VelocityField]:
    return [scalar_process().velocity_field(GAMMA), Iterate(scalar_process(), 3)]


@pytest.mark.parametrize("field", fields(), ids=["fixed point", "iterate"])
def test_velocity_at_pure_noise_is_the_mean_less_the_point(field: VelocityField) -> None:
    """v_0(x) = E[X] - x: a probe of the learned mean without any ODE; the iterate has learned (1 - g^3) of it."""
    cond, x = tensor([1.5, -1.0]), tensor([0.3])
    if isinstance(field, Iterate):
        weights, means, _ = field.parts(cond)
        expected = (means @ weights)[:, None] - (1 - GAMMA**3) * x
    else:
        expected = scalar_process().successor(cond[:, :1], cond[:, 1:], GAMMA).mean - x
    torch.testing.assert_close(field(0.0, x, cond), expected, atol=1e-5, rtol=0)
