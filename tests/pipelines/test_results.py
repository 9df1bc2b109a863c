"""Results of the project and of a profile go to a remote and come back in a clone, and garbage collection is safe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.orchestration import workspace
from pipelines.orchestration.__main__ import main
from pipelines.runs import graph
from tests.pipelines.conftest import ROOT, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning"),  # of DVC
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # DVC's indexes are closed by the garbage collector
]

DVC_YAML = """
stages:
  train:
    cmd: mkdir -p data/models && echo ${value} > data/models/weights && echo train >> ran
    deps: [code]
    params: [value]
    outs: [data/models]
  tables:
    cmd: >-
      mkdir -p data/tables data/metrics && cp data/models/weights data/tables/t.csv &&
      echo {} > data/metrics/m.json && echo tables >> ran
    deps: [data/models]
    outs: [data/tables: {cache: false}]
    metrics: [data/metrics/m.json: {cache: false}]
  report:
    cmd: mkdir -p data/report && cp data/tables/t.csv data/report/index.html && echo report >> ran
    deps: [data/tables]
    outs: [data/report]
"""


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def dvc(folder: Path, *words: str) -> None:
    run(folder, sys.executable, "-m", "dvc", *words)


def commit(root: Path) -> None:
    run(root, "git", "add", ".")
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    run(root, "git", *identity, "commit", "-q", "--allow-empty", "-m", "x")


def surroundings(patch: pytest.MonkeyPatch, root: Path) -> None:
    patch.chdir(root)
    patch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    patch.setenv("FLOWMATCH_HOME", str(root / ".flowmatch"))
    for name in ("DVC_ROOT", "DVC_STAGE", "DVC_REMOTE"):
        patch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project in git, where default and smoke have run, and a clone of it after `push` and a commit."""
    folder = tmp_path_factory.mktemp("results")
    root = folder / "a project"
    write(root, "dvc.yaml", DVC_YAML)
    write(root, "params.yaml", "profile: default\nvalue: 1\n")
    write(root, "code", "1")
    write(root, "pipelines/config/profiles/smoke.yaml", "profile: smoke\nvalue: 2\n")
    write(root, ".gitignore", "/.workspaces/\n/.flowmatch/\n/data/models/\n/data/report/\nran\n")
    write(root, ".dvc/config", "[core]\n    analytics = false\n    autostage = false\n    remote = store\n")
    write(root, ".dvc/config", (root / ".dvc/config").read_text() + "['remote \"store\"']\n    url = ../../store\n")
    write(root, ".dvc/.gitignore", "/config.local\n/tmp\n/cache\n")
    run(folder, "git", "init", "-q", str(root))
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, root)
        dvc(root, "repro", "-q")
        dvc(workspace.prepare(root, "smoke"), "repro", "-q")
        commit(root)
        shutil.copytree(root, folder / "before")
        assert main(["push"]) == 0
        commit(root)
    run(folder, "git", "clone", "-q", str(root), str(folder / "clone"))
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project before `push`, with a remote beside it."""
    shutil.copytree(made / "before", tmp_path / "a project")
    surroundings(monkeypatch, tmp_path / "a project")
    return tmp_path / "a project"


@pytest.fixture
def clone(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone, beside the project and the remote."""
    shutil.copytree(made, tmp_path / "all")
    surroundings(monkeypatch, tmp_path / "all" / "clone")
    return tmp_path / "all" / "clone"


def text(path: Path) -> str:
    return path.read_text().strip()


def test_a_clone_gets_the_tables_of_a_profile_by_dvc_pull(clone: Path) -> None:
    dvc(clone, "pull")
    assert text(clone / "data/models/weights") == text(clone / "data/tables/t.csv") == "1"
    assert (
        text(clone / "results/smoke/data/tables/t.csv") == text(clone / "results/smoke/data/report/index.html") == "2"
    )
    assert yaml.safe_load(text(clone / "results/smoke/params.yaml")) == {"profile": "smoke", "value": 2}
    assert graph.dirty(clone) == set()
    assert list(clone.rglob("ran")) == []


def test_a_clone_gets_everything_of_a_profile_by_pull(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--profile", "smoke"]) == 0
    here = clone / ".workspaces/smoke"
    assert capsys.readouterr().out == ".workspaces/smoke/data/report/index.html\n"
    assert text(here / "data/models/weights") == text(here / "data/tables/t.csv") == "2"
    assert graph.dirty(workspace.prepare(clone, "smoke")) == set()
    assert not (clone / "data/models").exists()  # of the project nothing was asked for
    assert main(["pull"]) == 0
    assert graph.dirty(clone) == set()
    assert list(clone.rglob("ran")) == []


def test_the_memory_of_runs_travels_too(clone: Path) -> None:
    assert main(["pull"]) == 0
    (clone / "dvc.lock").unlink()
    shutil.rmtree(clone / "data/models")
    dvc(clone, "repro", "-q", "train")
    assert text(clone / "data/models/weights") == "1"
    assert not (clone / "ran").exists()


def test_a_newer_push_replaces_what_was_pulled(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["pull", "--profile", "smoke"]) == 0
    root = clone.parent / "a project"
    monkeypatch.chdir(root)
    write(root, "pipelines/config/profiles/smoke.yaml", "profile: smoke\nvalue: 3\n")
    dvc(workspace.prepare(root, "smoke"), "repro", "-q")
    assert main(["push", "--profile", "smoke"]) == 0
    commit(root)
    monkeypatch.chdir(clone)
    run(clone, "git", "pull", "-q", str(root), "HEAD")
    assert main(["pull", "--profile", "smoke"]) == 0
    assert text(clone / ".workspaces/smoke/data/models/weights") == "3"
    assert graph.dirty(clone / ".workspaces/smoke") == set()


def test_workspaces_do_not_copy_results(clone: Path) -> None:
    assert not (workspace.prepare(clone, "smoke") / "results").exists()


def test_an_incomplete_profile_is_left_out_and_refused_by_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / ".workspaces/smoke", "code", "2")
    assert main(["push"]) == 0
    said = capsys.readouterr()
    assert said.out == "pushed: the project\n"
    assert said.err == (
        "left out: profile smoke is not complete, expected every stage to be up to date; "
        "run `make repro PROFILE=smoke` first.\n"
    )
    assert main(["push", "--profile", "smoke"]) == 1
    assert not (root / "results").exists()


def test_the_project_is_pushed_even_if_its_cache_or_its_results_are_lost(root: Path) -> None:
    command = [sys.executable, "-m", "pipelines.orchestration", "push"]

    def push() -> subprocess.CompletedProcess[str]:  # in a process of its own, because DVC prints by itself
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)

    shutil.rmtree(root / ".dvc/cache")
    done = push()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "pushed: the project, smoke\ncommit them: git add results/smoke.dvc results/.gitignore\n"
    for name in ("data/models", ".dvc/cache"):
        shutil.rmtree(root / name)
    dvc(root, "pull", "-q")
    assert text(root / "data/models/weights") == "1"
    for name in ("data/models", "data/report", ".dvc/cache", ".workspaces"):
        shutil.rmtree(root / name)
    done = push()
    assert (done.returncode, done.stdout) == (0, "pushed: the project\n")
    assert done.stderr == "the project's own results are not up to date; those that are there are pushed.\n"


MISTAKES = {
    "push without a remote": (["push"], "no default remote"),
    "pull without a remote": (["pull"], "no default remote"),
    "pull what nothing describes": (["pull", "--profile", "smoke"], "results/smoke.dvc is missing"),
    "push what has not run": (["push", "--profile", "other"], "profile other is not complete"),
    "pull from an empty remote": (["pull"], "the remote lacks results"),
    "push to a file": (["push"], "remote cannot be used"),
    "pull over edited results": (["pull"], "data/models"),
}


@pytest.mark.parametrize("case", list(MISTAKES))
def test_a_mistake_is_a_sentence(case: str, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, says = MISTAKES[case]
    match case:
        case "push without a remote" | "pull without a remote":
            dvc(root, "remote", "remove", "store")
        case "pull from an empty remote":
            for name in (".dvc/cache", "data/models", "data/report"):
                shutil.rmtree(root / name)
        case "push to a file":
            write(root.parent, "store", "no folder")
        case "pull over edited results":
            dvc(root, "push", "-q")
            write(root, "data/models/weights", "edited")
    assert main(command) == 1
    said = capfd.readouterr().err.strip()
    assert says in said
    assert "\n" not in said


# ---- garbage collection ----


def test_gc_keeps_what_the_project_and_profiles_use(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {path for path in (root / ".dvc/cache/files").rglob("*") if path.is_file()}
    write(root, "params.yaml", "profile: default\nvalue: 7\n")
    dvc(root, "repro", "-q")
    assert main(["gc"]) == 0
    assert capsys.readouterr().out.endswith("kept what these use: default, smoke\n")
    assert 0 < len([path for path in old if not path.exists()]) < len(old)
    for folder, value in ((root, "7"), (root / ".workspaces/smoke", "2")):
        shutil.rmtree(folder / "data/models")
        dvc(folder, "checkout", "-q")
        assert text(folder / "data/models/weights") == value
    assert main(["push"]) == 0  # the memory of runs names outputs that are gone


def test_gc_works_where_results_of_the_project_are_lost(root: Path) -> None:
    for name in ("data/models", ".dvc/cache"):
        shutil.rmtree(root / name)
    assert main(["gc"]) == 0
    for folder, name in ((root, "data/report"), (root / ".workspaces/smoke", "data/models")):
        shutil.rmtree(folder / name)
    dvc(root, "checkout", "-q", "report")
    dvc(root / ".workspaces/smoke", "checkout", "-q")
    assert text(root / "data/report/index.html") == "1"
    assert text(root / ".workspaces/smoke/data/models/weights") == "2"


def test_a_bare_dvc_gc_costs_nothing_while_the_outputs_are_there(root: Path) -> None:
    here = root / ".workspaces/smoke"
    dvc(root, "gc", "--workspace", "--force")
    assert graph.dirty(here) == set()
    shutil.rmtree(here / "data/models")
    dvc(here, "checkout", "-q")
    assert text(here / "data/models/weights") == "2"


# ---- an object store ----


@pytest.fixture
def bucket(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3-compatible server on loopback with an empty bucket, which is the project's remote."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install '.[test-slow]'")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: pip install '.[s3]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    credentials = {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="results")
    dvc(root, "remote", "modify", "store", "url", "s3://results/flowmatch")
    dvc(root, "remote", "modify", "store", "endpointurl", address)
    yield
    server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of boto and moto
def test_results_travel_by_an_object_store(bucket: None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["push"]) == 0
    commit(root)
    copy = root.parent / "clone"
    run(root.parent, "git", "clone", "-q", str(root), str(copy))
    surroundings(monkeypatch, copy)
    dvc(copy, "pull")
    assert text(copy / "results/smoke/data/tables/t.csv") == "2"
    assert main(["pull", "--profile", "smoke"]) == 0
    assert text(copy / ".workspaces/smoke/data/models/weights") == "2"
    assert graph.dirty(copy / ".workspaces/smoke") == graph.dirty(copy) == set()
    found = [path for path in copy.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert found == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_without_credentials_there_is_a_sentence(
    bucket: None, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for command in (["push"], ["pull"]):
        assert main(command) == 1
        said = capfd.readouterr().err.strip()
        assert "Unable to locate credentials" in said
        assert "\n" not in said
