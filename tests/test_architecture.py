"""The rules of imports between rooms, and that DVC knows every file that a stage is made of."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from pipelines.config import catalog

ROOT = Path(__file__).parents[1]
FILES = sorted(p for folder in ("flowmatch_core", "pipelines") for p in (ROOT / folder).rglob("*.py"))
STAGES = sorted(p.stem for p in (ROOT / "pipelines" / "stages").glob("*.py") if not p.stem.startswith("_"))
CACHED = [stage for stage in STAGES if stage != "sources"]
"""Stages whose results DVC keeps for unchanged dependencies; `sources` runs every time and has none."""

ROOMS: dict[str, set[str]] = {
    "base": set(),
    "config": {"base"},
    "datasets": {"base"},
    "environments": {"base"},
    "policies": {"base", "environments"},
    "runs": {"base", "config"},
    "data": {"base", "config", "datasets", "environments", "runs"},
    "models": {"base", "config", "runs"},
    "training": {"base", "config", "data", "models", "runs"},
    "evaluation": {"base", "config", "datasets", "environments", "models", "runs"},
    "planning": {"base", "config", "environments", "evaluation", "models", "runs"},
    "reporting": {"base", "config", "runs"},
    "experiments": {"base", "datasets", "reporting", "runs"},
    "orchestration": {"base", "config", "datasets", "environments", "evaluation", "models", "runs"},
    "stages": {"base", "config", "data", "evaluation", "experiments", "planning", "reporting", "runs", "training"},
}
"""Which rooms of `pipelines` each room may import: always rooms above it in this table."""

WITHOUT_CORE = {"base", "config", "runs", "stages"}
"""Rooms that do not import `flowmatch_core`."""

WITHOUT_RESULT = (
    *("pipelines.base.errors", "pipelines.config.messages", "flowmatch_core._require"),
    *("pipelines.runs.records", "pipelines.runs.live", "pipelines.runs.snapshots", "pipelines.runs.tracking"),
    *("pipelines.runs.graph", "pipelines.runs.inputs", "pipelines.runs.watchdog", "pipelines.runs.usage"),
    *("pipelines.runs.storage", "flowmatch_core"),
    *("pipelines.base.extras", "pipelines.reporting", "pipelines.runs"),
)
"""Modules that cannot change what a stage writes: sentences, records, the tracker, lists of names."""

PLUGINS = {
    "pipelines.datasets": "pipelines/datasets",
    "pipelines.environments": "pipelines/environments",
    "pipelines.experiments": "pipelines/experiments",
    "pipelines.reporting.tables": "pipelines/reporting/tables",
}
"""Packages that load their files by name."""

ROWS = {
    "pipelines.models.build": (catalog.PATHS, catalog.COUPLINGS, catalog.GRIDS, catalog.NETWORKS),
    "pipelines.models.density": (catalog.OBJECTIVES, catalog.NORMALIZING),
    "pipelines.training.density": (catalog.CLOSED_FORMS,),
    "pipelines.models.successor": (catalog.DISCOUNTS, catalog.SUCCESSOR_LOSSES),
}
"""Modules that load the rows of these tables of the catalog."""


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Everything that a file imports, at its top or in a function."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
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


def room(module: str) -> str | None:
    """The room of a module of `pipelines`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipelines" and parts[1:] not in ([], ["__main__"]) else None


def users(*packages: str) -> set[str]:
    return {name(path) for path in FILES if any(is_in(m, p) for m in imported(path) for p in packages)}


def closure(stage: str) -> set[Path]:
    """The project's files that a stage can run: what it imports, and what that loads by name."""
    found: set[Path] = set()
    waiting = [ROOT / "pipelines" / "stages" / f"{stage}.py"]
    while waiting:
        path = waiting.pop()
        here = name(path)
        if path in found or here in WITHOUT_RESULT:
            continue
        found.add(path)
        waiting += [file for module in imported(path) if (file := module_file(module))]
        packages = [here.rpartition(".")[0]]
        waiting += [file for package in packages if (file := module_file(package)) and package != "pipelines"]
        if here in PLUGINS:
            waiting += (ROOT / PLUGINS[here]).rglob("*.py")
        for table in ROWS.get(here, ()):
            waiting += [file for spec in table.values() if (file := module_file(spec.module))]
    return found


def test_every_room_imports_only_rooms_above_it() -> None:
    order = list(ROOMS)
    assert all(order.index(above) < order.index(here) for here, allowed in ROOMS.items() for above in allowed)
    for path in FILES:
        here = room(name(path))
        if here is None:
            continue
        assert here in ROOMS, f"{path} stands in no room"
        for module in imported(path):
            there = room(module)
            assert there in (None, here) or there in ROOMS[here], f"{name(path)} imports {module}"
            if here in WITHOUT_CORE:
                assert not is_in(module, "flowmatch_core"), f"{name(path)} imports {module}"


def test_every_file_of_the_pipeline_stands_in_a_room() -> None:
    outside = [p.name for p in (ROOT / "pipelines").iterdir() if p.is_file() and p.name != "__init__.py"]
    assert outside == ["__main__.py"]  # the door to orchestration


def test_reporting_uses_intervals_alone_of_the_library() -> None:
    for path in FILES:
        if room(name(path)) == "reporting":
            core = {m for m in imported(path) if is_in(m, "flowmatch_core")}
            assert core <= {"flowmatch_core.intervals"}, path


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
    mlflow = ("champions", "flavour", "store", "tracking", "versions")
    assert users("mlflow") == {f"pipelines.runs.{module}" for module in mlflow}
    assert users("prefect") == {"pipelines.orchestration.prefect"}
    assert users("dvc") == {"pipelines.runs.graph", "pipelines.runs.storage", "pipelines.orchestration.workspace"}
    assert users("matplotlib") <= {m for m in map(name, FILES) if room(m) in ("reporting", "experiments")}


def test_only_the_catalog_and_the_plugins_import_by_name() -> None:
    assert users("importlib") == {
        "flowmatch_core",  # public names on first use
        "flowmatch_core._require",  # dependencies on first use
        "pipelines.base.extras",  # is it installed?
        "pipelines.base.plugins",
        "pipelines.config.catalog",
        "pipelines.environments._entry_point",  # a user's policy
        "pipelines.environments._suite",  # is it installed?
        "pipelines.environments.gymnasium",  # is it installed?
        "pipelines.policies.train",  # is it installed, and its version
        "pipelines.runs.store",  # is it installed?
        "pipelines.reporting.facts",  # versions of packages
        "pipelines.orchestration.clusters",  # is it installed?
    }


def test_behaviour_is_not_chosen_by_looking_at_code() -> None:
    """Signatures and source text are data of the catalog; the one signature read is that of a stage, its options."""
    assert users("ast", "tokenize") == set()
    assert {user for user in users("inspect") if is_in(user, "pipelines")} == {"pipelines.stages._main"}
    for path in FILES:
        if is_in(name(path), "pipelines") and name(path) != "pipelines.stages._main":
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert "vars" not in {f.id for f in calls if isinstance(f, ast.Name)}, path


def test_one_place_spells_the_paths_below_data() -> None:
    words = {"provenance.json", "skipped.json", "index.html", "oracle.json"}
    endings = (".parquet", ".safetensors")
    for path in FILES:
        if name(path) == "pipelines.base.layout" or not is_in(name(path), "pipelines"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                assert node.value not in words, f"{path} spells {node.value!r}"
                module = node.value == "pyarrow.parquet"
                assert module or not node.value.endswith(endings), f"{path} spells {node.value!r}"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                parts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert "data" not in parts, f"{path} spells a path below data/"


def test_stage_files_are_doors() -> None:
    for stage in STAGES:
        path = ROOT / "pipelines" / "stages" / f"{stage}.py"
        assert len(path.read_text().splitlines()) <= 20, path


def test_stages_do_not_know_each_other_and_nobody_imports_one() -> None:
    for path in FILES:
        stages = {m for m in imported(path) if is_in(m, "pipelines.stages")}
        assert stages <= ({"pipelines.stages._main"} if room(name(path)) == "stages" else set()), path


def test_nothing_imports_tests_or_loads_what_can_execute() -> None:
    assert users("tests", "benchmarks", "peers", "pickle", "joblib", "dill", "cloudpickle", "shelve") == set()
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path
        assert "allow_pickle=True" not in text, path


def test_params_yaml_has_one_reader() -> None:
    assert users("yaml") <= {
        "pipelines.config.yaml_files",
        "pipelines.reporting.report",  # writes
        "pipelines.orchestration.workspace",  # writes
        "pipelines.runs.snapshots",  # reads dvc.lock
    }


@pytest.mark.parametrize("stage", CACHED)
def test_dvc_knows_every_file_that_a_stage_is_made_of(stage: str) -> None:
    template = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    listed = [ROOT / dep for dep in template["deps"]]
    for path in closure(stage):
        known = any(path == dep or dep in path.parents for dep in listed)
        parent_only = path.name == "__init__.py" and path.read_text() == ""
        assert known or parent_only, f"{path.relative_to(ROOT)} is not among the deps of {stage} in dvc.yaml"


@pytest.mark.parametrize("stage", CACHED)
def test_dvc_lists_no_file_that_a_stage_is_not_made_of(stage: str) -> None:
    template = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    files = closure(stage)
    for dep in template["deps"]:
        path = ROOT / dep
        if dep.startswith(("flowmatch_core", "pipelines")):
            assert any(file == path or path in file.parents for file in files), f"{stage} does not use {dep}"


@pytest.mark.parametrize("stage", CACHED)
def test_no_stage_depends_on_closed_rooms_or_on_what_has_no_result(stage: str) -> None:
    template = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    for dep in template["deps"]:
        closed_rooms = ["flowmatch_core/discrete", "pipelines/runs/tracking.py"]
        if not stage.endswith("_density"):  # methods of densities may name a normalizing flow
            closed_rooms.append("flowmatch_core/normalizing")
        for closed in closed_rooms:
            assert not (ROOT / closed).is_relative_to(ROOT / dep), f"{stage} depends on {closed} by {dep}"


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
