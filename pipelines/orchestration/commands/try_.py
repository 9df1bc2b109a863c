"""From a file to samples: train models on a table of your own, score them, and write a report.

    python -m pipelines try penguins.csv
    python -m pipelines try penguins.csv --columns bill_length bill_depth --condition species

It makes a profile for the file, whose folder is .workspaces/<name>: params.yaml with this data set alone. The same
command continues where it was stopped; other options train again what they change. A csv, tsv or parquet file has a
header line and one row per line; what is left out or changed is printed and stands with the results.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files, layout
from pipelines.base.errors import UserError, did_you_mean
from pipelines.config import params as parameters
from pipelines.config.yaml_files import read_yaml, write_yaml
from pipelines.orchestration import workspace
from pipelines.orchestration.commands import _workspace, repro
from pipelines.orchestration.text import aligned
from pipelines.runs import versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.base import tables

_TEST_ROWS = 10_000  # test rows that are scored
_LEVELS = 256  # an integer column with more values is modelled as continuous


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("file", nargs="+", help="csv, tsv or parquet; several files are read as one table")
    parser.add_argument("--name", help="name of the data set and of its profile (default: that of the file)")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="what is modelled (default: all numeric ones)")
    parser.add_argument(
        "--condition", nargs="+", default=[], metavar="COLUMN", help="model p(columns | these), numbers or words"
    )
    parser.add_argument("--weight", metavar="COLUMN", help="importance weights of the rows")
    parser.add_argument(
        "--missing",
        choices=("drop", "error"),
        default="drop",
        help="what happens to rows with a missing value (default: %(default)s, and their number is printed)",
    )
    parser.add_argument(
        "--discrete",
        nargs="+",
        default=None,
        metavar="COLUMN=HOW",
        help="integers and categories among the columns: uniform (add noise from [0, 1)), steps (noise and a marginal "
        "transform) or none (default: uniform for words and for integers with few values)",
    )
    parser.add_argument(
        "--transform",
        choices=("none", "marginals"),
        default="none",
        help="marginals: map each column to a normal by its own distribution first (default: %(default)s)",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of density.methods of params.yaml")
    parser.add_argument("--steps", type=_workspace.positive, help="gradient steps (default: density.fit.steps)")
    parser.add_argument("--seeds", type=_workspace.positive, help="networks per method (default: as density.seeds)")


def run(options: argparse.Namespace) -> int:
    """Make the profile, run it, and print its table and what can be done with the models."""
    root = Path.cwd()
    options.profile = name = options.name or _name(options.file[0])
    options.targets, options.force = [], False
    kinds = _kinds(paths := [_relative(file) for file in options.file])
    entry = _entry(options, paths, kinds)
    before = workspace.tried(root, name)
    if before.exists() and (old := read_yaml(before)["datasets"][name])["file"] != entry["file"]:
        raise UserError(
            f"{name!r} is the name of a try of {old['file']}; choose another one for {entry['file']} by --name, "
            f"or remove {os.path.relpath(before)} and the folder of that name beside it."
        )
    params = _params(read_yaml(root / "params.yaml"), name, entry, options)
    parameters.parse(params, before.relative_to(root))
    workspace.write(root, name, params)
    status = _workspace.run_changed(options, repro.execute)
    if status == 0:
        _explain(workspace.folder(root, name), name, entry)
    return status


def _entry(options: argparse.Namespace, paths: Sequence[str], kinds: Mapping[str, tables.Kind]) -> dict[str, Any]:
    """Return the entry of params.yaml for the files."""
    for name in [*(options.columns or []), *options.condition, *filter(None, [options.weight])]:
        if name not in kinds:
            raise UserError(f"{paths[0]} has no column {name!r}, only {', '.join(kinds)}{did_you_mean(name, kinds)}")
    others = {*options.condition, options.weight}
    numeric = [name for name, kind in kinds.items() if kind in ("integer", "float") and name not in others]
    discrete = _discrete(paths, kinds, options.columns or numeric)
    for word in options.discrete or []:
        name, _, how = word.rpartition("=")
        if how not in ("uniform", "steps", "none"):
            raise UserError(f"--discrete was given {word!r}, expected COLUMN=uniform, COLUMN=steps or COLUMN=none.")
        discrete[name] = how
    entry = {
        "kind": "table",
        "file": paths[0] if len(paths) == 1 else paths,
        "columns": options.columns,
        "condition": options.condition,
        "weight": options.weight,
        "missing": options.missing,
        "discrete": {name: how for name, how in discrete.items() if how != "none"},
        "transform": None if options.transform == "none" else options.transform,
    }
    return {key: value for key, value in entry.items() if value}


def _kinds(paths: Sequence[str]) -> dict[str, tables.Kind]:
    """Return what each column of the files holds."""
    from pipelines.base import tables

    found: dict[str, tables.Column] = {}
    for path in tables.find(list(map(Path, paths))):
        opened = tables.open_file(path)
        for name, column in opened.kinds(opened.names).items():
            found[name] = found[name] + column if name in found else column
    return {name: column.kind for name, column in found.items()}


def _discrete(paths: Sequence[str], kinds: Mapping[str, tables.Kind], columns: Sequence[str]) -> dict[str, str]:
    """Return the modelled columns that are dequantised by default: words, and integers with few and near values."""
    import numpy as np

    from pipelines.base import tables

    integers = [name for name in columns if kinds[name] == "integer"]
    values: dict[str, NDArray[np.float64]] = {name: np.empty(0) for name in integers}
    for path in tables.find(list(map(Path, paths))):
        for chunk in tables.open_file(path).chunks(dict.fromkeys(values, "integer")):
            for name in list(values):
                there = np.asarray(chunk[name])
                values[name] = np.union1d(values[name], there[np.isfinite(there)])
                if len(values[name]) > _LEVELS:
                    del values[name]
    few = {name for name, found in values.items() if (np.diff(found) == 1).any()}
    return {name: "uniform" for name in columns if kinds[name] == "text" or name in few}


def _params(
    base: Mapping[str, Any], name: str, entry: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Return params.yaml with the file as its only entry."""
    params = deepcopy(dict(base))
    params |= {"profile": name, "datasets": {name: dict(entry)}, "environments": {}, "plans": {}, "experiments": {}}
    params["successor"]["evaluate"]["solver_steps"] = {}  # they are of environments
    density = params["density"]
    density["methods"] = _methods(density["methods"], entry, options.methods)
    density["evaluate"]["likelihood_rows"] = _TEST_ROWS
    if options.steps:
        density["fit"]["steps"] = options.steps
    if options.seeds:
        density["seeds"] = list(range(options.seeds))
    return params


def _methods(known: Mapping[str, Any], entry: Mapping[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    """Return the methods of params.yaml, or some of them, without those that need conditions where there are none."""
    fit = {name: method for name, method in known.items() if "condition" in entry or not _needs_condition(method)}
    for name in wanted or []:
        if name not in fit:
            raise UserError(f"there is no method {name!r}, only {', '.join(fit)}{did_you_mean(name, fit)}")
    return {name: fit[name] for name in wanted or fit}


def _needs_condition(method: Mapping[str, Any]) -> bool:
    """Return whether the coupling of a method compares conditions."""
    coupling = method.get("coupling")
    name = coupling.get("name") if isinstance(coupling, Mapping) else coupling
    return bool(name == "conditional_ot")


def _name(file: str) -> str:
    """Return the name of a data set from that of a file.

    >>> _name("my data/2024 Penguins (raw).csv")
    'penguins_raw'
    """
    word = re.sub(r"[^a-z0-9]+", "_", Path(file).name.lower().partition(".")[0]).strip("_")
    return re.sub(r"^[^a-z]+", "", word)[:64] or "table"


def _relative(file: str) -> str:
    """Return a path in the project relative to its folder, so that a project that was moved finds it."""
    path = Path(os.path.abspath(file))
    inside = path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if inside else str(file)


def _explain(here: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Print the table, what was changed in the data, and what can be done with the models."""
    provenance = files.read_json(here / layout.provenance(layout.prepared(name)))
    markdown = (here / layout.table(layout.TABLES, "density", "md")).read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    print("", aligned([row[1:] for row in rows if set(row[0]) != {"-"}]), "", sep="\n")
    dequantised = ", ".join(f"{column} ({how})" for column, how in entry.get("discrete", {}).items())
    said = [f"dequantised: {dequantised}; --discrete COLUMN=none turns it off."] if dequantised else []
    for message in [*said, *provenance["messages"]]:
        print(f"- {message}")
    metrics = files.read_json(here / layout.metrics(name))
    trained = layout.MODELS / name  # without the floor and mixtures of seeds, which have no networks
    methods = [method for method in metrics if (here / trained / method).is_dir()]
    best = min(methods, key=lambda method: float(metrics[method].get("nll_val", metrics[method]["nll"])))
    model = _address(here, name, best)
    where = [
        f"{one['name']}={one['levels'][0] if one['kind'] == 'words' else format(one['loc'], '.4g')}"
        for one in provenance["conditions"]
    ]
    given = f" --where {shlex.join(where)}" if where else ""
    report = os.path.relpath(here / layout.page(layout.REPORT))
    kept = f"{name}: {write_yaml(entry, default_flow_style=True, width=10_000).strip()}"
    print(
        f"""
The smallest NLL on the validation rows is that of {best}.
  samples  python -m pipelines sample {model} --n 1000{given} --out new.csv
  scores   python -m pipelines score {model} {shlex.quote(_first(entry))} --out nll.csv
  report   {report}
  to keep  these lines under `datasets:` in params.yaml
    {kept}"""
    )


def _address(here: Path, name: str, method: str) -> str:
    """Return the shortest name that leads to a model of this profile."""
    full = versions.name_of(f"{name}.{method}", name)
    for short in (f"{name}.{method}", full):
        with suppress(UserError):
            if versions.resolve(short) == f"models:/{full}/latest":
                return short
    return shlex.quote(os.path.relpath(here / layout.models(name, method)))  # MLflow's store did not answer


def _first(entry: Mapping[str, Any]) -> str:
    return entry["file"] if isinstance(entry["file"], str) else entry["file"][0]
