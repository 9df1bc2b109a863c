"""Publish records as MLflow runs: one parent run per invocation, with a nested child run per stage.

Publishing is idempotent: published runs are identified by their tags, so after a crash, with a second publisher or
after the database was deleted, the next `publish` only adds what is missing. A stage that DVC skips has no record, so
an invocation that has ended is completed from its snapshot: all metrics of the workspace go to the parent, and
`lineage.json` names for each stage the run that produced its present output. Only this file imports MLflow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.base.errors import UserError, did_you_mean, first_line
from pipelines.base.redact import redact
from pipelines.config.params import Params
from pipelines.runs import records, snapshots
from pipelines.runs.records import Parameter, Record
from pipelines.runs.snapshots import Snapshot

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

EXPERIMENT = "flowmatch"
_MODEL = "flowmatch.model"  # tag of a run that trained a model: <data set or environment>.<method>
_BATCH = {"metrics": 900, "params": 100}  # MLflow rejects larger requests


def uri(home: Path) -> str:
    """Return the address of the MLflow store: `$MLFLOW_TRACKING_URI`, else a database in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.parent / 'mlflow.db'}"


def address(home: Path, invocation: str) -> str:
    """Return where MLflow shows the runs of an invocation; for a database that is the page of `make ui`."""
    tracker, where = Tracker(home), uri(home)
    found = tracker._search(f"tags.`flowmatch.invocation` = '{invocation}'")
    parent = next((run.info.run_id for run in found if "mlflow.parentRunId" not in run.data.tags), None)
    server = where.rstrip("/") if where.startswith("http") else "http://127.0.0.1:5000"
    return redact(f"{server}/#/experiments/{tracker.experiment}" + (f"/runs/{parent}" if parent else ""))


def model_files(address: str) -> Path:
    """Return the folder of a trained model's files, from its address in the registry or the run that trained it.

    Raises:
        UserError: There is no such model, or the address is invalid.
    """
    from mlflow.exceptions import MlflowException

    kind, _, rest = address.partition(":/")
    name, alias = (rest.partition("@")[::2]) if "@" in rest else (rest.partition("/")[0], "")
    version = rest.partition("/")[2]
    if kind not in ("models", "runs") or not name or (kind == "models" and not (alias or version)):
        raise UserError(
            f"the model {address!r} is neither models:/<name>/<version>, such as models:/maze_loop.td2_cfm/latest, nor "
            "models:/<name>@<alias> nor runs:/<id of a training run>."
        )
    client = _open(records.home())
    try:
        run = client.get_run(rest if kind == "runs" else _trained_by(client, name, version, alias))
    except MlflowException as error:
        raise UserError(f"MLflow has no model {address!r} ({first_line(error)}); see `make ui`.") from None
    model = run.data.tags.get(_MODEL)
    if model is None:
        raise UserError(f"the run of {address!r} is {run.info.run_name}; expected one that trained a model.")
    return Path(client.download_artifacts(run.info.run_id, model.rpartition(".")[2]))


def _open(home: Path) -> MlflowClient:
    """Open the existing MLflow store; a missing one is not created.

    Raises:
        UserError: There is no store.
    """
    from mlflow import MlflowClient

    where = uri(home)
    if where.startswith("sqlite:///") and not Path(where.removeprefix("sqlite:///")).exists():
        raise UserError(
            f"there are no runs in {where}; train models by `make repro`, and load them from the project's folder or "
            "with MLFLOW_TRACKING_URI set."
        )
    _be_quiet()
    return MlflowClient(tracking_uri=where)


def _trained_by(client: MlflowClient, name: str, version: str, alias: str) -> str:
    """Return the id of the run that trained a version of a registered model."""
    if alias:
        return str(client.get_model_version_by_alias(name, alias).run_id)
    if version != "latest":
        return str(client.get_model_version(name, version).run_id)
    found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if not found:
        known = [model.name for model in client.search_registered_models()]
        hint = did_you_mean(name, known)
        raise UserError(f"MLflow has no model {name!r}, only {', '.join(known) or 'none'}{hint}")
    return str(found[0].run_id)


def _be_quiet() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # an unreachable server must not delay a run
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Tracker:
    """The open store and its experiment; created and used while holding the publisher's lock."""

    def __init__(self, home: Path) -> None:
        _be_quiet()
        from mlflow import MlflowClient

        self.home = home
        self.client: MlflowClient = MlflowClient(tracking_uri=uri(home))
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found:
            self.experiment = found.experiment_id
        else:
            # The default location is the current folder, which may be the temporary one of a DVC experiment.
            own = "MLFLOW_TRACKING_URI" not in os.environ
            location = (home.parent / "mlartifacts").as_uri() if own else None
            self.experiment = self.client.create_experiment(EXPERIMENT, artifact_location=location)

    def publish(self, invocation: str) -> None:
        """Create or update the runs of an invocation."""
        runs = self._search(f"tags.`flowmatch.invocation` = '{invocation}'")
        parent = next((run for run in runs if "mlflow.parentRunId" not in run.data.tags), None)
        if parent and (parent.data.tags.get("flowmatch.complete") or parent.info.lifecycle_stage != "active"):
            return
        found = records.read(self.home / "runs" / invocation)
        last = snapshots.read(self.home, invocation)
        if not found and not last:
            return
        if parent is None:
            parent = self._create_parent(invocation, found, last)
        children = {
            (run.data.tags["dvc.stage"], run.data.tags["flowmatch.started"]): run
            for run in runs
            if "mlflow.parentRunId" in run.data.tags
        }
        latest: dict[str, str] = {}
        for record in found:
            child = children.pop((record.stage, repr(record.started)), None) or self._create_child(parent, record)
            latest[record.stage] = child.info.run_id
            self._update_child(child, record)
        for replaced in children.values():  # an attempt that was retried before its end was published
            if replaced.info.status == "RUNNING":
                self.client.set_terminated(replaced.info.run_id, "FAILED")
        if found:
            self._log_params(
                parent, {k: v for k, v in found[0].params.items() if k.split(".")[0] in Params.model_fields}
            )
        if last:
            finished = {record.stage: latest[record.stage] for record in found if record.status == "FINISHED"}
            self._complete(parent, last, finished)
        if (last and last.status) or records.is_over(invocation, found):
            status = (last and last.status) or records.worst(found)
            ended = max([record.ended or record.started for record in found], default=last.time if last else 0.0)
            self.client.set_terminated(parent.info.run_id, status, _ms(ended))
            self.client.set_tag(parent.info.run_id, "flowmatch.complete", "true")

    def _create_parent(self, invocation: str, found: Sequence[Record], last: Snapshot | None) -> Run:
        owner = records.owner_of(invocation)[1]
        started = owner or min([record.started for record in found], default=last.time if last else 0.0)
        params = found[0].params if found else last.params if last else {}
        profile = str(params.get("profile", "default"))
        name = f"{profile} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(started))}"
        tags = {"flowmatch.invocation": invocation, "profile": profile} | (_code(found[0]) if found else {})
        return self.client.create_run(self.experiment, _ms(started), tags, name)

    def _create_child(self, parent: Run, record: Record) -> Run:
        tags = {
            "mlflow.parentRunId": parent.info.run_id,
            "flowmatch.invocation": record.invocation,
            "flowmatch.started": repr(record.started),
            "dvc.stage": record.stage,
        }
        tags |= _code(record) | {_key(key): value for key, value in record.tags.items()}
        return self.client.create_run(self.experiment, _ms(record.started), tags, record.stage)

    def _update_child(self, child: Run, record: Record) -> None:
        if child.info.status != "RUNNING":
            return
        self._log_params(child, record.params)
        self._log_curves(child, record)
        if record.status == "RUNNING":
            return
        ended = _ms(record.ended or record.started)
        self._log_metrics(child.info.run_id, [(key, value, ended, 0) for key, value in record.metrics.items()])
        for key, value in record.tags.items():
            self.client.set_tag(child.info.run_id, _key(key), value)
        if record.message:
            self.client.set_tag(child.info.run_id, "mlflow.note.content", record.message)
        for name in record.artifacts:
            path = self.home.parent / record.workspace / name
            if path.exists():
                self.client.log_artifact(child.info.run_id, str(path))
        if record.status == "FINISHED" and _MODEL in record.tags:
            self._register(child, record)
        self.client.set_terminated(child.info.run_id, record.status, ended)

    def _register(self, child: Run, record: Record) -> None:
        """Register the model that a run trained as the next version of its name, once."""
        from mlflow.exceptions import MlflowException

        run, model = child.info.run_id, record.tags[_MODEL]
        profile = str(record.params.get("profile", "default"))
        name = model if profile == "default" else f"{profile}.{model}"  # a smoke run is not the latest model
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if not self.client.search_model_versions(f"run_id = '{run}'"):
            source = f"{child.info.artifact_uri}/{model.rpartition('.')[2]}"
            self.client.create_model_version(name, source, run, {"profile": profile, "dvc.stage": record.stage})

    def _log_curves(self, child: Run, record: Record) -> None:
        """Log the points that were added to the stage's curves since the offset in the run's tag."""
        offset = done = int(child.data.tags.get("flowmatch.offset", 0))
        batch: list[tuple[str, float | None, int, int]] = []
        for end, at, step, values in records.points(self.home / "runs" / record.invocation, record.stage, done):
            batch += [(key, value, _ms(at), step) for key, value in values.items()]
            offset = end
        if offset > done:
            self._log_metrics(child.info.run_id, batch)
            self.client.set_tag(child.info.run_id, "flowmatch.offset", str(offset))

    def _complete(self, parent: Run, last: Snapshot, finished: Mapping[str, str]) -> None:
        """Log DVC's metrics and parameters on the parent, and the run that produced each stage's present output."""
        run = parent.info.run_id
        self._log_params(parent, last.params)
        self._log_metrics(run, [(key, value, _ms(last.time), 0) for key, value in last.metrics.items()])
        lineage: dict[str, str | None] = {}
        for stage, entry in ((yaml.safe_load(last.lock) or {}).get("stages") or {}).items():
            digest = _digest(entry)
            if stage in finished:
                self.client.set_tag(finished[stage], "dvc.lock_hash", digest)
            made = finished.get(stage) or next(
                (
                    earlier.info.run_id
                    for earlier in self._search(f"tags.`dvc.stage` = '{stage}' and tags.`dvc.lock_hash` = '{digest}'")
                    if earlier.info.lifecycle_stage == "active"
                ),
                None,
            )
            lineage[stage] = made
        self.client.log_dict(run, lineage, "lineage.json")
        self.client.log_text(run, last.lock, "dvc.lock")
        self.client.set_tag(run, "dvc.lock_md5", hashlib.md5(last.lock.encode()).hexdigest())

    def _search(self, condition: str) -> list[Run]:
        from mlflow.entities import ViewType

        found: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                condition,
                ViewType.ALL,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return found

    def _log_params(self, run: Run, params: Mapping[str, Parameter]) -> None:
        """Log the parameters that the run does not have; MLflow does not allow changes."""
        from mlflow.entities import Param

        new = [Param(_key(key), str(value)) for key, value in params.items() if _key(key) not in run.data.params]
        run.data.params.update({param.key: param.value for param in new})
        for start in range(0, len(new), _BATCH["params"]):
            self.client.log_batch(run.info.run_id, params=new[start : start + _BATCH["params"]])

    def _log_metrics(self, run_id: str, points: Sequence[tuple[str, float | None, int, int]]) -> None:
        """Log points (key, value, milliseconds, step); MLflow stores equal points once, so they may be sent again."""
        from mlflow.entities import Metric

        metrics: list[Metric] = [
            Metric(_key(key), math.nan if value is None else value, at, step) for key, value, at, step in points
        ]
        for start in range(0, len(metrics), _BATCH["metrics"]):
            self.client.log_batch(run_id, metrics=metrics[start : start + _BATCH["metrics"]])


def _code(record: Record) -> dict[str, str]:
    if record.commit is None:
        return {}
    return {"mlflow.source.git.commit": record.commit, "git.dirty": str(record.dirty).lower()}


def _digest(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _key(name: str) -> str:
    """Replace the characters that MLflow does not accept in a name.

    >>> _key("train@moons-cfm/loss")
    'train:moons-cfm/loss'
    """
    return re.sub(r"[^\w\-. :/]", ":", name)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
