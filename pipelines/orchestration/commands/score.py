"""Score the rows of a file by a trained model: their negative log-density in nats, given their conditions.

    python -m pipelines score penguins.cfm new.csv --out nll.parquet

The mean and its standard error are printed; --out has a row for each row of the file, with the columns that the model
reads and nll. A row with a missing value or a word that training never saw has no score (NaN). Integers and categories
that were dequantised for training are scored by the mean over a few random dequantisations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.base import metric_keys
from pipelines.base.errors import UserError
from pipelines.orchestration import runner
from pipelines.orchestration.commands import _tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _tables.add_model(parser)
    parser.add_argument("file", type=Path, help="csv, tsv or parquet with the columns that the model was trained on")
    parser.add_argument("--out", type=_tables.output, help="file ending in .csv, .tsv or .parquet, which is replaced")


def run(options: argparse.Namespace) -> int:
    """Score the rows, write them, and print the mean."""
    runner.raise_on_signals()
    from flowmatch_core.solvers import Warped

    model = _tables.load(options, solver="adams", steps=96, grid=Warped())  # as the tables' likelihoods by default
    table = _tables.read(options.file, model.levels)
    if table.empty:
        raise UserError(f"{options.file} has no rows below the names of its columns.")
    problems = model.problems(table)
    scored = problems == ""
    if not scored.any():
        raise UserError(f"{options.file} has no row with a score: in the first one, {problems.iloc[0]}.")
    for sentence in model.conditions.warnings(table[scored.to_numpy()]):
        print(sentence, file=sys.stderr)
    nll = -model.log_prob(table, seed=options.seed, progress=_tables.progress("scored"))
    found = nll.to_numpy()[scored.to_numpy()]
    error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
    print(f"NLL {found.mean():.4f} ± {error:.4f} nats (mean ± standard error) of {len(found):,} rows")
    for problem, rows in problems[~scored].value_counts().items():
        print(f"without a score: {rows:,} rows, in which {problem}", file=sys.stderr)
    if options.out is not None:
        _tables.write(options.out, table.assign(**{metric_keys.free("nll", list(map(str, table.columns))): nll}))
        print(f"wrote {len(table):,} rows to {options.out}")
    return 0
