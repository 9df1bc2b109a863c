"""Read the newest numbers of every method from MLflow, to compare methods over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.runs.store import PARENT, Store


@dataclass
class Row:
    """The numbers of a method on a data set or in an environment.

    Attributes:
        data: Data set or environment.
        method: Name of the method.
        link: Page of the invocation that evaluated it.
        runs: Ids of the runs of its cells.
        commit: Commit of the code, if it is known.
        seeds: Values by name of the metric, then by training seed.
    """

    data: str
    method: str
    link: str
    commit: str | None
    runs: list[str] = field(default_factory=list)
    seeds: dict[str, dict[int, float]] = field(default_factory=dict)


def rows(opened: Store, profile: str, metrics: Sequence[str], data: str | None = None) -> list[Row]:
    """Return a row for every data set and method: the cells of the newest invocation that evaluated it.

    Args:
        opened: Store to read.
        profile: Profile of the runs.
        metrics: Names of metrics.
        data: Data set or environment; all by default.
    """
    condition = f"attributes.status = 'FINISHED' and tags.kind = 'cell' and tags.profile = '{profile}'"
    condition += f" and tags.data = '{data}'" if data else ""
    found: dict[tuple[str, str], Row] = {}
    chosen: dict[tuple[str, str], str] = {}
    for run in opened.search(condition):  # the newest first
        tags = run.data.tags
        values = {name: run.data.metrics.get(name, math.nan) for name in metrics if name in run.data.metrics}
        key, parent = (tags["data"], tags["method"]), tags[PARENT]
        if values and run.info.lifecycle_stage == "active" and chosen.setdefault(key, parent) == parent:
            row = found.setdefault(key, Row(*key, opened.link(parent), tags.get("commit")))
            row.runs.append(run.info.run_id)
            for name, value in values.items():
                row.seeds.setdefault(name, {})[int(tags["seed"])] = value
    return [found[key] for key in sorted(found)]
