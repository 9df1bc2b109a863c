from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.base.errors import UserError
from pipelines.config.operation import Operation
from pipelines.orchestration import runner
from pipelines.orchestration.runner import StageFailed, StageResult
from pipelines.orchestration.slots import Slots
from pipelines.runs import graph, records, tracking
from tests.pipelines.conftest import write
from tests.pipelines.test_runner import MARK, settings, sleepers, status_of, wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all tests of this file: making its database takes longer than the flow."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def prefect(prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from pipelines.orchestration import prefect

    runner.STOPPING.clear()
    yield prefect
    runner.STOPPING.clear()
    root.handlers[:] = handlers  # in whose place Prefect, when imported, puts a console for all tests that follow
    root.setLevel(level)


@pytest.fixture(autouse=True)
def database(project: Path, schema: Path) -> None:
    shutil.copy(schema, project / "mlflow.db")


COMMAND = """
import sys, types
from pipelines.config import params
params.load = params.parse = lambda *given: None
sys.modules["pipelines.orchestration.preflight"] = types.SimpleNamespace(check=params.load)  # it imports torch
from pipelines.orchestration.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def owner() -> str:
    """An invocation whose process lives, as an orchestrator does; without one it is over between two stages."""
    return records.name_of(psutil.Process())


def start_flow(root: Path, prefect_home: Path, **options: object) -> subprocess.Popen[str]:
    env = runner.environment(owner()) | {"PREFECT_HOME": str(prefect_home), "PREFECT_LOGGING_COLORS": "false"}
    command = [
        sys.executable,
        "-m",
        "pipelines.orchestration.prefect",
        "run",
        json.dumps({"root": str(root)} | options),
    ]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, on a project whose parameters are not flowmatch's."""
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)


# ---- the task, without a server


def setting(prefect: Any, project: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "root": str(project),
        "home": str(project / ".flowmatch"),
        "invocation": "test",
        "force": False,
        "timeout": 60.0,
        "cores": 1,
        "slots": Slots(str(project / ".flowmatch/slots"), 1, {}),
        "gpus": (),
    }
    return prefect.Setting(**(given | changes))


def stage(prefect: Any, project: Path, changed: bool, upstream: list[StageResult], **changes: Any) -> Any:
    node = graph.load(project)["side"]
    return asyncio.run(prefect.dvc_stage.fn(node, changed, upstream, setting(prefect, project, **changes)))


def test_a_task_starts_a_process_only_where_something_changed(
    prefect: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect, "get_run_logger", lambda: logging.getLogger("test"))
    unchanged, ran = StageResult("x", "unchanged", 0.0), StageResult("x", "ran", 1.0)
    assert stage(prefect, project, True, []).name == "Completed"
    monkeypatch.setattr(runner, "run_stage", lambda *_, **__: pytest.fail("a process for what cannot have changed"))
    assert stage(prefect, project, False, [unchanged]).name == "Unchanged"
    monkeypatch.undo()
    monkeypatch.chdir(project)
    monkeypatch.setattr(prefect, "get_run_logger", lambda: logging.getLogger("test"))
    assert stage(prefect, project, False, [unchanged, ran]).name == "Unchanged"  # DVC looked, and found it up to date


def test_only_a_stage_that_failed_by_itself_is_tried_again(
    prefect: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect, "get_run_logger", lambda: logging.getLogger("test"))
    assert prefect.should_retry(None, None, prefect.Failed(message="side failed"))
    settings(project, side={"sleep": 60, "child": MARK + 60})
    late = stage(prefect, project, True, [], timeout=3.0)
    assert (late.name, late.is_failed()) == ("TimedOut", True)
    assert "longer than its 3 s" in late.message
    assert sleepers(MARK + 60) == []
    assert not prefect.should_retry(None, None, late)
    runner.stop_mark(project / ".flowmatch", "test").parent.mkdir()
    runner.stop_mark(project / ".flowmatch", "test").touch()
    stopped = stage(prefect, project, True, [])
    assert (stopped.name, stopped.is_failed()) == ("Stopped", True)
    assert not prefect.should_retry(None, None, stopped)


def test_a_stage_gets_a_gpu_of_the_list_and_its_share_of_the_cores(
    prefect: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(prefect.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    given = prefect._setting(project, "test", False, 3, "cuda", Operation(gpus=(2, 0)))
    assert given.gpus == ("GPU-c", "GPU-a")
    assert (given.cores, given.slots.total, given.slots.tagged) == (2, 3, {"gpu": 2})
    seen: list[dict[str, str]] = []

    async def note(*_: Any, env: dict[str, str], **__: Any) -> StageResult:
        seen.append(env)
        await asyncio.sleep(0.5)
        return StageResult("side", "ran", 0.0)

    monkeypatch.setattr(runner, "run_stage", note)
    node = graph.load(project)["side"]
    tagged = type(node)(node.name, node.deps, node.cmd, node.outs, {"prefect": {"tags": ["gpu"]}})

    async def together() -> None:
        await asyncio.gather(*(given.run(tagged, print) for _ in range(2)), given.run(node, print))

    asyncio.run(together())
    assert sorted(env["CUDA_VISIBLE_DEVICES"] for env in seen) == ["GPU-a", "GPU-a,GPU-b,GPU-c", "GPU-c"]
    assert {(env["FLOWMATCH_CORES"], env["FLOWMATCH_TIMEOUT"]) for env in seen} == {("2", "43200")}


def test_one_device_and_a_list_of_devices_exclude_each_other(prefect: Any) -> None:
    assert prefect._gpus(Operation(gpus=(0, 1)), "cpu") == ()
    with pytest.raises(UserError, match=r"'cuda:1' and operation.gpus is \[0, 1\]"):
        prefect._gpus(Operation(gpus=(0, 1)), "cuda:1")


def test_a_failure_loses_its_traceback_and_a_defect_keeps_it(prefect: Any) -> None:
    def record(error: Exception) -> logging.LogRecord:
        return logging.LogRecord("x", logging.ERROR, "", 0, "", (), (type(error), error, None))

    expected, defect = record(StageFailed("s failed")), record(ValueError("a defect"))
    assert prefect._without_traceback(expected)
    assert prefect._without_traceback(defect)
    assert expected.exc_info is None
    assert defect.exc_info is not None


# ---- the flow


def test_a_dead_server_is_one_sentence_before_any_stage(project: Path, prefect_home: Path) -> None:
    env = runner.environment(owner()) | {
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_API_URL": "http://ann:Zq7x@127.0.0.1:9/api",
    }
    command = [sys.executable, "-m", "pipelines.orchestration.prefect", "run", json.dumps({"root": str(project)})]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("no Prefect server answers at PREFECT_API_URL='http://***@127.0.0.1:9/api'; start it")
    assert done.stderr.count("\n") == 1
    assert not (project / "seen").exists()


def test_a_failing_stage_is_tried_again_and_stops_only_what_needs_it(project: Path, prefect_home: Path) -> None:
    settings(project, leaf={"fail": 1, "sleep": 1}, join={"fail": 9}, side={"sleep": 4})
    with start_flow(project, prefect_home, workers=3) as process:
        said, _ = process.communicate(timeout=150)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    attempts = {p.name: len(p.read_text().splitlines()) for p in (project / "seen").iterdir() if not p.suffix}
    assert attempts == {"a": 2, "b": 2, "join": 1, "side": 1}
    starts = {name: float((project / "seen" / name).read_text().split()[0]) for name in ("a", "b", "side")}
    ends = {name: float((project / "seen" / f"{name}.end").read_text()) for name in ("a", "b", "side")}
    assert max(starts.values()) < min(ends.values())  # independent stages overlapped
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {"leaf@a", "leaf@b", "side"}
    assert graph.dirty(project) == {"join"}
    store = tracking.Tracker(project / ".flowmatch").store
    names = sorted((run.info.run_name, run.info.status) for run in store.search("tags.`dvc.stage` != ''"))
    assert ("join", "FAILED") in names
    assert ("side", "FINISHED") in names
    (parent,) = store.search("tags.`flowmatch.complete` = 'true'")
    assert parent.info.status == "FAILED"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_flow_leaves_nothing(project: Path, prefect_home: Path, signum: int) -> None:
    settings(project, side={"sleep": 60, "child": MARK + 30 + signum})
    with start_flow(project, prefect_home, targets=["side"]) as process:
        wait_for(lambda: sleepers(MARK + 30 + signum), 120)
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("uvicorn" in child.cmdline() for child in started)
        process.send_signal(signum)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, said
    wait_for(lambda: not [c for c in started if c.is_running() and c.status() != psutil.STATUS_ZOMBIE])
    assert sleepers(MARK + 30 + signum) == []
    assert status_of(project, "side", owner()) == "KILLED"
    assert len((project / "seen/side").read_text().splitlines()) == 1


# ---- the command line


def test_repro_runs_then_has_nothing_to_do(project: Path) -> None:
    write(project, "data/report/index.html", "x")
    first = command("repro")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "data/report/index.html"
    second = command("repro")
    assert second.returncode == 0
    assert second.stdout == "nothing has changed: all 4 stages are up to date.\ndata/report/index.html\n"
    assert len(list((project / ".flowmatch/runs").iterdir())) == 1
    assert command("flow").stdout == second.stdout
    status = command("status")
    assert status.stdout.splitlines()[0].split() == ["up", "to", "date", "leaf@a"]


def test_a_failed_repro_ends_in_a_sentence_that_says_how_to_go_on(project: Path) -> None:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\nside: {fail: 1}\n")
    failed = command("repro", "--profile", "smoke", "side")
    assert failed.returncode == 1
    said = failed.stderr.splitlines()[-1]
    assert said.startswith("side failed; ")
    assert said.endswith("continue with `make repro PROFILE=smoke`.")
    assert "Traceback" not in failed.stderr
    assert not (project / "dvc.lock").exists()
    again = command("repro", "--profile", "smoke", "side")
    assert again.returncode == 0
    assert (project / ".workspaces/smoke/data/side.txt").read_text() == "3"
    assert len(list((project / ".flowmatch/runs").iterdir())) == 2  # a workspace's runs are the project's


def test_a_signal_ends_repro_and_its_stages(project: Path) -> None:
    settings(project, side={"sleep": 60, "child": MARK + 50})
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "repro", "side"], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: sleepers(MARK + 50))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("stopped by SIGINT; ")
    assert sleepers(MARK + 50) == []


def test_mistakes_are_sentences(project: Path) -> None:
    for arguments, says in (
        (("repro", "--profile", "smok"), "no profile 'smok'"),
        (("repro", "nonsense"), "nonsense"),
    ):
        done = command(*arguments)
        assert done.returncode == 1
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    (project / "dvc.yaml").unlink()
    assert "run from the project's root" in command("validate").stderr


def test_parameters_are_checked_before_anything_runs(project: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pipelines.orchestration", "flow"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("params.yaml") or "params.yaml:" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (project / ".prefect").exists()
    assert not (project / "seen").exists()
