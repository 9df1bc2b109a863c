"""The scheduled flow on a real Prefect server, on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipelines.config import params
from pipelines.orchestration import runner
from pipelines.orchestration.commands import serve
from tests.pipelines.conftest import DVC_YAML, PARAMS, ROOT, STEP, write
from tests.pipelines.test_runner import MARK, sleepers, wait_for

SECRET = "hunter2"
ENTRYPOINTS = {
    "pipelines.orchestration.prefect.retrain": "make serve",
    f"{ROOT}/pipelines/orchestration/prefect.py:retrain": "prefect.yaml",
}


def steps(project: Path, **changes: dict[str, object]) -> None:
    settings = yaml.safe_load(PARAMS)
    for stage, change in changes.items():
        settings[stage] |= change
    write(project, "steps.yaml", yaml.safe_dump(settings))


@pytest.fixture
def scheduled(project: Path) -> Path:
    """The tiny project with parameters that are flowmatch's; those of its stages are in steps.yaml."""
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    given |= {"datasets": {"moons": given["datasets"]["moons"]}, "experiments": {}}
    given["environments"] = {"spiral": given["environments"]["spiral"]}
    given["operation"]["schedule"]["cron"] = "* * * * *"
    write(project, "params.yaml", yaml.safe_dump(given))
    lines = [
        line.replace("params: [", "params: [steps.yaml: [") + "]" if "params: [" in line else line
        for line in DVC_YAML.splitlines()
    ]
    write(project, "dvc.yaml", "\n".join(lines))
    write(project, "step.py", STEP.replace("params.yaml", "steps.yaml"))
    steps(project)
    return project


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the API of a server with a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect-server")))
        patch.setenv("PREFECT_API_URL", "")
        with serve._server(free_port()):
            yield os.environ["PREFECT_API_URL"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def at_server(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PREFECT_API_URL", server)
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    return server


def prefect(*arguments: str, check: bool = True) -> str:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, env=runner.environment(""), capture_output=True, text=True, timeout=240)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def post(server: str, path: str, **content: Any) -> Any:
    answer = httpx.post(f"{server}/{path}", json=content, timeout=60.0)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def runs(server: str, deployment: str, state: str) -> list[str]:
    """The identifiers of the scheduled flow's runs in a state."""
    found = post(
        server,
        "flow_runs/filter",
        deployments={"name": {"any_": [deployment]}},
        flow_runs={"state": {"type": {"any_": [state]}}},
    )
    return [run["id"] for run in found]


def said(process: subprocess.Popen[str], log: Path) -> str:
    process.terminate()
    process.wait(120)
    return log.read_text()


# ---- without a server


@pytest.mark.parametrize("entrypoint", list(ENTRYPOINTS), ids=list(ENTRYPOINTS.values()))
def test_the_parameters_of_a_scheduled_run_are_plain_and_valid(project: Path, entrypoint: str) -> None:
    """Prefect loads the flow in a process of its own, and validates its parameters there."""
    code = """
import sys
from prefect.flows import load_flow_from_entrypoint
flow = load_flow_from_entrypoint(sys.argv[1])
print(flow.validate_parameters({"root": ".", "profile": "smoke"}))
print([kind["type"] for kind in flow.parameters.model_dump()["properties"].values()])
"""
    done = subprocess.run([sys.executable, "-c", code, entrypoint], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["{'root': '.', 'profile': 'smoke'}", "['string', 'string']"], done.stderr


def test_the_work_pools_schedule_is_that_of_params() -> None:
    (deployment,) = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (schedule,) = deployment["schedules"]
    expected = params.load(ROOT / "params.yaml").operation.schedule
    assert (schedule["cron"], schedule["timezone"]) == (expected.cron, expected.timezone)


def test_mistakes_end_serving_in_a_sentence_before_a_server_starts(scheduled: Path) -> None:
    command = [sys.executable, "-m", "pipelines.orchestration", "serve"]
    silent = dict(os.environ) | {"PREFECT_API_URL": "http://ann:pw@127.0.0.1:9/api"}
    unanswered = subprocess.run(command, env=silent, capture_output=True, text=True)
    assert unanswered.returncode == 1
    assert "no Prefect server answers" in unanswered.stderr
    assert "pw" not in unanswered.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        in_use = subprocess.run([*command, "--port", port], capture_output=True, text=True)
    assert in_use.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in in_use.stderr
    given = yaml.safe_load((scheduled / "params.yaml").read_text())
    given["operation"]["schedule"] = {"cron": "nightly", "timezone": "UTC"}
    write(scheduled, "params.yaml", yaml.safe_dump(given))
    no_cron = subprocess.run(command, capture_output=True, text=True)
    assert no_cron.returncode == 1
    assert "operation.schedule.cron is 'nightly'" in no_cron.stderr
    for done in (unanswered, in_use, no_cron):
        assert done.stderr.count("\n") == 1
    assert not (scheduled / ".prefect/server.log").exists()


# ---- on a server


@pytest.mark.slow
def test_a_cron_run_completes_is_cancelled_and_resumed_and_no_other_runs_beside_it(
    scheduled: Path, at_server: str, tmp_path: Path
) -> None:
    seconds = MARK + 70
    log = tmp_path / "serve.log"
    seen = scheduled / ".workspaces/default-apart/seen"
    command = [sys.executable, "-m", "pipelines.orchestration", "serve"]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, text=True) as process:
        try:
            wait_for(lambda: runs(at_server, "default", "COMPLETED"), 240)
            steps(scheduled, side={"value": 4, "sleep": 600, "child": seconds})
            wait_for(lambda: sleepers(seconds), 240)
            (running,) = runs(at_server, "default", "RUNNING")
            prefect("deployment", "run", "flowmatch-retrain/default")
            wait_for(lambda: runs(at_server, "default", "CANCELLED"), 120)  # it was due beside another one
            beside = runs(at_server, "default", "CANCELLED")
            assert sleepers(seconds)
            assert running not in beside
            prefect("flow-run", "cancel", running)
            wait_for(lambda: running in runs(at_server, "default", "CANCELLED"), 60)
            assert sleepers(seconds) == []
            steps(scheduled, side={"value": 4})
            before = len(runs(at_server, "default", "COMPLETED"))
            wait_for(lambda: len(runs(at_server, "default", "COMPLETED")) > before, 240)
            attempts = {path.name: len(path.read_text().splitlines()) for path in seen.iterdir() if not path.suffix}
            assert attempts == {"a": 1, "b": 1, "join": 1, "side": 3}
        finally:
            text = said(process, log)
    assert process.returncode == 0, text
    assert "Traceback" not in text
    (deployment,) = post(at_server, "deployments/filter", deployments={"name": {"any_": ["default"]}})
    assert deployment["paused"]  # without this process nothing would run
    assert deployment["schedules"][0]["schedule"]["timezone"] == "UTC"
    tasks = post(at_server, "task_runs/filter", task_runs={"name": {"any_": ["join", "side"]}})
    assert {task["name"] for task in tasks} == {"join", "side"}
    artifacts = {found["key"]: found for found in post(at_server, "artifacts/latest/filter")}
    assert {row["stage"] for row in yaml.safe_load(artifacts["stages"]["data"])} == {"leaf@a", "leaf@b", "join", "side"}
    assert "data/report/index.html" in artifacts["run"]["data"]
    assert "/#/experiments/" in artifacts["run"]["data"]
    assert SECRET not in text
    assert files_with(SECRET, Path(os.environ["PREFECT_HOME"]), scheduled) == []


def files_with(word: str, *folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and word.encode() in path.read_bytes()
    ]


@pytest.mark.slow
def test_a_worker_of_a_work_pool_runs_the_deployment_of_prefect_yaml(scheduled: Path, at_server: str) -> None:
    for folder in ("pipelines", "flowmatch_core"):
        shutil.copytree(ROOT / folder, scheduled / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", scheduled)
    refused = prefect("deploy", "--all", check=False)
    assert "flowmatch" in refused
    assert "Traceback" not in refused
    prefect("work-pool", "create", "flowmatch", "--type", "process")
    prefect("deploy", "--all")
    prefect("deployment", "run", "flowmatch-retrain/pool")
    prefect("worker", "start", "--pool", "flowmatch", "--run-once", "--prefetch-seconds", "30")
    wait_for(lambda: runs(at_server, "pool", "COMPLETED"), 10)
    assert (scheduled / ".workspaces/default-apart/data/join.txt").exists()
    assert (scheduled / ".flowmatch/runs").is_dir()


@pytest.mark.slow
def test_serving_starts_and_stops_its_own_server(scheduled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    port = free_port()
    command = [sys.executable, "-m", "pipelines.orchestration", "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        server = f"http://127.0.0.1:{port}/api"
        assert process.stdout
        assert process.stdout.readline() == f"Prefect: http://127.0.0.1:{port} (stop with Ctrl-C)\n"
        wait_for(lambda: post(server, "deployments/filter"), 120)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert "Traceback" not in text
    assert (scheduled / ".prefect/prefect.db").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server}/health")
