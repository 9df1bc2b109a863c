"""Make tables and the report from the entries that are complete, after a run in which a stage failed.

They are written to `data/partial`, never to the outputs of DVC's stages `tables` and `report`. It is a command of its
own (`python -m pipelines.reporting.partial 12-1700000000.25`), run in the folder of the failed run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.base import files, layout
from pipelines.base.errors import UserError, first_line
from pipelines.config import params as parameters
from pipelines.config.params import Params
from pipelines.reporting import facts, report, tables
from pipelines.reporting.report import Incomplete
from pipelines.runs import graph, records
from pipelines.runs.graph import Node


def complete(params: Params, nodes: Mapping[str, Node], changed: Collection[str]) -> tuple[Params, list[str]]:
    """Split the entries of params.yaml into those with up-to-date results and the others.

    An entry is complete if neither the stage that writes its metrics has changed nor a stage before it; results of
    other entries may be those of an earlier run.

    Args:
        params: Contents of params.yaml.
        nodes: Stages by name.
        changed: Names of the stages that are not up to date.

    Returns:
        The parameters without the entries that are not complete, and the names of these as texts.
    """
    made = {out: node.name for node in nodes.values() for out in node.outs}
    missing: list[str] = []
    kept = dict[str, dict[str, Any]]()
    for section, kind, metrics in (
        ("datasets", "data set", layout.metrics),
        ("environments", "environment", layout.metrics),
        ("experiments", "experiment", layout.findings),
        ("plans", "planning", layout.planned),
    ):
        entries = getattr(params, section)
        stages = {name: made.get(metrics(name).as_posix()) for name in entries}
        lost = [name for name, stage in stages.items() if stage is None or _before(nodes, [stage]) & set(changed)]
        if section == "plans":  # whose environment is described by its own results
            lost += [name for name in entries if name not in kept["environments"] and name not in lost]
        kept[section] = {name: entry for name, entry in entries.items() if name not in lost}
        missing += [f"{kind} {name}" for name in lost]
    return params.model_copy(update=kept), missing


def _before(nodes: Mapping[str, Node], names: Iterable[str]) -> set[str]:
    """Return these stages and all that they depend on."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += nodes[name].deps
    return found


def write(invocation: str) -> Path:
    """Write the tables and the page of a failed invocation in the current folder, and return the page's path.

    Raises:
        UserError: No entry is complete, or the project cannot be read.
    """
    here = Path.cwd()
    params, missing = complete(parameters.load(), *graph.compare(here))
    if not (params.datasets or params.environments or params.experiments):
        raise UserError("no entry of params.yaml is complete, so there is no partial report.")
    run = facts.gather(invocation)
    with files.replacing(layout.PARTIAL) as folder:
        tables.save(params, folder / layout.TABLES.name)
        incomplete = Incomplete(facts.failures(run.stages), missing)
        report.compose(params, folder, folder / layout.TABLES.name, run, incomplete)
    return layout.page(layout.PARTIAL)


def main(invocation: str) -> int:
    """Write the page and print its path; return the exit status."""
    try:
        page = write(invocation)
    except (UserError, OSError) as error:
        print(f"partial report: {first_line(error)}", file=sys.stderr)
        return 1
    print(f"partial report: {os.path.relpath(page.absolute(), records.home().parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
