"""Snapshots of a workspace at the end of an invocation: parameters, metrics and dvc.lock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.base import files, layout
from pipelines.config.yaml_files import read_yaml
from pipelines.runs import graph, records
from pipelines.runs.records import Parameter, Status


@dataclass
class Snapshot:
    """The state of a workspace at the end of an invocation, as DVC reports it."""

    invocation: str
    workspace: str  # relative to the project's folder
    status: Status | None  # None if no orchestrator observed the end
    time: float
    params: dict[str, Parameter]
    metrics: dict[str, float]
    lock: str  # the text of dvc.lock


def settle(workspace: Path) -> None:
    """Take the missing snapshot of a workspace's last invocation, before another one runs there."""
    home = records.home()
    here = os.path.relpath(workspace.absolute(), home.parent)
    mine = {name: found for name, found in records.by_invocation(home).items() if found[-1].workspace == here}
    if not mine:
        return
    last = max(mine, key=lambda name: mine[name][-1].started)
    if not path_of(home, last).exists() and records.is_over(last, mine[last]) and (workspace / "dvc.lock").exists():
        take(last, workspace, None)


def take(invocation: str, workspace: Path, status: Status | None) -> None:
    """Write a snapshot of a workspace: all metrics, the parameters and the lock."""
    home = records.home()
    with graph.repository(workspace) as repo:
        shown = repo.metrics.show().get("", {}).get("data", {})
    lock = workspace / "dvc.lock"
    params = workspace / "params.yaml"
    snapshot = Snapshot(
        invocation=invocation,
        workspace=os.path.relpath(workspace.absolute(), home.parent),
        status=status,
        time=time.time(),
        params=records.flat(read_yaml(params)) if params.exists() else {},
        metrics={key: value for path, found in shown.items() for key, value in _numbers(path, found.get("data"))},
        lock=lock.read_text(encoding="utf-8") if lock.exists() else "",
    )
    files.write_json(path_of(home, invocation), asdict(snapshot))


def path_of(home: Path, invocation: str) -> Path:
    """Return the file of an invocation's snapshot."""
    return home / "snapshots" / f"{invocation}.json"


def read(home: Path, invocation: str) -> Snapshot | None:
    """Return the snapshot of an invocation, or None if there is none."""
    path = path_of(home, invocation)
    return Snapshot(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _numbers(path: str, nested: Any, inner: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a metrics file by name: {"nll": 1} in `data/metrics/moons/cfm.json` is moons/cfm/nll."""
    parts = Path(path).with_suffix("").parts
    while len(parts) > 1 and parts[0] in layout.METRICS.parts:
        parts = parts[1:]
    if isinstance(nested, Mapping):
        for key, value in nested.items():
            yield from _numbers(path, value, f"{inner}/{key}")
    elif isinstance(nested, int | float) and not isinstance(nested, bool):
        yield "/".join(parts) + inner, nested
