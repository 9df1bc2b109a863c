"""MLflow's store by environment variables alone, and stores that do not answer."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.orchestration import runner
from pipelines.orchestration.commands import publish, ui
from pipelines.runs import live, store, tracking, versions
from pipelines.runs.records import RunRecord
from tests.pipelines.runs import parents, runs
from tests.pipelines.test_promotion import save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SECRET = "Zq7x"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stage(project: Path) -> str:
    """A finished stage with a file, its invocation."""
    (project / "data").mkdir(exist_ok=True)
    (project / "data" / "page.txt").write_text("a page")
    record = RunRecord.start("s", {})
    record.metrics({"score": 2})
    record.artifact("data/page.txt")
    record.finish("FINISHED")
    return record.invocation


def page_of(project: Path) -> str:
    """The file of the stage, as MLflow returns it."""
    (run,) = [run for run in runs(project) if run.info.run_name == "s"]
    client = tracking.Tracker(project / ".flowmatch").client
    return Path(client.download_artifacts(run.info.run_id, "page.txt")).read_text()


def test_where_files_go(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = project / ".flowmatch"
    assert store.artifacts(home) == (project / "mlartifacts").as_uri()
    monkeypatch.setenv("FLOWMATCH_ARTIFACTS", "files")
    assert store.artifacts(home) == (project / "files").as_uri()
    monkeypatch.setenv("FLOWMATCH_ARTIFACTS", "s3://bucket/runs")
    assert store.artifacts(home) == "s3://bucket/runs"


@pytest.mark.parametrize(
    ("variable", "address", "module", "extra"),
    [
        ("MLFLOW_TRACKING_URI", f"postgresql://ann:{SECRET}@db/runs", "psycopg2", "postgres"),
        ("FLOWMATCH_ARTIFACTS", "s3://bucket/runs", "boto3", "s3"),
    ],
)
def test_a_missing_driver_is_a_sentence_with_the_command(
    project: Path, monkeypatch: pytest.MonkeyPatch, variable: str, address: str, module: str, extra: str
) -> None:
    monkeypatch.setenv(variable, address)
    monkeypatch.setattr(store, "find_spec", lambda name: None if name == module else True)
    with pytest.raises(UserError, match=rf"needs the package {module}.*pip install -e '\.\[{extra}\]'") as caught:
        store.connect(project / ".flowmatch")
    assert SECRET not in str(caught.value)


def not_published(project: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What the publication of a stage says to the terminal, which is never the password."""
    live.publish_quietly(stage(project), "s")
    said = capfd.readouterr().err
    assert SECRET not in said
    return said


def test_a_database_that_does_not_answer_costs_one_line_without_its_password(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://ann:{SECRET}@127.0.0.1:{free_port()}/runs")
    said = not_published(project, capfd)
    assert said.startswith("tracking: not published (")
    assert said.count("\n") == 1


def test_a_store_that_refuses_its_address_does_not_print_the_password(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"nonsense://ann:{SECRET}@host/runs?token={SECRET}")
    assert "not published" in not_published(project, capfd)


def test_publish_says_where_without_the_password(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://ann:{SECRET}@db/runs")
    monkeypatch.setattr(live, "publish", lambda: None)
    assert publish.run(argparse.Namespace()) == 0
    assert capsys.readouterr().out == "published to postgresql://***@db/runs\n"


# ---- a project that was moved or copied, and a store that is not whole


@pytest.fixture
def published(project: Path, schema: Path) -> Path:
    """A project with a run that trained a model of one file."""
    shutil.copy(schema, project / "mlflow.db")
    network = layout.network(layout.models("moons", "cfm"), 0)
    save(network, 1.0)
    record = RunRecord.start("train_density@moons-cfm", {})
    record.artifact(network.parent)
    record.tag(versions.MODEL, "moons.cfm")
    record.finish("FINISHED")
    live.publish(record.invocation)
    return project


def as_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in another folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLOWMATCH_HOME", str(folder / ".flowmatch"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def places(folder: Path) -> list[str]:
    """Every place of files that MLflow's database of a project holds, but that of the experiment `Default`."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        rows = [
            row[0]
            for table, columns in store._PATHS.items()
            for column in columns
            for row in database.execute(f"select {column} from {table}")
        ]
    return [row for row in rows if row and "mlruns" not in row]


def test_a_moved_project_loads_its_models(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere" / "größe 100% _日本"
    moved.parent.mkdir()
    published.rename(moved)
    as_in(moved, monkeypatch)
    found = versions.files("models:/moons.cfm/1")
    assert layout.network(found, 0).read_bytes() == layout.network(layout.models("moons", "cfm"), 0).read_bytes()
    assert len(places(moved)) >= 4
    assert all(place.startswith((moved / "mlartifacts").as_uri()) for place in places(moved))


def test_a_copied_project_leaves_the_original_alone(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    before = contents(published)
    as_in(copy, monkeypatch)
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "999999998-1.00")
    live.publish(stage(copy))
    assert page_of(copy) == "a page"
    assert contents(published) == before
    assert list((copy / "mlartifacts").rglob("page.txt"))
    # and the original, which has not moved, goes on in its own folder
    as_in(published, monkeypatch)
    assert layout.network(versions.files("models:/moons.cfm/1"), 0).exists()
    assert all(place.startswith((published / "mlartifacts").as_uri()) for place in places(published))


def test_files_that_were_sent_elsewhere_stay_there(
    project: Path, schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMATCH_ARTIFACTS", str(tmp_path / "disk" / "mlartifacts"))
    shutil.copy(schema, project / "mlflow.db")
    live.publish(stage(project))
    moved = tmp_path / "moved"
    project.rename(moved)
    as_in(moved, monkeypatch)
    assert page_of(moved) == "a page"
    assert all(place.startswith((tmp_path / "disk").as_uri()) for place in places(moved))


def test_a_moved_project_that_may_not_be_written_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*given: Any, **options: Any) -> sqlite3.Connection:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(store.sqlite3, "connect", read_only)
    with pytest.raises(UserError, match=r"moved or copied, and .*mlflow.db could not be told so \(attempt to write a"):
        store._bring_files_along(project / ".flowmatch", argparse.Namespace(artifact_location="/there/mlartifacts"))


def damage(database: Path, how: str) -> None:
    if how == "no database":
        database.write_bytes(b"no database at all" * 100)
    elif how == "cut":
        database.write_bytes(database.read_bytes()[:5000])
    else:
        with closing(sqlite3.connect(database)) as opened, opened:
            opened.execute("update alembic_version set version_num = ?", (how,))


@pytest.mark.parametrize("how", ["no database", "cut", "ff01dab58835", "not_a_version"])
def test_a_damaged_store_or_one_of_another_mlflow_is_one_sentence(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """Of every command that needs it; a run only mentions it."""
    from pipelines.orchestration.__main__ import main

    damage(published / "mlflow.db", how)
    here = published.rename(tmp_path / "another place")  # MLflow does not look twice at the version of a store
    as_in(here, monkeypatch)
    begin = f"the tracking store sqlite:///{here}/mlflow.db cannot be used ("
    for command in (["publish"], ["compare"], ["ui", "--port", str(free_port())]):
        capfd.readouterr()
        assert main(command) == 1, command
        said = capfd.readouterr().err
        assert said.startswith(begin), (command, said)
        assert "move it away" in said and said.count("\n") == 1, (command, said)
    with pytest.raises(UserError, match="cannot be used"):
        versions.files("models:/moons.cfm/1")
    said = not_published(here, capfd)
    assert said.startswith(f"tracking: not published ({begin}")


# ---- make ui


def test_the_pages_of_a_server_are_its_own(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://ann:{SECRET}@mlflow.example.org/team")
    assert ui.run(argparse.Namespace(port=5000)) == 0
    said = capsys.readouterr().out
    assert "https://***@mlflow.example.org/team" in said
    assert SECRET not in said


def test_a_port_in_use_is_a_sentence(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.orchestration.__main__ import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"port {port} of 127.0.0.1 cannot be used (")
    assert said.count("\n") == 1


def test_the_address_is_printed_once_it_is_served(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    said: list[str] = []
    monkeypatch.setattr(publish, "run", lambda options: 0)
    monkeypatch.setattr(store, "open_existing", lambda home: argparse.Namespace(experiment="1"))
    monkeypatch.setattr(runner, "raise_on_signals", lambda: None)

    def serve(*arguments: Any) -> int:
        time.sleep(0.5)
        said.append(capsys.readouterr().out)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", port))
            listening.listen()
            until = time.monotonic() + 30
            while len(said) < 2 and time.monotonic() < until:
                time.sleep(0.05)
                said.extend(filter(None, [capsys.readouterr().out]))
        return 0

    monkeypatch.setattr(runner, "run_foreground", serve)
    assert ui.run(argparse.Namespace(port=port)) == 0
    page = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
    assert said == ["", f"MLflow: {page} (stop with Ctrl-C)\n"]


def test_the_password_is_not_on_the_command_line_of_the_ui(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"postgresql://ann:{SECRET}@db/runs"
    started: list[tuple[Any, ...]] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(publish, "run", lambda options: 0)
    monkeypatch.setattr(store, "open_existing", lambda home: argparse.Namespace(experiment="1"))
    monkeypatch.setattr(runner, "raise_on_signals", lambda: None)

    def start(*arguments: Any) -> int:
        started.append(arguments)
        return 0

    monkeypatch.setattr(runner, "run_foreground", start)
    assert ui.run(argparse.Namespace(port=free_port())) == 0
    ((command, _, environment),) = started
    assert SECRET not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == address


# ---- real stores


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database of its own on loopback, with a password."""
    import psycopg2

    folders = [Path(found).parent for found in (shutil.which("initdb"),) if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    here = next((folder for folder in folders if (folder / "postgres").exists()), None)
    if here is None:
        pytest.skip("no PostgreSQL server is installed (Debian's package `postgresql`)")
    folder = Path(f"/tmp/flowmatch-postgres-{os.getpid()}")  # a name short enough for its socket
    folder.mkdir()
    (folder / "password").write_text(SECRET)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
        shutil.chown(folder / "password", "nobody", "nogroup")
    data, port = folder / "data", free_port()
    initialise = [here / "initdb", "-D", data, "-U", "ann", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
    subprocess.run([*map(str, initialise)], check=True, capture_output=True, cwd=folder, **user)
    serve = [here / "postgres", "-D", data, "-p", port, "-c", "listen_addresses=127.0.0.1", "-k", folder, "-F"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*map(str, serve)], stdout=log, stderr=log, cwd=folder, **user)
    address = f"postgresql://ann:{SECRET}@127.0.0.1:{port}/postgres"
    try:
        until = time.monotonic() + 120
        while True:
            try:
                psycopg2.connect(address).close()
                break
            except psycopg2.OperationalError:
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_postgresql_by_one_variable(
    project: Path, monkeypatch: pytest.MonkeyPatch, postgres: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    live.publish_quietly(stage(project), "s")
    assert capfd.readouterr().err == ""
    (parent,) = parents(project)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"s/score": 2.0})
    assert page_of(project) == "a page"
    assert not (project / "mlruns").exists()  # MLflow's default, which git does not ignore
    assert list((project / "mlartifacts").rglob("page.txt"))
    assert not (project / "mlflow.db").exists()


@pytest.mark.slow
def test_files_in_an_object_store(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{port}"
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("MLFLOW_S3_ENDPOINT_URL", endpoint),
            ("FLOWMATCH_ARTIFACTS", "s3://flowmatch/runs"),
        ):
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="flowmatch")
        live.publish(stage(project))
        assert page_of(project) == "a page"
        keys = [row["Key"] for row in client.list_objects_v2(Bucket="flowmatch")["Contents"]]
        assert any(key.startswith("runs/") and key.endswith("page.txt") for key in keys)
        assert not (project / "mlartifacts").exists()
    finally:
        server.stop()


@pytest.mark.slow
def test_a_server_keeps_runs_files_and_models(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import httpx

    port, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'db'}", "--artifacts-destination", str(folder / "files")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 180
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        live.publish(stage(project))
        assert page_of(project) == "a page"
        assert list((folder / "files").rglob("page.txt"))
        assert not (project / "mlartifacts").exists()
        opened = store.open_existing(project / ".flowmatch")
        assert list(opened.client.search_registered_models()) == []
        link = opened.link(parents(project)[0].info.run_id)
        assert link.startswith(f"http://127.0.0.1:{port}/#/experiments/")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.mark.slow
def test_a_database_locked_for_half_a_minute_fails_no_run(
    project: Path, schema: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(schema, project / "mlflow.db")
    other = sqlite3.connect(project / "mlflow.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(30.0, other.rollback)
    release.start()
    with live.live(project, "999999999-1.00", every=0.1) as outcome:
        invocation = stage(project)
        outcome.status = "FINISHED"
    assert capfd.readouterr().err.count("\n") <= 1
    release.join()
    other.close()
    live.publish(invocation)
    assert {run.info.status for run in runs(project)} == {"FINISHED"}
