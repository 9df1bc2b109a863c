"""Draw rows from a trained model, with the columns, units and types of the table that it was trained on.

    python -m pipelines sample penguins.cfm --n 1000 --where species=Gentoo --out new.parquet

A model with conditions needs a value for each of them. The same seed gives the same rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from pipelines.base.errors import UserError
from pipelines.orchestration import runner
from pipelines.orchestration.commands import _tables, _workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _tables.add_model(parser)
    parser.add_argument("--n", type=_workspace.positive, default=1000, help="number of rows (default: %(default)s)")
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="conditions, such as species=Gentoo",
    )
    parser.add_argument(
        "--out",
        type=_tables.output,
        help="file ending in .csv, .tsv or .parquet, which is replaced (default: print csv)",
    )


def run(options: argparse.Namespace) -> int:
    """Draw the rows and write or print them."""
    runner.raise_on_signals()
    import torch

    model = _tables.load(options)
    where = model.conditions.parse(_pairs(options.where, model.conditions.names))
    for sentence in model.conditions.warnings(model.conditions.table(where, 1)):
        print(sentence, file=sys.stderr)
    generator = torch.Generator(model.device).manual_seed(options.seed)
    table = model.sample(options.n, where, generator, _tables.progress("drew"))
    if options.out is None:
        table.to_csv(sys.stdout, index=False)
    else:
        _tables.write(options.out, table)
        print(f"wrote {len(table):,} rows to {options.out}")
    return 0


def _pairs(words: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Return conditions from words such as `species=Gentoo`; a name may contain the sign.

    >>> _pairs(["a=b=1", "c=d=2"], ["a=b"])
    {'a=b': '1', 'c': 'd=2'}
    """
    found = {}
    for word in words:
        known = [name for name in names if word.startswith(f"{name}=")]
        name = max(known, key=len) if known else word.partition("=")[0]
        if "=" not in word:
            raise UserError(f"--where was given {word!r}, expected NAME=VALUE, such as species=Gentoo.")
        if name in found:
            raise UserError(f"--where was given {name!r} twice; give it once.")
        found[name] = word[len(name) + 1 :]
    return found
