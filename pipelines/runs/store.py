"""Open MLflow's store: which one it is, where files go, and sentences for what is missing.

The environment alone decides. `MLFLOW_TRACKING_URI` is a database (sqlite by default, or PostgreSQL) or the address of
an MLflow server. `FLOWMATCH_ARTIFACTS` is the folder or URL for the files of runs; a server decides that itself.

MLflow keeps the absolute path of every run's files. The files of the default store belong to the folder that it stands
in, so opening it after the project was moved or copied replaces the old folder by the present one.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from pipelines.base.errors import UserError, first_line
from pipelines.base.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

EXPERIMENT = "flowmatch"
PARENT, INVOCATION = "mlflow.parentRunId", "flowmatch.invocation"  # tags of runs
UI = "http://127.0.0.1:5000"  # where `make ui` serves a database
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_EXTRAS = {"postgresql": ("psycopg2", "postgres"), "s3": ("boto3", "s3")}  # the module that a scheme needs, the extra

# A store that does not answer must not delay a run: MLflow alone asks a database for minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "PGCONNECT_TIMEOUT": "5"}
_ATTEMPTS = 3

_SQLITE, _FILES = "sqlite:///", "mlartifacts"
_PATHS = {  # columns of MLflow's database that hold the place of a run's files
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}


@dataclass(frozen=True)
class Store:
    """An open store.

    Attributes:
        client: MLflow's client.
        experiment: Id of the project's experiment.
        page: Address of the UI.
    """

    client: MlflowClient
    experiment: str
    page: str

    def search(self, condition: str, limit: int | None = None) -> list[Run]:
        """Return the runs of the experiment that fulfil a condition, deleted ones too, the newest first."""
        from mlflow.entities import ViewType

        found: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                condition,
                ViewType.ALL,
                max_results=min(limit or 1000, 1000),
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            found += page
            token = page.token
            if not token or (limit and len(found) >= limit):
                return found

    def runs_of(self, invocation: str) -> tuple[Run | None, list[Run]]:
        """Return the parent run of an invocation, if there is one, and the runs below it."""
        runs = self.search(f"tags.`{INVOCATION}` = '{invocation}'")
        parent = next((run for run in runs if PARENT not in run.data.tags), None)
        return parent, [run for run in runs if PARENT in run.data.tags]

    def link(self, run: str) -> str:
        """Return the address of a run's page."""
        return f"{self.page}/#/experiments/{self.experiment}/runs/{run}"

    def comparison(self, runs: Sequence[str]) -> str:
        """Return the address of the page that compares runs."""
        chosen, among = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (runs, [self.experiment]))
        return f"{self.page}/#/compare-runs?runs={chosen}&experiments={among}"


def uri(home: Path) -> str:
    """Return the address of the MLflow store: `$MLFLOW_TRACKING_URI`, else a database in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{home.parent / 'mlflow.db'}"


def runs_page(page: str, experiment: str) -> str:
    """Return the address of the list of runs in the view of model training; without it the UI opens in that of GenAI.

    >>> runs_page("http://127.0.0.1:5000", "1")
    'http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning'
    """
    return f"{page}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def is_server(address: str) -> bool:
    """Return whether an address is that of an MLflow server.

    >>> is_server("https://mlflow.example.org"), is_server("postgresql://db/mlflow")
    (True, False)
    """
    return urlsplit(address).scheme in ("http", "https")


def artifacts(home: Path) -> str:
    """Return where a database store keeps files: `$FLOWMATCH_ARTIFACTS`, a folder or URL, else the project's folder."""
    given = os.environ.get("FLOWMATCH_ARTIFACTS") or str(home.parent / _FILES)
    return given if "://" in given else Path(given).absolute().as_uri()


def connect(home: Path) -> Store:
    """Open the store and create what is missing in it; call this only while holding the publisher's lock.

    Raises:
        UserError: The store cannot be used, or needs a package that is not installed.
    """
    with answering(home):
        client = _client(home)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            # MLflow's default is the current folder, which may be the temporary one of a DVC experiment.
            location = None if is_server(uri(home)) else artifacts(home)
            experiment = str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=_KIND))
        else:
            experiment = str(found.experiment_id)
            _bring_files_along(home, found)
            for key, value in _KIND.items():
                if found.tags.get(key) != value:
                    client.set_experiment_tag(experiment, key, value)
        return Store(client, experiment, _page(home))


def open_existing(home: Path) -> Store:
    """Open the store for reading; a missing one is not created.

    Raises:
        UserError: There is no store or no run in it, it cannot be used, or needs a package that is not installed.
    """
    where = uri(home)
    if not where.startswith(_SQLITE) or Path(where.removeprefix(_SQLITE)).exists():
        with answering(home):
            client = _client(home)
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                _bring_files_along(home, found)
                return Store(client, str(found.experiment_id), _page(home))
    raise UserError(
        f"there are no runs in {redact(where)}; train models by `make repro`, and load them from the project's "
        "folder or with MLFLOW_TRACKING_URI set."
    )


@contextmanager
def answering(home: Path) -> Iterator[None]:
    """Raise what a damaged store, or one that does not answer, raises in the block as one sentence.

    Raises:
        UserError: The store cannot be used.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        where = uri(home)
        said = redact(first_line(error))
        if is_server(where):
            remedy = "check MLFLOW_TRACKING_URI and the server"
        elif where.startswith(_SQLITE):
            remedy = (
                "move it away, and `make publish` makes a new one of the records in .flowmatch; one of an older MLflow "
                f"is brought up to date by `mlflow db upgrade {where}`"
            )
        else:
            remedy = "check MLFLOW_TRACKING_URI and the database"
        raise UserError(f"the tracking store {redact(where)} cannot be used ({said}); {remedy}.") from error


def _bring_files_along(home: Path, experiment: Experiment) -> None:
    """Replace the folder of files in a default store whose project was moved or copied."""
    old, new = str(experiment.artifact_location), artifacts(home)
    given = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("FLOWMATCH_ARTIFACTS")
    if given or old == new or not old.endswith(f"/{_FILES}"):
        return
    database = home.parent / "mlflow.db"
    try:
        with closing(sqlite3.connect(database, timeout=30)) as opened, opened:
            for table, columns in _PATHS.items():
                for column in columns:
                    within = f"{column} = :old or substr({column}, 1, :length + 1) = :old || '/'"
                    opened.execute(
                        f"update {table} set {column} = :new || substr({column}, :length + 1) where {within}",
                        {"old": old, "new": new, "length": len(old)},
                    )
    except sqlite3.OperationalError as error:
        raise UserError(
            f"the project was moved or copied, and {database} could not be told so ({error}); allow this user to write "
            "there and run the same command again."
        ) from error


def address(home: Path, invocation: str) -> str:
    """Return the address of an invocation's page, or of the UI if the store does not answer or has no such run."""
    try:
        store = open_existing(home)
        parent, _ = store.runs_of(invocation)
    except Exception:  # whatever is wrong with the store has been printed when the run was published
        return _page(home)
    return store.link(parent.info.run_id) if parent else store.page


def _client(home: Path) -> MlflowClient:
    where = uri(home)
    _require(where)
    if not is_server(where):
        _require(artifacts(home))
    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # an error is printed once, by whoever publishes
    from mlflow import MlflowClient

    if not is_server(where):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = _ATTEMPTS

    return MlflowClient(tracking_uri=where)


def _require(address: str) -> None:
    """Raise an error if the package that an address needs is not installed."""
    scheme = urlsplit(address).scheme.partition("+")[0]
    module, extra = _EXTRAS.get(scheme, ("", ""))
    if module and find_spec(module) is None:
        raise UserError(
            f"{redact(address)} needs the package {module}, which is not installed; "
            f"run `pip install -e '.[{extra}]'` in the project's folder."
        )


def _page(home: Path) -> str:
    address = uri(home)
    return redact(address).rstrip("/") if is_server(address) else UI
