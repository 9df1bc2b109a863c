from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.runs import records
from pipelines.runs.records import RunRecord


def run(code: str) -> subprocess.Popen[str]:
    """Another process that starts a record, and what it does then."""
    start = "from pipelines.runs.records import RunRecord; r = RunRecord.start('s@x', {'a': {'b': 1}})"
    return subprocess.Popen([sys.executable, "-c", f"{start}\n{code}"], stdout=subprocess.PIPE, text=True)


def only(project: Path) -> records.Record:
    (folder,) = (project / ".flowmatch" / "runs").iterdir()
    (record,) = records.read(folder)
    return record


def test_a_record_says_what_was_said(project: Path) -> None:
    record = RunRecord.start("s@x", {"seed": 0, "fit": {"lr": 0.1, "hidden": [8, 8], "name": None}})
    folder = project / ".flowmatch" / "runs" / record.invocation
    assert records.read(folder)[0].status == "RUNNING"
    record.metrics({"nll": 1.5})
    record.metrics({"emd": 2})
    record.tag("cell", "x")
    record.artifact(Path("data/x.txt"))
    record.finish("FAILED", "no data")
    (found,) = records.read(folder)
    assert found.params == {"seed": 0, "fit.lr": 0.1, "fit.hidden": "[8, 8]", "fit.name": None}
    assert found.metrics == {"nll": 1.5, "emd": 2.0}
    assert (found.status, found.message, found.tags, found.artifacts) == (
        "FAILED",
        "no data",
        {"cell": "x"},
        ["data/x.txt"],
    )
    assert found.started <= (found.ended or 0)
    assert found.workspace == "."


def test_a_curve_can_be_read_on_from_an_offset(project: Path) -> None:
    record = RunRecord.start("s", {})
    folder = project / ".flowmatch" / "runs" / record.invocation
    record.series(0, {"loss": 2.0, "rate": 1})
    record.series(1, {"loss": float("nan")})
    record.finish("FINISHED")
    first, second = records.points(folder, "s")
    assert first[2:4] == (0, {"loss": 2.0, "rate": 1.0})
    assert second[3]["loss"] != second[3]["loss"]
    assert [point[2] for point in records.points(folder, "s", first[0])] == [1]
    with (folder / "s.jsonl").open("a") as file:
        file.write('{"time": 1, "st')  # a writer in the middle of a line
    assert [point[2] for point in records.points(folder, "s", second[0])] == []


def test_a_second_attempt_replaces_the_first(project: Path) -> None:
    first = RunRecord.start("s", {})
    first.series(0, {"loss": 1.0})
    first.finish("FAILED", "once")
    RunRecord.start("s", {}).finish("FINISHED")
    assert only(project).message is None
    assert list(records.points(project / ".flowmatch" / "runs" / first.invocation, "s")) == []


def test_a_killed_process_leaves_killed(project: Path) -> None:
    with run("r.series(0, {'l': 1}); print('ready', flush=True); import time; time.sleep(60)") as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert only(project).status == "RUNNING"
        process.kill()
        process.wait()
        assert only(project).status == "KILLED"
        assert (only(project).ended or 0) >= only(project).started


def test_a_zombie_does_not_count_as_running(project: Path) -> None:
    with run("import os; os._exit(9)") as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has fetched its status
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert only(project).status == "KILLED"
        process.wait()


def test_another_process_of_the_same_id_is_another(project: Path) -> None:
    me = psutil.Process()
    assert records.is_alive(me.pid, me.create_time())
    assert not records.is_alive(me.pid, me.create_time() - 3600)
    assert not records.is_alive(-1, 0.0)


def test_the_file_is_whole_at_every_moment(project: Path) -> None:
    with run("\nfor i in range(3000): r.metrics({f'm{i % 50}': i})\nr.finish('FINISHED')") as process:
        seen = 0
        while process.poll() is None:
            for path in (project / ".flowmatch").glob("runs/*/s@x.json"):
                json.loads(path.read_text())
                seen += 1
        assert seen > 10
        assert only(project).status == "FINISHED"
        assert [p.name for p in (project / ".flowmatch").glob("runs/*/*")] == ["s@x.json"]


def test_stages_of_one_dvc_repro_share_an_invocation(project: Path) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    (folder,) = (project / ".flowmatch" / "runs").iterdir()
    found = records.read(folder)
    assert [r.stage for r in found] == ["leaf@a", "leaf@b", "join", "side"]
    assert records.owner_of(folder.name)[0] not in {r.pid for r in found} | {os.getpid()}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/v/bin/python", "/v/bin/dvc", "repro"], True),
        (["/v/bin/python", "-m", "dvc", "--wait-for-lock", "repro", "-s", "x"], True),
        (["python", "-m", "dvc", "exp", "exec-run", "--infofile", "f"], True),
        (["dvc", "exp", "run", "--temp"], True),
        (["dvc", "status"], False),
        (["python", "-m", "pipelines.stages.report", "repro"], False),
        (["/bin/sh", "-c", "dvc repro"], False),
        ([], False),
    ],
)
def test_what_counts_as_a_run_of_dvc(command: list[str], expected: bool) -> None:
    assert records._is_dvc_run(command) is expected


def test_the_orchestrator_names_the_invocation(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "77-1.5")
    assert RunRecord.start("s", {}).invocation == "77-1.5"
    assert (project / ".flowmatch/runs/77-1.5/s.json").exists()


@pytest.mark.parametrize("owner", ["this user", "another one"])
def test_commit_and_changes_are_those_of_the_code(project: Path, owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever owns the folder: one that is mounted into a container has another owner than its processes."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def state() -> tuple[str | None, bool | None]:
        found = RunRecord.start("s", {}).record
        return found.commit, found.dirty

    assert state() == (None, None)
    git("init", "-q")
    (project / "data").mkdir()
    (project / "data/a.json").write_text("1")
    (project / "dvc.lock").write_text("1")
    git("add", "-f", "step.py", "params.yaml", "data/a.json", "dvc.lock")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD")
    if owner == "another one":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        with pytest.raises(subprocess.CalledProcessError):
            git("rev-parse", "HEAD")
    assert state() == (commit, False)
    (project / "data/a.json").write_text("2")  # what a run itself writes
    (project / "dvc.lock").write_text("2")
    assert state() == (commit, False)
    (project / "params.yaml").write_text("seed: 1")
    assert state() == (commit, True)


def test_a_stage_stopped_by_a_signal_can_still_close_its_record(project: Path) -> None:
    code = """
import signal, sys, time
def stop(*_): r.finish('KILLED', 'stopped'); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print('ready', flush=True); time.sleep(60)
"""
    with run(code) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert (only(project).status, only(project).message) == ("KILLED", "stopped")
