"""Read and write tables, models and JSON atomically.

The formats are parquet, safetensors and JSON, none of which can execute code when read. A writer creates a temporary
file in the same folder and renames it, so a file with the final name is always complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile
    from torch import Tensor

_REMAKE = "`make repro` (or `dvc checkout` if it was made before)."
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` when the block ends without an error.

    Raises:
        UserError: The disk is full, or the file may not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_dir():  # a rename does not replace a folder that is not empty
                remove(path)
            os.replace(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a write that the system refuses to the block as an error that names the file.

    Raises:
        UserError: The disk is full, or the file may not be written.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        if not full and not (error.errno in _FORBIDDEN and _concerns(error, path)):
            raise
        refused = path if full else Path(error.filename or path)
        final = Path(*(match[1] if (match := _TEMPORARY.fullmatch(part)) else part for part in refused.parts))
        remedy = "free some space" if full else "allow this user to write there"
        raise UserError(
            f"{final} could not be written ({os.strerror(error.errno or 0)}); {remedy} and run the same command again."
        ) from error


def _concerns(error: OSError, path: Path) -> bool:
    """Return whether an error is about `path`, a folder above it or a file in it, and not about an input."""
    named = Path(error.filename or path)
    return named.is_relative_to(path) or path.is_relative_to(named)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: The file is missing.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unread(path, error) from None


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in blocks, so that the file may be larger than memory.

    Raises:
        UserError: The file is missing.
    """
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    except OSError as error:
        raise _unread(path, error) from None


def md5(path: Path) -> str:
    """Return the MD5 of a file or a folder as DVC computes it; that of a folder ends in `.dir`.

    Raises:
        UserError: The file is missing.
    """
    if path.is_dir():
        inside = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        listed = [{"md5": md5(inside[name]), "relpath": name} for name in sorted(inside)]
        return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"
    digest = hashlib.md5(usedforsecurity=False)
    for piece in chunks(path):
        digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with non-finite numbers as null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unread(path, error) from None
    except ValueError as error:
        raise _corrupt(path, "JSON", error) from None


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def write_chunks(path: Path, chunks: Iterable[pd.DataFrame]) -> None:
    """Write a table as parquet that may exceed memory, one row group per chunk.

    Args:
        path: File to write.
        chunks: At least one chunk; all have the same columns.
    """
    from pyarrow import Table, parquet

    with replacing(path) as temporary, ExitStack() as stack:
        writer = None
        for chunk in chunks:
            table = Table.from_pandas(chunk, preserve_index=False)
            if writer is None:
                writer = stack.enter_context(parquet.ParquetWriter(temporary, table.schema))
            writer.write_table(table)


def read_table(path: Path, columns: Sequence[str] = (), *, finite: bool = True) -> pd.DataFrame:
    """Read a parquet table and check its columns and values.

    Args:
        path: File to read.
        columns: Columns that the table must have.
        finite: Whether to refuse missing and infinite numbers. Samples of a diverged model may contain them.

    Raises:
        UserError: The file is missing or corrupt, lacks a column, or contains a number that is not finite.
    """
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError, ... for a damaged file
        raise _corrupt(path, "parquet", error) from None
    _check_columns(path, list(map(str, table)), columns)
    if finite:
        numbers = table.select_dtypes("number")
        check_finite(path, list(map(str, numbers)), numbers.to_numpy())
    return table


def open_table(path: Path, columns: Sequence[str]) -> ParquetFile:
    """Open a parquet table for reading in parts, and check its columns.

    Raises:
        UserError: The file is missing or corrupt, or lacks a column.
    """
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:
        raise _corrupt(path, "parquet", error) from None
    _check_columns(path, file.schema_arrow.names, columns)
    return file


def read_group(path: Path, file: ParquetFile, group: int, columns: Sequence[str]) -> Table:
    """Return some columns of one row group of an open table.

    Raises:
        UserError: The file is corrupt.
    """
    try:
        return file.read_row_group(group, columns=list(columns), use_threads=False)
    except Exception as error:
        raise _corrupt(path, "parquet", error) from None


def row_groups(path: Path, columns: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield numeric columns of a table as float64 arrays (rows, columns), one row group at a time.

    Raises:
        UserError: The file is missing or corrupt, or lacks a column.
    """
    import numpy as np

    file = open_table(path, columns)
    for group in range(file.metadata.num_row_groups):
        table = read_group(path, file, group, columns)
        yield np.stack([table.column(name).to_numpy() for name in columns], 1)


def check_finite(path: Path, columns: Sequence[str], rows: np.ndarray, first: int = 0) -> None:
    """Raise an error if rows of a table contain NaN or infinity.

    Args:
        path: File that the rows come from.
        columns: Names of the columns of `rows`.
        rows: Values, shape (n, columns).
        first: Number of the first row in the file.

    Raises:
        UserError: A value is not finite; the message names the first one.
    """
    import numpy as np

    bad = ~np.isfinite(rows)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise UserError(
            f"{path} holds {float(rows[row, column])} in column {columns[column]!r}, row {first + row} "
            f"({int(bad.sum())} such values); expected finite numbers, so fix the source and make it again: {_REMAKE}"
        )


def _check_columns(path: Path, there: Sequence[str], wanted: Sequence[str]) -> None:
    lacking = [name for name in wanted if name not in there]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]!r} (it has {', '.join(there)}); make it again: {_REMAKE}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON description in one safetensors file."""
    from safetensors.torch import save

    content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"meta": json.dumps(dict(meta))})
    with replacing(path) as temporary:  # `save_file` would ignore the umask: only the owner could read its file
        temporary.write_bytes(content)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_tensors` wrote.

    Raises:
        UserError: The file is missing or corrupt.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # a list; the file is no mapping
            return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["meta"])
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:  # SafetensorError, KeyError (no metadata), ValueError (not JSON), OSError
        raise _corrupt(path, "safetensors", error) from None


def read_arrays(path: Path, *prefixes: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the description in a model's safetensors file, and the arrays whose names begin so, without torch.

    Raises:
        UserError: The file is missing or corrupt.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118  # it is no mapping
            return json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise _missing(path) from None
    except Exception as error:
        raise _corrupt(path, "safetensors", error) from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _missing(path: Path) -> UserError:
    return UserError(f"{path} is not there; make it: {_REMAKE}")


def _unread(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return _missing(path)
    return UserError(f"{path} could not be read ({error.strerror}); allow this user to read it, or make it: {_REMAKE}")


def _corrupt(path: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{path} is not a whole {kind} file ({first_line(error)}); delete it and make it again: {_REMAKE}")
