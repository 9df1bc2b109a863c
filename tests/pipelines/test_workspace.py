from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.base.errors import UserError
from pipelines.config import yaml_files
from pipelines.orchestration import workspace
from pipelines.runs import graph
from tests.pipelines.conftest import write


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its content and inode, except in workspaces and DVC's state."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file() and not {".workspaces", ".git", "tmp", "cache"} & set(path.relative_to(folder).parts)
    }


@pytest.fixture(params=["git", "no git"])
def root(request: pytest.FixtureRequest, project: Path) -> Path:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\nside: {value: 30}\n")
    write(project, "pipelines/code.py", "1")
    write(project, ".gitignore", "/.workspaces/\n/data/\n*.log\n")
    write(project, "dvc.lock", "the developer's")
    write(project, "data/side.txt", "the developer's")
    write(project, "data/raw/input.csv", "shared")
    if request.param == "git":
        write(project, "noise.log", "ignored")
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "-f", "data/raw/input.csv"], check=True)
    return project


def test_default_is_the_project_itself(root: Path) -> None:
    before = tree(root)
    assert workspace.prepare(root, "default") == root
    assert tree(root) == before
    assert not (root / ".workspaces").exists()


def test_a_workspace_has_the_projects_files_and_the_profiles_parameters(root: Path) -> None:
    before = tree(root)
    here = workspace.prepare(root, "smoke")
    assert tree(root) == before
    found = set(tree(here))
    assert {"dvc.yaml", "step.py", "pipelines/code.py", ".dvc/config", "data/raw/input.csv"} <= found
    assert found.isdisjoint({"dvc.lock", "data/side.txt", "noise.log"})
    params = yaml.safe_load((here / "params.yaml").read_text())
    assert params == yaml.safe_load((root / "params.yaml").read_text()) | {
        "profile": "smoke",
        "side": {"value": 30},
    }


def test_a_second_time_touches_only_what_was_edited(root: Path) -> None:
    here = workspace.prepare(root, "smoke")
    before = tree(here)
    workspace.prepare(root, "smoke")
    assert tree(here) == before
    write(root, "pipelines/code.py", "2")
    workspace.prepare(root, "smoke")
    after = tree(here)
    assert {name for name in after if after[name] != before.get(name)} == {"pipelines/code.py"}
    assert after["pipelines/code.py"][0] == b"2"


def test_deleted_files_go_and_the_workspaces_own_stay(root: Path) -> None:
    here = workspace.prepare(root, "smoke")
    for name in ("dvc.lock", "data/side.txt", ".checkpoints/half.bin", "seen/side"):
        write(here, name, "the workspace's")
    (root / "pipelines/code.py").unlink()
    workspace.prepare(root, "smoke")
    assert not (here / "pipelines/code.py").exists()
    for name in ("dvc.lock", "data/side.txt", ".checkpoints/half.bin", "seen/side"):
        assert (here / name).read_text() == "the workspace's"


def test_files_of_an_interrupted_synchronisation_are_removed_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "pipelines/new.py", "1")
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_dvc_settings", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            workspace.prepare(root, "smoke")
    (root / "pipelines/new.py").unlink()
    here = workspace.prepare(root, "smoke")
    assert not (here / "pipelines/new.py").exists()


def test_apart_gives_default_a_folder_of_its_own(root: Path) -> None:
    here = workspace.prepare(root, "default", apart=True)
    assert here != root
    assert here.parent == root / ".workspaces"
    params = (root / "params.yaml").read_text()
    assert yaml.safe_load((here / "params.yaml").read_text()) == yaml.safe_load(params)
    assert workspace.prepare(root, "smoke", apart=True) != workspace.prepare(root, "smoke")


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
        ({"a": {"x": {}, "y": {"z": 1}}}, {"a": {"x": None}}, {"a": {"y": {"z": 1}}}),
        ({"a": 1}, {"a": None}, {"a": None}),
        ({"a": 1}, {"b": {"c": 2}}, {"a": 1, "b": {"c": 2}}),
        ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
    ],
)
def test_merge(base: dict[str, object], changes: dict[str, object], expected: dict[str, object]) -> None:
    before = yaml.safe_dump(base)
    assert yaml_files.merge(base, changes) == expected
    assert yaml.safe_dump(base) == before


def test_an_unknown_profile_is_a_sentence(root: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smoke'"):
        workspace.prepare(root, "smok")


def test_the_cache_is_shared_with_its_memory_of_runs(project: Path) -> None:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\nside: {value: 30}\n")
    dvc = [sys.executable, "-m", "dvc", "repro", "-q"]
    subprocess.run(dvc, check=True)
    lock = (project / "dvc.lock").read_text()
    shutil.rmtree(project / "seen")
    here = workspace.prepare(project, "smoke")
    subprocess.run(dvc, cwd=here, check=True)
    assert [path.name for path in (here / "seen").glob("*.end")] == ["side.end"]  # the others were restored
    assert (here / "data/join.txt").read_text() == "2"
    assert (here / "data/side.txt").read_text() == "30"
    assert (project / "data/side.txt").read_text() == "3"
    assert (project / "dvc.lock").read_text() == lock


def test_a_cache_that_the_project_keeps_elsewhere_is_shared_too(project: Path, tmp_path: Path) -> None:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\n")
    write(project, ".dvc/config.local", f"[cache]\n    dir = {tmp_path / 'elsewhere'}\n")
    here = workspace.prepare(project, "smoke")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "side"], cwd=here, check=True)
    assert (tmp_path / "elsewhere").is_dir()
    assert not (here / ".dvc/cache").exists()


CELLS = """
stages:
  collect:
    matrix: {environment: "${environments}"}
    cmd: echo ${item.environment}
  train_successor:
    matrix: {environment: "${environments}", method: "${successor.methods}"}
    cmd: echo ${item.environment} ${item.method}
"""


def test_a_workspace_has_only_the_cells_that_run_under_the_same_names(project: Path) -> None:
    write(project, "dvc.yaml", CELLS)
    write(project, "params.yaml", "environments: {a: {}, b: {}}\nsuccessor: {methods: {x: {}, y: {}}}\n")
    write(project, "pipelines/config/profiles/smoke.yaml", "environments: {b: {methods: [y]}}\n")
    everything = {"collect@a", "collect@b", *(f"train_successor@{cell}" for cell in ("a-x", "a-y", "b-x", "b-y"))}
    assert set(graph.load(project)) == everything
    nodes = graph.load(workspace.prepare(project, "smoke"))
    assert set(nodes) == everything - {"train_successor@b-x"}
    assert nodes["train_successor@b-y"].cmd == "echo b y"


@pytest.mark.parametrize(
    "broken", ["environments: 3", "environments: {a: 3}", "successor: {methods: 3}", "successor: [x]"]
)
def test_parameters_that_are_no_grid_are_left_to_the_schema(project: Path, broken: str) -> None:
    write(project, "dvc.yaml", CELLS)
    write(project, "params.yaml", "environments: {a: {}}\nsuccessor: {methods: {x: {}}}\n")
    write(project, "pipelines/config/profiles/smoke.yaml", broken)
    assert "matrix" in (workspace.prepare(project, "smoke") / "dvc.yaml").read_text()
