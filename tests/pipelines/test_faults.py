"""What goes wrong during a run: nothing that is kept lies, nothing is lost, and each fault is one sentence."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.base import locks
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.orchestration import workspace
from pipelines.orchestration.commands import _workspace
from pipelines.runs import graph, inputs, records, watchdog
from tests.pipelines.conftest import ROOT, write

DVC_YAML = """
stages:
  prepare:
    matrix: {dataset: "${datasets}"}
    cmd: python stage.py ${item}
    deps: [stage.py, code, big.bin]
    params: [seed, "datasets.${item.dataset}"]
    outs: ["data/${item.dataset}.txt"]
"""

LOCK = """
schema: '2.0'
stages:
  leaf@a:
    cmd: python step.py a
  side:
    cmd: python step.py side
"""

# Waits for the file `go`, unless there is a file `free`.
STAGE = '''
"""A stage."""
import time
from pathlib import Path

from pipelines.stages import _main


def main(stage, dataset):
    Path("started").touch()
    while not (Path("go").exists() or Path("free").exists()):
        time.sleep(0.02)
    with stage.output(Path(f"data/{dataset}.txt")) as temporary:
        temporary.write_text(str(stage.params.seed))


_main.run(main)
'''


@pytest.fixture
def waiting(project: Path) -> Path:
    """A project with one stage, which waits for a file after it has read its inputs."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["datasets"] = {"moons": {"kind": "moons"}}
    write(project, "params.yaml", yaml.safe_dump(raw))
    write(project, "dvc.yaml", DVC_YAML)
    write(project, "stage.py", STAGE)
    write(project, "code/part.py", "1")
    write(project, "code/gone.py", "1")
    (project / "big.bin").write_bytes(bytes(3 << 20))
    return project


@pytest.fixture
def started(waiting: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed after the test, with all that run in the project."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(waiting):
                process.kill()
    for each in processes:
        each.kill()
        each.wait()
        if each.stdout:
            each.stdout.close()


def repro(**variables: str) -> subprocess.Popen[str]:
    """A bare `dvc repro`, whose stages do not publish."""
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        env={**os.environ, "FLOWMATCH_INVOCATION": "test", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def edit(key: str, value: object) -> None:
    raw = yaml.safe_load(Path("params.yaml").read_text())
    here = raw
    *parents, last = key.split(".")
    for part in parents:
        here = here[part]
    here[last] = value
    Path("params.yaml").write_text(yaml.safe_dump(raw))


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def during(process: subprocess.Popen[str], change: Callable[[], object]) -> str:
    """Make a change while the stage waits, let it end, and return what DVC printed."""
    wait_until(Path("started").exists)
    change()
    Path("go").touch()
    output = process.communicate()[0]
    for name in ("started", "go"):
        Path(name).unlink()
    return output


EDITS: dict[str, Callable[[], object]] = {
    "params.yaml: seed": lambda: edit("seed", 7),
    "params.yaml: datasets.moons.noise": lambda: edit("datasets.moons.noise", 0.5),
    "params.yaml: datasets.moons": lambda: edit("datasets", {}),
    "code/part.py": lambda: Path("code/part.py").write_text("2"),
    "code/new.py": lambda: Path("code/new.py").write_text("2"),
    "code/gone.py": Path("code/gone.py").unlink,
    "stage.py": lambda: Path("stage.py").write_text("# edited"),
    "big.bin": lambda: Path("big.bin").write_bytes(bytes(4 << 20)),
}

HARMLESS: dict[str, Callable[[], object]] = {
    "another section": lambda: edit("density.fit.lr", 0.5),
    "another data set": lambda: edit("datasets.digits", {"kind": "digits"}),
    "the same value, written otherwise": lambda: write(Path(), "params.yaml", Path("params.yaml").read_text() + "# x"),
    "an editor's file": lambda: Path("code/.part.py.swp").write_text("2"),
    "the same content again": lambda: Path("code/part.py").write_text("1"),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_of_an_input_is_found_and_named(waiting: Path, name: str) -> None:
    needed = inputs.of("prepare@moons", {"dataset": "moons"})
    before = needed.state()
    needed.verify(before)
    write(waiting, "data/moons.txt", "made of the old input")
    EDITS[name]()
    with pytest.raises(UserError, match=f"^{re.escape(name)} (\\(and 1 more\\) )?was edited while the stage ran"):
        needed.verify(before)
    assert not Path("data/moons.txt").exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_an_edit_of_something_else_is_none(waiting: Path, name: str) -> None:
    needed = inputs.of("prepare@moons", {"dataset": "moons"})
    before = needed.state()
    HARMLESS[name]()
    needed.verify(before)


def test_the_inputs_of_a_stage_are_those_that_dvc_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, folders and outputs of every stage of the project, and of a folder the files that DVC sees in it."""
    monkeypatch.chdir(ROOT)
    from dvc.repo import Repo

    with Repo() as repo:
        for stage in repo.index.stages:
            cell = dict(zip(*[iter(stage.cmd.replace("--", "").split()[3:])] * 2, strict=True))
            needed = inputs.of(stage.addressing, cell)
            keys = {key for dep in stage.deps for key in getattr(dep, "params", ())}
            deps = {dep.def_path for dep in stage.deps if not hasattr(dep, "params")}
            assert (set(needed.params), set(map(str, needed.deps))) == (keys, deps), stage.addressing
            assert set(map(str, needed.outs)) == {out.def_path for out in stage.outs}
        for dep in ("pipelines/config", "pipelines/reporting", "flowmatch_core/networks"):
            seen = {os.path.relpath(path, ROOT) for path in repo.dvcignore.find(repo.fs, str(ROOT / dep))}
            assert {str(path) for path in inputs._files(Path(dep))} == seen


def test_an_edit_during_a_run_leaves_neither_a_lock_nor_a_cached_run(waiting: Path) -> None:
    was = Path("params.yaml").read_text()
    output = during(repro(), lambda: edit("seed", 7))
    assert output.count("edited while the stage ran") == 1, output
    assert "prepare@moons: params.yaml: seed was edited" in output
    assert "Traceback" not in output
    assert not Path("data/moons.txt").exists()
    assert not Path("dvc.lock").exists()
    (record,) = records.read(records.home() / "runs" / "test")
    assert record.status == "FAILED"
    Path("free").touch()
    for text, seed in ((Path("params.yaml").read_text(), "7"), (was, "1")):  # nothing is restored for either of them
        Path("params.yaml").write_text(text)
        assert "is cached" not in repro().communicate()[0]
        assert Path("data/moons.txt").read_text() == seed
    edit("seed", 7)
    assert "is cached" in repro().communicate()[0]
    assert Path("data/moons.txt").read_text() == "7"


def test_an_edit_for_the_next_run_does_not_disturb_this_one(waiting: Path) -> None:
    process = repro()
    during(process, lambda: edit("density.fit.lr", 0.5))
    assert process.returncode == 0
    assert Path("data/moons.txt").read_text() == "1"


@pytest.mark.parametrize("killed", [["dvc"], pytest.param(["dvc", "shell"], marks=pytest.mark.slow)], ids=" and ".join)
def test_a_stage_ends_when_what_started_it_was_killed(
    waiting: Path, started: list[subprocess.Popen[str]], killed: list[str]
) -> None:
    started.append(repro())
    wait_until(Path("started").exists)
    stage = next(p for p in psutil.Process(started[0].pid).children(recursive=True) if "stage.py" in p.cmdline())
    for each in reversed(psutil.Process(started[0].pid).children(recursive=True)):
        if each != stage and "shell" in killed:
            each.kill()
    started[0].kill()
    started[0].wait()
    wait_until(lambda: not stage.is_running())
    (record,) = records.read(records.home() / "runs" / "test")
    assert (record.status, "is gone" in str(record.message)) == ("KILLED", True)
    Path("free").touch()
    again = repro()
    again.communicate()
    assert again.returncode == 0


@pytest.mark.slow
def test_a_stage_ends_when_its_orchestrator_was_killed(waiting: Path, started: list[subprocess.Popen[str]]) -> None:
    owner = subprocess.Popen(["sleep", "1000"], text=True)
    started.append(owner)
    invocation = records.name_of(psutil.Process(owner.pid))
    started.append(repro(FLOWMATCH_INVOCATION=invocation))
    wait_until(Path("started").exists)
    owner.kill()
    owner.wait()
    assert started[1].wait(100) != 0
    (record,) = records.read(records.home() / "runs" / invocation)
    assert record.status == "KILLED"


def test_the_same_stage_does_not_run_twice_at_once(waiting: Path, started: list[subprocess.Popen[str]]) -> None:
    command = [sys.executable, "stage.py", "--dataset", "moons"]
    started.append(subprocess.Popen(command, env={**os.environ, "FLOWMATCH_INVOCATION": "one"}, text=True))
    wait_until(Path("started").exists)
    with (
        pytest.raises(locks.Busy, match=f"stage prepare is in use by process {started[0].pid}; "),
        locks.held(locks.FOLDER / "stage@moons.lock", "stage prepare", 0.0),
    ):
        pass


def test_a_stage_that_takes_too_long_fails(waiting: Path) -> None:
    process = repro(FLOWMATCH_TIMEOUT="0.5")
    output = process.communicate()[0]
    assert process.returncode != 0
    assert "prepare@moons: took longer than its limit of 0.5 s" in output
    (record,) = records.read(records.home() / "runs" / "test")
    assert record.status == "FAILED"
    assert not Path("data/moons.txt").exists()


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "nan"])
def test_a_limit_that_is_none_is_named(waiting: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("FLOWMATCH_TIMEOUT", limit)
    with pytest.raises(UserError, match=f"FLOWMATCH_TIMEOUT is '{limit}'; expected"):
        watchdog.Watchdog(records.RunRecord.start("a", {}))


NASTY = [
    "x; touch pwned; true",
    "'; touch pwned; '",
    "$(touch pwned) `touch pwned`",
    "n\ntouch pwned\n",
    '"; touch pwned; "',
]


def test_a_bare_dvc_repro_executes_no_name_of_an_entry(project: Path) -> None:
    """The project's own command lines, with names that the schema would refuse if a stage started."""
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for stage in graph["stages"].values():
        for section in ("deps", "params", "outs", "metrics", "plots"):
            stage.pop(section, None)
    write(project, "dvc.yaml", yaml.safe_dump(graph))
    entries = dict.fromkeys(NASTY, "")
    raw = dict.fromkeys(("datasets", "environments", "plans", "experiments"), entries)
    raw |= {section: {"methods": {NASTY[0]: {}}} for section in ("density", "successor")}
    write(project, "params.yaml", yaml.safe_dump(raw))
    write(project, "bin/python", '#!/bin/sh\nprintf "%s|" "$@" >> ran\n')
    (project / "bin/python").chmod(0o755)
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--keep-going"],
        env={**os.environ, "PATH": f"{project / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        check=False,
    )
    ran = (project / "ran").read_text()
    assert all(f"--dataset|{name}|" in ran for name in NASTY if "\n" not in name), ran
    assert not list(project.rglob("pwned"))


@pytest.mark.parametrize("section", ["datasets", "environments", "experiments", "density.methods", "successor.methods"])
@pytest.mark.parametrize("name", [*NASTY, "../up", "a/b", "", " ", "-rf", "A", "ä", "x" * 65, "a.b", "floor\n"])
def test_the_schema_refuses_names_that_are_no_words(section: str, name: str) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    here = raw
    for part in section.split("."):
        here = here[part]
    here[name] = next(iter(here.values()))
    with pytest.raises(UserError) as caught:
        params.parse(raw, Path("params.yaml"))
    assert "\n" not in str(caught.value)
    assert section in str(caught.value)
    assert "expected small letters" in str(caught.value)


CUT: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda whole: whole[: len(whole) // 2],
    "nothing": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "a list": lambda whole: b"[1]",
}


@pytest.mark.parametrize("how", CUT)
@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock", "params.yaml", ".dvc/config"])
def test_a_damaged_file_of_the_project_is_one_sentence_or_runs_again(project: Path, name: str, how: str) -> None:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\n")
    write(project, "dvc.lock", LOCK)
    whole = (project / name).read_bytes()
    (project / name).write_bytes(CUT[how](whole))
    harmless = {("dvc.lock", "half"), ("params.yaml", "nothing")}  # their stages have changed
    if (name, how) in harmless:
        assert "side" in graph.dirty(project)
        return
    with pytest.raises(UserError) as caught:
        _workspace.has_work(project, argparse.Namespace(targets=[], force=False))
    assert "\n" not in str(caught.value)
    if name in ("dvc.yaml", "params.yaml") and how != "nothing":
        with pytest.raises(UserError, match=f"^{project / name} (is not valid YAML|holds list; expected a mapping)"):
            workspace.prepare(project, "smoke")


def orchestrate(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.orchestration", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["default", "smoke"])
def test_two_runs_at_once_and_a_run_after_kill_9(
    waiting: Path, started: list[subprocess.Popen[str]], profile: str
) -> None:
    write(waiting, "pipelines/config/profiles/smoke.yaml", "profile: smoke\nseed: 5\n")
    here = waiting if profile == "default" else waiting / ".workspaces" / profile
    first = orchestrate("repro", "--profile", profile)
    started.append(first)
    wait_until((here / "started").exists)
    edit("seed", 7)  # of the next run of the profile
    before = (here / "params.yaml").read_bytes()
    for command in ("repro", "flow", "status"):
        second = orchestrate(command, "--profile", profile)
        output = second.communicate()[0]
        assert second.returncode == 1
        assert f"is in use by process {first.pid}; wait until it ends or stop it" in output
        assert len(output.splitlines()) == 1
    check = orchestrate("validate", "--profile", profile)
    assert f"params.yaml is valid for profile {profile}." in check.communicate()[0]
    assert (here / "params.yaml").read_bytes() == before
    edit("seed", 1)

    family = psutil.Process(first.pid).children(recursive=True)
    stage = next(p for p in family if "stage.py" in p.cmdline())
    for each in [psutil.Process(first.pid), *(p for p in family if p != stage)]:
        each.kill()
    (here / "free").touch()
    (here / "started").unlink()
    again = orchestrate("repro", "--profile", profile)
    said = again.communicate()[0]
    assert "stopped before" not in said
    assert again.returncode == 0, said
    assert not stage.is_running()
    assert (here / "data/moons.txt").read_text() == ("1" if profile == "default" else "5")
