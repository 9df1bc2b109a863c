"""The true rows of a data set with which density models are compared, and the moments of its training rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines.base import files, layout, seeding
from pipelines.config.params import Params
from pipelines.models.conditions import Conditions

Array = NDArray[np.float64]

SINGULAR = 1e-9  # smallest eigenvalue of a correlation matrix that rounding does not hide


@final
@dataclass(frozen=True)
class Rows:
    """Rows of a part of a data set.

    Attributes:
        x: Values in the units of the data, (n, columns).
        table: Columns of the conditions, n rows; without columns if there are no conditions.
        cond: Condition vectors, (n, size).
        weight: Importance weights, (n,), or None for equal weights.
    """

    x: Array
    table: pd.DataFrame
    cond: NDArray[np.float32]
    weight: Array | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: NDArray[np.int64] | slice) -> Rows:
        """Return some of the rows."""
        weight = None if self.weight is None else self.weight[index]
        return Rows(self.x[index], self.table.iloc[index].reset_index(drop=True), self.cond[index], weight)

    def draw(self, count: int, rng: np.random.Generator) -> Rows:
        """Return rows in random order, without weights.

        Rows of equal weights come once before any of them comes again; others are drawn by their weights.
        """
        if self.weight is None:
            return self.take(np.resize(rng.permutation(len(self)), count))
        drawn = self.take(rng.choice(len(self), count, p=self.weight / self.weight.sum()))
        return Rows(drawn.x, drawn.table, drawn.cond)

    def mean(self, values: Array) -> tuple[float, float]:
        """Return the weighted mean of a value of each row, and its standard error."""
        weight = np.ones(len(self)) if self.weight is None else self.weight
        mean, n = float(np.average(values, weights=weight)), len(self)
        if n < 2:
            return mean, float("nan")
        return mean, float(np.sqrt(n / (n - 1) * (weight**2 * (values - mean) ** 2).sum()) / weight.sum())


@final
@dataclass(frozen=True)
class Moments:
    """The weighted mean and covariance of the training rows, targets first and then the condition vector.

    Attributes:
        mean: Means, (columns + size,).
        covariance: Covariances, (columns + size, columns + size).
        columns: Number of targets.
    """

    mean: Array
    covariance: Array
    columns: int

    @property
    def loc(self) -> Array:
        """Means of the targets."""
        return self.mean[: self.columns]

    @property
    def scale(self) -> Array:
        """Standard deviations of the targets."""
        return np.sqrt(np.diag(self.covariance)[: self.columns])

    def log_prob(self, rows: Rows) -> Array | None:
        """Return the log-density of one Gaussian with these moments, whose mean is linear in the conditions.

        It is None if a target is a linear function of the others: such rows have no density.
        """
        d = self.columns
        within, across, given = self.covariance[:d, :d], self.covariance[:d, d:], self.covariance[d:, d:]
        slope = across @ np.linalg.pinv(given, hermitian=True) if given.size else across
        left = within - slope @ across.T
        spread = np.sqrt(np.diag(left))
        if (
            not (spread > SINGULAR * self.scale).all()
            or np.linalg.eigvalsh(left / np.outer(spread, spread))[0] < SINGULAR
        ):
            return None
        shifted = rows.x - self.loc - (rows.cond - self.mean[d:]) @ slope.T
        root = np.linalg.cholesky(left / np.outer(spread, spread))
        z = np.linalg.solve(root, (shifted / spread).T)
        constant = np.log(spread).sum() + np.log(np.diag(root)).sum() + d / 2 * np.log(2 * np.pi)
        log_prob: Array = -(z**2).sum(0) / 2 - constant
        return log_prob


@final
@dataclass(frozen=True)
class Prepared:
    """The folder of a prepared data set.

    Attributes:
        folder: The folder.
        provenance: Its description.
    """

    folder: Path
    provenance: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """Read the description of a prepared data set."""
        return cls(folder, files.read_json(layout.provenance(folder)))

    @property
    def columns(self) -> list[str]:
        """Names of the targets."""
        return list(self.provenance["columns"])

    @property
    def conditions(self) -> Conditions:
        """The conditions."""
        return Conditions(tuple(self.provenance["conditions"]))

    def table(self, part: str) -> pd.DataFrame:
        """Return the table of a part."""
        return files.read_table(layout.part(self.folder, part), [*self.columns, *self.conditions.names])

    def part(self, name: str) -> Rows:
        """Return the rows of a part."""
        return self._dequantised(self.rows(self.table(name)), np.random.default_rng(seeding.derived_seed(0, name)))

    def rows(self, table: pd.DataFrame) -> Rows:
        """Return the rows of a table that has the columns of the data set."""
        names, weight = self.conditions.names, self.provenance["weight"]
        return Rows(
            table[self.columns].to_numpy(np.float64, copy=True),  # as torch takes only what it may write
            table[names].reset_index(drop=True),
            self.conditions.encode(table[names]),
            table[weight].to_numpy(np.float64, copy=True) if weight in table else None,
        )

    def training(self, count: int, rng: np.random.Generator) -> tuple[Rows, Moments]:
        """Return random training rows in the order of their table, and the moments of all; read by row groups."""
        total = self.provenance["rows"]["train"]
        chosen = np.sort(rng.permutation(total)[:count])
        kept, sums, shift, first = [], None, None, 0
        for rows in self._groups():
            v = np.concatenate([rows.x, rows.cond], 1)
            weight = np.ones(len(rows)) if rows.weight is None else rows.weight
            shift = np.average(v, axis=0, weights=weight) if shift is None else shift  # so that no digits are lost
            v = v - shift
            found = weight.sum(), weight @ v, (v * weight[:, None]).T @ v
            sums = found if sums is None else tuple(a + b for a, b in zip(sums, found, strict=True))
            kept.append(rows.take(chosen[(chosen >= first) & (chosen < first + len(rows))] - first))
            first += len(rows)
        assert sums is not None, self.folder  # a part has at least one row
        mean = sums[1] / sums[0]
        moments = Moments(mean + shift, sums[2] / sums[0] - np.outer(mean, mean), len(self.columns))
        return _together(kept), moments

    def _groups(self) -> Iterator[Rows]:
        path = layout.part(self.folder, "train")
        file = files.open_table(path, [*self.columns, *self.conditions.names])
        noise = np.random.default_rng(seeding.derived_seed(0, "train"))
        for group in range(file.metadata.num_row_groups):
            rows = self.rows(files.read_group(path, file, group, file.schema_arrow.names).to_pandas())
            yield self._dequantised(rows, noise)

    def _dequantised(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """Return rows with uniform noise on their pixels, which the tables of images hold as whole numbers."""
        if self.provenance.get("image") is None:
            return rows
        return replace(rows, x=rows.x + rng.random(rows.x.shape))


def conditions(params: Params, dataset: str, val: Rows) -> Rows:
    """Return the validation rows whose conditions the samples have, in the order of the samples.

    They are not those of the test rows, so that samples of a perfect model are as far from the test rows as the floor.
    """
    return val.draw(params.density.sample_for(params.datasets[dataset]).samples, rng_of(params, dataset, "conditions"))


def rng_of(params: Params, *key: object) -> np.random.Generator:
    """Return the generator of a choice of rows."""
    return np.random.default_rng(seeding.derived_seed(params.seed, "rows", *key))


def _together(parts: list[Rows]) -> Rows:
    weights = [rows.weight for rows in parts if rows.weight is not None]
    return Rows(
        np.concatenate([rows.x for rows in parts]),
        pd.concat([rows.table for rows in parts], ignore_index=True),
        np.concatenate([rows.cond for rows in parts]),
        np.concatenate(weights) if weights else None,
    )
