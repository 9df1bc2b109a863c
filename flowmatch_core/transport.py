"""Optimal transport between two sets of equally weighted points, exact and entropic."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmatch_core._require import required

__all__ = ["entropic_plan", "optimal_permutation", "optimal_plan"]

MAX_ITERATIONS = 10_000_000
"""Maximum number of iterations of the network simplex method."""
MAX_ROUNDS = 1_000
"""Maximum number of rounds of Sinkhorn's algorithm, twenty iterations each."""
DAMPING = 1e-11
"""Share of the diagonal that keeps Newton's Laplacian regular: prices are free up to a constant, in a plan that is a
permutation up to one for each row. It changes a step, not the plan that the steps lead to."""

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
    reg = 0.05 * cost.mean()  # a smaller regularisation needs more iterations than it saves
    with np.errstate(all="ignore"):
        _, columns = _scaled(np.exp(-cost / reg), iterations=20)
        prices = reg * np.log(columns)
    if np.isfinite(prices).all():  # otherwise all costs are equal, or some are infinite
        cost = _reduced(cost - prices)
    permutation: NDArray[np.intp] = optimize.linear_sum_assignment(cost)[1]
    return permutation


def entropic_plan(cost: Matrix, reg: float, tolerance: float = 1e-4) -> Matrix:
    r"""Return the entropic transport plan.

    It is the doubly stochastic `P` with the least $\sum_{ij} P_{ij} (c_{ij} + \epsilon \log P_{ij})$.

    Row `i` is the distribution of the partner of `i`. Sinkhorn's algorithm is fast where the regularisation is large
    and slow where the plan is nearly a permutation, and Newton's method the reverse: a round is a few iterations of
    the one and, where they do not suffice, a step of the other on the dual problem. The regularisation decreases to
    the given one, and the dual prices are extrapolated to the next. For 512 points in the plane and a regularisation
    of 1 % of the mean cost this takes twice the time of `optimal_plan`. In float64 a regularisation below 1e-13 of
    the mean cost cannot be told from that.

    References:
        - Sinkhorn Distances: Lightspeed Computation of Optimal Transport (Cuturi, 2013),
          https://arxiv.org/abs/1306.0895
        - A Sinkhorn-Newton Method for Entropic Optimal Transport (Brauer et al., 2017),
          https://arxiv.org/abs/1710.06635
        - Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems (Schmitzer, 2019),
          https://arxiv.org/abs/1610.06519

    Args:
        cost: The cost of each pair, with shape `(n, n)`.
        reg: The regularisation $\epsilon$, in units of the cost.
        tolerance: The largest mean error of the sums of the columns; those of the rows are exact.

    Raises:
        RuntimeError: The sums have not converged.

    Examples:
        >>> entropic_plan(np.array([[1.0, 0.0], [0.0, 1.0]]), reg=1.0).round(4)
        array([[0.2689, 0.7311],
               [0.7311, 0.2689]])
    """
    cost = _reduced(cost)
    n, mean = len(cost), float(cost.mean())
    reg = max(reg, 1e-13 * mean)
    current, prices = max(reg, mean), np.zeros(n)
    previous = math.inf, prices  # no slope yet
    for _ in range(MAX_ROUNDS):
        plan = _row_softmax((prices - cost) / current)
        rows, columns = _scaled(plan, iterations=20)
        plan = rows[:, None] * plan * columns
        prices = prices + current * np.log(columns)
        excess = plan.sum(0) - 1
        error = float(np.abs(excess).mean())
        if current == reg and error <= tolerance:
            return plan
        if current > reg and error <= 0.5 / n:  # a column that is far off costs many steps later
            smaller = max(reg, current / 4)
            slope = (prices - previous[1]) / (current - previous[0])
            previous = current, prices
            current, prices = smaller, prices + (smaller - current) * slope
        else:
            prices = prices + current * _newton_step(plan, excess)
    raise RuntimeError(
        f"the entropic transport between {len(cost)} points was not solved: its marginals are off by {error:.1g}, "
        f"so reg={reg} should be larger against the mean cost, {mean:.3g}."
    )


def _reduced(cost: Matrix) -> Matrix:
    """Subtract the minimum of each row and then of each column, which does not change the optimal plan."""
    cost = cost - cost.min(1, keepdims=True)
    reduced: Matrix = cost - cost.min(0)
    return reduced


def _scaled(kernel: Matrix, iterations: int) -> tuple[Matrix, Matrix]:
    """Return `a` and `b` such that the rows of `a * kernel * b`, and approximately the columns, sum to one."""
    a = np.ones(len(kernel))
    for _ in range(iterations):
        b = 1 / np.maximum(a @ kernel, 1e-100)  # a column may be out of reach of every row in floating point
        a = 1 / (kernel @ b)
    return a, b


def _row_softmax(x: Matrix) -> Matrix:
    """Return the rows of `exp(x)` over their sums; overwrites `x`."""
    x -= x.max(1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(1, keepdims=True)
    return x


def _newton_step(plan: Matrix, excess: Matrix) -> Matrix:
    r"""Return the change of the prices over the regularisation that Newton's method proposes, damped.

    The dual problem is to maximise $\sum_j v_j - \epsilon \sum_i \log \sum_j e^{(v_j - c_{ij}) / \epsilon}$. Its
    gradient is minus the excess of the sums of the columns, and its Hessian that of a graph with the weights
    $P^T P$, a Laplacian.
    """
    linalg = required("scipy.linalg", "scipy")
    laplacian = -(plan.T @ plan)
    laplacian[np.diag_indices(len(plan))] += 1 + excess + DAMPING
    step = -linalg.cho_solve(linalg.cho_factor(laplacian, overwrite_a=True, check_finite=False), excess)
    step -= step.mean()
    gain = -float(excess @ step)
    size = min(1.0, 10 / np.abs(step).max())  # the quadratic model holds no further
    while -np.log(plan @ np.exp(size * step)).sum() < 1e-4 * size * gain - 1e-12:
        size /= 2
    damped: Matrix = size * step
    return damped
