"""The record of a stage: one small JSON file, and its curves as JSON lines.

A stage writes only here and does not use a tracker; `pipelines.runs.tracking` copies the records to MLflow. The files
are `<home>/runs/<invocation>/<stage>.json[l]`; an invocation is one `dvc repro` or flow.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from pipelines.base import files, git, ranks
from pipelines.base.home import home as home

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Parameter = str | int | float | bool | None

_FLUSH_SECONDS = 2.0  # at most this much of a curve is lost if the process is killed
_SAME_PROCESS_SECONDS = 5.0  # a process's start time is derived from the clock, which may be adjusted while it runs
_COLUMNS = ("columns", "state_names", "action_names")  # keys of a provenance
_FORCE = re.compile(r"--force|-[fimpqsvPR]*f[fimpqsvPR]*")  # alone or among other short options without a value
# Files that a run writes do not make the code dirty.
_NOT_CODE = (":(top,exclude)data", ":(top,exclude)dvc.lock")


class CellKey(NamedTuple):
    """A method on a data set or in an environment, with one training seed."""

    data: str
    method: str
    seed: int


@dataclass
class Cell:
    """What a stage found about one cell.

    Attributes:
        data: Data set or environment.
        method: Name of the method in params.yaml.
        seed: Training seed.
        params: Parameters of the training.
        metrics: Numbers, with the same names for every method and seed.
        model: Digest of the file of the network.
        trained: Whether the stage trained the network.
    """

    data: str
    method: str
    seed: int
    params: Mapping[str, Parameter] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    model: str | None = None
    trained: bool = False

    @property
    def key(self) -> CellKey:
        """What identifies the cell."""
        return CellKey(self.data, self.method, self.seed)


@dataclass
class Input:
    """Data that a stage read.

    Attributes:
        name: Data set or environment.
        context: What they were read for: training or evaluation.
        path: Folder of the data in the workspace.
        digest: MD5 of the content, as DVC computes it.
        columns: Names of the columns.
        source: Where the data come from.
        types: Types of the columns that are not `float`: `integer` or `text`.
        files: SHA-256 of the user's files, by their paths from the folder that the stage ran in.
    """

    name: str
    context: str
    path: str
    digest: str
    columns: list[str]
    source: str
    types: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Point(NamedTuple):
    """A point of a stage's curves, and the byte offset after it."""

    end: int
    time: float
    step: int
    values: dict[str, float]
    cell: CellKey | None


@dataclass
class Record:
    """One attempt to run one stage."""

    stage: str
    invocation: str
    workspace: str  # the folder it ran in, relative to the project's
    pid: int
    created: float
    started: float
    params: dict[str, Parameter]
    commit: str | None = None
    dirty: bool | None = None
    status: Status = "RUNNING"
    message: str | None = None
    ended: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    settings: dict[str, Parameter] = field(default_factory=dict)  # params.yaml as the stage loaded it
    outputs: dict[str, str] = field(default_factory=dict)  # digests by path
    inputs: list[Input] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)


class RunRecord:
    """The writer of one record; every call leaves a complete file."""

    def __init__(self, record: Record, folder: Path) -> None:
        self.record = record
        self._json, self._curve = _paths(folder, record.stage)
        self._rows: list[str] = []
        self._flushed = time.monotonic()

    @classmethod
    def start(cls, stage: str, params: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> RunRecord:
        """Open the record of the stage that this process runs, and replace that of an earlier attempt.

        Args:
            stage: Name of the stage.
            params: Parameters of the stage's cell.
            settings: Contents of params.yaml as the stage loaded it.
        """
        me = psutil.Process()
        commit, dirty = _git()
        name = invocation()
        record = Record(
            stage=stage,
            invocation=name,
            workspace=os.path.relpath(Path.cwd(), home().parent),
            pid=me.pid,
            created=me.create_time(),
            started=time.time(),
            params=flat(params),
            settings=flat(settings or {}),
            commit=commit,
            dirty=dirty,
        )
        if not ranks.is_first():
            return Follower(record, home() / "runs" / name)
        self = cls(record, home() / "runs" / name)
        self._curve.unlink(missing_ok=True)
        self._write()
        return self

    @property
    def invocation(self) -> str:
        """Name of the invocation."""
        return self.record.invocation

    def series(self, step: int, values: Mapping[str, float], cell: CellKey | None = None) -> None:
        """Add one point to each of some curves, of the stage or of one of its cells."""
        row = {"time": time.time(), "step": step, "values": _floats(values), "cell": cell}
        self._rows.append(json.dumps(row))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def metrics(self, values: Mapping[str, float]) -> None:
        """Add metrics of the whole attempt."""
        self.record.metrics.update(_floats(values))
        self._write()

    def params(self, values: Mapping[str, Any]) -> None:
        """Add parameters that determine the result of the attempt."""
        self.record.params |= flat(values)
        self._write()

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self.record.tags[key] = value
        self._write()

    def artifact(self, path: Path | str) -> None:
        """Add a file or folder that the tracker should copy."""
        self.record.artifacts.append(str(path))
        self._write()

    def output(self, path: Path) -> None:
        """Add an output that is complete, with the digest of its content."""
        self.record.outputs[path.as_posix()] = files.md5(path)
        self._write()

    def data(self, name: str, context: str, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Add data that the stage reads.

        Args:
            name: Data set or environment.
            context: What they are read for: training or evaluation.
            folder: Folder of the data.
            provenance: Description of the data.
        """
        columns = [column for key, names in provenance.items() if key.endswith(_COLUMNS) for column in names]
        columns += [condition["name"] for condition in provenance.get("conditions", ())]
        types = {column: kind for column, kind in provenance.get("types", {}).items() if kind != "float"}
        source, given = str(provenance.get("source", "")), dict(provenance.get("files", {}))
        path, digest = folder.as_posix(), files.md5(folder)
        self.record.inputs.append(Input(name, context, path, digest, columns, source, types, given))
        self._write()

    def cells(self, cells: Sequence[Cell]) -> None:
        """Add cells, or what else is known about them."""
        for new in cells:
            old = next((cell for cell in self.record.cells if cell.key == new.key), None)
            if old is None:
                old = Cell(*new.key)
                self.record.cells.append(old)
            old.params = {**old.params, **new.params}
            old.metrics = {**old.metrics, **_floats(new.metrics)}
            old.model, old.trained = new.model or old.model, new.trained or old.trained
        self._write()

    def finish(self, status: Status, message: str | None = None) -> None:
        """Close the record with a status."""
        self._flush()
        self.record.status, self.record.message, self.record.ended = status, message, time.time()
        self._write()

    def _flush(self) -> None:
        if self._rows:
            with files.writing(self._curve), self._curve.open("a", encoding="utf-8") as file:
                file.write("".join(row + "\n" for row in self._rows))
            self._rows.clear()
        self._flushed = time.monotonic()

    def _write(self) -> None:
        files.write_json(self._json, asdict(self.record))


class Follower(RunRecord):
    """The record of a further process of one stage, which is not written."""

    def _flush(self) -> None:
        self._rows.clear()

    def _write(self) -> None:
        pass


def invocation() -> str:
    """Return the name of the invocation that this process belongs to.

    It is `$FLOWMATCH_INVOCATION` if an orchestrator set it, else it is named after the nearest ancestor that is a `dvc
    repro` or an experiment, else after this process.
    """
    given = os.environ.get("FLOWMATCH_INVOCATION")
    if given:
        return given
    me = psutil.Process()
    return name_of(nearest_dvc_run(me.parents()) or me)


def nearest_dvc_run(ancestors: Sequence[psutil.Process]) -> psutil.Process | None:
    """Return the first process that is a `dvc repro` or an experiment, or None."""
    return next((ancestor for ancestor in ancestors if _is_dvc_run(_command(ancestor))), None)


def forced() -> bool:
    """Return whether the nearest ancestor that is a `dvc repro` or an experiment also runs what has not changed."""
    owner = nearest_dvc_run(psutil.Process().parents())
    return owner is not None and any(_FORCE.fullmatch(word) for word in _command(owner))


def name_of(owner: psutil.Process) -> str:
    """Return the name of the invocation that a process owns.

    An existing name of the same process is reused, because the start time changes when the clock is adjusted.
    """
    for folder in (home() / "runs").glob(f"{owner.pid}-*"):
        if is_alive(*owner_of(folder.name)):
            return folder.name
    return f"{owner.pid}-{owner.create_time():.2f}"


def owner_of(invocation: str) -> tuple[int, float]:
    """Return the process id and start time in an invocation's name, or (-1, 0.0) if it has none.

    >>> owner_of("12-1700000000.25")
    (12, 1700000000.25)
    >>> owner_of("nightly")
    (-1, 0.0)
    """
    pid, _, created = invocation.partition("-")
    try:
        return int(pid), float(created)
    except ValueError:
        return -1, 0.0


def is_alive(pid: int, created: float) -> bool:
    """Return whether the process of this id and start time is running."""
    try:
        process = psutil.Process(pid)
        same = bool(abs(process.create_time() - created) < _SAME_PROCESS_SECONDS)
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def read(folder: Path) -> list[Record]:
    """Return the records of an invocation; a RUNNING record whose process is gone becomes KILLED."""
    records = []
    for path in folder.glob("*.json"):
        try:
            records.append(_read(path))
        except (ValueError, TypeError) as error:  # damaged, or of another version, which should not fail a run
            print(f"{path} is no record of this version ({error}); delete it.", file=sys.stderr)
    return sorted(records, key=lambda record: record.started)


def by_invocation(home: Path) -> dict[str, list[Record]]:
    """Return the records by invocation, without invocations that have none."""
    found = {folder.name: read(folder) for folder in (home / "runs").glob("*")}
    return {name: rows for name, rows in found.items() if rows}


def is_over(invocation: str, found: Sequence[Record]) -> bool:
    """Return whether an invocation has ended: neither a stage nor the process that starts stages is running."""
    owner = owner_of(invocation)
    by_hand = any(record.pid == owner[0] for record in found)
    return all(record.status != "RUNNING" for record in found) and (by_hand or not is_alive(*owner))


def worst(statuses: Iterable[Status]) -> Status:
    """Return the status of several stages that have ended, from those of each."""
    statuses = set(statuses)
    return "FAILED" if "FAILED" in statuses else "KILLED" if "KILLED" in statuses else "FINISHED"


def points(folder: Path, stage: str, offset: int = 0) -> Iterator[Point]:
    """Yield the points of a stage's curves from a byte offset."""
    path = _paths(folder, stage)[1]
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # incomplete: its writer was killed or is still writing
                return
            offset += len(line)
            row = json.loads(line)
            cell = row.get("cell")
            yield Point(offset, row["time"], row["step"], row["values"], CellKey(*cell) if cell else None)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Parameter]:
    """Return nested parameters as one level with dotted keys.

    >>> flat({"seed": 0, "fit": {"lr": 0.1, "hidden": [8, 8]}})
    {'seed': 0, 'fit.lr': 0.1, 'fit.hidden': '[8, 8]'}
    """
    level: dict[str, Parameter] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            level |= flat(value, f"{prefix}{key}.")
        else:
            level[f"{prefix}{key}"] = value if isinstance(value, str | int | float | None) else json.dumps(value)
    return level


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: math.nan if value is None else float(value) for key, value in values.items()}


def _paths(folder: Path, stage: str) -> tuple[Path, Path]:
    name = stage.replace("/", ":")
    return folder / f"{name}.json", folder / f"{name}.jsonl"


def _parse(path: Path) -> Record:
    record = Record(**json.loads(path.read_text(encoding="utf-8")))
    record.cells = [Cell(**cell) for cell in record.cells]  # type: ignore[arg-type]
    record.inputs = [Input(**given) for given in record.inputs]  # type: ignore[arg-type]
    return record


def _read(path: Path) -> Record:
    record = _parse(path)
    if record.status == "RUNNING" and not is_alive(record.pid, record.created):
        record = _parse(path)  # it may have finished since it was read
        if record.status == "RUNNING":
            # The clock of files is coarser than that of the start.
            record.status, record.ended = "KILLED", max(record.started, path.stat().st_mtime)
            record.message = "its process ended without a status (killed, or the machine stopped)."
    return record


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _is_dvc_run(command: Sequence[str]) -> bool:
    """Return whether a command line is `dvc repro`, `dvc exp run` or its worker, started as a script or with `-m`."""
    programme = any(Path(word).name == "dvc" for word in command[:3])
    return programme and not {"repro", "exp", "experiments"}.isdisjoint(command)


def _git() -> tuple[str | None, bool | None]:
    """Return the commit of the code and whether it has changes; None for both if there is no commit."""
    try:
        commit = git.output("rev-parse", "HEAD").decode().strip()
        return commit, bool(git.output("status", "--porcelain", "--untracked-files=no", "--", ":/", *_NOT_CODE).strip())
    except git.Unavailable:
        return None, None
