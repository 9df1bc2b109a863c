"""Read recorded episodes, one at a time: tables, D4RL and Minari files (HDF5), and folders of ExORL.

A reader yields `Rows` of one episode each in the order of the file. Arrays have columns too: s0, s1, ... are the
components of an observation, a0, a1, ... those of an action, beside `episode`, `terminal`, `timeout` and `reward`.
"""

from __future__ import annotations

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from pipelines.base.errors import UserError, first_line
from pipelines.environments import Array

if TYPE_CHECKING:
    import h5py
    import pandas as pd

HDF5 = ("hdf5", "h5")
TABLES = ("parquet", "csv", "tsv")
ORDER = ("step", "time")
"""Columns of a table that say the order of the rows, if it has them and they are no part of the state or the action."""

_MINARI = ("observations", "actions", "rewards", "terminations", "truncations")
_BATCH = 1 << 16  # rows of a table that are read at once


@dataclass(frozen=True)
class Fields:
    """The columns of a log.

    Attributes:
        state: Components of the state.
        action: Components of the action.
        episode: Name of the episode.
        next_state: Components of the next state, or nothing.
        terminal: Whether a row's step ends in a terminal state, or None.
        timeout: Whether a time limit cut the episode off after a row, or None.
        reward: Reward of a row's step, or None.
    """

    state: tuple[str, ...]
    action: tuple[str, ...]
    episode: str
    next_state: tuple[str, ...] = ()
    terminal: str | None = None
    timeout: str | None = None
    reward: str | None = None

    @property
    def numbers(self) -> list[str]:
        """Columns that hold numbers, each once."""
        single = [self.reward] if self.reward else []
        return list(dict.fromkeys([*self.state, *self.action, *self.next_state, *single]))

    @property
    def flags(self) -> list[str]:
        """Columns that hold true or false."""
        return [name for name in (self.terminal, self.timeout) if name]


@dataclass(frozen=True)
class Rows:
    """The rows of an episode as they are recorded.

    Attributes:
        file: Where it is recorded.
        name: Name of the episode.
        state: States, shape (rows, d), or (rows + 1, d) with the state after the last row.
        action: Actions, shape (rows, a).
        next_state: Next states, shape (rows, d), or None.
        reward: Rewards, shape (rows,), or None.
        terminal: Whether a row's step ends in a terminal state, shape (rows,).
        timeout: Whether a time limit cut the episode off after a row, shape (rows,).
    """

    file: Path
    name: str
    state: Array
    action: Array
    next_state: Array | None
    reward: Array | None
    terminal: NDArray[np.bool_]
    timeout: NDArray[np.bool_]


class Reader(ABC):
    """A reader of files of one layout."""

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Names of the columns that the files have."""

    @abstractmethod
    def rows(self, fields: Fields) -> Iterator[Rows]:
        """Yield the episodes.

        Raises:
            UserError: A file cannot be read, or its rows are not ordered by episode and step.
        """

    def defaults(self) -> Mapping[str, str]:
        """Return the column of each role that the layout itself gives a name."""
        return {}


def reader(paths: Sequence[Path]) -> Reader:
    """Return the reader of files, which must have one layout.

    Raises:
        UserError: The layout is unknown.
    """
    first = paths[0]
    if first.is_dir():
        return _Minari(first) if first.joinpath("data").is_dir() else _Exorl(first)
    other = next((path for path in paths if _suffix(path) != _suffix(first)), None)
    if other is not None:
        raise UserError(f"the log has {first.name} and {other.name}; expected files of one kind.")
    if _suffix(first) in HDF5:
        return _Hdf5(paths)
    if _suffix(first) in TABLES:
        return _Table(paths)
    raise UserError(
        f"{first} has the suffix {_suffix(first)!r}; expected {', '.join((*TABLES, *HDF5))}, a folder of a Minari data "
        "set or one of ExORL episodes."
    )


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


# ---- tables ----


@final
class _Table(Reader):
    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    @cached_property
    def columns(self) -> Sequence[str]:
        return _header(self.paths[0])

    def rows(self, fields: Fields) -> Iterator[Rows]:
        ordered = [name for name in ORDER if name in self.columns and name not in (*fields.numbers, *fields.flags)]
        seen, name, waiting = set[str](), None, list[Array]()
        for path in self.paths:
            for ids, values in _batches(path, fields, ordered):
                cuts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
                for begin, end in pairwise(cuts):
                    if begin < end and ids[begin] != name:
                        if name is not None:
                            yield _of_table(path, name, np.concatenate(waiting), fields, ordered)
                            waiting = []
                        name = str(ids[begin])
                        if name in seen:
                            raise UserError(
                                f"{path}: the episode {name!r} comes back after other rows, so that episodes overlap; "
                                f"expected the rows of an episode together: sort the log by {fields.episode!r}, or "
                                "give every episode a name of its own."
                            )
                        seen.add(name)
                    waiting.append(values[begin:end])
        if name is not None:
            yield _of_table(self.paths[-1], name, np.concatenate(waiting), fields, ordered)


def _header(path: Path) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        if _suffix(path) == "parquet":
            return list(parquet.read_schema(path).names)
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline().rstrip("\r\n")
    except (OSError, ValueError, ArrowException) as error:
        raise _unreadable(path, error) from None
    return [name.strip().strip('"') for name in line.split(_delimiter(path, line))]


def _delimiter(path: Path, line: str) -> str:
    return "\t" if _suffix(path) == "tsv" else max(",;\t", key=line.count)


def _batches(path: Path, fields: Fields, ordered: Sequence[str]) -> Iterator[tuple[NDArray[np.str_], Array]]:
    """Yield the names of the episodes and the other columns of a table in parts.

    The columns are those of `fields.numbers`, then those of `fields.flags` as 0 and 1, then `ordered`.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    wanted = list(dict.fromkeys([fields.episode, *fields.numbers, *fields.flags, *ordered]))
    there = _header(path)
    lacking = next((name for name in wanted if name not in there), None)
    if lacking is not None:
        raise UserError(f"{path} has no column {lacking!r}, which other files of the log have; take it out or add it.")
    try:
        if _suffix(path) == "parquet":
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                    yield _values(path, batch.to_pandas(), fields, ordered)
            return
        with path.open(encoding="utf-8-sig") as text:
            parse = csv.ParseOptions(delimiter=_delimiter(path, text.readline()))
        types = dict.fromkeys([*fields.numbers, *ordered], pa.float64())
        types |= dict.fromkeys([fields.episode, *fields.flags], pa.string())
        convert = csv.ConvertOptions(column_types=types, include_columns=wanted, strings_can_be_null=True)
        with csv.open_csv(path, parse_options=parse, convert_options=convert) as opened:
            for batch in opened:
                yield _values(path, batch.to_pandas(), fields, ordered)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise error if isinstance(error, UserError) else _unreadable(path, error) from None


def _values(path: Path, table: pd.DataFrame, fields: Fields, ordered: Sequence[str]) -> tuple[NDArray[np.str_], Array]:
    if table[fields.episode].isna().any():
        raise UserError(f"{path} has a row without a value in {fields.episode!r}; expected the name of its episode.")
    values = np.empty((len(table), len(fields.numbers) + len(fields.flags) + len(ordered)))
    for place, column in enumerate([*fields.numbers, *fields.flags, *ordered]):
        if len(fields.numbers) <= place < len(fields.numbers) + len(fields.flags):
            values[:, place] = _flags(path, column, table[column])
            continue
        try:
            values[:, place] = table[column].to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError):
            raise UserError(
                f"{path}: the column {column!r} holds {table[column].iloc[0]!r}; expected numbers: leave it out of "
                "`state` and `action`, or code it as numbers."
            ) from None
    return table[fields.episode].astype(str).to_numpy(dtype=str), values


def _of_table(path: Path, name: str, values: Array, fields: Fields, ordered: Sequence[str]) -> Rows:
    every = [*fields.numbers, *fields.flags, *ordered]
    for column in ordered:
        _check_order(path, name, column, values[:, every.index(column)])

    def part(columns: Sequence[str]) -> Array:
        return values[:, [every.index(column) for column in columns]]

    def flags(column: str | None) -> NDArray[np.bool_]:
        return np.zeros(len(values), dtype=bool) if column is None else values[:, every.index(column)] != 0

    return Rows(
        path,
        name,
        part(fields.state),
        part(fields.action),
        part(fields.next_state) if fields.next_state else None,
        part([fields.reward])[:, 0] if fields.reward else None,
        flags(fields.terminal),
        flags(fields.timeout),
    )


def _check_order(path: Path, name: str, column: str, values: Array) -> None:
    change = np.diff(values)
    bad = ~(change > 0) if column == "time" else ~np.isclose(change, change[:1])
    if not bad.any() and (change[:1] > 0).all():
        return
    at = int(bad.argmax()) if bad.any() else 0
    raise UserError(
        f"{path}: {column!r} goes from {values[at]:g} to {values[at + 1]:g} in the episode {name!r}; expected "
        + ("it to increase" if column == "time" else "equal steps, each one later than the one before")
        + ": sort the rows, and give an episode with a gap two names."
    )


def _flags(path: Path, column: str, values: pd.Series) -> NDArray[np.bool_]:
    """Return a column of true and false, which may be written as 0 and 1 or as words."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = values.astype(str).str.strip().str.lower().map(words)
    if found.isna().any():
        raise UserError(
            f"{path}: the column {column!r} holds {str(values[found.isna()].iloc[0])!r}; expected true or false, or 1 "
            "or 0."
        )
    return found.to_numpy(dtype=bool)


# ---- arrays ----


class _Arrays(Reader):
    """A reader whose columns are the components of arrays."""

    @cached_property
    def columns(self) -> Sequence[str]:
        first = next(self.whole(), None)
        if first is None:
            return []
        state = [f"s{i}" for i in range(first.state.shape[1])]
        found = [*state, *(f"a{i}" for i in range(first.action.shape[1])), "episode", "terminal", "timeout"]
        found += ["reward"] * (first.reward is not None)
        return found + [f"next_{name}" for name in state] * (first.next_state is not None)

    def defaults(self) -> Mapping[str, str]:
        return {"terminal": "terminal", "timeout": "timeout"}

    def rows(self, fields: Fields) -> Iterator[Rows]:
        state, action = _components("s", fields.state), _components("a", fields.action)
        for whole in self.whole():
            for part, wanted in ((whole.state, state), (whole.action, action)):
                if part.shape[1] <= max(wanted):
                    raise UserError(
                        f"{whole.file}: the episode {whole.name!r} has arrays of {part.shape[1]} columns; expected "
                        f"{max(wanted) + 1}, as in the first episode."
                    )
            yield Rows(
                whole.file,
                whole.name,
                whole.state[:, state],
                whole.action[:, action],
                None if whole.next_state is None else whole.next_state[:, state],
                whole.reward if fields.reward else None,
                whole.terminal,
                whole.timeout,
            )

    @abstractmethod
    def whole(self) -> Iterator[Rows]:
        """Yield the episodes with all columns."""


@final
class _Hdf5(_Arrays):
    """Files of D4RL, with one array of all steps, or of Minari, with a group for each episode."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def whole(self) -> Iterator[Rows]:
        import h5py

        number = 0
        for path in self.paths:
            try:
                with h5py.File(path, "r") as file:
                    groups = sorted(
                        (name for name in file if name.startswith("episode_")), key=lambda name: int(name[8:])
                    )
                    episodes = (_of_minari(path, file[name]) for name in groups) if groups else _of_d4rl(path, file)
                    for rows in episodes:
                        yield replace(rows, name=str(number))
                        number += 1
            except (OSError, KeyError, ValueError) as error:
                raise error if isinstance(error, UserError) else _unreadable(path, error) from None


@final
class _Minari(_Arrays):
    """The folder of a Minari data set: `data/main_data.hdf5`, or another format that only the package reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def whole(self) -> Iterator[Rows]:
        try:
            from minari import MinariDataset
        except ImportError:
            file = self.folder.joinpath("data", "main_data.hdf5")
            if not file.exists():
                raise UserError(
                    f"{self.folder} holds no data/main_data.hdf5, and the package minari, which reads the other "
                    "formats, is not installed; run `pip install minari`."
                ) from None
            yield from _Hdf5([file]).whole()
            return
        try:
            for episode in MinariDataset(self.folder.joinpath("data")).iterate_episodes():
                yield _of_minari(self.folder, {key: getattr(episode, key) for key in _MINARI}, str(episode.id))
        except (OSError, KeyError, ValueError) as error:
            raise error if isinstance(error, UserError) else _unreadable(self.folder, error) from None


@final
class _Exorl(_Arrays):
    """A folder of ExORL episodes, in which the action of row t is the one that led to observation t."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def whole(self) -> Iterator[Rows]:
        for file in exorl_files(self.folder, "file"):
            observation, action, discount = exorl_arrays(file, ("observation", "action", "discount"))
            (reward,) = exorl_arrays(file, ("reward",)) if "reward" in _archive(file) else (None,)
            steps = len(discount) - 1
            for name, array in (("observation", observation), ("action", action), ("reward", reward)):
                if array is not None and len(array) != steps + 1:
                    raise UserError(
                        f"{file} has {len(array)} rows of {name!r} and {steps + 1} of 'discount'; expected as many."
                    )
            yield Rows(
                file,
                file.relative_to(self.folder).as_posix(),
                observation,
                action[1:],
                None,
                None if reward is None else reward[1:, 0],
                discount[1:, 0] == 0,
                np.zeros(steps, dtype=bool),
            )


def _components(prefix: str, names: Sequence[str]) -> list[int]:
    """Return the numbers of components, from their names."""
    for name in names:
        if not (name.startswith(prefix) and name[1:].isdecimal()):
            raise UserError(f"{name!r} is no component of the array; expected {prefix}0, {prefix}1, ...")
    return [int(name[1:]) for name in names]


def _of_minari(path: Path, episode: Mapping[str, Any] | h5py.Group, name: str = "") -> Rows:
    found = {key: _vectors(path, key, episode[key]) for key in _MINARI}
    return Rows(
        path,
        name,
        found["observations"],
        found["actions"],
        None,
        found["rewards"][:, 0],
        found["terminations"][:, 0] != 0,
        found["truncations"][:, 0] != 0,
    )


def _of_d4rl(path: Path, file: h5py.File) -> Iterator[Rows]:
    """Yield the episodes of arrays of all steps, which end where `terminals` or `timeouts` say it."""
    lacking = next((key for key in ("observations", "actions", "terminals") if key not in file), None)
    if lacking is not None:
        raise UserError(
            f"{path} has no {lacking!r} (it has {', '.join(file)}); expected those of D4RL (observations, actions, "
            "terminals and timeouts) or the groups of Minari (episode_0, ...)."
        )
    count = len(file["observations"])
    terminal = np.asarray(file["terminals"], dtype=bool).reshape(-1)
    timeout = np.asarray(file["timeouts"] if "timeouts" in file else np.zeros(count), dtype=bool).reshape(-1)
    begin = 0
    for end in np.unique([*(np.flatnonzero(terminal | timeout) + 1), count]).tolist():
        part = slice(begin, end)
        columns = {
            key: _vectors(path, key, file[key][part])
            for key in ("observations", "actions", "next_observations", "rewards")
            if key in file
        }
        yield Rows(
            path,
            "",
            columns["observations"],
            columns["actions"],
            columns.get("next_observations"),
            columns["rewards"][:, 0] if "rewards" in columns else None,
            terminal[part],
            timeout[part],
        )
        begin = end


def _vectors(path: Path, key: str, array: Any) -> Array:
    """Return an array as rows of numbers."""
    if not hasattr(array, "shape") or len(array.shape) > 2:
        found = f"shape {tuple(array.shape)}" if hasattr(array, "shape") else ", ".join(map(str, array))
        raise UserError(f"{path} has {key!r} with {found}; expected one vector for each step.")
    values = np.asarray(array)
    if values.dtype.kind not in "biuf":
        raise UserError(f"{path} has {key!r} of the type {values.dtype}; expected numbers.")
    return values.astype(np.float64).reshape(len(values), -1)


# ---- folders of ExORL ----


def exorl_files(directory: Path, key: str) -> list[Path]:
    """Return the files of the episodes of ExORL in the order of their paths.

    Args:
        directory: Folder with the files, at any depth.
        key: Key of `params.yaml` that names the folder, for the message.

    Raises:
        UserError: There are none.
    """
    found = sorted(directory.rglob("*.npz"))
    if not found:
        raise UserError(
            f"{directory} holds no .npz files, expected the episodes of ExORL; "
            f"set `{key}` to the folder that they were unpacked to."
        )
    return found


def exorl_arrays(file: Path, names: Sequence[str]) -> list[Array]:
    """Return arrays of an episode, each of shape (rows, width).

    Raises:
        UserError: The file is missing or damaged, or lacks one of the arrays.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = [np.asarray(archive[name], dtype=np.float64) for name in names]
        if any(array.ndim == 0 for array in arrays):
            raise ValueError("an array has no axis")
    except (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} is no episode of ExORL ({type(error).__name__}: {error}); "
            f"expected an .npz file with the arrays {', '.join(names)}: take it out or unpack it again."
        ) from None
    return [array.reshape(len(array), -1) for array in arrays]


def _archive(file: Path) -> list[str]:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
        return list(archive.files)


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} is not there; expected a log: put it back, or correct `file`.")
    return UserError(f"{path} cannot be read as a log ({first_line(error)}); expected what its suffix says.")
