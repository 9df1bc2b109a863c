"""Laws of transport plans: exact ones against every permutation and POT, entropic ones against POT and their form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import ot
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from flowmatch_core import transport
from flowmatch_core.transport import entropic_plan, optimal_permutation, optimal_plan

Matrix = NDArray[np.float64]


def standard_normal(n: int, dim: int, seed: int) -> Matrix:
    return np.random.default_rng(seed).standard_normal((n, dim))


def distances(n: int, dim: int = 2, seed: int = 0, kind: str = "normal") -> Matrix:
    x, y = standard_normal(n, dim, seed), standard_normal(n, dim, seed + 1000)
    if kind == "clusters":
        y = 0.01 * y + 10 * standard_normal(4, dim, seed)[np.arange(n) % 4]
    elif kind == "repeated":
        y = y[np.arange(n) // 3]
    elif kind == "outlier":
        y[0] *= 1e6
    else:
        y = 2 * y + 1
    return np.asarray(ot.dist(y, x))


KINDS = ["normal", "clusters", "repeated", "outlier"]


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_permutation_is_the_best_of_all(seed: int) -> None:
    cost = distances(6, seed=seed) if seed % 2 else standard_normal(6, 6, seed)  # any costs, negative ones too
    best = min(sum(cost[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert cost[np.arange(6), optimal_permutation(cost)].sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), [(1, 2), (2, 2), (100, 1), (200, 2), (200, 30)])
def test_the_permutation_costs_what_the_network_simplex_method_finds(n: int, dim: int, kind: str) -> None:
    cost = distances(n, dim, kind=kind)
    permutation = optimal_permutation(cost)
    assert sorted(permutation) == list(range(n))
    plan = optimal_plan(cost)
    assert cost[np.arange(n), permutation].sum() == pytest.approx((plan * cost).sum() / n, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("cost", [np.zeros((5, 5)), np.full((4, 4), -3.0), np.diag([1e300, 1.0, 0.5])])
def test_costs_that_no_price_can_sort_are_solved_too(cost: Matrix) -> None:
    permutation = optimal_permutation(cost)
    assert sorted(permutation) == list(range(len(cost)))
    expected = cost[linear_sum_assignment(cost)].sum()
    assert cost[np.arange(len(cost)), permutation].sum() == pytest.approx(expected, abs=1e-12 * np.abs(cost).max())


def test_the_permutation_does_not_depend_on_terms_of_rows_and_columns() -> None:
    cost = distances(60)
    shifted = cost + 100 * standard_normal(60, 1, 3) - 50 * standard_normal(1, 60, 4)
    assert (optimal_permutation(cost) == optimal_permutation(shifted)).all()


def test_a_plan_moves_whole_units_between_sets_of_different_sizes() -> None:
    cost = distances(12)[:, :9]
    plan = optimal_plan(cost)
    assert (plan.sum(1) == 9).all() and (plan.sum(0) == 12).all() and (plan == plan.round()).all()
    assert (plan * cost).sum() / cost.size == pytest.approx(ot.emd2([], [], cost))


def test_an_unsolved_plan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ITERATIONS", 1)
    with pytest.raises(RuntimeError, match="between 50 and 50 points was not solved"):
        optimal_plan(distances(50))


# --- entropic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg", [0.3, 2.0, 50.0])
def test_the_entropic_plan_is_that_of_pot(reg: float) -> None:
    cost = distances(40)
    weights = np.full(40, 1 / 40)
    expected = 40 * ot.sinkhorn(weights, weights, cost, reg, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    np.testing.assert_allclose(entropic_plan(cost, reg, tolerance=1e-11), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reg", [1e-3, 0.02, 0.1, 1.0, 1e3, 1e12])
def test_the_entropic_plan_has_its_marginals_and_its_form(kind: str, reg: float) -> None:
    cost = distances(50, kind=kind)
    plan = entropic_plan(cost, reg)
    np.testing.assert_allclose(plan.sum(1), 1, rtol=1e-9)
    assert np.abs(plan.sum(0) - 1).mean() <= 1e-4
    assert np.isfinite(plan).all() and (plan >= 0).all()
    # log P + c / reg is a term of the row plus one of the column, wherever P has not run out of digits
    with np.errstate(divide="ignore"):
        rest = np.log(plan) * reg + cost
    for rows in itertools.combinations(range(0, 50, 10), 2):
        both = (plan[list(rows)] > 1e-250).all(0)
        difference = rest[rows[0], both] - rest[rows[1], both]
        np.testing.assert_allclose(difference, difference[:1].repeat(len(difference)), atol=1e-9 * (reg + cost.max()))


def test_the_entropic_plan_runs_from_the_best_permutation_to_all_pairs_alike() -> None:
    cost = distances(30)
    permutation = np.eye(30)[optimal_permutation(cost)]
    np.testing.assert_allclose(entropic_plan(cost, 1e-4), permutation, atol=1e-3)
    np.testing.assert_allclose(entropic_plan(cost, 1e8), 1 / 30, rtol=1e-5)
    assert entropic_plan(np.array([[7.0]]), 1.0) == 1


def moons(n: int, seed: int) -> Matrix:
    """Costs between two moons with noise and a standard normal sample."""
    random = np.random.default_rng(seed)
    angle = np.pi * random.random(n // 2)
    x, y = np.cos(angle), np.sin(angle)
    data = np.stack([np.concatenate([x, 1 - x]), np.concatenate([y, 0.5 - y])], 1)
    noise = random.standard_normal((n, 2))
    return np.asarray(ot.dist(data + 0.1 * random.standard_normal((n, 2)), noise))


def converged(cost: Matrix, reg: float) -> Matrix:
    """Sinkhorn's algorithm in the log domain, for as long as it takes."""
    rows, columns = np.zeros(len(cost)), np.zeros(len(cost))
    for _ in range(20_000):
        columns = -reg * logsumexp((rows[:, None] - cost) / reg, axis=0)
        change = -reg * logsumexp((columns - cost) / reg, axis=1) - rows
        rows = rows + change
        if np.abs(change).max() < 1e-10 * reg:
            return np.asarray(np.exp((rows[:, None] + columns - cost) / reg))
    raise AssertionError("not converged")


def test_a_sharp_entropic_plan_is_the_fixed_point_of_sinkhorns_algorithm() -> None:
    cost, reg = moons(10, 1), 0.2
    expected = converged(cost, reg)
    np.testing.assert_allclose(entropic_plan(cost, reg, tolerance=1e-11), expected, atol=1e-8)
    assert 0.5 < expected.max(1).mean() < 0.99  # neither a permutation nor spread over all pairs


@pytest.mark.parametrize("sigma", [0.1, 0.05, 5e-3, 5e-4, 5e-8, 1e-30])
def test_the_entropic_plan_is_found_for_every_regularisation(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ROUNDS", 80)  # Sinkhorn's algorithm alone takes more
    for seed in range(12):
        cost = moons(128, seed)
        plan = entropic_plan(cost, 2 * sigma**2)
        assert np.abs(plan.sum(0) - 1).mean() <= 1e-4 and (plan >= 0).all()
        if sigma < 1e-6:
            np.testing.assert_allclose(plan, np.eye(128)[optimal_permutation(cost)], atol=1e-3)


def test_a_plan_in_two_points_is_known() -> None:
    # P = [[p, q], [q, p]] with log(p / q) = -(c_same - c_other) / reg
    p = 1 / (1 + math.exp(3.0 / 0.7))
    np.testing.assert_allclose(entropic_plan(np.array([[3.0, 0.0], [0.0, 3.0]]), 0.7), [[p, 1 - p], [1 - p, p]])


def test_an_unsolved_entropic_plan_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ROUNDS", 3)
    with pytest.raises(RuntimeError, match=r"between 50 points was not solved: .* reg=0\.001 should be larger"):
        entropic_plan(distances(50), 0.001)
