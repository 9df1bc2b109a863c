"""A table of one's own: CSV or parquet files of any size, with conditions, weights, missing values and own splits.

The files are read twice: once for the types of the columns, and once for the rows, which become numbers in a scratch
file. From there they are divided into parts and shuffled, so that neither the order of the rows nor the size of a
chunk matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from pipelines.base import layout, metric_keys, plugins, tables
from pipelines.base.errors import UserError, did_you_mean
from pipelines.base.tables import Column, Kind, TableFile
from pipelines.datasets import Array, Discrete, Parts, Type
from pipelines.datasets._rows import Labels, Rows, at_random, by_time, sizes

if TYPE_CHECKING:
    import pandas as pd

MOST_WORDS = 1000  # different words in a column
MOST_STEPS = 100_000  # values between the smallest and the largest of a column with step marginals
_EXACT = 2.0**53  # larger integers are not all numbers of double precision
_SHOWN = 8  # names in a message


def _listed(value: Any) -> Any:
    """Read one name or path as a list of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _named(value: Any) -> Any:
    """Read the name of a column; a whole number stands for its digits."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_named)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_listed)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_listed), Field(min_length=1)]


class Files(plugins.Settings):
    """The files of each part."""

    train: Paths = Field(description="file, list or glob of the training rows")
    val: Paths = Field(description="file, list or glob of the validation rows")
    test: Paths = Field(description="file, list or glob of the test rows")


class Split(plugins.Settings):
    """How rows are divided: at random by default, by time, by a column, or by files."""

    val: float | None = Field(default=None, gt=0, lt=1, description="share of validation rows; null: 0.1")
    test: float | None = Field(default=None, gt=0, lt=1, description="share of test rows; null: 0.1")
    time: Name | None = Field(default=None, description="column that orders the rows: the last are for testing")
    column: Name | None = Field(default=None, description="column with the words train, val and test")
    files: Files | None = Field(default=None, description="the files of each part, in place of `file`")

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        ways = [name for name in ("time", "column", "files") if getattr(self, name) is not None]
        shares = [name for name in ("val", "test") if getattr(self, name) is not None]
        if len(ways) > 1 or (shares and ways not in ([], ["time"])):
            raise ValueError(f"`split` has {' and '.join([*ways, *shares])}; expected one way to split")
        if sum(self.shares()) >= 1:
            raise ValueError("the shares `val` and `test` of `split` leave no rows for training; lower them")
        return self

    def shares(self) -> tuple[float, float]:
        """Return the shares of validation and test rows."""
        return (0.1 if self.val is None else self.val, 0.1 if self.test is None else self.test)


class Settings(plugins.Settings):
    """The files of a table and the roles of its columns."""

    file: Paths | None = Field(
        default=None, description="CSV, TSV or parquet, a list or a glob, relative to params.yaml"
    )
    columns: Names | None = Field(default=None, min_length=1, description="what is modelled; null: all numeric columns")
    condition: Names = Field(default=(), description="conditions of the density: numbers as they are, words one-hot")
    weight: Name | None = Field(default=None, description="column of importance weights")
    missing: Literal["error", "drop"] = Field(default="error", description="what becomes of rows that lack a value")
    discrete: dict[str, Literal["uniform", "steps"]] = Field(
        default={},
        description="integers and words among the columns: dequantised, with or without step marginals",
    )
    transform: Literal["none", "marginals"] = Field(
        default="none", description="marginals: each column to a normal distribution by its own"
    )
    split: Split = Field(default=Split(), description="how the rows are divided into parts")

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.file is None) == (self.split.files is None):
            raise ValueError("expected either `file` or `split: {files: {train: ..., val: ..., test: ...}}`")
        roles = {"columns": self.columns, "condition": self.condition}
        roles |= {"weight": _given(self.weight), "split.column": _given(self.split.column)}
        seen: dict[str, str] = {}
        for role, names in roles.items():
            for name in names or ():
                if name in seen:
                    raise ValueError(f"the column {name!r} stands under `{seen[name]}` and `{role}`; expected it once")
                seen[name] = role
        for name in self.discrete:
            if seen.get(name, "columns") != "columns" or (self.columns is not None and name not in self.columns):
                hint = did_you_mean(name, self.columns or (), "; name it there, too.")
                raise ValueError(f"`discrete` names {name!r}, which is not among `columns`{hint}")
        return self

    @property
    def others(self) -> list[str]:
        """Columns that are named for something else than being modelled."""
        return [*self.condition, *_given(self.weight), *_given(self.split.time), *_given(self.split.column)]


def _given(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the files of the table, named by their part, their place and their own name.

    Raises:
        UserError: A file is missing.
    """
    return {f"{part}/{place:06d}/{path.name}": path for part, place, path in _paths(settings)}


def _paths(settings: Settings) -> Iterator[tuple[str, int, Path]]:
    """Yield the part, the place and the path of each file; the part is empty where the rows are divided otherwise."""
    files = settings.split.files
    patterns = {"": settings.file} if files is None else {part: getattr(files, part) for part in layout.PARTS}
    for part, some in patterns.items():
        for place, path in enumerate(tables.find(some or ())):
            yield part, place, path


def parts(settings: Settings, *, rng: np.random.Generator, mirror: Path | None, scratch: Path) -> Parts:
    """Read the files and divide their rows.

    Raises:
        UserError: A file or a column is not what the settings say; the message names it and the remedy.
    """
    opened = [(part, tables.open_file(path)) for part, _, path in _paths(settings)]
    files = [file for _, file in opened]
    messages = [note for file in files for note in file.notes]
    held = _look(settings, files, messages)
    columns = _columns(settings, held, messages)
    if not columns:
        raise UserError(
            f"{_all(files)} has no numeric column to model; expected at least one, so name some under `columns`, words "
            f"with their treatment under `discrete` (found {_listing({n: _what(c) for n, c in held.items()})})."
        )
    reading = {name: held[name].kind for name in dict.fromkeys([*columns, *settings.others])}
    read = _Reader(reading, Rows(scratch / "read", len(reading) + 1), {name: held[name] for name in reading})
    for part, file in opened:
        read.add(file, layout.PARTS.index(part) if part else 0)
    for file in files:
        file.check_unchanged()
    read.check(settings, _all(files))
    missing = read.total - read.rows.count
    if missing:
        lacking = _listing({name: number for name, number in read.lacking.items() if number})
        messages.append(f"{missing} of {read.total} rows were dropped because a value was missing ({lacking}).")
    constants = _constants(settings, columns, read, messages)
    numbering = [name for name in columns if settings.columns is None and read.numbers_rows(name)]
    if numbering:
        messages.append(f"left out because it numbers the rows: {_quoted(numbering)} (name it under `columns`).")
    columns = [name for name in columns if name not in constants and name not in numbering]
    if not columns:
        raise UserError(f"no numeric column of {_all(files)} varies; expected at least one, so name some.")
    labels = _labels(settings, read, rng)
    counts = np.bincount(labels, minlength=3)
    for part, count in zip(layout.PARTS, counts, strict=True):
        if not count:
            raise UserError(
                f"the {part} part of {_all(files)} has none of {read.rows.count} rows; expected at least one, so "
                "change `split` or bring more rows."
            )
    discrete = {name: _discrete(name, how, read) for name, how in settings.discrete.items()}
    divided = _Divided(columns, settings, discrete, read, labels, rng, scratch)
    return Parts(
        rows=dict(zip(layout.PARTS, counts.tolist(), strict=True)),
        chunks=divided.chunks,
        columns=columns,
        types={name: _type(held[name]) for name in [*columns, *constants, *settings.condition]},
        source=_listing([file.path.name for file in files]),
        licence="that of the table",
        fidelity="own table",
        conditions={name: read.levels.get(name) for name in settings.condition},
        weight=divided.weight,
        discrete=discrete,
        constants=constants,
        marginals=settings.transform == "marginals",
        files={str(file.path): file.sha256 for file in files},
        missing=missing,
        messages=messages,
    )


def _look(settings: Settings, files: Sequence[TableFile], messages: list[str]) -> dict[str, Column]:
    """Return what the columns hold: those that the settings name, and all with a name where they name none.

    Raises:
        UserError: A column is missing or stands twice in a file, or there are no rows.
    """
    names = [*(settings.columns or ()), *settings.discrete, *settings.others]
    if settings.columns is None:
        nameless = [name for name in files[0].names if not name or name.startswith(("__index_level_", "Unnamed: "))]
        if nameless:
            messages.append(f"left out because they have no name, as a saved index: {len(nameless)} of the columns.")
        names = [*(name for name in files[0].names if name not in nameless), *names]
    names = list(dict.fromkeys(names))
    for file in files:
        for name in names:
            if file.names.count(name) != 1:
                found = f"has the column {name!r} {file.names.count(name)} times" if name in file.names else ""
                there = _listing(file.names)
                raise UserError(
                    f"{file.path} {found or f'has no column {name!r}'}, expected it once among its columns ({there})"
                    f"{did_you_mean(name, set(file.names) - {name})}"
                )
    looked = [file.kinds(names) for file in files]
    held = {name: reduce(add, [one[name] for one in looked]) for name in names}
    if not any(column.rows for column in held.values()):
        raise UserError(f"{_all(files)} has no rows below the names of its columns; expected some.")
    return held


def _columns(settings: Settings, held: Mapping[str, Column], messages: list[str]) -> list[str]:
    """Return the modelled columns.

    Raises:
        UserError: What a column holds does not fit its role.
    """
    roles: dict[str, tuple[tuple[Kind, ...], str]] = {}
    for name in settings.condition:
        roles[name] = ("integer", "float", "text"), "condition"
    for name in _given(settings.weight):
        roles[name] = ("integer", "float"), "weight"
    for name in _given(settings.split.time):
        roles[name] = ("integer", "float", "date"), "split.time"
    for name in _given(settings.split.column):
        roles[name] = ("text",), "split.column"
    columns = list(settings.columns or ())
    if settings.columns is None:
        free = [name for name in held if name not in roles]
        columns = [
            name for name in free if held[name].kind in ("integer", "float", "mixed") or name in settings.discrete
        ]
        columns += [name for name in free if held[name].kind == "text" and tables.thousands(held[name].word)]
        out: dict[str, list[str]] = {}
        for name in free:
            if name not in columns:
                out.setdefault(_what(held[name]).partition(" such as")[0], []).append(name)
        messages += [f"left out because they hold {what}: {_quoted(names)}." for what, names in out.items()]
    for name in columns:
        kinds: tuple[Kind, ...] = ("integer", "float")
        _check_kind(name, held[name], (*kinds, "text") if name in settings.discrete else kinds, "columns")
    for name, (kinds, role) in roles.items():
        _check_kind(name, held[name], kinds, role)
    return columns


def _is_numeric(column: Column) -> bool:
    """Return whether a column is meant as numbers, even if some cannot be read."""
    return column.kind in ("integer", "float", "mixed") or (column.kind == "text" and tables.thousands(column.word))


def _check_kind(name: str, column: Column, allowed: Sequence[Kind], role: str) -> None:
    if column.kind in allowed:
        return
    what = f"the column {name!r} (`{role}`)"
    if column.kind == "mixed" and column.words == column.row == 1:
        raise UserError(
            f"{what} of {column.where} holds {column.word!r} in its first row and numbers below, which looks like a "
            "second line of names or units; expected numbers from the second line on, so remove that line."
        )
    if tables.thousands(column.word):
        raise UserError(
            f"{what} of {column.where} holds {column.word!r} in row {column.row}, expected numbers with a decimal "
            "point and without separators of thousands; write them so."
        )
    if column.kind == "mixed":
        raise UserError(
            f"{what} of {column.where} holds {column.word!r} in row {column.row} and {column.words} values in "
            f"{column.rows} that are no numbers, expected numbers; mend these rows, leave a cell empty where a value "
            "is missing, or leave the column out."
        )
    remedies = {
        "columns": f"name it under `discrete`, such as `discrete: {{{name}: uniform}}`, or under `condition`",
        "split.time": "write the times as 2024-12-31 23:59:59 or as numbers",
        "split.column": "write train, val or test in each row",
    }
    expected = {"split.time": "dates or numbers", "split.column": "words"}
    remedy = remedies.get(role) if column.kind == "text" or role.startswith("split") else None
    raise UserError(
        f"{what} holds {_what(column)}, expected {expected.get(role, 'numbers')}; "
        f"{remedy or 'write plain numbers or leave it out'}."
    )


@final
class _Reader:
    """Reads files into rows of numbers, without those that lack a value.

    Attributes:
        names: Columns in the order of the rows; the last number of a row is the part that its file belongs to.
        rows: The rows; words are their codes.
        held: What the columns hold.
        levels: Words of each column of words in sorted order.
        total: Number of rows in the files.
        lacking: Number of missing values by column.
        infinite: Number of infinite values by column.
        incomplete: Number of rows that lack a value, by file.
        low: Smallest value of each column.
        high: Largest value of each column.
    """

    def __init__(self, kinds: Mapping[str, Kind], rows: Rows, held: Mapping[str, Column]) -> None:
        self.kinds, self.rows, self.held = kinds, rows, held
        self.names = list(kinds)
        self.total = 0
        self.lacking = dict.fromkeys(kinds, 0)
        self.infinite = dict.fromkeys(kinds, 0)
        self.incomplete: dict[str, int] = {}
        self.low, self.high = np.full(len(kinds), np.inf), np.full(len(kinds), -np.inf)
        self._whole, self._numbering = np.ones(len(kinds), bool), np.ones(len(kinds), bool)
        self._first = np.zeros(len(kinds))
        self._codes: dict[str, dict[str, int]] = {name: {} for name, kind in kinds.items() if kind == "text"}
        self._used = {name: np.zeros(MOST_WORDS, bool) for name in self._codes}

    def add(self, file: TableFile, part: int) -> None:
        """Append the rows of a file.

        Raises:
            UserError: A column has too many words, or the file cannot be read.
        """
        for chunk in file.chunks(self.kinds):
            values = np.stack([self._numbers(name, chunk[name]) for name in self.names], 1)
            lacks, infinite = np.isnan(values), np.isinf(values)
            for i, name in enumerate(self.names):
                self.lacking[name] += int(lacks[:, i].sum())
                self.infinite[name] += int(infinite[:, i].sum())
            if not self.total and len(values):
                self._first = values[0]
            numbers = np.arange(self.total, self.total + len(values))[:, None]
            self._numbering &= (values == self._first + numbers).all(0)
            self.total += len(values)
            number = int(lacks.any(1).sum())
            self.incomplete[str(file.path)] = self.incomplete.get(str(file.path), 0) + number
            kept = values[~(lacks | infinite).any(1)]
            if len(kept):
                self.low, self.high = np.minimum(self.low, kept.min(0)), np.maximum(self.high, kept.max(0))
                self._whole &= (kept == np.floor(kept)).all(0)
            for name, used in self._used.items():
                used[kept[:, self.names.index(name)].astype(np.int64)] = True
            self.rows.add(np.column_stack([kept, np.full(len(kept), part)]))

    def check(self, settings: Settings, source: str) -> None:
        """Raise an error for values that no row may have, and for missing values unless they are dropped.

        Raises:
            UserError: There is such a value.
        """
        for name, number in self.infinite.items():
            if number:
                raise UserError(
                    f"the column {name!r} of {source} holds infinity in {number} of {self.total} rows, expected "
                    "finite numbers; mend these rows or remove them."
                )
        missing = self.total - self.rows.count
        lacking = _listing({name: number for name, number in self.lacking.items() if number})
        if len(self.incomplete) > 1:
            lacking += "; " + _listing({path: number for path, number in self.incomplete.items() if number})
        if missing and settings.missing == "error":
            raise UserError(
                f"{missing} of {self.total} rows of {source} lack a value ({lacking}), expected every value; say "
                "`missing: drop`, fill them in, or name `columns` without these."
            )
        if not self.rows.count:
            raise UserError(
                f"every row of {source} lacks a value ({lacking}), expected whole rows; name `columns` without these."
            )
        if settings.weight is not None and not self.range(settings.weight)[0] > 0:
            raise UserError(
                f"the column {settings.weight!r} (`weight`) of {source} goes down to {self.range(settings.weight)[0]:g}"
                ", expected positive weights; remove rows that do not count."
            )

    def range(self, name: str) -> tuple[float, float]:
        """Return the smallest and the largest value of a column."""
        i = self.names.index(name)
        return float(self.low[i]), float(self.high[i])

    def whole(self, name: str) -> bool:
        """Return whether a column holds integers only."""
        return bool(self._whole[self.names.index(name)])

    def numbers_rows(self, name: str) -> bool:
        """Return whether each value of a column is the one before plus 1, as in an index."""
        return self.total > 2 and bool(self._numbering[self.names.index(name)])

    @property
    def levels(self) -> dict[str, list[str]]:
        """The words of each column of words, in sorted order."""
        return {
            name: sorted(word for word, code in codes.items() if self._used[name][code])
            for name, codes in self._codes.items()
        }

    def coded(self) -> Iterator[Array]:
        """Yield the rows, with the place of each word among its sorted levels."""
        places = {}
        for name, levels in self.levels.items():
            places[name] = np.array([levels.index(word) if word in levels else -1 for word in self._codes[name]])
        for rows in self.rows.chunks():
            for name, place in places.items():
                i = self.names.index(name)
                rows[:, i] = place[rows[:, i].astype(np.int64)]
            yield rows

    def _numbers(self, name: str, values: Any) -> Array:
        """Return a column as float64, NaN where missing, words as codes in the order of their appearance."""
        if isinstance(values, np.ndarray):
            return values
        coded = values.dictionary_encode()
        codes = self._codes[name]
        for word in coded.dictionary.to_pylist():
            codes.setdefault(word, len(codes))
        if len(codes) > MOST_WORDS:
            raise UserError(
                f"the column {name!r} holds more than {MOST_WORDS} different words, expected fewer; group them or "
                "leave the column out."
            )
        place = np.array([*(codes[word] for word in coded.dictionary.to_pylist()), np.nan])
        numbers: Array = place[coded.indices.fill_null(len(place) - 1).to_numpy()]
        return numbers


def _constants(
    settings: Settings, columns: Sequence[str], read: _Reader, messages: list[str]
) -> dict[str, float | int | str]:
    """Return the values of constant columns, which are left out where the settings do not name them.

    Raises:
        UserError: The settings name a constant column.
    """
    constant = {name: read.range(name)[0] for name in read.names if read.range(name)[0] == read.range(name)[1]}
    for role, names in (("columns", settings.columns or ()), ("condition", settings.condition)):
        for name in names:
            if name in constant:
                value = read.levels[name][0] if name in read.levels else constant[name]
                raise UserError(
                    f"the column {name!r} (`{role}`) is constant ({value}); expected it to vary, so leave it out of "
                    f"`{role}`."
                )
    found: dict[str, float | int | str] = {}
    for name in columns:
        if name in constant:
            value = constant[name]
            if abs(value) >= _EXACT:
                raise UserError(
                    f"the column {name!r} holds numbers near {value:g}, which differ by less than double precision "
                    "tells apart; subtract an offset in the file, or name `columns` without it."
                )
            integer = read.kinds[name] == "integer"
            found[name] = read.levels[name][0] if name in read.levels else int(value) if integer else value
    if found:
        messages.append(f"left out because they are constant, and put back into samples: {_listing(found)}.")
    return found


def _labels(settings: Settings, read: _Reader, rng: np.random.Generator) -> Labels:
    """Return the number of the part of each row.

    Raises:
        UserError: A word of the split column is no part.
    """
    split = settings.split
    if split.files is not None:
        return read.rows.column(len(read.names)).astype(np.int8)
    if split.column is not None:
        levels = read.levels[split.column]
        for word in levels:
            if word not in layout.PARTS:
                raise UserError(
                    f"the column {split.column!r} (`split.column`) holds {word!r}, expected train, val or test"
                    f"{did_you_mean(word, layout.PARTS, '; write one of these.')}"
                )
        number = np.array([layout.PARTS.index(word) for word in levels], dtype=np.int8)
        i = read.names.index(split.column)
        labels: Labels = np.concatenate([number[rows[:, i].astype(np.int64)] for rows in read.coded()])
        return labels
    wanted = sizes(read.rows.count, *split.shares())
    if split.time is not None:
        return by_time(read.rows.column(read.names.index(split.time)), wanted)
    return at_random(wanted, rng)


def _discrete(name: str, how: Literal["uniform", "steps"], read: _Reader) -> Discrete:
    """Return the description of a discrete column.

    Raises:
        UserError: It holds other numbers than integers, or too many for step marginals.
    """
    low, high = read.range(name)
    if not read.whole(name):
        raise UserError(
            f"the column {name!r} (`discrete`) holds numbers with decimals, expected integers or words; leave it out "
            "of `discrete`."
        )
    if how == "steps" and high - low > MOST_STEPS:
        raise UserError(
            f"the column {name!r} (`discrete`) goes from {low:.0f} to {high:.0f}, expected at most {MOST_STEPS} values "
            "for step marginals; say `uniform`."
        )
    return Discrete(how, int(low), read.levels.get(name))


@final
class _Divided:
    """The rows of each part in scratch files, in the units and the order of the prepared tables.

    Attributes:
        weight: Name of the weight column, None without one.

    Raises:
        UserError: A word occurs in a part but not in the training rows.
    """

    def __init__(
        self,
        columns: Sequence[str],
        settings: Settings,
        discrete: Mapping[str, Discrete],
        read: _Reader,
        labels: Labels,
        rng: np.random.Generator,
        scratch: Path,
    ) -> None:
        names = [*columns, *settings.condition, *_given(settings.weight)]
        self.weight = None if settings.weight is None else metric_keys.free("weight", names[:-1])
        self._names = names if self.weight is None else [*names[:-1], self.weight]
        self._noisy = [columns.index(name) for name in discrete]
        levels = read.levels
        self._levels = {name: levels[name] for name in settings.condition if name in levels}
        self._rng = dict(zip(layout.PARTS, rng.spawn(3), strict=True))
        self._rows = {part: Rows(scratch / part, len(names)) for part in layout.PARTS}
        self._total = dict.fromkeys(layout.PARTS, 0.0)
        seen = {name: np.zeros((3, len(words)), np.int64) for name, words in levels.items() if name in names}
        places, start = [read.names.index(name) for name in names], 0
        for chunk in read.coded():
            label, chunk = labels[start : start + len(chunk)], chunk[:, places]
            start += len(chunk)
            for name, count in seen.items():
                np.add.at(count, (label, chunk[:, names.index(name)].astype(np.int64)), 1)
            for number, (part, rows) in enumerate(self._rows.items()):
                rows.add(chunk[label == number])
                self._total[part] += chunk[label == number, -1].sum()
        read.rows.path.unlink()
        for name, count in seen.items():
            for word, (train, *others) in zip(levels[name], count.T, strict=True):
                if not train:
                    raise UserError(
                        f"the word {word!r} of the column {name!r} is in {sum(others)} of {start} rows and in none of "
                        "the training part, so that training never sees it; group rare words, remove these rows, or "
                        "change `split`."
                    )

    def chunks(self, part: str) -> Iterator[pd.DataFrame]:
        """Yield the rows of a part in random order; a part can be read once."""
        import pandas as pd

        rng, rows = self._rng[part], self._rows[part]
        mean = self._total[part] / rows.count
        for values in rows.shuffled(rng):
            values[:, self._noisy] += rng.random((len(values), len(self._noisy)))
            table = pd.DataFrame(values, columns=self._names)
            for name, levels in self._levels.items():
                table[name] = np.array(levels, dtype=object)[table[name].to_numpy(dtype=np.int64)]
            if self.weight is not None:
                table[self.weight] /= mean
            yield table


def _type(column: Column) -> Type:
    return "integer" if column.kind == "integer" else "text" if column.kind == "text" else "float"


def _what(column: Column) -> str:
    """Return what a column holds, for a message."""
    return {
        "integer": "integers",
        "float": "numbers",
        "text": f"words such as {column.word!r}",
        "date": "dates",
        "empty": "no values",
        "mixed": f"numbers and words such as {column.word!r}",
        "other": f"values of the type {column.type}",
    }[column.kind]


def _all(files: Sequence[TableFile]) -> str:
    return str(files[0].path) if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"


def _quoted(names: Sequence[str]) -> str:
    return _listing([repr(name) for name in names])


def _listing(values: Mapping[str, Any] | Sequence[str]) -> str:
    """Return names, or names with values, with commas; only the first of many."""
    words = [f"{name} {value}" for name, value in values.items()] if isinstance(values, Mapping) else list(values)
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")
