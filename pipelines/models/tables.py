"""A trained density model of a table: tensors as of a flow, and DataFrames with the user's columns, units and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final, overload

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmatch_core.flow import Flow
from flowmatch_core.solvers import SolverError
from pipelines.base.errors import UserError, did_you_mean, first_line
from pipelines.models.conditions import Conditions

ROWS = 65_536
"""Rows that are sampled or scored at once."""
DRAWS = 4
"""Dequantisations of an integer or a category whose log-densities are averaged."""

Where = Mapping[str, Any] | pd.DataFrame
Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    """Report nothing."""


@final
class DensityModel:
    """A density model with the columns of the user's table.

    A tensor is given and returned in the columns and units of the prepared data, in which a category is a code plus a
    number from [0, 1). A DataFrame has the user's types: integers are integers, categories are words, and constant
    columns, which the model leaves out, have their value.

    Attributes:
        flow: The trained flow.
        columns: Modelled columns.
        conditions: Conditions of the density.

    Args:
        flow: The trained flow, in the units of the prepared data.
        meta: Description in the file of the model.
        device: Device of the flow.
    """

    def __init__(self, flow: Flow, meta: Mapping[str, Any], device: torch.device) -> None:
        self.flow, self.device = flow, device
        self.columns: list[str] = list(meta.get("columns") or [f"x{i}" for i in range(flow.event_shape[0])])
        self.conditions = Conditions(tuple(meta.get("conditions", ())))
        self.constants: Mapping[str, Any] = meta.get("constants", {})
        self._types: Mapping[str, str] = meta.get("types", {})
        self._discrete: Mapping[str, Mapping[str, Any]] = meta.get("discrete", {})

    @property
    def levels(self) -> dict[str, list[str] | None]:
        """Columns that a row needs to be scored, each with its words, or None if it holds numbers."""
        modelled = {name: self._discrete.get(name, {}).get("levels") for name in self.columns}
        return modelled | {one["name"]: one.get("levels") for one in self.conditions.described}

    def __repr__(self) -> str:
        given = f" | {', '.join(self.conditions.names)}" if self.conditions.size else ""
        return f"DensityModel(p({', '.join(self.columns)}{given}))"

    @overload
    def sample(
        self, size: int, cond: Where | None = ..., generator: torch.Generator | None = ..., progress: Progress = ...
    ) -> pd.DataFrame: ...

    @overload
    def sample(
        self, size: Sequence[int] = ..., cond: Tensor | None = ..., generator: torch.Generator | None = ...
    ) -> Tensor: ...

    def sample(
        self,
        size: int | Sequence[int] = (),
        cond: Tensor | Where | None = None,
        generator: torch.Generator | None = None,
        progress: Progress = _silent,
    ) -> Tensor | pd.DataFrame:
        """Draw samples: a shape gives a tensor, a number of rows a DataFrame.

        Args:
            size: Number of rows of the DataFrame, or shape of the draws `(*sample_shape,)`.
            cond: Conditions. For a DataFrame a mapping from names to values, which all rows have, or a DataFrame, each
                row of which gets `size` rows of the result. For a tensor the encoded conditions `(*batch, size)`.
            generator: Source of randomness.
            progress: Function that is called with the number of rows that are done and that of all rows.

        Returns:
            A tensor `(*sample_shape, *batch, columns)`, or a table of the modelled columns, conditions and constants.

        Raises:
            UserError: The number of rows is less than 1, a condition is unknown or missing, training never saw its
                value, or the solver failed.
        """
        if not isinstance(size, int):
            assert cond is None or isinstance(cond, Tensor)
            return self.flow.sample(size, cond, generator)
        if size < 1:
            raise UserError(f"the number of rows is {size}, expected at least 1.")
        if isinstance(cond, pd.DataFrame):
            given = cond.iloc[np.repeat(np.arange(len(cond)), size)].reset_index(drop=True)
        else:
            assert not isinstance(cond, Tensor)
            given = self.conditions.table(cond or {}, size)
        parts = []
        with _in_a_sentence():
            for rows in _slices(len(given), progress):
                shape, encoded = self._batch(given.iloc[rows])
                parts.append(self.flow.sample(shape, encoded, generator))
        return self._decoded(torch.cat(parts).double().cpu().numpy(), given)

    @overload
    def log_prob(self, x: pd.DataFrame, *, seed: int = ..., progress: Progress = ...) -> pd.Series: ...

    @overload
    def log_prob(self, x: Tensor, cond: Tensor | None = ..., *, generator: torch.Generator | None = ...) -> Tensor: ...

    def log_prob(
        self,
        x: Tensor | pd.DataFrame,
        cond: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int = 0,
        progress: Progress = _silent,
    ) -> Tensor | pd.Series:
        r"""Return the log-density of rows in nats, given their conditions.

        An integer or a category that was dequantised is scored by the mean of $\log p(k + u)$ over `DRAWS` numbers
        $u$ from [0, 1), a lower bound of the log-probability of $k$, whose mean is the NLL that the tables show.

        Args:
            x: Points `(*batch, columns)`, or a table with the modelled columns and the conditions; others are ignored.
            cond: Encoded conditions of a tensor.
            generator: Source of randomness of a log-density that is estimated, for a tensor.
            seed: Seed of the dequantisation, for a table.
            progress: Function that is called with the number of rows that are done and that of all rows.

        Returns:
            A tensor `(*batch,)`, or a series with the index of the table, NaN for rows that have `problems`.

        Raises:
            UserError: A column is not there or holds no numbers, or the solver failed.
        """
        if isinstance(x, Tensor):
            return self.flow.log_prob(x, cond, generator=generator)
        whole = (self.problems(x) == "").to_numpy()
        table, noise = x[whole], torch.Generator().manual_seed(seed)
        values = self._encoded(table)
        dequantised = torch.tensor([name in self._discrete for name in self.columns], dtype=torch.float64)
        draws = DRAWS if self._discrete else 1
        found = torch.zeros(len(table), dtype=torch.float64)
        with _in_a_sentence(), torch.no_grad():
            for rows in _slices(len(table), progress):
                _, encoded = self._batch(table.iloc[rows])
                here = values[rows]
                drawn = torch.rand(len(here), draws, here.shape[1], generator=noise, dtype=torch.float64)
                for u in drawn.unbind(1):  # in the order of the rows, so that batches have the same noise
                    point = (here + u * dequantised).to(self.device)
                    found[rows] += self.flow.log_prob(point, encoded).double().cpu() / draws
        result = np.full(len(x), np.nan)
        result[whole] = found.numpy()
        return pd.Series(result, index=x.index, name="log_prob")

    def problems(self, table: pd.DataFrame) -> pd.Series:
        """Return for each row why it has no log-density, or "" if it has one.

        A value is missing or infinite, or it is a word that training never saw.

        Raises:
            UserError: A column is not there or holds no numbers.
        """
        found = np.full(len(table), "", dtype=object)
        for name, known in self.levels.items():
            column = _column(table, name)
            numbers = _numbers(name, column).to_numpy() if known is None else None
            missing = column.isna().to_numpy()
            wrong = np.isinf(numbers) if numbers is not None else ~column.astype(str).isin(known or ()).to_numpy()
            for row in np.flatnonzero((missing | wrong) & (found == "")):
                unseen = f"is {column.iloc[row]!r}, which training never saw" if numbers is None else "is infinite"
                found[row] = f"{name!r} {'is missing' if missing[row] else unseen}"
        return pd.Series(found, index=table.index)

    def _batch(self, table: pd.DataFrame) -> tuple[tuple[int, ...], Tensor | None]:
        """Return the shape of the draws for rows, one each, and their encoded conditions."""
        if not self.conditions.size:
            return (len(table),), None
        return (), torch.as_tensor(self.conditions.encode(table), device=self.device)

    def _encoded(self, table: pd.DataFrame) -> Tensor:
        """Return the modelled columns as float64, with the codes of categories, `(rows, columns)`."""
        columns = []
        for name in self.columns:
            words = self._discrete.get(name, {}).get("levels")
            column = _column(table, name)
            if words is None:
                columns.append(_numbers(name, column).to_numpy())
            else:
                codes = {word: float(code) for code, word in enumerate(words)}
                columns.append(column.astype(str).map(codes).to_numpy(np.float64))
        return torch.as_tensor(np.stack(columns, 1))

    def _decoded(self, values: NDArray[np.float64], given: pd.DataFrame) -> pd.DataFrame:
        """Return samples as a table with the user's types."""
        table: dict[str, NDArray[Any]] = {}
        for place, name in enumerate(self.columns):
            words = self._discrete.get(name, {}).get("levels")
            code = np.floor(values[:, place]) if name in self._discrete else values[:, place]
            if words is not None:
                table[name] = np.array(words, dtype=object)[code.clip(0, len(words) - 1).astype(np.int64)]
            else:
                table[name] = self._typed(name, code)
        table |= {name: self._typed(name, given[name].to_numpy()) for name in self.conditions.names}
        table |= {name: np.full(len(values), value) for name, value in self.constants.items()}
        return pd.DataFrame(table)

    def _typed(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        if self._types.get(name) != "integer":
            return values
        return np.rint(values.astype(np.float64)).astype(np.int64)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Raise what the library says of a solve that failed as an error of the user."""
    try:
        yield
    except SolverError as error:
        raise UserError(f"the model diverged ({first_line(error)}); take more steps or train it longer.") from None


def _slices(total: int, progress: Progress) -> Iterator[slice]:
    """Yield the rows in batches, and report each one that is done."""
    for start in range(0, total, ROWS):
        stop = min(start + ROWS, total)
        yield slice(start, stop)
        progress(stop, total)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    there = list(map(str, table.columns))
    if there.count(name) != 1:
        found = f"{there.count(name)} such columns" if name in there else ", ".join(there) or "no columns"
        hint = did_you_mean(name, set(there) - {name})
        raise UserError(f"the table has no single column {name!r}, which the model needs; it has {found}{hint}")
    return table.iloc[:, there.index(name)]


def _numbers(name: str, column: pd.Series) -> pd.Series:
    """Return a column as float64, with NaN for missing values."""
    try:
        return pd.to_numeric(column).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"the column {name!r} holds {column.dtype} ({first_line(error)}), expected numbers.") from None
