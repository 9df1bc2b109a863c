"""Read a user's tables, CSV or parquet, column by column and in chunks, so that a file may be larger than memory.

What can be told from a file itself is found by looking: delimiter, encoding, decimal comma, types. What cannot be read
ends in one sentence that names what was found.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from pipelines.base.errors import UserError, first_line

Kind = Literal["integer", "float", "text", "date", "empty", "mixed", "other"]
"""What a column holds: integers, other numbers, words, dates, nothing, numbers with a few words, or none of them."""

BLOCK = 1 << 22  # bytes of CSV per chunk
ROWS = 1 << 16  # rows of parquet per chunk
_SAMPLE = 1 << 16  # bytes of CSV from which delimiter and decimal comma are told
_BUFFER = 1 << 20  # bytes of a column of parquet that are read at once
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_CSV, _PARQUET = ("csv", "tsv", "txt"), ("parquet", "pq")  # endings of names
_BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "-nan", "NULL", "null", "None", "NaT")
_INTEGER = r"^[+-]?\d+$"
_NUMBER = r"^[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf|Inf|INF|infinity|Infinity)$"
_DECIMAL_COMMA, _DECIMAL_POINT = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?"), re.compile(r"[+-]?\d*\.\d+.*")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}([,.]\d{3})+([.,]\d+)?")


@dataclass(frozen=True)
class Column:
    """What a column of one or several files holds.

    Attributes:
        kind: Type of its values.
        type: Name of the type, for messages.
        rows: Number of values, including the missing ones.
        missing: Number of missing values.
        words: Number of values that are no numbers, where the kind is text or mixed.
        word: The first of them.
        row: Its number below the names, from 1.
        where: The file that it stands in.
    """

    kind: Kind
    type: str = ""
    rows: int = 0
    missing: int = 0
    words: int = 0
    word: str = ""
    row: int = 0
    where: str = ""

    def __add__(self, other: Column) -> Column:
        """Return what the column holds if its values continue in another file or chunk."""
        before = self.rows if other.where == self.where else 0
        first = self if self.words else replace(other, row=other.row + before)
        return replace(
            first,
            kind=_together(self, other),
            type=self.type or other.type,
            rows=self.rows + other.rows,
            missing=self.missing + other.missing,
            words=self.words + other.words,
        )


def _together(one: Column, other: Column) -> Kind:
    kinds = {one.kind, other.kind} - {"empty"}
    if len(kinds) < 2:
        return next(iter(kinds), "empty")
    if kinds == {"integer", "float"}:
        return "float"
    if "other" in kinds:
        return "other"
    if kinds == {"date", "text"}:
        return "text"
    words = one.words + other.words
    values = one.rows + other.rows - one.missing - other.missing
    return "mixed" if 2 * words <= values else "text"


class TableFile(ABC):
    """A table in a file.

    Attributes:
        path: The file.
        names: Names of its columns, as they stand in the file.
    """

    path: Path
    names: list[str]

    @abstractmethod
    def kinds(self, names: Iterable[str]) -> dict[str, Column]:
        """Return what some columns hold; this reads the whole file.

        Raises:
            UserError: The file cannot be read as a table.
        """

    @abstractmethod
    def chunks(self, kinds: Mapping[str, Kind]) -> Iterator[dict[str, Any]]:
        """Yield some columns chunk by chunk.

        Args:
            kinds: The columns to read, with their kinds. Numbers become float64 arrays with NaN for missing values,
                dates seconds since 1970 likewise, words Arrow arrays of strings with nulls.

        Raises:
            UserError: The file cannot be read as a table, or has changed since it was opened.
        """

    @property
    @abstractmethod
    def notes(self) -> list[str]:
        """Sentences on how the file was read, where that is not plain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = self._state()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file's content."""
        digest = hashlib.sha256()
        for piece in _pieces(self.path):
            digest.update(piece)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise an error if the file has changed since it was opened.

        Raises:
            UserError: It has changed, or has vanished.
        """
        if self._state() != self._stat:
            raise UserError(f"{self.path} changed while it was read; run the same command again when it is complete.")

    def _state(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except OSError as error:
            raise _unread(self.path, error) from None
        return stat.st_size, stat.st_mtime_ns


@final
class CsvFile(TableFile):
    """A text file with one row a line and the names in its first line.

    Args:
        path: The file.

    Raises:
        UserError: It is empty or no text, or its first line holds no names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.encoding = _encoding(path)
        self.delimiter, self.comma = _format(path, self.encoding)
        with self._open() as reader:
            raw: list[str] = reader.schema.names
        self._raw = raw
        self.names = [name.strip() for name in raw]
        self._check_names()

    @property
    def notes(self) -> list[str]:
        """Sentences on how the file was read, where that is not plain."""
        notes = []
        if self.encoding == "latin-1":
            notes.append(f"{self.path.name} is not UTF-8 and was read as Latin-1.")
        if self.comma:
            notes.append(f"the decimal commas of {self.path.name} were read as points.")
        return notes

    def kinds(self, names: Iterable[str]) -> dict[str, Column]:
        """Return what some columns hold; this reads the whole file."""
        found = {name: Column("empty", where=str(self.path)) for name in names}
        for batch in self._batches():
            for name in found:
                found[name] += _look(self._strings(batch, name), str(self.path))
        return found

    def chunks(self, kinds: Mapping[str, Kind]) -> Iterator[dict[str, Any]]:
        """Yield some columns chunk by chunk."""
        for batch in self._batches():
            yield {name: self._values(self._strings(batch, name), name, kind) for name, kind in kinds.items()}
        self.check_unchanged()

    def _values(self, strings: Any, name: str, kind: Kind) -> Any:
        if kind == "text":
            return strings
        try:
            return _seconds(strings) if kind == "date" else _floats(strings)
        except ValueError:  # it was a number when the kinds were found
            self.check_unchanged()
            raise

    def _batches(self) -> Iterator[Any]:
        import pyarrow as pa

        with self._open(dict.fromkeys(self._raw, pa.string())) as reader:
            yield from reader

    @contextmanager
    def _open(self, types: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """Open the file for reading, and raise what pyarrow raises in the block as a sentence."""
        import pyarrow as pa
        from pyarrow import csv as reader

        bad: list[Any] = []

        def note(row: Any) -> str:
            bad.append(row)
            return "error"

        try:
            with reader.open_csv(
                self.path,
                reader.ReadOptions(use_threads=False, block_size=BLOCK, encoding=self.encoding),
                reader.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=note),
                reader.ConvertOptions(column_types=types, strings_can_be_null=False),
            ) as opened:
                yield opened
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise self._ragged(bad[0]) if bad else _not_a_table(self.path, error) from None
        except OSError as error:
            raise _unread(self.path, error) from None

    def _ragged(self, row: Any) -> UserError:
        where = f"data row {row.number - 1}" if row.number else f"the row {row.text[:40]!r}"
        return UserError(
            f"{where} of {self.path} has {row.actual_columns} values separated by {_DELIMITERS[self.delimiter]}, where "
            f"the first line has {row.expected_columns} names; expected as many, so mend that row, remove lines above "
            "the names or below the table, and give a column of row names a name."
        )

    def _strings(self, batch: Any, name: str) -> Any:
        """Return a column as strings without spaces at the ends, with nulls for missing values."""
        import pyarrow as pa
        from pyarrow import compute

        strings = compute.utf8_trim_whitespace(batch.column(self.names.index(name)))
        strings = compute.if_else(compute.is_in(strings, pa.array(_MISSING)), None, strings)
        if self.comma:
            number = compute.match_substring_regex(strings, r"^[+-]?\d*,\d+([eE][+-]?\d+)?$")
            strings = compute.if_else(number, compute.replace_substring(strings, ",", "."), strings)
        return strings

    def _check_names(self) -> None:
        """Refuse a first line of numbers, but for different integers, such as years or the columns of a matrix."""
        names = [name for name in self.names if name]
        plain = len(set(names)) == len(names) and all(re.match(_INTEGER, name) for name in names)
        if names and not plain and all(re.match(_NUMBER, name) for name in names):
            raise UserError(
                f"the first line of {self.path} holds the number {names[0]!r} and no names; "
                "expected the names of the columns, so add a line of names."
            )


@final
class ParquetTable(TableFile):
    """A parquet file.

    Args:
        path: The file.

    Raises:
        UserError: It is no parquet file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.schema = self._file().schema_arrow
        self.names = list(self.schema.names)

    @property
    def notes(self) -> list[str]:
        """Sentences on how the file was read: none."""
        return []

    def kinds(self, names: Iterable[str]) -> dict[str, Column]:
        """Return what some columns hold; this reads the whole file."""
        found = {
            name: Column(_kind(field.type), str(field.type), where=str(self.path))
            for name in names
            for field in [self.schema.field(name)]
        }
        plain = {name: column.kind for name, column in found.items() if column.kind not in ("other", "empty")}
        found |= {name: replace(found[name], kind="empty") for name in plain}
        for chunk in self.chunks(plain):
            for name, values in chunk.items():
                found[name] += _examined(values, plain[name], str(self.path))
        rows = self._file().metadata.num_rows
        return found | {name: replace(found[name], rows=rows) for name in found.keys() - plain}

    def chunks(self, kinds: Mapping[str, Kind]) -> Iterator[dict[str, Any]]:
        """Yield some columns chunk by chunk."""
        import pyarrow as pa

        if not kinds:
            return
        file = self._file()
        try:
            for batch in file.iter_batches(ROWS, columns=list(kinds), use_threads=False):
                yield {name: _plain(batch.column(name), kind) for name, kind in kinds.items()}
        except pa.ArrowInvalid as error:
            raise _not_a_table(self.path, error) from None
        except OSError as error:
            raise _unread(self.path, error) from None
        self.check_unchanged()

    def _file(self) -> Any:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER)  # not the whole file
        except pa.ArrowInvalid as error:
            raise _not_a_table(self.path, error) from None
        except OSError as error:
            raise _unread(self.path, error) from None


def find(files: Sequence[Path]) -> list[Path]:
    """Return the paths of files and of globs, those of a glob in the order of their names.

    Raises:
        UserError: A file is missing, or a glob matches none.
    """
    found: list[Path] = []
    for text in map(str, files):
        paths = sorted(glob(text, recursive=True)) if has_magic(text) and not os.path.exists(text) else [text]
        if not paths:
            raise UserError(f"no file matches {text!r}; expected at least one, so mend the pattern or its folder.")
        found += [Path(path) for path in paths]
    for path in found:
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected a file; name its files by a glob, such as {path}/*.csv.")
        if not path.is_file():
            raise UserError(f"{path} is missing, expected a file{_near(path)}")
    return found


def open_file(path: Path) -> TableFile:
    """Open a table by the ending of its name.

    Raises:
        UserError: The ending is unknown, or the file cannot be read as a table.
    """
    if _ending(path) in _PARQUET:
        return ParquetTable(path)
    if _ending(path) in _CSV:
        return CsvFile(path)
    raise UserError(
        f"{path} ends in {path.suffix!r}, expected {', '.join(_CSV + _PARQUET)}; save the table as such a file."
    )


def _ending(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def thousands(text: str) -> bool:
    """Return whether a text is a number with separators of thousands.

    >>> thousands("1,234"), thousands("1.234.567,8"), thousands("12,5")
    (True, True, False)
    """
    return _THOUSANDS.fullmatch(text) is not None


def _near(path: Path) -> str:
    from pipelines.base.errors import did_you_mean

    folder = path.parent
    others = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(path.name, others, "; paths are relative to params.yaml.")


def _look(strings: Any, where: str) -> Column:
    """Return what an Arrow array of strings holds."""
    from pyarrow import compute

    rows, missing = len(strings), strings.null_count
    column = Column("empty", "text", rows, missing, where=where)
    if missing == rows:
        return column
    if _casts(strings, "int64") or compute.all(compute.match_substring_regex(strings, _INTEGER)).as_py():
        return replace(column, kind="integer")
    if _casts(strings, "float64") or compute.all(compute.match_substring_regex(strings, _NUMBER)).as_py():
        return replace(column, kind="float")
    no_number = compute.invert(compute.match_substring_regex(strings, _NUMBER)).fill_null(False)
    words, first = compute.sum(no_number).as_py(), compute.index(no_number, True).as_py()
    column = replace(column, words=words, word=strings[first].as_py(), row=first + 1)
    if words == rows - missing and _is_date(strings):
        return replace(column, kind="date")
    return replace(column, kind="mixed" if 2 * words <= rows - missing else "text")


def _casts(strings: Any, kind: str) -> bool:
    import pyarrow as pa

    try:
        strings.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _floats(strings: Any) -> NDArray[np.float64]:
    from pyarrow import compute

    values: NDArray[np.float64] = compute.cast(strings, "float64").to_numpy(zero_copy_only=False)
    return values


def _is_date(strings: Any) -> bool:
    import pyarrow as pa

    try:
        _seconds(strings)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _seconds(times: Any) -> NDArray[np.float64]:
    """Return dates, or strings in ISO 8601, as seconds since 1970, NaN where missing."""
    import pyarrow as pa
    from pyarrow import compute

    if _kind(times.type) == "text":
        times = times.cast(pa.string())
        zoned = compute.match_substring_regex(times, r"\d\d:.*(Z|[+-]\d\d:?\d\d)$")
        if compute.any(zoned).as_py():
            times = times.cast(pa.timestamp("us", "UTC"))
    micro = times.cast(pa.timestamp("us", getattr(times.type, "tz", None)), safe=False)
    seconds: NDArray[np.float64] = compute.divide(micro.cast("int64").cast("float64"), 1e6).to_numpy(
        zero_copy_only=False
    )
    return seconds


def _kind(type_: Any) -> Kind:
    """Return the kind of a column of an Arrow type."""
    from pyarrow import types

    if types.is_dictionary(type_):
        return _kind(type_.value_type)
    if types.is_integer(type_):
        return "integer"
    if types.is_floating(type_) or types.is_decimal(type_):
        return "float"
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "text"
    if types.is_boolean(type_):
        return "text"  # the words True and False
    if types.is_date(type_) or types.is_timestamp(type_):
        return "date"
    return "empty" if types.is_null(type_) else "other"


def _examined(values: Any, kind: Kind, where: str) -> Column:
    """Return what a chunk of a column of a known kind holds."""
    if isinstance(values, np.ndarray):
        missing = int(np.isnan(values).sum())
        return Column(kind if missing < len(values) else "empty", "", len(values), missing, where=where)
    present = values.drop_null()
    word = present[0].as_py() if len(present) else ""
    held: Kind = "empty" if not len(present) else "date" if _is_date(present) else kind
    return Column(held, "", len(values), values.null_count, len(present), word, 1 if word else 0, where)


def _plain(array: Any, kind: Kind) -> Any:
    """Return an Arrow array as float64 with NaN for missing values, or as Arrow strings."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kind == "date":
        return _seconds(array)
    if kind == "text":
        if pa.types.is_boolean(array.type):
            return compute.if_else(array, "True", "False")
        return array.cast(pa.string())
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _encoding(path: Path) -> str:
    """Return the encoding of a text file: that of its byte order mark, UTF-8, or else Latin-1."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    encoding, size = "utf-8", 0
    for piece in _pieces(path):
        if size == 0 and piece[:2] in _BOMS:
            return _BOMS[piece[:2]]
        size += len(piece)
        if b"\0" in piece:
            raise UserError(f"{path} holds bytes that are no text; expected a CSV file, so save the table as CSV.")
        if encoding == "utf-8":
            try:
                decoder.decode(piece)
            except UnicodeDecodeError:
                encoding = "latin-1"
    if size == 0:
        raise UserError(f"{path} is empty; expected a line of names and rows below it.")
    return encoding


def _format(path: Path, encoding: str) -> tuple[str, bool]:
    """Return the delimiter of a CSV file, and whether its numbers have a decimal comma."""
    with path.open("rb") as file:
        raw = file.read(_SAMPLE)
    text = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)(errors="replace").decode(raw)
    if len(raw) == _SAMPLE:  # without the cut last line
        text = text[: text.rfind("\n") + 1] or text
    best, delimiter, cells = (0.0, 1), ",", list[list[str]]()
    for candidate in _DELIMITERS:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=candidate) if row]
        width = len(rows[0]) if rows else 0
        fit = sum(len(row) == width for row in rows[1:]) / max(1, len(rows) - 1), width
        if width > 1 and fit > best:
            best, delimiter, cells = fit, candidate, rows[1:]
    values = [cell.strip() for row in cells for cell in row]
    commas = [value for value in values if _DECIMAL_COMMA.fullmatch(value)]
    if delimiter == "," or not commas or any(_DECIMAL_POINT.fullmatch(value) for value in values):
        return delimiter, False
    if all(map(thousands, commas)):
        raise UserError(
            f"{path} holds {commas[0]!r}, which may mean thousands or decimals; expected numbers with a decimal point "
            "and without separators of thousands, so write them so."
        )
    return delimiter, True


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    except OSError as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: OSError) -> UserError:
    reason = error.strerror or first_line(error)
    return UserError(f"{path} could not be read ({reason}); expected a table that stays there while it is read.")


def _not_a_table(path: Path, error: Exception) -> UserError:
    what = "parquet" if _ending(path) in _PARQUET else "CSV"
    return UserError(f"{path} could not be read as {what} ({first_line(error)}); mend it or save the table again.")
