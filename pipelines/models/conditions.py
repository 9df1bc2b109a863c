"""Conditions of a density, p(columns | conditions), as the condition vector of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from pipelines.base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 10  # words in a message


@final
@dataclass(frozen=True)
class Conditions:
    """How the conditions of a data set become the condition vector of a network: numbers standardised, words one-hot.

    Attributes:
        described: The conditions in order, as `conditions` of `provenance.json` and of a model's description lists
            them: `{"name", "kind": "number", "loc", "scale", "low", "high"}` or `{"name", "kind": "words", "levels"}`.

    >>> Conditions(({"name": "colour", "kind": "words", "levels": ["blue", "red"]},)).size
    2
    """

    described: tuple[Mapping[str, Any], ...]

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [one["name"] for one in self.described]

    @property
    def size(self) -> int:
        """Length of the condition vector; 0 without conditions."""
        return sum(len(one["levels"]) if one["kind"] == "words" else 1 for one in self.described)

    def encode(self, table: pd.DataFrame) -> NDArray[np.float32]:
        """Return the condition vectors of rows, `(n, size)`.

        Raises:
            UserError: A column is missing, or a value is missing, no finite number, or a word that training never saw.
        """
        blocks = [np.empty((len(table), 0))]
        for one in self.described:
            values = self._column(table, one["name"])
            if one["kind"] == "number":
                blocks.append((_numbers(one["name"], values)[:, None] - one["loc"]) / one["scale"])
            else:
                blocks.append(np.eye(len(one["levels"]))[_codes(one, values)])
        return np.concatenate(blocks, 1).astype(np.float32)

    def warnings(self, table: pd.DataFrame) -> list[str]:
        """Return a sentence for each number that lies outside the range of the training rows.

        Raises:
            UserError: A column or a value is missing, or a value is no finite number.
        """
        found = []
        for one in self.described:
            if one["kind"] == "number":
                values = _numbers(one["name"], self._column(table, one["name"]))
                outside = values[(values < one["low"]) | (values > one["high"])]
                if len(outside):
                    found.append(
                        f"the condition {one['name']!r} is {outside[0]:g} in {len(outside)} of {len(values)} rows, "
                        f"outside the range of training, {one['low']:g} to {one['high']:g}: the model extrapolates."
                    )
        return found

    def parse(self, where: Mapping[str, str]) -> dict[str, float | str]:
        """Return the values of conditions that are given as text, such as `{"species": "Gentoo"}`, in their types.

        Raises:
            UserError: A name is unknown or missing, a value is no finite number, or training never saw a word.
        """
        self._check_names(where)
        values: dict[str, float | str] = {}
        for one in self.described:
            text = where[one["name"]]
            if one["kind"] == "number":
                values[one["name"]] = float(_numbers(one["name"], np.array([text], dtype=object))[0])
            else:
                _codes(one, np.array([text], dtype=object))
                values[one["name"]] = text
        return values

    def table(self, where: Mapping[str, Any], n: int) -> pd.DataFrame:
        """Return n rows with the same conditions.

        Raises:
            UserError: A name is unknown or missing.
        """
        import pandas as pd

        self._check_names(where)
        return pd.DataFrame({name: [where[name]] * n for name in self.names}, index=range(n))

    def _check_names(self, where: Mapping[str, Any]) -> None:
        known = ", ".join(self.names) or "none"
        for name in where:
            if name not in self.names:
                raise UserError(
                    f"the model has no condition {name!r}, expected {known}{did_you_mean(name, self.names)}"
                )
        for name in self.names:
            if name not in where:
                raise UserError(f"the condition {name!r} is not given, expected a value for each of {known}.")

    def _column(self, table: pd.DataFrame, name: str) -> NDArray[Any]:
        there = list(map(str, table.columns))
        if there.count(name) != 1:
            found = f"{there.count(name)} such columns" if name in there else ", ".join(there) or "no columns"
            raise UserError(
                f"the table has no single column {name!r} for this condition of the model, found {found}"
                f"{did_you_mean(name, set(there) - {name})}"
            )
        column = table.iloc[:, there.index(name)]
        lacking = int(column.isna().sum())
        if lacking:
            raise UserError(
                f"the condition {name!r} is missing in {lacking} of {len(column)} rows; fill them in or leave them out."
            )
        return column.to_numpy(dtype=object)


def _numbers(name: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """Return values as float64."""
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError):
        numbers = np.array([_number(value) for value in values], dtype=np.float64)
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise UserError(f"the condition {name!r} is {values[bad.argmax()]!r}, expected a finite number.")
    return numbers


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _codes(described: Mapping[str, Any], values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the places of words among the levels of a condition."""
    levels: list[str] = described["levels"]
    place = {level: code for code, level in enumerate(levels)}
    codes = np.array([place.get(str(value), -1) for value in values], dtype=np.int64)
    if (codes < 0).any():
        word = str(values[(codes < 0).argmax()])
        known = ", ".join(levels[:_SHOWN]) + (f" and {len(levels) - _SHOWN} more" if len(levels) > _SHOWN else "")
        raise UserError(
            f"the condition {described['name']!r} is {word!r}, which training never saw; expected one of {known}"
            f"{did_you_mean(word, levels)}"
        )
    return codes
