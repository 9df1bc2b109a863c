"""Data sets: one plugin file each, loaded by name (`plugins.load("pipelines.datasets", name)`).

A plugin defines `Settings` and `build(settings, *, rng, mirror) -> Dataset`. A plugin whose rows may exceed memory
defines `parts(settings, *, rng, mirror, scratch) -> Parts` instead, which yields them in chunks. A plugin that reads
files also defines `sources(settings, mirror)`, which names them (see `pipelines.runs.sources`); what it names by an
archive is downloaded first (see `pipelines.datasets._archives`). A plugin with a known
density also defines `log_prob(settings, x) -> (n,)`, the exact log-density in nats of rows as `build` returns them.
Evaluation reports its entropy `-E[log p(X)]`, the best NLL that any model can reach, next to the NLL of the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base import downloads, layout, metric_keys, plugins
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError, first_line

if TYPE_CHECKING:
    import pandas as pd

_CHUNK_BYTES, _LEAST_ROWS = 1 << 26, 65_536  # of the rows that are written at once

Array = NDArray[np.float64]
Fidelity = Literal[
    "exact generator",
    "official",
    "official rows and split, time noise redrawn",
    "official-test/partial-train",
    "equivalent",
    "subset",
    "subset-alt-columns",
    "own table",
]
Type = Literal["float", "integer", "text"]


@dataclass(frozen=True)
class Discrete:
    """A column of integers or words among the modelled ones, stored as its code plus a number drawn from [0, 1).

    Attributes:
        how: The marginal that the code gets: none (`uniform`) or steps.
        low: Smallest code.
        levels: The words in the order of their codes, from 0; None for integers, which are their own codes.
    """

    how: Literal["uniform", "steps"]
    low: int
    levels: list[str] | None = None


@dataclass(frozen=True)
class Transform:
    """How one column becomes normal, by a distribution of its own that is fitted to the training rows.

    Attributes:
        kind: A mixture of Gaussians, whole numbers with uniform noise (steps), a uniform distribution, or no transform.
        components: Number of Gaussians of a mixture.
        floor: Smallest standard deviation of a Gaussian, as a share of that of the column.
        weight_power: Power of the weights of the rows with which a mixture is fitted.
        start: Where level 0 of steps begins, or the uniform distribution.
        width: Width of a level, or of the uniform distribution.
    """

    kind: Literal["mixture", "steps", "uniform", "identity"]
    components: int = 8
    floor: float = 0.05
    weight_power: float = 1.0
    start: float = 0.0
    width: float = 1.0


@dataclass(frozen=True)
class Image:
    """The sizes of images whose pixels are columns, channel by channel and row by row.

    Attributes:
        channels: Number of channels.
        height: Rows of pixels.
        width: Columns of pixels.
        levels: Number of levels: a pixel is a whole number from 0 to levels - 1.
    """

    channels: int
    height: int
    width: int
    levels: int


@dataclass(frozen=True)
class Parts:
    """The parts of a data set, which are read in chunks, with their provenance.

    Attributes:
        rows: Number of rows by part: train, val and test.
        chunks: Function that yields a part in chunks: the columns (float64, finite), then the conditions (float64, or
            strings where they are words), then the weight where the part has weights (positive, mean 1 over the part).
        columns: Names of the modelled columns.
        types: What the source held, by column and condition.
        source: Origin of the rows.
        licence: Licence of the rows.
        fidelity: How close the rows are to those of the papers.
        notes: Remarks on the rows, shown with the results.
        discrete_bins: See `Dataset`.
        conditions: Words of each condition in order, None for a condition that is a number.
        weight: Name of the weight column, None without one.
        weight_power: Power of the weights that restores the population; above 1 where they were tempered.
        discrete: Discrete columns by name.
        constants: Values of columns that are constant and not modelled.
        marginals: Transforms of columns to normal distributions; true for a mixture for each that is not discrete.
        gaussian: Published negative log-likelihood per test row of a Gaussian of full covariance, and its error: what
            the rows are checked by.
        image: Sizes of an image, where the columns are its pixels: the chunks hold whole numbers without noise, which
            readers add, and each column gets steps that are smoothed by those of all pixels.
        files: SHA-256 of each file that was read.
        missing: Number of rows that were dropped because a value was missing.
        messages: Sentences on how the rows were read, shown with the results.
    """

    rows: Mapping[str, int]
    chunks: Callable[[str], Iterator[pd.DataFrame]]
    columns: list[str]
    types: Mapping[str, Type]
    source: str
    licence: str
    fidelity: Fidelity
    notes: str = ""
    discrete_bins: float | None = None
    conditions: Mapping[str, list[str] | None] = field(default_factory=dict)
    weight: str | None = None
    weight_power: float = 1.0
    discrete: Mapping[str, Discrete] = field(default_factory=dict)
    constants: Mapping[str, float | int | str] = field(default_factory=dict)
    marginals: bool | Mapping[str, Transform] = False
    gaussian: tuple[float, float] | None = None
    image: Image | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0
    messages: Sequence[str] = ()


@dataclass(frozen=True)
class Dataset:
    """The rows of a data set in memory, split into training, validation and test parts, with their provenance.

    Rows may be an array, a data frame, a tensor or nested lists of numbers of any type; they become float64. The
    columns of a data frame are found by their names.

    Attributes:
        train: Training rows, float64, shape (rows, dims), finite.
        val: Validation rows, as `train`.
        test: Test rows, as `train`.
        columns: Name of each column.
        source: Origin of the rows.
        licence: Licence of the rows.
        fidelity: How close the rows are to those of the papers.
        weight: Importance weights of the train rows (mean 1), or None for equal weights.
        weight_power: Power of the weights that restores the population; above 1 where they were tempered.
        notes: Remarks on the rows, shown with the results.
        discrete_bins: Levels per dimension if the rows are dequantised integers scaled to [0, 1): one level
            is 1/bins wide, so bits per dimension = NLL / (dims ln 2) + log2(bins). None for continuous rows.
        marginals: See `Parts`.
        gaussian: See `Parts`.
    """

    train: Any
    val: Any
    test: Any
    columns: Sequence[str]
    source: str
    licence: str
    fidelity: Fidelity
    weight: Any = None
    weight_power: float = 1.0
    notes: str = ""
    discrete_bins: float | None = None
    marginals: bool | Mapping[str, Transform] = False
    gaussian: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Convert the rows to float64 and check them.

        Raises:
            UserError: The rows, the names or the weights are not what they should be.
        """
        object.__setattr__(self, "columns", [str(name) for name in self.columns])
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise UserError(f"{self.source} has the column {name!r} twice, expected different names; rename one.")
        for part in layout.PARTS:
            object.__setattr__(self, part, self._matrix(part, getattr(self, part)))
        if self.weight is not None:
            weight = _array(self.weight, f"the weights of {self.source}")
            ok = weight.shape == (len(self.train),) and np.isfinite(weight).all() and (weight > 0).all()
            if not ok:
                raise UserError(
                    f"the weights of {self.source} (shape {weight.shape}) are not one positive finite "
                    f"number for each of the {len(self.train)} train rows; rebuild or replace the source."
                )
            object.__setattr__(self, "weight", weight)

    def parts(self) -> Parts:
        """Return the parts, in chunks of a moderate size, which become row groups."""
        import pandas as pd

        columns = list(self.columns)
        weight = None if self.weight is None else metric_keys.free("weight", columns)

        def chunks(part: str) -> Iterator[pd.DataFrame]:
            rows, size = getattr(self, part), max(_LEAST_ROWS, _CHUNK_BYTES // (8 * len(columns)))
            for first in range(0, len(rows), size):
                table = pd.DataFrame(rows[first : first + size], columns=columns)
                if weight is None or part != "train":
                    yield table
                else:
                    yield table.assign(**{weight: self.weight[first : first + size]})

        return Parts(
            rows={part: len(getattr(self, part)) for part in layout.PARTS},
            chunks=chunks,
            columns=columns,
            types=dict.fromkeys(columns, "float"),
            source=self.source,
            licence=self.licence,
            fidelity=self.fidelity,
            notes=self.notes,
            discrete_bins=self.discrete_bins,
            weight=weight,
            weight_power=self.weight_power,
            marginals=self.marginals,
            gaussian=self.gaussian,
        )

    def _matrix(self, part: str, given: Any) -> Array:
        """Return the rows of a part as float64, `(rows, columns)`."""
        where = f"the {part} rows of {self.source}"
        by_name = hasattr(given, "iloc") and given.ndim == 2
        rows: Array = self._by_name(where, given) if by_name else _array(given, where)
        if rows.ndim == 1 and len(self.columns) == 1:
            rows = rows[:, None]
        if rows.ndim != 2 or rows.shape[1] != len(self.columns) or not len(rows):
            raise UserError(
                f"{where} have shape {rows.shape}, expected at least one row of {len(self.columns)} columns; rebuild "
                "or replace the source."
            )
        bad = ~np.isfinite(rows)
        if bad.any():
            column = int(bad.any(0).argmax())
            raise UserError(
                f"column {self.columns[column]!r} of {where} holds NaN or infinity in {int(bad[:, column].sum())} of "
                f"{len(rows)} rows, expected finite numbers; clean or replace the source."
            )
        return rows

    def _by_name(self, where: str, frame: pd.DataFrame) -> Array:
        there = [str(name) for name in frame.columns]
        if sorted(there) != sorted(self.columns):
            raise UserError(
                f"{where} have the columns {', '.join(map(repr, there))}, expected {', '.join(map(repr, self.columns))}"
                " each once; name the columns of the data frame so, or return an array."
            )
        columns = [
            _array(frame.iloc[:, there.index(name)], f"the values of column {name!r} of {where}")
            for name in self.columns
        ]
        return np.stack(columns, 1) if columns else np.empty((len(frame), 0))


def _array(values: Any, what: str) -> Array:
    """Return values of any library as a float64 array; missing values become NaN.

    Raises:
        UserError: They are no real numbers.
    """
    if hasattr(values, "detach"):  # a tensor of any device and type
        values = values.detach().cpu().double().numpy()
    try:
        if hasattr(values, "iloc"):
            return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
        plain = np.asarray(values)
        if np.iscomplexobj(plain) or plain.dtype.kind in "SU":
            raise TypeError(f"they are {plain.dtype}")
        numbers: Array = plain.astype(np.float64)
        return numbers
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what} cannot be read as numbers ({first_line(error)}); expected real numbers in a rectangle, so code "
            "words as numbers, or use `kind: table`, which knows words."
        ) from None


class GeneratedSettings(plugins.Settings):
    """Sizes of a data set that is drawn from a generator."""

    train: int = Field(50_000, ge=1, le=100_000_000, description="train rows")
    val: int = Field(5_000, ge=1, le=100_000_000, description="validation rows")
    test: int = Field(10_000, ge=1, le=100_000_000, description="test rows")


def scaled(rows: Array, deviation: float | None) -> Array:
    """Return rows whose coordinates together have mean 0 and a standard deviation; the same rows for None.

    >>> scaled(np.array([[1.0, 3.0]]), 7.0)
    array([[-7.,  7.]])
    """
    return rows if deviation is None else (rows - rows.mean()) * (deviation / rows.std())


def generated(settings: GeneratedSettings, draw: Callable[[int], Array], name: str, notes: str) -> Dataset:
    """Return a two-dimensional data set of independent draws.

    Args:
        settings: Sizes of the parts.
        draw: Function that returns n rows, shape (n, 2).
        name: Name of the plugin.
        notes: Remarks on the rows.
    """
    total = settings.train + settings.val + settings.test
    train, val, test = np.split(draw(total), [settings.train, settings.train + settings.val])
    return Dataset(
        train=train,
        val=val,
        test=test,
        columns=["x", "y"],
        source=f"generator pipelines/datasets/{name}.py",
        licence="MIT (generated by this project)",
        fidelity="exact generator",
        notes=notes,
    )


def fetch(kind: str, settings: plugins.Settings, mirror: Path | None, log: Callable[[str], None]) -> None:
    """Download and verify the archives that a data set reads.

    Args:
        kind: Name of the plugin.
        settings: Its settings.
        mirror: Folder with local copies of real data sets.
        log: Function that prints a line.

    Raises:
        UserError: An archive cannot be downloaded or is damaged, or a file of the mirror is missing.
    """
    hook = getattr(plugins.load(__name__, kind), "sources", None)
    for source in {} if hook is None else hook(settings, mirror).values():
        if isinstance(source, Archive):
            downloads.fetch(source, log)


def build(
    kind: str, settings: plugins.Settings, *, rng: np.random.Generator, mirror: Path | None, scratch: Path
) -> Parts:
    """Return the data set of a kind, the name of a file in this folder.

    Args:
        kind: Name of the plugin.
        settings: Its settings.
        rng: Generator of all that is drawn.
        mirror: Folder with local copies of real data sets.
        scratch: Empty folder for what does not fit into memory, until the parts are read.

    Raises:
        UserError: There is no such file, or the source of the data is missing or damaged.
    """
    plugin = plugins.load(__name__, kind)
    if hasattr(plugin, "parts"):
        parts: Parts = plugin.parts(settings, rng=rng, mirror=mirror, scratch=scratch)
        return parts
    built = plugin.build(settings, rng=rng, mirror=mirror)
    if not isinstance(built, Dataset):
        raise UserError(
            f"`build` of the data set {kind!r} returned {type(built).__name__}, expected a `Dataset` of "
            "pipelines.datasets; return one."
        )
    return built.parts()


def log_prob(kind: str, settings: plugins.Settings, x: Array) -> Array | None:
    """Return the exact log-density of rows `(n, columns)` in nats, `(n,)`, or None if it is unknown."""
    exact = getattr(plugins.load(__name__, kind), "log_prob", None)
    return None if exact is None else exact(settings, x)
