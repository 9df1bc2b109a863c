from __future__ import annotations

import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.base.errors import UserError
from pipelines.config import changes, params, yaml_files
from pipelines.orchestration import workspace
from pipelines.runs import graph
from tests.pipelines.conftest import ROOT, write

PROFILES = ROOT / "pipelines" / "config" / "profiles"


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
    found_params = yaml.safe_load((here / "params.yaml").read_text())
    assert found_params == yaml.safe_load((root / "params.yaml").read_text()) | {
        "profile": "smoke",
        "side": {"value": 30},
    }


def test_ignored_files_stay_out_of_a_workspace_whoever_owns_the_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\n")
    write(project, ".gitignore", "*.log\n")
    write(project, "noise.log", "ignored")
    subprocess.run(["git", "init", "-q"], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    here = workspace.prepare(project, "smoke")
    assert (here / "step.py").exists() and not (here / "noise.log").exists()


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
  train_density:
    matrix: {dataset: "${datasets}", method: "${density.methods}"}
    cmd: echo ${item.dataset} ${item.method}
  train_successor:
    matrix: {environment: "${environments}", method: "${successor.methods}"}
    cmd: echo ${item.environment} ${item.method}
"""
GRID = """
datasets: {c: {}, d: {}}
density: {methods: {u: {}, v: {}}}
environments: {a: {}, b: {}}
successor: {methods: {x: {}, y: {}}}
"""


def test_a_workspace_has_only_the_cells_that_run_under_the_same_names(project: Path) -> None:
    write(project, "dvc.yaml", CELLS)
    write(project, "params.yaml", GRID)
    own = "datasets: {c: {methods: [v]}}\nenvironments: {b: {methods: [y]}}\n"
    write(project, "pipelines/config/profiles/smoke.yaml", own)
    everything = {"collect@a", "collect@b", *(f"train_successor@{cell}" for cell in ("a-x", "a-y", "b-x", "b-y"))}
    everything |= {f"train_density@{cell}" for cell in ("c-u", "c-v", "d-u", "d-v")}
    assert set(graph.load(project)) == everything
    nodes = graph.load(workspace.prepare(project, "smoke"))
    assert set(nodes) == everything - {"train_successor@b-x", "train_density@c-u"}
    assert nodes["train_successor@b-y"].cmd == "echo b y"
    assert nodes["train_density@c-v"].cmd == "echo c v"


@pytest.mark.parametrize(
    "broken",
    ["environments: 3", "environments: {a: 3}", "successor: {methods: 3}", "successor: [x]", "datasets: {c: 3}"],
)
def test_parameters_that_are_no_grid_are_left_to_the_schema(project: Path, broken: str) -> None:
    write(project, "dvc.yaml", CELLS)
    write(project, "params.yaml", GRID)
    write(project, "pipelines/config/profiles/smoke.yaml", broken)
    assert "matrix" in (workspace.prepare(project, "smoke") / "dvc.yaml").read_text()


def test_a_run_holds_its_folder_and_a_refused_one_changes_nothing_there(root: Path) -> None:
    with workspace.held(root, "smoke") as here, workspace.held(root, "default"):  # two folders, two runs
        before = tree(here)
        write(root, "pipelines/code.py", "2")
        write(root, "params.yaml", "seed: 9\n")
        ask = "from pathlib import Path; from pipelines.orchestration import workspace as w"
        for profile in ("smoke", "default"):
            command = f"{ask}\nwith w.held(Path('.'), {profile!r}): pass"
            result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
            assert f"is in use by process {os.getpid()}; wait until it ends or stop it" in result.stderr
        assert tree(here) == before
    with workspace.held(root, "smoke") as here:
        assert (here / "pipelines/code.py").read_text() == "2"
    with workspace.held(root, "smoke", apart=True) as other, workspace.held(root, "smoke"):
        assert other != here


def test_a_truncated_list_of_files_is_a_sentence(project: Path) -> None:
    write(project, "pipelines/config/profiles/smoke.yaml", "profile: smoke\n")
    manifest = workspace.prepare(project, "smoke").with_suffix(".files.json")
    manifest.write_bytes(manifest.read_bytes()[:20])
    with pytest.raises(UserError, match=r"smoke.files.json is not a whole JSON file .*; delete it"):
        workspace.prepare(project, "smoke")


ENTRIES = {
    ("datasets",): {"kind": "moons", "train": 9},
    ("environments",): {"kind": "maze", "gamma": 0.5},
    ("experiments",): {"kind": "sde_vs_ode", "samples": 9},
    ("density", "methods"): {"loss": "cfm", "path": "cond_ot", "coupling": "independent"},
    ("successor", "methods"): {"loss": "td_cfm", "seeds": [1]},
}


def nest(section: tuple[str, ...], value: object) -> dict[str, object]:
    for key in reversed(section):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("section", ENTRIES, ids=".".join)
def test_changes_to_an_entry_that_is_not_there_are_left_out_and_whole_entries_are_added(
    section: tuple[str, ...],
) -> None:
    """The user removed or renamed an entry of params.yaml that a profile changes."""
    whole = ENTRIES[section]
    base = nest(section, {"mine": whole})
    part = dict(list(whole.items())[-1:])
    wanted = {"renamed": part, "removed": None, "added": whole, "mine": part}
    params, skipped = changes.apply(base, nest(section, wanted))
    assert params == nest(section, {"mine": whole, "added": whole})
    assert skipped == [".".join((*section, "renamed"))]
    assert changes.apply(base, nest(section, {"mine": None})) == (nest(section, {}), [])
    assert base == nest(section, {"mine": whole})


def test_names_of_entries_that_are_not_there_are_left_out() -> None:
    base = {
        "environments": {"a": {"methods": ["x", "y"]}, "b": {}, "c": {"methods": ["mistyped", "x"]}},
        "successor": {"methods": {"x": {"loss": "x"}, "y": {"loss": "y"}}, "evaluate": {"solver_steps": {"b": [2]}}},
    }
    profile = {
        "environments": {"b": None, "c": {"length": 3}, "d": {"kind": "maze", "methods": ["x", "gone"]}},
        "successor": {"methods": {"y": None}, "evaluate": {"solver_steps": {"elsewhere": [3], "d": [4]}}},
    }
    params, skipped = changes.apply(base, profile)
    assert {name: entry["methods"] for name, entry in params["environments"].items()} == {
        "a": ["x"],
        "c": ["mistyped", "x"],  # a mistake in params.yaml remains one
        "d": ["x"],
    }
    assert params["successor"]["evaluate"]["solver_steps"] == {"d": [4]}
    assert skipped == [
        "y of environments.a.methods",
        "gone of environments.d.methods",
        "solver_steps of b",
        "solver_steps of elsewhere",
    ]


@pytest.mark.parametrize(
    "profile", ["td_tables", "td_tables_smoke", "td_claims", "td_claims_smoke", "td_planning", "td_domains"]
)
def test_a_profile_about_given_entries_runs_none_of_the_users_own(profile: str) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    wanted, _ = changes.apply(raw, yaml_files.read_yaml(PROFILES / f"{profile}.yaml"))
    mine = deepcopy(raw)
    for section, like in (("datasets", "moons"), ("environments", "spiral"), ("experiments", "sde_vs_ode")):
        mine[section]["mine"] = mine[section][like]
    for section, like in (("density", "cfm"), ("successor", "td_cfm")):
        mine[section]["methods"]["my_method"] = mine[section]["methods"][like]
    found, skipped = changes.apply(mine, yaml_files.read_yaml(PROFILES / f"{profile}.yaml"))
    assert skipped == []
    found["density"] = wanted["density"]  # which trains on no data set
    assert found == wanted
    assert found["datasets"] == {} and found["experiments"] == {}


@pytest.mark.parametrize("profile", [{"only": {"environments": []}}, {"environments": {"mine": None}}])
def test_a_profile_without_an_environment_does_not_plan_in_it(profile: dict[str, Any]) -> None:
    base = {"environments": {"mine": {"kind": "maze"}}, "plans": {"mine": {"rewards": ["loop"]}}}
    found, skipped = changes.apply(base, profile)
    assert found == {"environments": {}, "plans": {}}
    assert skipped == []


@pytest.mark.parametrize("only", [None, ["datasets"], {"datasets": None}, {"datasets": "moons"}, {"methods": []}])
def test_a_selection_of_no_entries_is_a_sentence(only: object) -> None:
    with pytest.raises(UserError, match=r"the profile's only is .*; expected lists of names under datasets, "):
        changes.apply({"datasets": {"moons": {"kind": "moons"}}}, {"only": only})


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
@pytest.mark.parametrize(
    "key",
    [
        *("datasets.moons", "datasets.digits", "environments.maze_loop", "environments.spiral"),
        *("experiments.sde_vs_ode", "density.methods.cfm", "successor.methods.mc_cfm", "successor.methods.oracle"),
    ],
)
def test_every_profile_is_valid_without_any_one_entry_of_params_yaml(key: str, profile: str) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    here = raw
    *parents, last = key.split(".")
    for part in parents:
        here = here[part]
    del here[last]
    merged, _ = changes.apply(raw, yaml_files.read_yaml(PROFILES / f"{profile}.yaml"))
    assert params.parse(merged, Path("params.yaml")).profile == profile


def test_a_profile_may_leave_out_data_sets_whose_files_are_missing(tmp_path: Path) -> None:
    """And only these: a mistake in params.yaml remains one."""
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw |= {
        "mirror": "copies",
        "datasets": {"hepmass": {"kind": "hepmass"}, "moons": {"kind": "moons"}, "no": {"kind": 3}},
    }
    (tmp_path / "copies").mkdir()
    write(tmp_path, "params.yaml", yaml.safe_dump(raw))
    for name, skip in (("some", "true"), ("all", "false")):
        write(tmp_path, f"pipelines/config/profiles/{name}.yaml", f"profile: {name}\nskip_missing: {skip}\n")
    found, left_out = workspace.parameters(tmp_path, "some")
    assert list(found["datasets"]) == ["moons", "no"] and "skip_missing" not in found
    assert len(left_out) == 1 and left_out[0].startswith("hepmass is left out: ")
    assert f"{tmp_path / 'copies' / 'maf' / 'hepmass_head.npz'} is missing" in left_out[0]
    found, left_out = workspace.parameters(tmp_path, "all")
    assert list(found["datasets"]) == ["hepmass", "moons", "no"] and left_out == []
    (tmp_path / "copies").rmdir()
    with pytest.raises(UserError, match=r"^params.yaml: mirror is 'copies', which is no folder; expected a folder"):
        workspace.parameters(tmp_path, "some")
