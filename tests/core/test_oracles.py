"""Laws of the closed forms: sums, quadrature, rollouts, the continuity and the Bellman equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.oracles import GaussianMixture, LinearGaussianMDP, gaussian_mixture, linear_gaussian
from flowmatch_core.paths import AffinePath, CondOT, Cosine
from flowmatch_core.solvers import solve
from tests.support.random import generator, tensor

PATHS = [CondOT(), CondOT(sigma_min=0.1), Cosine()]


def spiral(radius: float = 0.9, noise: float = 0.3) -> LinearGaussianMDP:
    """A rotation by 0.4 about a centre that is not the origin, under a policy that is not zero."""
    angle, K = 0.4, tensor([-0.2, 0.1], [0.0, 0.3])
    F = radius * tensor([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])
    B = tensor([1.0, 0.5], [0.0, 1.0])
    W = noise**2 * tensor([1.0, 0.3], [0.3, 0.5])
    return LinearGaussianMDP(A=F - B @ K, B=B, c=tensor(0.3, -0.1), W=W, K=K, k=tensor(0.2, 0.1))


def line(F: float = 0.8, noise: float = 0.5) -> LinearGaussianMDP:
    """One dimension: A + B K = F."""
    return LinearGaussianMDP(
        A=tensor([F + 0.5]),
        B=tensor([1.0]),
        c=tensor(0.4),
        W=tensor([noise**2]),
        K=tensor([-0.5]),
        k=tensor(0.1),
    )


def starts(rows: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, generator=generator(1)).double(), torch.randn(rows, 2, generator=generator(2)).double()


def brute_force(
    mdp: LinearGaussianMDP, state: Tensor, action: Tensor | None, gamma: float, terms: int
) -> list[tuple[float, Tensor, Tensor]]:
    """(w_n, mu_n, Sigma_n) for one state, one step after another; the first one is the next state."""
    action = mdp.K @ state + mdp.k if action is None else action
    mean, covariance, atoms = mdp.A @ state + mdp.B @ action + mdp.c, mdp.W, []
    for n in range(terms):
        atoms.append(((1 - gamma) * gamma**n, mean, covariance))
        mean = mdp.A @ mean + mdp.B @ (mdp.K @ mean + mdp.k) + mdp.c
        closed_loop = mdp.A + mdp.B @ mdp.K
        covariance = closed_loop @ covariance @ closed_loop.T + mdp.W
    return atoms


def reference(atoms: list[tuple[float, Tensor, Tensor]]) -> MixtureSameFamily:
    weights, means, covariances = (
        torch.stack([torch.as_tensor(a[i], dtype=torch.float64) for a in atoms]) for i in range(3)
    )
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


@pytest.mark.parametrize("mdp", [spiral(), spiral(radius=1.0), spiral(radius=0.0)], ids=["stable", "walk", "iid"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_moments_are_those_of_the_whole_series(mdp: LinearGaussianMDP, on_policy: bool) -> None:
    state, given = starts()
    action = None if on_policy else given
    m = mdp.successor(state, action, 0.9)
    for row in range(len(state)):
        atoms = brute_force(mdp, state[row], None if on_policy else given[row], 0.9, terms=500)
        mean = torch.stack([w * mu for w, mu, _ in atoms]).sum(0)
        second = torch.stack([w * (torch.outer(mu, mu) + cov) for w, mu, cov in atoms]).sum(0)
        torch.testing.assert_close(m.mean[row], mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(m.second_moment[row], second, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mdp", [spiral(), spiral(radius=1.0)], ids=["stable", "walk"])
def test_density_is_the_mixture_of_the_steps(mdp: LinearGaussianMDP) -> None:
    state, action = starts()
    m = mdp.successor(state, action, 0.9, tolerance=1e-14)
    x = 2 * torch.randn(4, 3, 2, generator=generator()).double()
    for row in range(3):
        truth = reference(brute_force(mdp, state[row], action[row], 0.9, terms=500))
        expected: Tensor = truth.log_prob(x[:, row])  # type: ignore[no-untyped-call]
        torch.testing.assert_close(m.log_prob(x)[:, row], expected, atol=1e-10, rtol=0)
    assert torch.equal(m.log_prob(x[0]), m.log_prob(x)[0])


def test_truncation_keeps_all_mass_and_puts_the_tail_on_the_stationary_law() -> None:
    state, _ = starts()
    for tolerance in (1e-1, 1e-3):
        m = spiral().successor(state, None, 0.99, tolerance=tolerance)
        assert m.weights.sum() == pytest.approx(1.0, abs=1e-12)
        assert 0.9 * tolerance < m.weights[-1] <= tolerance
    exact = spiral().successor(state, None, 0.99, tolerance=1e-12)
    x = state + 0.1
    torch.testing.assert_close(m.log_prob(x), exact.log_prob(x), atol=1e-4, rtol=0)


def test_random_walk_has_the_variance_and_kurtosis_of_theory() -> None:
    """F = I from 0: Var = sigma^2 / (1 - gamma) and kurtosis 3 (1 + gamma), td-flows 4.1 (b)."""
    one, zero = tensor([1.0]), tensor(0.0)
    walk = LinearGaussianMDP(A=one, B=one, c=zero, W=0.04 * one, K=0 * one, k=zero)
    m = walk.successor(tensor([0.0]), None, 0.9, tolerance=1e-16)
    variance = m.second_moment.item()
    assert variance == pytest.approx(0.04 / 0.1, rel=1e-12)
    fourth = float((m.weights * 3 * m.covariances.flatten() ** 2).sum())
    assert fourth / variance**2 == pytest.approx(3 * 1.9, rel=1e-9)


def test_values_are_integrals_of_the_rewards_over_the_density() -> None:
    mdp, gamma = spiral(), 0.8
    state, action = starts(2)
    m = mdp.successor(state, action, gamma, tolerance=1e-12)
    grid = torch.linspace(-9, 9, 201, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    density = m.log_prob(x[:, None].expand(-1, 2, -1)).exp() * (grid[1] - grid[0]) ** 2
    weight, matrix, goal = tensor(1.0, -2.0), tensor([1.0, 0.2], [0.4, 0.5]), tensor(0.5, 1.0)
    spread = tensor([0.3, 0.1], [0.1, 0.2])
    rewards = {
        "linear": x @ weight + 0.7,
        "quadratic": torch.einsum("nd,de,ne->n", x, matrix, x),
        "bump": torch.exp(-0.5 * torch.einsum("nd,de,ne->n", x - goal, spread.inverse(), x - goal)),
    }
    values = {
        "linear": mdp.value_linear(state, action, gamma, weight=weight, offset=0.7),
        "quadratic": mdp.value_quadratic(state, action, gamma, matrix=matrix),
        "bump": mdp.value_bump(state, action, gamma, goal=goal, spread=spread),
    }
    for name, reward in rewards.items():
        integral = reward @ density / (1 - gamma)
        torch.testing.assert_close(values[name], integral, atol=1e-5, rtol=0)


def test_rollouts_and_samples_have_the_closed_form_moments() -> None:
    mdp, gamma, n = spiral(), 0.8, 40_000
    start, action = tensor(1.0, -2.0), tensor(-1.0, 0.5)
    m = mdp.successor(start[None], action[None], gamma)
    rng, g = np.random.default_rng(0), generator()
    horizon = torch.from_numpy(rng.geometric(1 - gamma, n))  # on 1, 2, 3, ...
    x = mdp.step(start.expand(n, 2), action.expand(n, 2), generator=g)
    rollout = x.clone()
    for step in range(2, int(horizon.max()) + 1):
        x = mdp.step(x, mdp.policy(x), generator=g)
        rollout = torch.where((horizon == step)[:, None], x, rollout)
    for x in (rollout, m.sample(n, generator=g)[:, 0]):
        for values, truth in ((x, m.mean[0]), (x[:, :, None] * x[:, None], m.second_moment[0])):
            z = (values.mean(0) - truth) / (values.std(0) / math.sqrt(n))
            assert z.abs().max() < 4


def test_samples_follow_the_distribution_function() -> None:
    m = line().successor(tensor([2.0], [-1.0]), None, 0.9)
    x = m.sample(4000, generator=generator())[..., 0]
    for row in range(2):
        centres, scales = m.means[row, :, 0].numpy(), m.covariances[:, 0, 0].sqrt().numpy()

        def cdf(values: np.ndarray, centres: np.ndarray = centres, scales: np.ndarray = scales) -> np.ndarray:
            return np.asarray(stats.norm.cdf((values[:, None] - centres) / scales) @ m.weights.numpy())

        assert stats.kstest(x[:, row].numpy(), cdf).pvalue > 1e-3


def test_without_discount_the_measure_is_the_next_state_alone() -> None:
    mdp, (state, action) = spiral(), starts()
    m = mdp.successor(state, action, 0.0)
    torch.testing.assert_close(m.mean, state @ mdp.A.T + action @ mdp.B.T + mdp.c)
    torch.testing.assert_close(m.second_moment - m.mean[:, :, None] * m.mean[:, None], mdp.W.expand(3, 2, 2))
    x = m.sample(4, generator=generator())
    expected = MultivariateNormal(m.mean, mdp.W).log_prob(x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(m.log_prob(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_marginals_solve_the_continuity_equation(path: AffinePath) -> None:
    m = spiral().successor(starts(1)[0], None, 0.8)
    x, t = (
        torch.randn(20, 1, 2, generator=generator()).double(),
        torch.linspace(0.02, 0.98, 20, dtype=torch.float64),
    )
    for point, time in zip(x, t, strict=True):
        v = m.velocity(time, point, path)
        in_time: Tensor = torch.func.jacrev(lambda s, p=point: m.marginal_log_prob(s, p, path))(time)
        in_space: Tensor = torch.func.jacrev(lambda p, s=time: m.marginal_log_prob(s, p, path))(point)
        jacobian: Tensor = torch.func.jacrev(lambda p, s=time: m.velocity(s, p, path))(point)
        divergence = jacobian.squeeze().trace()
        assert abs(in_time + (v * in_space).sum() + divergence) < 1e-9
        torch.testing.assert_close(m.score(time, point, path), in_space[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_velocity_is_the_one_that_belongs_to_the_score(path: AffinePath) -> None:
    m = spiral().successor(*starts(), 0.9)
    x, t = torch.randn(3, 2, generator=generator()).double(), tensor(0.1, 0.5, 0.9)
    expected = path.convert(m.score(t, x, path), t, x, source="score", target="velocity")
    torch.testing.assert_close(m.velocity(t, x, path), expected, atol=1e-10, rtol=0)


def test_velocity_at_both_ends() -> None:
    """CondOT: E[X] - x, then x; Cosine: (pi / 2) E[X], then 0."""
    m, x = spiral().successor(*starts(), 0.9, tolerance=1e-12), starts()[1]
    torch.testing.assert_close(m.velocity(0.0, x), m.mean - x, atol=1e-9, rtol=0)
    torch.testing.assert_close(m.velocity(1.0, x), x, atol=1e-9, rtol=0)
    torch.testing.assert_close(m.velocity(0.0, x, Cosine()), math.pi / 2 * m.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(m.velocity(1.0, x, Cosine()), torch.zeros_like(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_velocity_is_finite_everywhere_even_for_atoms(path: AffinePath, dtype: torch.dtype) -> None:
    atoms = GaussianMixture(
        torch.tensor([0.25, 0.75], dtype=dtype),
        torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=dtype),
        torch.zeros(2, 2, 2, dtype=dtype),
    )
    x = torch.tensor([[-100.0, 7.0], [-3.0, 0.0], [2.9, 1.1]], dtype=dtype)
    for t in (0.0, 0.5, 1.0):
        assert atoms.velocity(t, x, path).isfinite().all()
    torch.testing.assert_close(atoms.velocity(0.5, x), 2 * (atoms.means[[0, 0, 1]] - x), atol=1e-4, rtol=1e-4)


def test_single_precision_agrees_with_double() -> None:
    exact = spiral().successor(*starts(), 0.95)
    single = GaussianMixture(exact.weights.float(), exact.means.float(), exact.covariances.float())
    x, t = starts()[0], tensor(0.0, 0.6, 1.0)
    torch.testing.assert_close(
        single.velocity(t.float(), x.float()), exact.velocity(t, x).float(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(single.log_prob(x.float()), exact.log_prob(x).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
def test_flow_of_the_velocity_is_the_monotone_map_to_the_measure(path: AffinePath) -> None:
    """In one dimension the flow keeps quantiles: F(psi_1(z)) = Phi(z)."""
    mdp, z = line(), torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    x = solve(mdp.velocity_field(0.9, path), z, cond=tensor([2.0]).expand(21, 1), solver="rk4", steps=80).x
    m = mdp.successor(tensor([2.0]), None, 0.9)
    components = torch.distributions.Normal(m.means[0, :, 0], m.covariances[:, 0, 0].sqrt())
    quantile = components.cdf(x) @ m.weights  # type: ignore[no-untyped-call]
    torch.testing.assert_close(quantile, torch.special.ndtr(z[:, 0]), atol=1e-6, rtol=0)


def test_flow_of_the_velocity_reproduces_the_moments() -> None:
    mdp, gamma, n = spiral(), 0.8, 2000
    state = tensor([1.0, -1.0])
    x = solve(
        mdp.velocity_field(gamma),
        torch.randn(n, 2, generator=generator()).double(),
        cond=state.expand(n, 2),
        steps=40,
    ).x
    m = mdp.successor(state, None, gamma)
    for values, truth in ((x, m.mean[0]), (x[:, :, None] * x[:, None], m.second_moment[0])):
        assert ((values.mean(0) - truth) / (values.std(0) / math.sqrt(n))).abs().max() < 4


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
def test_likelihood_of_the_velocity_is_the_density(path: AffinePath) -> None:
    mdp, (state, action), gamma = spiral(noise=0.6), starts(), 0.8
    m, cond = mdp.successor(state, action, gamma), torch.cat([state, action], -1)
    x = m.sample(1, generator=generator())[0]
    errors = []
    for steps in (10, 40, 160):
        flow = ContinuousFlow(mdp.velocity_field(gamma, path), event_shape=(2,), steps=steps)
        errors.append(float((flow.log_prob(x, cond=cond).detach() - m.log_prob(x)).abs().max()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-3


def over_next_states(
    mdp: LinearGaussianMDP, state: float, action: float, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """E[function(S')] by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    mean = mdp.A[0, 0] * state + mdp.B[0, 0] * action + mdp.c[0]
    next_state = mean + mdp.W[0, 0].sqrt() * torch.from_numpy(nodes)[:, None]
    return torch.einsum("n,n...->...", torch.from_numpy(weights / weights.sum()), function(next_state))


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_density_and_flux_satisfy_their_bellman_equations(path: AffinePath, t: float) -> None:
    """m_t = (1-g) P_t + g E[m_t(S')] and, for j = m v, j_t = (1-g) j(P)_t + g E[j_t(S')]."""
    mdp, gamma, state, action = line(), 0.9, 1.5, -0.7
    x = torch.linspace(-3, 4, 9, dtype=torch.float64)[:, None]
    m = mdp.successor(tensor([state]), tensor([action]), gamma, tolerance=1e-13)
    one_step = mdp.successor(tensor([state]), tensor([action]), 0.0)

    def both(mixture: GaussianMixture, points: Tensor) -> Tensor:
        density = mixture.marginal_log_prob(t, points, path).exp()
        return torch.stack([density, density * mixture.velocity(t, points, path)[..., 0]], -1)

    def of_next_states(next_state: Tensor) -> Tensor:
        later = mdp.successor(next_state, None, gamma, tolerance=1e-13)
        return both(later, x[:, None].expand(-1, len(next_state), -1)).transpose(0, 1)

    right = (1 - gamma) * both(one_step, x) + gamma * over_next_states(mdp, state, action, of_next_states)
    torch.testing.assert_close(both(m, x), right, atol=1e-8, rtol=0)


@pytest.mark.parametrize("on_policy", [True, False])
def test_field_is_the_velocity_of_every_row(on_policy: bool) -> None:
    mdp, (state, action), x = spiral(), starts(), starts()[1]
    t = tensor(0.2, 0.5, 0.9)
    m = mdp.successor(state, None if on_policy else action, 0.9)
    cond = state if on_policy else torch.cat([state, action], -1)
    field = mdp.velocity_field(0.9, Cosine())
    torch.testing.assert_close(field(t, x, cond), m.velocity(t, x, Cosine()), atol=1e-12, rtol=0)
    torch.testing.assert_close(field(0.5, x, cond), m.velocity(0.5, x, Cosine()), atol=1e-12, rtol=0)
    torch.testing.assert_close(m.velocity_field(Cosine())(t, x, None), m.velocity(t, x, Cosine()), atol=0, rtol=0)


def test_chunks_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp, (state, action) = spiral(), starts(5)
    m, x = mdp.successor(state, action, 0.9), torch.randn(7, 5, 2, generator=generator()).double()
    t, cond = torch.linspace(0, 1, 5, dtype=torch.float64), torch.cat([state, action], -1)
    field = mdp.velocity_field(0.9)
    whole = m.log_prob(x), m.velocity(t, x), m.score(0.5, x), field(t, x[0], cond)
    for module in (gaussian_mixture, linear_gaussian):
        monkeypatch.setattr(module, "CHUNK", 500)
    for a, b in zip(whole, (m.log_prob(x), m.velocity(t, x), m.score(0.5, x), field(t, x[0], cond)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_mixture_moments_match_its_samples_and_unbatched_shapes() -> None:
    m = GaussianMixture(tensor(0.3, 0.7), tensor([1.0, 0.0], [-1.0, 2.0]), torch.stack([spiral().W, 2 * spiral().W]))
    x = m.sample(20_000, generator=generator())
    assert x.shape == (20_000, 2)
    assert m.log_prob(x[0]).shape == ()
    assert m.velocity(0.5, x[0]).shape == (2,)
    for values, truth in ((x, m.mean), (x[:, :, None] * x[:, None], m.second_moment)):
        assert ((values.mean(0) - truth) / (values.std(0) / math.sqrt(len(x)))).abs().max() < 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spiral().successor(*starts(), 1.0), r"gamma was 1.0, but should be in \[0, 1\)"),
        (
            lambda: spiral(radius=1.2).successor(*starts(), 0.9),
            r"gamma was 0.9, but should be in \[0, 0.694444\)",
        ),
        (lambda: spiral().value_linear(*starts(), -0.1, weight=tensor(1.0, 1.0)), "gamma was -0.1"),
        (lambda: spiral().velocity_field(0.9)(0.0, starts()[0], None), "cond had shape None"),
        (
            lambda: spiral().velocity_field(0.9)(0.0, starts()[0], torch.zeros(3, 3)),
            r"cond had shape \(3, 3\)",
        ),
        (
            lambda: GaussianMixture(tensor(1.0), tensor([0.0], [1.0]), torch.ones(1, 1, 1)),
            "weights and covariances",
        ),
        (
            lambda: LinearGaussianMDP(
                tensor([1.0]), tensor([1.0]), tensor([1.0]), tensor([1.0]), tensor([1.0]), tensor(0.0)
            ),
            r"c had shape \(1, 1\), but with 1 states and 1 actions it should be \(1,\)",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
