from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.orchestration import runner
from pipelines.orchestration.runner import StageFailed, StageResult, StageStopped
from pipelines.runs import records
from tests.pipelines.conftest import PARAMS, write

MARK = 86400.0  # each test's sleeping grandchild is known by its own number of seconds


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    runner.STOPPING.clear()
    yield
    runner.STOPPING.clear()
    assert runner._groups == set()


def settings(project: Path, **changes: dict[str, object]) -> None:
    params = yaml.safe_load(PARAMS)
    for stage, change in changes.items():
        params[stage] |= change
    write(project, "params.yaml", yaml.safe_dump(params))


def run(project: Path, name: str, **options: object) -> StageResult:
    env = runner.environment("test")
    return asyncio.run(runner.run_stage(name, project, env=env, **options))  # type: ignore[arg-type]


def sleepers(seconds: float) -> list[int]:
    """The living processes `sleep <seconds>`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["cmdline"] == ["sleep", str(seconds)] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def wait_for(condition: object, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


def status_of(project: Path, stage: str, invocation: str = "test") -> str:
    found = records.read(project / ".flowmatch/runs" / invocation)
    return next(record.status for record in found if record.stage == stage)


def test_what_becomes_of_a_stage(project: Path) -> None:
    said: list[str] = []
    assert run(project, "side", log=said.append).how == "ran"
    assert "> python step.py side" in said
    assert run(project, "side").how == "unchanged"
    assert run(project, "side", force=True).how == "ran"
    (project / "dvc.lock").unlink()
    (project / "data/side.txt").unlink()
    assert run(project, "side").how == "restored"
    assert (project / "data/side.txt").read_text() == "3"
    assert len((project / "seen/side").read_text().splitlines()) == 2


def test_a_failure_is_the_stages_own_last_word(project: Path) -> None:
    settings(project, side={"fail": 1})
    with pytest.raises(StageFailed, match=r"^side failed with exit status \d+: side was told to fail$"):
        run(project, "side")
    assert run(project, "side").how == "ran"


def test_the_failure_of_a_killed_stage_names_the_signal(project: Path) -> None:
    settings(project, side={"sleep": 60})
    outcome: list[Exception] = []

    def attempt() -> None:
        try:
            run(project, "side")
        except StageFailed as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    wait_for((project / "seen" / "side").exists)
    wait_for(lambda: (project / "seen" / "side").read_text())
    os.kill(int((project / "seen" / "side").read_text().split()[1]), signal.SIGKILL)
    thread.join()
    assert "its process was killed by signal 9; a retry or the next run continues" in str(outcome[0])


@pytest.mark.parametrize("status", [-9, 137])
def test_a_killed_stage_is_known_with_and_without_a_shell_that_waited_for_it(status: int) -> None:
    last = runner._error_line(["Killed", f"ERROR: failed to reproduce 'side': failed to run: x, exited with {status}"])
    assert last.startswith("its process was killed by signal 9;")


def test_a_stage_that_takes_too_long_is_stopped_with_all_it_started(project: Path) -> None:
    settings(project, side={"sleep": 60, "child": MARK + 1})
    with pytest.raises(StageFailed, match="longer than its 3 s"):
        run(project, "side", timeout=3.0)
    assert sleepers(MARK + 1) == []
    assert status_of(project, "side") == "KILLED"


def test_stopping_leaves_no_process_and_no_output(project: Path) -> None:
    settings(project, side={"sleep": 60, "child": MARK + 2})
    caught: list[BaseException] = []

    def work() -> None:
        try:
            run(project, "side", log=lambda line: None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: sleepers(MARK + 2))
    runner.stop_all()
    thread.join(20)
    assert not thread.is_alive()
    assert sleepers(MARK + 2) == []
    assert [str(error) for error in caught] == ["side was stopped."]
    assert status_of(project, "side") == "KILLED"
    assert not (project / "data/side.txt").exists()
    with pytest.raises(StageFailed, match="not started"):
        run(project, "side")


def test_a_mark_stops_a_stage_that_another_process_asked_for(project: Path) -> None:
    settings(project, side={"sleep": 60, "child": MARK + 3})
    mark = runner.stop_mark(project / ".flowmatch", "test")

    async def stopped() -> None:
        env = runner.environment("test")
        stage = asyncio.create_task(runner.run_stage("side", project, env=env, log=lambda line: None))
        while not sleepers(MARK + 3):
            await asyncio.sleep(0.05)
        mark.parent.mkdir()
        mark.touch()
        await stage

    with pytest.raises(StageStopped, match="side was stopped"):
        asyncio.run(asyncio.wait_for(stopped(), 60))
    assert sleepers(MARK + 3) == []
    assert status_of(project, "side") == "KILLED"


def test_what_ignores_the_request_is_made_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.5)
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout
        stubborn.stdout.readline()
        runner.kill_groups({stubborn.pid})
        assert stubborn.wait() == -signal.SIGKILL


def test_independent_stages_overlap_and_do_not_disturb_each_other(project: Path) -> None:
    settings(project, leaf={"value": 1, "sleep": 2}, side={"sleep": 2})
    said: list[str] = []

    async def together() -> list[StageResult]:
        env = runner.environment("test")
        stages = (runner.run_stage(name, project, env=env, log=said.append) for name in ("leaf@a", "leaf@b", "side"))
        return list(await asyncio.gather(*stages))

    assert [result.how for result in asyncio.run(together())] == ["ran"] * 3
    assert [line for line in said if "ERROR" in line] == []  # none had to be tried again for a sibling's lock
    spans = []
    for name in ("a", "b", "side"):
        (line,) = (project / "seen" / name).read_text().splitlines()
        spans.append((float(line.split()[0]), float((project / "seen" / f"{name}.end").read_text())))
    assert max(start for start, _ in spans) < min(end for _, end in spans)
    assert set(yaml.safe_load((project / "dvc.lock").read_text())["stages"]) == {"leaf@a", "leaf@b", "side"}


def test_only_the_stage_itself_is_touched(project: Path) -> None:
    with pytest.raises(StageFailed, match=r"data/a\.txt"):  # which the flow would have made before
        run(project, "join")
    assert not (project / "seen").exists()


def test_another_command_of_dvc_is_waited_for(project: Path) -> None:
    from dvc.repo import Repo

    said: list[str] = []
    with Repo(str(project)) as repo:
        repo.lock.lock()
        threading.Timer(6.0, repo.lock.unlock).start()  # DVC by itself gives up after 3 s
        assert run(project, "side", log=said.append).how == "ran"
    assert [line for line in said if "ERROR" in line] == []


def test_children_find_this_interpreter_first() -> None:
    env = runner.environment("x")
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["FLOWMATCH_INVOCATION"] == "x"
    assert Path(env["FLOWMATCH_HOME"]).is_absolute()


def test_children_are_told_their_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FLOWMATCH_TIMEOUT", "FLOWMATCH_CORES"):
        monkeypatch.delenv(name, raising=False)
    assert not {"FLOWMATCH_TIMEOUT", "FLOWMATCH_CORES"} & runner.environment("x").keys()
    env = runner.environment("x", home=tmp_path, timeout=43200.0, cores=3)
    assert (env["FLOWMATCH_HOME"], env["FLOWMATCH_TIMEOUT"], env["FLOWMATCH_CORES"]) == (str(tmp_path), "43200", "3")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_foreground_stops_the_command_and_what_it_started(project: Path, signum: int) -> None:
    seconds = MARK + 10 + signum
    code = f"""
import sys
from pathlib import Path
from pipelines.orchestration import runner
runner.raise_on_signals()
try:
    command = ["sh", "-c", "sleep {seconds} & sleep {seconds}"]
    runner.run_foreground(command, Path.cwd(), runner.environment("x"))
except runner.Stopped as stopped:
    sys.exit(stopped.status)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_for(lambda: len(sleepers(seconds)) == 2)
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum
    assert sleepers(seconds) == []


def test_the_foregrounds_exit_status_is_the_commands(project: Path) -> None:
    assert runner.run_foreground(["sh", "-c", "exit 7"], project, runner.environment("x")) == 7
