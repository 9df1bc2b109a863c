"""Exact optimal transport between two sets of equally weighted points."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["optimal_plan"]

MAX_ITERATIONS = 10_000_000


def optimal_plan(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a plan of least total cost that moves `m` units from each of `n` rows to give `n` to each of
    `m` columns.

    Whole units keep the arithmetic exact: the plan's entries are whole numbers, and for `n == m` the plan
    is `n` times a permutation matrix, because the network simplex method ends in a vertex.

    References:
        | POT: Python Optimal Transport (Flamary et al., 2021), https://pythonot.github.io

    Arguments:
        cost: The cost of moving a unit, with shape `(n, m)`.

    Example:
        >>> optimal_plan(np.array([[1.0, 0.0], [0.0, 1.0]]))
        array([[0., 2.],
               [2., 0.]])
    """
    import ot  # imported here because it takes a second

    n, m = cost.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what POT warns of is in its log, and raised below
        result: tuple[Any, Any] = ot.emd(np.full(n, m), np.full(m, n), cost, numItermax=MAX_ITERATIONS, log=True)
    plan, log = result
    if log["warning"] is not None:
        raise RuntimeError(f"the transport between {n} and {m} points was not solved: {log['warning']}.")
    return np.asarray(plan, dtype=np.float64)
