"""Tables that commands read and write, and the progress of work on their rows."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files
from pipelines.base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.models.tables import DensityModel

KINDS = ("csv", "tsv", "parquet")
_LINE_SECONDS = 2.0


def output(name: str) -> Path:
    """Return the path of an option, whose ending says the kind of the table."""
    path = Path(name)
    if path.suffix.lstrip(".") not in KINDS:
        hint = did_you_mean(path.suffix.lstrip("."), KINDS, "")
        raise argparse.ArgumentTypeError(f"{name!r} should end in .csv, .tsv or .parquet{hint}")
    return path


def read(path: Path, columns: Mapping[str, Sequence[str] | None]) -> pd.DataFrame:
    """Read columns of a table.

    Args:
        path: CSV, TSV or parquet.
        columns: Names of the columns, each with its words, or None if it holds numbers.

    Raises:
        UserError: The file is missing or cannot be read as a table, or it lacks such a column.
    """
    import pandas as pd

    from pipelines.base import tables

    opened = tables.open_file(*tables.find([path]))
    for name in columns:
        if opened.names.count(name) != 1:
            found = "several" if name in opened.names else f"no such column, only {', '.join(opened.names)}"
            hint = did_you_mean(name, set(opened.names) - {name})
            raise UserError(f"the model needs the column {name!r}, of which {path} has {found}{hint}")
    numbers = opened.kinds([name for name, words in columns.items() if words is None])
    for name, column in numbers.items():
        if column.kind not in ("integer", "float", "empty"):
            where = f", {column.word!r} in row {column.row}" if column.word else ""
            raise UserError(f"the column {name!r} of {path} holds {column.kind}{where}; expected numbers.")
    kinds: dict[str, tables.Kind] = {name: "float" if name in numbers else "text" for name in columns}
    chunks = [pd.DataFrame({name: _values(chunk[name]) for name in columns}) for chunk in opened.chunks(kinds)]
    table = pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame(columns=list(columns))
    whole = [name for name, column in numbers.items() if column.kind == "integer" and not column.missing]
    return table.astype(dict.fromkeys(whole, "int64"))


def _values(values: Any) -> Any:
    """Return a column of a chunk for pandas: numbers are an array, words an array of Arrow."""
    return values.to_pandas() if hasattr(values, "to_pandas") else values


def write(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically, in the kind that its ending says."""
    kind = path.suffix.lstrip(".")
    if kind == "parquet":
        files.write_table(path, table)
        return
    with files.replacing(path) as temporary:
        table.to_csv(temporary, index=False, sep="\t" if kind == "tsv" else ",", encoding="utf-8")


def progress(what: str) -> Callable[[int, int], None]:
    """Return a function that prints how many rows are done, at most every two seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _LINE_SECONDS:
            last = time.monotonic()
            print(f"{what} {done:,} of {total:,} rows", file=sys.stderr, flush=True)

    return report


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and how it is read."""
    parser.add_argument(
        "model",
        help="name of a trained model, such as penguins.cfm (`<data set>.<method>`, the version trained last), "
        "models:/<name>/<version>, models:/<name>@champion, or a folder such as data/models/moons/cfm",
    )
    parser.add_argument("--network", type=int, metavar="SEED", help="which of its networks (default: the first)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")


def load(options: argparse.Namespace, **how: Any) -> DensityModel:
    """Return the model of the options, and print which one it is.

    Raises:
        UserError: There is no such model, or it is one of an environment.
    """
    from pipelines.models import registry
    from pipelines.models.tables import DensityModel
    from pipelines.runs import versions

    address = options.model
    if not Path(address).is_dir() and ":/" not in address:
        address = versions.resolve(address)
    model = registry.load(address, seed=options.network, device=options.device, **how)
    if not isinstance(model, DensityModel):
        raise UserError(
            f"{options.model!r} is a model of an environment, which is used from Python: "
            "`pipelines.models.registry.load(name).sample(state, action, n)`."
        )
    print(f"{address}: {model}", file=sys.stderr)
    return model
