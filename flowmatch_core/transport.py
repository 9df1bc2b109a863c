"""Optimal transport between two sets of equally weighted points, exact and entropic."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmatch_core._require import required

__all__ = ["entropic_plan", "optimal_permutation", "optimal_plan"]

MAX_ITERATIONS = 10_000_000
"""Maximum number of iterations of the network simplex method."""
MAX_ROUNDS = 3_000
"""Maximum number of rounds of Sinkhorn's algorithm."""

Matrix = NDArray[np.float64]


def optimal_plan(cost: Matrix) -> Matrix:
    """Return the plan of least total cost from `n` rows of `m` units to `m` columns of `n` units.

    With integer units the arithmetic is exact: the entries of the plan are integers, and for `n == m` the plan is `n`
    times a permutation matrix, because the network simplex method ends in a vertex.

    References:
        - POT: Python Optimal Transport (Flamary et al., 2021), https://pythonot.github.io

    Args:
        cost: The cost of moving a unit, with shape `(n, m)`.

    Examples:
        >>> optimal_plan(np.array([[1.0, 0.0], [0.0, 1.0]]))
        array([[0., 2.],
               [2., 0.]])
    """
    ot = required("ot", "POT")  # imported here because it takes a second
    n, m = cost.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT's warnings are in its log, and raised below
        result: tuple[Any, Any] = ot.emd(np.full(n, m), np.full(m, n), cost, numItermax=MAX_ITERATIONS, log=True)
    plan, log = result
    if log["warning"] is not None:
        raise RuntimeError(f"the transport between {n} and {m} points was not solved: {log['warning']}.")
    return np.asarray(plan, dtype=np.float64)


def optimal_permutation(cost: Matrix) -> NDArray[np.intp]:
    r"""Return the permutation $\pi$ with the least $\sum_i c_{i \pi(i)}$.

    The assignment is exact. The algorithm adds rows one at a time along shortest augmenting paths. Dual prices
    subtracted from the columns shorten these paths; a few iterations of Sinkhorn's algorithm provide them. For 256
    points this halves the time in two dimensions, and reduces it to a quarter in 43 dimensions: 1.3 ms, against 5 ms
    of the network simplex method.

    References:
        - On Implementing 2D Rectangular Assignment Algorithms (Crouse, 2016),
          https://doi.org/10.1109/TAES.2016.140952

    Args:
        cost: The cost of each pair, with shape `(n, n)`.

    Examples:
        >>> optimal_permutation(np.array([[1.0, 0.0], [0.0, 1.0]]))
        array([1, 0])
    """
    optimize = required("scipy.optimize", "scipy")
    cost = _reduced(cost)
    reg = 0.03 * cost.mean()  # a smaller regularisation needs more iterations than it saves
    with np.errstate(all="ignore"):
        # in float32, half the time: prices of any precision leave the assignment exact
        _, columns = _scaled(np.exp((cost / -reg).astype(np.float32)), iterations=20)
        prices = reg * np.log(columns.astype(np.float64))
    if np.isfinite(prices).all():  # otherwise all costs are equal, or some are infinite
        cost = _reduced(cost - prices)
    permutation: NDArray[np.intp] = optimize.linear_sum_assignment(cost)[1]
    return permutation


def entropic_plan(cost: Matrix, reg: float, tolerance: float = 1e-4) -> Matrix:
    r"""Return the entropic transport plan.

    It is the doubly stochastic `P` with the least $\sum_{ij} P_{ij} (c_{ij} + \epsilon \log P_{ij})$.

    Row `i` is the distribution of the partner of `i`. Sinkhorn's algorithm runs in the log domain, without under- or
    overflow, with cheaper iterations of matrix-vector products in between, and with a regularisation that decreases
    to the given one.

    References:
        - Sinkhorn Distances: Lightspeed Computation of Optimal Transport (Cuturi, 2013),
          https://arxiv.org/abs/1306.0895
        - Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems (Schmitzer, 2019),
          https://arxiv.org/abs/1610.06519

    Args:
        cost: The cost of each pair, with shape `(n, n)`.
        reg: The regularisation $\epsilon$, in units of the cost.
        tolerance: The largest mean error of the sums of the columns; those of the rows are exact.

    Raises:
        RuntimeError: The sums have not converged, for instance because the regularisation is tiny relative to the
            cost.

    Examples:
        >>> entropic_plan(np.array([[1.0, 0.0], [0.0, 1.0]]), reg=1.0).round(4)
        array([[0.2689, 0.7311],
               [0.7311, 0.2689]])
    """
    cost = _reduced(cost)
    rows, columns = np.zeros(len(cost)), np.zeros(len(cost))
    current = max(reg, float(cost.mean()))
    for _ in range(MAX_ROUNDS):
        columns = -current * _log_sum_exp((rows[:, None] - cost) / current, axis=0)
        rows = -current * _log_sum_exp((columns - cost) / current, axis=1)
        plan = np.exp((rows[:, None] + columns - cost) / current)
        error = float(np.abs(plan.sum(0) - 1).mean())
        if current == reg and error <= tolerance:
            return plan
        # the sums of the plan's columns are at least 1 / n here, and stay so: no division by zero
        rows = rows + current * np.log(_scaled(plan, iterations=30)[0])
        if error <= 0.1:
            current = max(reg, current / 4)
    raise RuntimeError(
        f"the entropic transport between {len(cost)} points was not solved: its marginals are off by {error:.1g}, "
        f"so reg={reg} should be larger against the mean cost, {cost.mean():.3g}."
    )


def _reduced(cost: Matrix) -> Matrix:
    """Subtract the minimum of each row and then of each column, which does not change the optimal plan."""
    cost = cost - cost.min(1, keepdims=True)
    reduced: Matrix = cost - cost.min(0)
    return reduced


def _scaled(kernel: NDArray[Any], iterations: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return `a` and `b` such that the rows of `a * kernel * b`, and approximately the columns, sum to one."""
    a = np.ones(len(kernel), kernel.dtype)
    for _ in range(iterations):
        b = 1 / (a @ kernel)
        a = 1 / (kernel @ b)
    return a, b


def _log_sum_exp(x: Matrix, axis: int) -> Matrix:
    largest = x.max(axis, keepdims=True)
    total: Matrix = np.log(np.exp(x - largest).sum(axis)) + largest.squeeze(axis)
    return total
