"""Mean, standard deviation and range of columns, with which models standardise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.base.errors import UserError


def check_varying(source: str, columns: Sequence[str], low: np.ndarray, high: np.ndarray) -> None:
    """Raise an error if the minimum and maximum of a column are equal.

    The standard deviation of a constant column may be a rounding error instead of zero, so it is not checked.

    Args:
        source: Name of the table, for the message.
        columns: Names of the columns.
        low: Minimum of each column.
        high: Maximum of each column.

    Raises:
        UserError: A column is constant; the message names the first one.
    """
    for name, least, largest in zip(columns, low, high, strict=True):
        if not largest > least:
            raise UserError(
                f"the column {name!r} of {source} is constant ({least}); expected it to vary, so leave it out."
            )


class Moments:
    """Running mean, standard deviation and range of columns (Chan, Golub and LeVeque 1983).

    >>> moments = Moments(["x"])
    >>> moments.add(np.array([[1.0], [2.0]])), moments.add(np.array([[6.0]]))
    (None, None)
    >>> moments.result()
    {'loc': [3.0], 'scale': [2.160246899469287], 'low': [1.0], 'high': [6.0]}
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.count = 0
        self.mean = self.squares = np.zeros(len(self.columns))
        self.low, self.high = np.full(len(self.columns), np.inf), np.full(len(self.columns), -np.inf)

    def add(self, rows: NDArray[np.float64]) -> None:
        """Include rows (n, columns)."""
        n, mean = len(rows), rows.mean(0)
        total, change = self.count + n, mean - self.mean
        self.squares = self.squares + n * rows.var(0) + change**2 * (self.count * n / total)
        self.mean, self.count = self.mean + change * (n / total), total
        self.low, self.high = np.minimum(self.low, rows.min(0)), np.maximum(self.high, rows.max(0))

    def result(self, source: str = "the transitions") -> dict[str, list[float]]:
        """Return `loc`, `scale`, `low` and `high`.

        Args:
            source: Name of the rows, for the message.

        Raises:
            UserError: A column is constant, so that it cannot be standardised.
        """
        check_varying(source, self.columns, self.low, self.high)
        scale = np.sqrt(self.squares / self.count)
        moments = {"loc": self.mean, "scale": scale, "low": self.low, "high": self.high}
        return {name: value.tolist() for name, value in moments.items()}
