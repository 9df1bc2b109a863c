"""Mean, standard deviation and range of columns, with which models standardise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def units(
    found: Mapping[str, Sequence[float]], states: Sequence[str], actions: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return what the provenance of an environment says about its units, and a sentence on each constant component.

    Args:
        found: Moments of the next states and, behind them, of the actions; see `Moments.result`.
        states: Names of the components of a state.
        actions: Names of the components of an action.

    Returns:
        `loc`, `scale`, `low` and `high` of the states, `constants`, the values of states that no model contains, and
        `action_loc` and `action_scale`; and the sentences.

    Raises:
        UserError: All components of the state are constant.
    """
    count = len(states)
    parts = [{name: values[part] for name, values in found.items()} for part in (slice(count), slice(count, None))]
    constants, fixed = (_constants(names, **part) for names, part in zip((states, actions), parts, strict=True))
    if len(constants) == len(states):
        raise UserError(
            "the transitions change no component of the state: "
            f"{', '.join(f'{name} is {value:g}' for name, value in constants.items())}; expected one that varies."
        )
    sentences = [
        f"{name} is {value:g} in all transitions, so that it is no part of the models and is put back in samples"
        for name, value in constants.items()
    ]
    sentences += [
        f"the action {name} is {value:g} in all transitions, so that models know no other value of it"
        for name, value in fixed.items()
    ]
    of_actions = {f"action_{name}": parts[1][name] for name in ("loc", "scale")}
    return {**parts[0], "constants": constants, **of_actions}, sentences


def _constants(names: Sequence[str], low: Sequence[float], high: Sequence[float], **others: object) -> dict[str, float]:
    return {name: a for name, a, b in zip(names, low, high, strict=True) if not b > a}


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

    def including(self, tables: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        """Yield tables unchanged, and include the rows of each."""
        for table in tables:
            self.add(table[self.columns].to_numpy(dtype=np.float64))
            yield table

    def check_varying(self, source: str) -> None:
        """Raise an error if a column is constant.

        Args:
            source: Name of the table, for the message.

        Raises:
            UserError: A column is constant; the message names the first one.
        """
        for name, value in _constants(self.columns, self.low.tolist(), self.high.tolist()).items():
            raise UserError(
                f"the column {name!r} of {source} is constant ({value}); expected it to vary, so leave it out."
            )

    def result(self) -> dict[str, list[float]]:
        """Return `loc`, `scale`, `low` and `high`; a constant column is 0 when it is standardised, with scale 1."""
        varies = self.high > self.low  # the standard deviation of a constant may be a rounding error in place of 0
        loc, scale = np.where(varies, self.mean, self.low), np.where(varies, np.sqrt(self.squares / self.count), 1.0)
        moments = {"loc": loc, "scale": scale, "low": self.low, "high": self.high}
        return {name: value.tolist() for name, value in moments.items()}
