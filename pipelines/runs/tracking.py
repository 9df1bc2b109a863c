"""Publish records as MLflow runs: a parent per invocation, and below it a run per stage and a run per cell.

A cell is a method on a data set with one training seed. Training and evaluation write to the same run of a cell, with
the same names for all of them, so that MLflow compares methods and seeds; the parent has the means over seeds. All
numbers come from the records of the stages that the invocation ran, none from the workspace. `lineage.json` names for
each stage the run that made its present outputs, found by their digests.

Publishing is idempotent: published runs are identified by their tags, so after a crash, with a second publisher or
after the database was deleted, the next `publish` only adds what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base.redact import redact
from pipelines.runs import flavour, records, snapshots, store, versions
from pipelines.runs.records import Cell, CellKey, Input, Parameter, Record, Status
from pipelines.runs.snapshots import Snapshot
from pipelines.runs.store import INVOCATION, PARENT

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Run

_SCORE = "score_metric"  # tag of an evaluation: the metric that is the score of its models

_METRICS, _OTHERS = 900, 50  # of one request: MLflow rejects more than 1000, 100 of them no metrics
_FILES = 100  # of a data set that are listed with their hashes; MLflow limits the length of a source
_STATE = "flowmatch.state"  # tag of a cell: digest of what is published
_OFFSET = "flowmatch.offset"  # tag of a stage: how far its curves are published
_TRAINED_IN = "flowmatch.trained_in"  # tag of a cell: id of the run of its training stage
_INHERITED = (INVOCATION, "profile", "commit", "mlflow.source.git.commit", "git.dirty")

_Point = tuple[str, float | None, int, int]  # name, value, milliseconds, step


@dataclass
class _CellState:
    """What the stages of an invocation found about one cell."""

    key: CellKey
    started: float
    ended: float = 0.0
    statuses: list[Status] = field(default_factory=list)
    params: dict[str, Parameter] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)  # time of each metric
    tags: dict[str, str] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    score: str | None = None
    trained_in: str | None = None  # id of the run of the training stage

    @property
    def status(self) -> Status:
        """Status of the cell's run, of all stages that contributed."""
        return "RUNNING" if "RUNNING" in self.statuses else records.worst(self.statuses)

    def digest(self) -> str:
        """Return a digest of all that is published, to notice what is new."""
        state = [self.status, self.params, self.metrics, self.tags, [repr(given) for given in self.inputs]]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

    def add(self, record: Record, cell: Cell, run: str) -> None:
        """Add what one stage found."""
        self.started = min(self.started, record.started)
        self.ended = max(self.ended, record.ended or record.started)
        self.statuses.append(record.status)
        self.params |= cell.params
        if record.ended:  # before that their time is not known, and MLflow would keep a point for each of two
            self.metrics |= cell.metrics
            self.measured |= dict.fromkeys(cell.metrics, record.ended)
        self.inputs += [_in_project(given, record.workspace) for given in record.inputs]
        self.tags |= {key: record.tags[key] for key in ("device",) if key in record.tags}
        if cell.model:
            self.tags["model"] = cell.model
        if cell.trained:
            self.trained_in = run
        self.score = record.tags.get(_SCORE, self.score)


@dataclass
class _Curves:
    """New points of a stage's curves, by cell (None: of the stage), and the tag that says they are published."""

    points: dict[CellKey | None, list[_Point]] = field(default_factory=dict)
    offset: dict[str, str] = field(default_factory=dict)


class Tracker:
    """The open store; created and used while holding the publisher's lock."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = store.connect(home)
        self.client = self.store.client

    def publish(self, invocation: str) -> None:
        """Create or update the runs of an invocation."""
        parent, children = self.store.runs_of(invocation)
        if parent and (parent.data.tags.get("flowmatch.complete") or parent.info.lifecycle_stage != "active"):
            return
        found = records.read(self.home / "runs" / invocation)
        last = snapshots.read(self.home, invocation)
        if not found and not last:
            return
        parent = parent or self._create_parent(invocation, found, last)
        stages = self._stage_runs(parent, found, [run for run in children if "dvc.stage" in run.data.tags])
        known = {key: run for run in children if (key := _key_of(run)) is not None}
        cells = {state.key: state for state in _gather(found, stages)}
        cell_runs = {key: known.get(key) or self._create_cell(parent, state) for key, state in cells.items()}
        curves = {record.stage: self._new_points(stages[record.stage], record) for record in found}
        for key, state in cells.items():
            points = [point for curve in curves.values() for point in curve.points.get(key, ())]
            self._update_cell(cell_runs[key], state, points)
        for record in found:  # after the cells, because the run of the stage says which points are published
            self._update_stage(stages[record.stage], record, curves[record.stage])
        status = _status(invocation, found, last)
        if status != "RUNNING":
            for key, state in cells.items():  # at the end, because MLflow does not change the context of an input
                self.client.log_inputs(cell_runs[key].info.run_id, _datasets(state.inputs))
            self._score(cells.values())
            self._complete(parent, found, stages, cells.values(), last, status)

    def _create_parent(self, invocation: str, found: Sequence[Record], last: Snapshot | None) -> Run:
        owner = records.owner_of(invocation)[1]
        started = owner or min([record.started for record in found], default=last.time if last else 0.0)
        params = found[0].settings if found else last.params if last else {}
        profile = _profile(found[0]) if found else str(params.get("profile", "default"))
        name = f"{profile} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(started))}"
        tags = {"kind": "invocation", INVOCATION: invocation, "profile": profile}
        run = self.client.create_run(
            self.store.experiment, _ms(started), tags | (_code(found[0]) if found else {}), name
        )
        self._log(run.info.run_id, params=params)
        return run

    def _stage_runs(self, parent: Run, found: Sequence[Record], existing: Sequence[Run]) -> dict[str, Run]:
        """Return the run of every stage by its name, created where there is none."""
        known = {(run.data.tags["dvc.stage"], run.data.tags["flowmatch.started"]): run for run in existing}
        stages: dict[str, Run] = {}
        for record in found:
            run = known.pop((record.stage, repr(record.started)), None)
            stages[record.stage] = run or self._create_stage(parent, record)
        for replaced in known.values():  # an attempt that was retried before its end was published
            if replaced.info.status == "RUNNING":
                self.client.set_terminated(replaced.info.run_id, "FAILED")
        return stages

    def _create_stage(self, parent: Run, record: Record) -> Run:
        tags = {
            "kind": "stage",
            PARENT: parent.info.run_id,
            INVOCATION: record.invocation,
            "flowmatch.started": repr(record.started),
            "dvc.stage": record.stage,
            "profile": _profile(record),
        }
        return self.client.create_run(self.store.experiment, _ms(record.started), tags | _code(record), record.stage)

    def _update_stage(self, run: Run, record: Record, curves: _Curves) -> None:
        """Log what is new about a stage on its run."""
        run_id = run.info.run_id
        if run.info.lifecycle_stage != "active":
            return
        if run.info.status != "RUNNING":
            if record.status not in ("RUNNING", run.info.status):  # found faulty after it was published
                self._log(run_id, tags=_note(record))
                self.client.set_terminated(run_id, record.status)
            return
        points, offset = curves.points.get(None, []), curves.offset
        if record.status == "RUNNING":
            self._log(run_id, points, _new(run, record.params), offset)
            return
        ended = _ms(record.ended or record.started)
        tags = offset | record.tags | {"flowmatch.outputs": snapshots.digest(record.outputs)} | _note(record)
        self._log(run_id, points + _at(record.metrics, ended), _new(run, record.params), tags)
        for name in record.artifacts:
            path = self.home.parent / record.workspace / name
            if path.exists():
                self.client.log_artifact(run_id, str(path))
        if record.status == "FINISHED" and versions.MODEL in record.tags:
            self._register(run, record)
        self.client.set_terminated(run_id, record.status, ended)

    def _register(self, run: Run, record: Record) -> None:
        """Add the MLmodel file to a trained model and register it."""
        run_id, model = run.info.run_id, record.tags[versions.MODEL]
        networks = [self.home.parent / record.workspace / name for name in record.artifacts]
        with tempfile.TemporaryDirectory() as folder:
            for path in networks:
                if path.name == versions.folder_of(model) and path.exists():
                    flavour.write(path, Path(folder), run_id)
            self.client.log_artifacts(run_id, folder, versions.folder_of(model))
        tags = {"dvc.stage": record.stage} | _code(record)
        versions.register(self.client, model, _profile(record), run_id, str(run.info.artifact_uri), tags)

    def _new_points(self, run: Run, record: Record) -> _Curves:
        """Return the points that were added to a stage's curves since the offset in the tag of its run."""
        curves = _Curves()
        if run.info.status == "RUNNING":
            done = int(run.data.tags.get(_OFFSET, 0))
            for point in records.points(self.home / "runs" / record.invocation, record.stage, done):
                curves.points.setdefault(point.cell, []).extend(_at(point.values, _ms(point.time), point.step))
                curves.offset = {_OFFSET: str(point.end)}
        return curves

    def _create_cell(self, parent: Run, state: _CellState) -> Run:
        data, method, seed = state.key
        tags = {
            "kind": "cell",
            PARENT: parent.info.run_id,
            **{name: parent.data.tags[name] for name in _INHERITED if name in parent.data.tags},
            "data": data,
            "method": method,
            "seed": str(seed),
        }
        return self.client.create_run(self.store.experiment, _ms(state.started), tags, f"{data} {method} seed {seed}")

    def _update_cell(self, run: Run, state: _CellState, points: Sequence[_Point]) -> None:
        """Bring the run of a cell up to date with its curves and what its stages found, if anything is new."""
        digest = state.digest()
        if run.info.lifecycle_stage != "active":
            return
        if run.data.tags.get(_STATE) == digest:
            state.trained_in = run.data.tags.get(_TRAINED_IN)
            self._log(run.info.run_id, points)
            return
        tags = state.tags | {_STATE: digest}
        params: dict[str, Parameter] = {**state.key._asdict(), **state.params}
        if state.trained_in is None and "model" in tags:  # evaluated only: another invocation trained the network
            trained = self.store.search(f"tags.kind = 'cell' and tags.trained_model = '{tags['model']}'", 1)
            for earlier in trained:
                tags["trained_by"] = earlier.info.run_id
                state.trained_in = earlier.data.tags[_TRAINED_IN]
                params = {**earlier.data.params, **params}
        elif "model" in tags:
            tags["trained_model"] = tags["model"]
        if state.trained_in:
            tags[_TRAINED_IN] = state.trained_in
        if state.status != "RUNNING":
            self.client.set_terminated(run.info.run_id, state.status, _ms(state.ended))
        numbers = [(key, value, _ms(state.measured[key]), 0) for key, value in state.metrics.items()]
        self._log(run.info.run_id, [*points, *numbers], _new(run, params), tags)

    def _score(self, cells: Iterable[_CellState]) -> None:
        """Tag the versions of the models that were evaluated with the mean of their score over seeds."""
        scored: dict[tuple[str, str], list[float]] = {}
        for cell in cells:
            if cell.trained_in and cell.score in cell.metrics:
                value = cell.metrics[cell.score]
                scored.setdefault((cell.trained_in, cell.score), []).append(math.nan if value is None else value)
        for (run, metric), values in scored.items():
            versions.score(self.client, run, metric, sum(values) / len(values), len(values))

    def _complete(
        self,
        parent: Run,
        found: Sequence[Record],
        stages: Mapping[str, Run],
        cells: Iterable[_CellState],
        last: Snapshot | None,
        status: Status,
    ) -> None:
        """Log means over seeds, numbers of stages, and the run that made each stage's outputs; close the parent."""
        run_id = parent.info.run_id
        ended = _ms(max([record.ended or record.started for record in found], default=last.time if last else 0.0))
        devices = sorted({record.tags["device"] for record in found if "device" in record.tags})
        tags = {"flowmatch.complete": "true"} | ({"device": ", ".join(devices)} if devices else {})
        lineage = {record.stage: stages[record.stage].info.run_id for record in found if record.status == "FINISHED"}
        outputs = last.outputs() if last else {}
        ran = {record.stage for record in found}
        earlier = {stage: self._made(stage, digest) for stage, digest in outputs.items() if stage not in ran}
        self.client.log_dict(run_id, lineage | earlier, "lineage.json")
        if last and last.lock:
            self.client.log_text(run_id, last.lock, "dvc.lock")
            tags["dvc.lock_md5"] = hashlib.md5(last.lock.encode(), usedforsecurity=False).hexdigest()
        self._log(run_id, _at(_means(cells) | _of_stages(found), ended))
        self.client.set_terminated(run_id, status, ended)
        self._log(run_id, tags=tags)

    def _made(self, stage: str, digest: str) -> str | None:
        """Return the newest run of a stage that made outputs of a digest, or None if it is not known."""
        for run in self.store.search(f"tags.`dvc.stage` = '{stage}' and tags.`flowmatch.outputs` = '{digest}'"):
            if run.info.lifecycle_stage == "active" and run.info.status == "FINISHED":
                return str(run.info.run_id)
        return None

    def _log(
        self,
        run_id: str,
        points: Sequence[_Point] = (),
        params: Mapping[str, Parameter] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log points, parameters and tags in as few requests as MLflow allows.

        MLflow stores equal points once, so they may be sent again; it does not allow to change parameters.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Metric] = [
            Metric(_key(key), math.nan if value is None else value, at, step) for key, value, at, step in points
        ]
        given = [Param(_key(key), str(value)) for key, value in (params or {}).items()]
        set_tags = [RunTag(_key(key), value) for key, value in (tags or {}).items()]
        while metrics or given or set_tags:
            self.client.log_batch(run_id, metrics[:_METRICS], given[:_OTHERS], set_tags[:_OTHERS])
            metrics, given, set_tags = metrics[_METRICS:], given[_OTHERS:], set_tags[_OTHERS:]


def _gather(found: Sequence[Record], stages: Mapping[str, Run]) -> list[_CellState]:
    """Return what the stages of an invocation found, by cell."""
    states: dict[CellKey, _CellState] = {}
    for record in found:
        for cell in record.cells:
            state = states.setdefault(cell.key, _CellState(cell.key, record.started))
            state.add(record, cell, stages[record.stage].info.run_id)
    return list(states.values())


def _status(invocation: str, found: Sequence[Record], last: Snapshot | None) -> Status:
    """Return the status of an invocation: that of its orchestrator, else that of its stages."""
    if any(record.status == "RUNNING" for record in found):
        return "RUNNING"
    if last and last.status:
        return last.status
    over = records.is_over(invocation, found)
    return records.worst([record.status for record in found]) if over else "RUNNING"


def _means(cells: Iterable[_CellState]) -> dict[str, float | None]:
    """Return the means of the metrics of cells over seeds, such as `maze_loop/td2_cfm/emd`."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        for name, value in cell.metrics.items():
            key = f"{cell.key.data}/{cell.key.method}/{name}"
            values.setdefault(key, []).append(math.nan if value is None else value)
    return {key: sum(each) / len(each) for key, each in values.items()}


def _of_stages(found: Sequence[Record]) -> dict[str, float | None]:
    """Return the metrics that stages have beside those of cells; their load on the machine stays on their own runs."""
    return {
        f"{record.stage}/{name}": value
        for record in found
        for name, value in record.metrics.items()
        if not name.startswith("system/")
    }


def _datasets(inputs: Sequence[Input]) -> list[DatasetInput]:
    """Return the data that were read; MLflow keeps one input for each content, so its context names all uses."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found: list[DatasetInput] = []
    for digest in dict.fromkeys(given.digest for given in inputs):
        uses = [given for given in inputs if given.digest == digest]
        first, context = uses[0], ", ".join(dict.fromkeys(given.context for given in uses))
        schema = {
            "mlflow_colspec": [
                {"type": flavour.TYPES[first.types.get(name, "float")], "name": name, "required": True}
                for name in first.columns
            ]
        }
        source: dict[str, Any] = {"uri": min(first.files, default=first.path), "description": first.source}
        if first.files:
            source |= {"sha256": dict(sorted(first.files.items())[:_FILES]), "files": len(first.files)}
        dataset = Dataset(first.name, digest, "local", json.dumps(source), json.dumps(schema))
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    return found


def _in_project(given: Input, workspace: str) -> Input:
    """Return data with the paths of the user's files relative to the project's folder."""
    return replace(given, files={os.path.normpath(Path(workspace, path)): sha for path, sha in given.files.items()})


def _note(record: Record) -> dict[str, str]:
    return {"mlflow.note.content": redact(record.message)} if record.message else {}


def _code(record: Record) -> dict[str, str]:
    if record.commit is None:
        return {}
    dirty = str(record.dirty).lower()
    return {"commit": record.commit, "mlflow.source.git.commit": record.commit, "git.dirty": dirty}


def _profile(record: Record) -> str:
    return str(record.params.get("profile", "default"))


def _key_of(run: Run) -> CellKey | None:
    """Return the cell of a run, or None if it is a stage's."""
    tags = run.data.tags
    return CellKey(tags["data"], tags["method"], int(tags["seed"])) if tags.get("kind") == "cell" else None


def _new(run: Run, params: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return the parameters that a run does not have."""
    return {key: value for key, value in params.items() if _key(key) not in run.data.params}


def _at(values: Mapping[str, float | None], at: int, step: int = 0) -> list[_Point]:
    return [(key, value, at, step) for key, value in values.items()]


def _key(name: str) -> str:
    """Replace the characters that MLflow does not accept in a name.

    >>> _key("train@moons-cfm/loss")
    'train:moons-cfm/loss'
    """
    return re.sub(r"[^\w\-. :/]", ":", name)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
