from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.base.errors import UserError
from pipelines.orchestration import clusters
from tests.pipelines.conftest import PARAMS, write
from tests.pipelines.test_prefect import owner, start_flow
from tests.pipelines.test_runner import MARK, sleepers, status_of, wait_for


def test_a_missing_extra_is_a_sentence_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    for cluster, extra in (("dask", "dask"), ("tcp://h:1", "dask"), ("ray", "ray"), ("ray://h:1", "ray")):
        with pytest.raises(UserError, match=rf"pip install -c requirements.lock -e '.\[pipeline,{extra}\]'"):
            clusters.check(cluster)


def test_a_cluster_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: object())
    for cluster, start in (("tcp://127.0.0.1:9", "dask scheduler"), ("ray://127.0.0.1:9", "ray start --head")):
        with pytest.raises(UserError, match=f"nothing answers .*{start}"):
            clusters.check(cluster)


def test_machines_of_a_cluster_need_a_server_that_they_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: object())
    monkeypatch.setattr(clusters.socket, "create_connection", lambda *_: socket.socket())
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    clusters.check("tcp://127.0.0.1:8786")
    with pytest.raises(UserError, match="set PREFECT_API_URL"):
        clusters.check("tcp://head.example:8786")
    monkeypatch.setenv("PREFECT_API_URL", "http://head.example:4200/api")
    clusters.check("tcp://head.example:8786")


@pytest.fixture
def scheduler(project: Path) -> Iterator[str]:
    """The address of a Dask scheduler with one worker, each a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    common = ["--host", "127.0.0.1", "--no-dashboard"]
    python = [sys.executable, "-m"]
    commands = (
        [*python, "distributed.cli.dask_scheduler", *common, "--port", address.rpartition(":")[2]],
        [*python, "distributed.cli.dask_worker", address, *common, "--nthreads", "2"],
    )
    env = {name: value for name, value in os.environ.items() if name != "FLOWMATCH_HOME"}
    started = [
        subprocess.Popen(each, cwd="/", env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for each in commands
    ]
    yield address
    for process in started:
        process.terminate()
        process.wait(60)


def locked(project: Path) -> set[str]:
    """The stages that DVC has finished; the file is empty while DVC writes it."""
    lock = project / "dvc.lock"
    entries = yaml.safe_load(lock.read_text()) if lock.exists() else None
    return set((entries or {}).get("stages", ()))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["dask", "ray", "tcp"])
def test_stages_run_on_a_cluster_are_stopped_there_and_resumed(
    project: Path, tmp_path: Path, cluster: str, request: pytest.FixtureRequest
) -> None:
    where = request.getfixturevalue("scheduler") if cluster == "tcp" else cluster
    home, seconds = tmp_path / "prefect", MARK + 80 + len(cluster)

    def settings(**side: object) -> None:
        given = yaml.safe_load(PARAMS) | {"operation": {"cluster": where, "workers": 2}}
        given["side"] |= side
        write(project, "params.yaml", yaml.safe_dump(given))

    settings(sleep=600, child=seconds)
    with start_flow(project, home) as process:
        wait_for(lambda: sleepers(seconds) and "join" in locked(project), 240)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    # Ray replaces the handler of SIGTERM by its own, which stops the run and then aborts this process.
    assert process.returncode == (-signal.SIGABRT if cluster == "ray" else 128 + signal.SIGTERM), said
    wait_for(lambda: sleepers(seconds) == [])
    assert status_of(project, "side", owner()) == "KILLED"
    settings()
    with start_flow(project, home) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    attempts = {
        path.name: len(path.read_text().splitlines()) for path in (project / "seen").iterdir() if not path.suffix
    }
    assert attempts == {"a": 1, "b": 1, "join": 1, "side": 2}
    assert not [child for child in psutil.Process().children(recursive=True) if "raylet" in child.name()]
