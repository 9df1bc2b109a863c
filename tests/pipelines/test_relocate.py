"""Paths of params.yaml in the folder of a profile: relative ones lead to the same files, wherever the project lies."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.orchestration import preflight, workspace
from pipelines.orchestration.commands import _workspace
from pipelines.orchestration.relocate import relocate
from pipelines.runs import graph
from tests.pipelines.conftest import ROOT

EXORL = {"kind": "exorl", "directory": "../episodes", "simulator": {"kind": "maze", "task": "loop"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "my project"
    (root / ".workspaces" / "smoke").mkdir(parents=True)
    return root


def lead(root: Path, where: str) -> Path:
    """The file that a path in a workspace leads to, without touching links."""
    return (root / ".workspaces" / "smoke" / where).resolve()


def test_relative_paths_lead_to_the_same_files_and_absolute_ones_stay(root: Path) -> None:
    params = {"mirror": "../mirror", "environments": {"log": EXORL, "elsewhere": {**EXORL, "directory": "/episodes"}}}
    moved = relocate(params, root, root / ".workspaces" / "smoke")
    assert lead(root, moved["mirror"]) == root.parent / "mirror"
    log = moved["environments"]["log"]
    assert lead(root, log["directory"]) == root.parent / "episodes"
    assert {**log, "directory": EXORL["directory"]} == EXORL
    assert moved["environments"]["elsewhere"]["directory"] == "/episodes"
    assert str(root) not in str(moved)  # a project that was moved finds its own files
    assert params["environments"]["log"] == EXORL  # type: ignore[index]


def test_a_workspace_behind_a_link_and_a_linked_project(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big disk" / "deep"
    elsewhere.mkdir(parents=True)
    (tmp_path / "linked").symlink_to(root)
    (root / ".workspaces" / "smoke").rmdir()
    (root / ".workspaces" / "smoke").symlink_to(elsewhere)
    (root / "in.csv").write_text("x")
    params = {"mirror": "in.csv"}
    for project in (root, tmp_path / "linked"):
        moved = relocate(params, project, project / ".workspaces" / "smoke")
        assert (elsewhere / moved["mirror"]).read_text() == "x"


@pytest.mark.parametrize("entries", [None, 3, {"x": None}, {"x": {"kind": "nothing"}}, {"x": {"kind": "exorl"}}])
def test_what_the_schema_refuses_is_left_to_it(root: Path, entries: Any) -> None:
    params = {"datasets": entries, "environments": entries, "mirror": None}
    assert relocate(params, root, root / ".workspaces" / "smoke") == params


def test_a_profile_reads_the_projects_files(project: Path) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump({"environments": {"log": EXORL}, "mirror": "data/raw"}))
    profile = project / "pipelines/config/profiles/smoke.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("profile: smoke\n")
    here = workspace.prepare(project, "smoke")
    params = yaml.safe_load((here / "params.yaml").read_text())
    assert (here / params["mirror"]).resolve() == project / "data/raw"
    assert (here / params["environments"]["log"]["directory"]).resolve() == project.parent / "episodes"


def test_the_checks_before_a_run_look_where_the_stages_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(preflight, "check", lambda params: folders.append(Path.cwd()))
    monkeypatch.setattr(graph, "compare", lambda here, targets: ({"prepare": None}, {"prepare"}))
    shutil.copy(ROOT / "params.yaml", project)
    (project / ".workspaces" / "smoke").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", project / ".workspaces" / "smoke")
    here = project / ".workspaces" / "smoke"
    assert _workspace.has_work(here, argparse.Namespace(targets=[], force=False))
    assert folders == [here]
    assert Path.cwd() == project
