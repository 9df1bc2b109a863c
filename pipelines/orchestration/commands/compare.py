"""Print the newest numbers of every method, with their intervals over seeds, from MLflow."""

from __future__ import annotations

import argparse
import json
import math

from pipelines.base.errors import UserError
from pipelines.orchestration.text import aligned
from pipelines.runs import comparison, records, store
from pipelines.runs.comparison import Row

_METRICS = ("emd", "emd_over_floor", "nll_per_dim", "mse_v")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--profile", default="default", help="profile of the runs (default: %(default)s)")
    parser.add_argument("--data", help="data set or environment (default: all)")
    parser.add_argument(
        "--metric", action="append", help=f"metric, may be given several times (default: {', '.join(_METRICS)})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the value of every seed")


def run(options: argparse.Namespace) -> int:
    """Print a line for each data set and method."""
    metrics = tuple(options.metric or _METRICS)
    home = records.home()
    opened = store.open_existing(home)
    with store.answering(home):
        rows = comparison.rows(opened, options.profile, metrics, options.data)
    if not rows:
        what = f"{', '.join(metrics)}{f' of {options.data}' if options.data else ''}"
        raise UserError(
            f"MLflow has no finished run of profile {options.profile!r} with {what}; `make publish` copies the runs "
            "of bare `dvc repro` there, and `make repro` makes new ones."
        )
    print(json.dumps([_plain(row) for row in rows], indent=2) if options.json else _table(rows, metrics))
    if options.data and not options.json:
        print(f"\nside by side: {opened.comparison([run for row in rows for run in row.runs])}")
    return 0


def _plain(row: Row) -> dict[str, object]:
    """Return a row as JSON: per metric the mean, the limits of the interval and the value of each seed."""
    from flowmatch_core.intervals import t_interval

    numbers: dict[str, object] = {}
    for name, seeds in row.seeds.items():
        found = t_interval(list(seeds.values()))
        limits = {"mean": found.mean, "low": found.low, "high": found.high}
        numbers[name] = {key: value if math.isfinite(value) else None for key, value in limits.items()} | {
            "seeds": {str(seed): value if math.isfinite(value) else None for seed, value in sorted(seeds.items())}
        }
    return {"data": row.data, "method": row.method, "commit": row.commit, "run": row.link, "metrics": numbers}


def _table(rows: list[Row], metrics: tuple[str, ...]) -> str:
    """Return aligned columns: mean ± half of the 95 % interval over seeds."""
    shown = [name for name in metrics if any(name in row.seeds for row in rows)]
    lines = [["data", "method", "seeds", *shown, "run"]]
    for row in rows:
        count = max(len(seeds) for seeds in row.seeds.values())
        lines.append([row.data, row.method, str(count), *(_cell(row.seeds.get(name, {})) for name in shown), row.link])
    return aligned(lines)


def _cell(seeds: dict[int, float]) -> str:
    """Return a mean over seeds with half of its interval, if there are several."""
    from flowmatch_core.intervals import t_interval

    if not seeds:
        return "-"
    found = t_interval(list(seeds.values()))
    half = (found.high - found.low) / 2
    return f"{found.mean:.4g} ± {half:.2g}" if math.isfinite(half) else f"{found.mean:.4g}"
