"""The rule of dependencies: who may import whom, and that DVC knows every file that a stage is made of."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("flowmatch_core", "pipelines") for p in (ROOT / folder).rglob("*.py"))
STAGES = sorted(p.stem for p in (ROOT / "pipelines" / "stages").glob("*.py") if p.stem != "__init__")

# Modules that cannot change what a stage writes: sentences, records for a tracker, and the tracker itself.
WITHOUT_RESULT = ("pipelines.errors", "pipelines.records", "pipelines.orchestration")


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Everything that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if module_file(inner) else node.module


def module_file(module: str) -> Path | None:
    """The project's file of a module."""
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def users(*packages: str) -> set[str]:
    return {name(path) for path in FILES if any(is_in(m, p) for m in imported(path) for p in packages)}


def families(path: Path) -> Iterator[str]:
    """Packages whose members a file looks up by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            file = module_file(node.value) if "." in node.value else None
            if file is not None and file.name == "__init__.py":
                yield node.value


def closure(stage: str) -> set[Path]:
    """The project's files that a stage can run: what it imports, and all members of what it looks up by name."""
    found: set[Path] = set()
    waiting = [ROOT / "pipelines" / "stages" / f"{stage}.py"]
    while waiting:
        path = waiting.pop()
        if path in found or any(is_in(name(path), module) for module in WITHOUT_RESULT):
            continue
        found.add(path)
        waiting += [file for module in imported(path) if (file := module_file(module))]
        if name(path) != "pipelines.params":  # it knows the families' names only to check a spelling
            waiting += [p for family in families(path) for p in (ROOT / family.replace(".", "/")).rglob("*.py")]
    return found


def test_the_mathematics_knows_nothing_of_the_pipeline() -> None:
    allowed = {"torch", "torchdiffeq", "numpy", "scipy", "ot", "zuko", "flowmatch_core", *sys.stdlib_module_names}
    for path in FILES:
        if is_in(name(path), "flowmatch_core"):
            assert {module.split(".")[0] for module in imported(path)} <= allowed, path


def test_the_mathematics_opens_no_file_prints_nothing_and_reads_no_environment() -> None:
    for path in FILES:
        if is_in(name(path), "flowmatch_core"):
            assert not {"os", "pathlib", "subprocess", "logging"} & {m.split(".")[0] for m in imported(path)}, path
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not {"open", "print", "input"} & {f.id for f in calls if isinstance(f, ast.Name)}, path


def test_each_outer_tool_has_one_place() -> None:
    assert users("mlflow") == {"pipelines.orchestration.tracking"}
    assert users("prefect") == {"pipelines.orchestration.flow"}
    assert all(is_in(user, "pipelines.orchestration") for user in users("dvc"))


def test_stages_do_not_know_each_other_and_nobody_imports_one() -> None:
    for path in FILES:
        assert not any(is_in(module, "pipelines.stages") for module in imported(path)), path


def test_members_know_neither_stages_nor_training() -> None:
    outer = ("stages", "stage", "training", "fitting", "models", "orchestration", "params")
    for path in FILES:
        if any(is_in(name(path), f"pipelines.{family}") for family in ("datasets", "environments", "experiments")):
            assert not any(is_in(m, f"pipelines.{o}") for m in imported(path) for o in outer), path


def test_only_the_stage_context_and_the_registry_reach_the_orchestration_from_below() -> None:
    below = {user for user in users("pipelines.orchestration") if not is_in(user, "pipelines.orchestration")}
    assert below == {"pipelines.stage", "pipelines.registry"}


def test_nothing_imports_tests_or_loads_what_can_execute() -> None:
    assert users("tests", "benchmarks", "pickle", "joblib", "dill", "cloudpickle", "shelve") == set()
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path
        assert "allow_pickle=True" not in text, path


def test_params_yaml_has_one_reader() -> None:
    assert users("yaml") <= {
        "pipelines.params",
        "pipelines.stages.report",  # writes
        "pipelines.orchestration.workspace",  # writes
        "pipelines.orchestration.tracking",  # reads dvc.lock
    }


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_every_file_that_a_stage_is_made_of(stage: str) -> None:
    template = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    listed = [ROOT / dep for dep in template["deps"]]
    for path in closure(stage):
        known = any(path == dep or dep in path.parents for dep in listed)
        parent_only = path.name == "__init__.py" and path.read_text() == ""
        assert known or parent_only, f"{path.relative_to(ROOT)} is not among the deps of {stage} in dvc.yaml"


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_no_file_that_a_stage_is_not_made_of(stage: str) -> None:
    template = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    files = closure(stage)
    for dep in template["deps"]:
        path = ROOT / dep
        if dep.startswith(("flowmatch_core", "pipelines")) and dep != "pipelines/templates":
            assert any(file == path or path in file.parents for file in files), f"{stage} does not use {dep}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_light_to_import(stage: str) -> None:
    """What runs for seconds must not spend seconds on imports that it may not need."""
    tree = ast.parse((ROOT / "pipelines" / "stages" / f"{stage}.py").read_text())
    top = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not any(is_in(str(m), heavy) for m in top for heavy in ("torch", "pandas", "mlflow", "matplotlib"))
