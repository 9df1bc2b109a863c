"""What is known of an invocation beside the records of its stages: its parameters, how it ended, and DVC's lock.

Of the workspace only `dvc.lock` is read, and only to find which run made the outputs of the stages that did not run. An
orchestrator writes a snapshot when it starts and another one when it ends. Of a run without an orchestrator the lock is
read afterwards, and believed only if it holds the outputs that the stages of the run have made: the folder may have
been checked out at another commit since.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml

from pipelines.base import files
from pipelines.config.yaml_files import read_yaml
from pipelines.runs import records
from pipelines.runs.records import Parameter, Record, Status


@dataclass
class Snapshot:
    """The state of an invocation.

    Attributes:
        invocation: Name of the invocation.
        workspace: Folder that it ran in, relative to the project's.
        status: Status that the orchestrator set; None if there was none.
        time: When the snapshot was taken.
        lock: Text of dvc.lock.
        params: Contents of params.yaml at the start, if there is an orchestrator.
        pid: Process of the orchestrator.
        created: When that process was started.
        stage: Stage that was running, whose outputs are not yet in the lock.
    """

    invocation: str
    workspace: str
    status: Status | None
    time: float
    lock: str
    params: dict[str, Parameter] = field(default_factory=dict)
    pid: int = -1
    created: float = 0.0
    stage: str | None = None

    def outputs(self) -> dict[str, str]:
        """Return the digest of the outputs of every stage in the lock."""
        stages = (yaml.safe_load(self.lock) or {}).get("stages") or {}
        return {
            stage: digest({out["path"]: out.get("md5", "") for out in entry.get("outs", ())})
            for stage, entry in stages.items()
        }

    def is_of(self, found: Sequence[Record]) -> bool:
        """Return whether the lock is that of the end of a run, judged by the outputs of its stages."""
        here = self.outputs()
        made = {record.stage: digest(record.outputs) for record in found if record.status == "FINISHED"}
        return all(here.get(stage) == made[stage] for stage in made if stage != self.stage)


def begin(invocation: str, workspace: Path) -> None:
    """Write the snapshot of an invocation that this process is about to run."""
    me = psutil.Process()
    params = workspace / "params.yaml"
    given = records.flat(read_yaml(params)) if params.exists() else {}
    _write(_taken(invocation, workspace, "RUNNING", params=given, pid=me.pid, created=me.create_time()))


def end(invocation: str, workspace: Path, status: Status) -> None:
    """Write the snapshot of an invocation that has ended."""
    before = read(records.home(), invocation)
    _write(_taken(invocation, workspace, status, params=before.params if before else {}))


def during(invocation: str, workspace: Path, stage: str) -> None:
    """Write the snapshot of an invocation without an orchestrator while its stage ends."""
    _write(_taken(invocation, workspace, None, stage=stage))


def settle(workspace: Path) -> None:
    """Write the missing snapshot of a workspace's last invocation, before another one runs there."""
    home = records.home()
    here = os.path.relpath(workspace.absolute(), home.parent)
    mine = {name: found for name, found in records.by_invocation(home).items() if found[-1].workspace == here}
    if not mine:
        return
    last = max(mine, key=lambda name: mine[name][-1].started)
    if path_of(home, last).exists() or not records.is_over(last, mine[last]):
        return
    snapshot = _taken(last, workspace, None)
    if snapshot.lock and snapshot.is_of(mine[last]):
        _write(snapshot)


def path_of(home: Path, invocation: str) -> Path:
    """Return the file of an invocation's snapshot."""
    return home / "snapshots" / f"{invocation}.json"


def read(home: Path, invocation: str) -> Snapshot | None:
    """Return the snapshot of an invocation, or None if there is none; RUNNING becomes KILLED if its process is gone."""
    path = path_of(home, invocation)
    if not path.exists():
        return None
    try:
        snapshot = Snapshot(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # damaged, or of another version, which should not fail a run
        print(f"{path} is no snapshot of this version ({error}); delete it.", file=sys.stderr)
        return None
    if snapshot.status == "RUNNING" and not records.is_alive(snapshot.pid, snapshot.created):
        snapshot.status = "KILLED"
    return snapshot


def digest(outputs: Mapping[str, str]) -> str:
    """Return one digest for the outputs of a stage."""
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()[:16]


def _taken(
    invocation: str,
    workspace: Path,
    status: Status | None,
    *,
    params: Mapping[str, Parameter] | None = None,
    pid: int = -1,
    created: float = 0.0,
    stage: str | None = None,
) -> Snapshot:
    lock = workspace / "dvc.lock"
    return Snapshot(
        invocation=invocation,
        workspace=os.path.relpath(workspace.absolute(), records.home().parent),
        status=status,
        time=time.time(),
        lock=lock.read_text(encoding="utf-8") if lock.exists() else "",
        params=dict(params or {}),
        pid=pid,
        created=created,
        stage=stage,
    )


def _write(snapshot: Snapshot) -> None:
    files.write_json(path_of(records.home(), snapshot.invocation), asdict(snapshot))
