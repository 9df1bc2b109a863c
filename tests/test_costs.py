"""What a change costs: which stages DVC runs again after an edit, by `dvc status` on a project that is up to date."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import params
from pipelines.runs import graph, sources

ROOT = Path(__file__).parents[1]
DATASETS = ("moons", "eight_gaussians", "checkerboard", "digits", "penguins")
ENVIRONMENTS = ("maze_loop", "spiral")
DENSITIES, SUCCESSORS = (
    ("cfm", "ot_cfm", "gaussian_mixture"),
    ("mc_cfm", "td_cfm", "td_cfm_coupled", "td2_cfm", "oracle"),
)
RESULTS = {"tables", "report"}


def of(stage: str, *parts: Iterable[str]) -> set[str]:
    """The stages of a template: `of("collect", ENVIRONMENTS)`."""
    names = [""]
    for part in parts:
        names = [f"{name}-{key}" if name else key for name in names for key in part]
    return {f"{stage}@{name}" for name in names}


PREPARE, COLLECT = of("prepare", DATASETS), of("collect", ENVIRONMENTS)
TRAIN_DENSITY, TRAIN_SUCCESSOR = (
    of("train_density", DATASETS, DENSITIES),
    of("train_successor", ENVIRONMENTS, SUCCESSORS),
)
SAMPLE_DENSITY, SAMPLE_SUCCESSOR = of("sample_density", DATASETS), of("sample_successor", ENVIRONMENTS)
EVALUATE_DENSITY, EVALUATE_SUCCESSOR = of("evaluate_density", DATASETS), of("evaluate_successor", ENVIRONMENTS)
EXPERIMENTS = of("experiment", ("sde_vs_ode", "memoryless_chain"))
DENSITY = TRAIN_DENSITY | SAMPLE_DENSITY | EVALUATE_DENSITY
SUCCESSOR = TRAIN_SUCCESSOR | SAMPLE_SUCCESSOR | EVALUATE_SUCCESSOR
EVERYTHING = PREPARE | COLLECT | DENSITY | SUCCESSOR | EXPERIMENTS | RESULTS

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which DVC holds every stage for up to date, with empty files as outputs."""
    copy = tmp_path_factory.mktemp("costs") / "flowmatch"
    for name in ("pipelines", "flowmatch_core"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "data" / "raw", copy / "data" / "raw")
    run(copy, "init", "--no-scm", "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMATCH_HOME", str(copy / ".flowmatch"))
        sources.refresh(copy, params.load(copy / "params.yaml"))
    for out in (out for node in graph.load(copy).values() for out in node.outs if not (copy / out).exists()):
        (copy / out).parent.mkdir(parents=True, exist_ok=True)
        (copy / out).touch()
    run(copy, "commit", "--force", "-q")
    assert graph.dirty(copy) == set()
    return copy


def run(folder: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def text(name: str, old: str = '"""', new: str = '"""Edited. ') -> Edit:
    """Change the first occurrence of some words in a file: by default the beginning of its docstring."""

    def edit(folder: Path) -> None:
        path = folder / name
        before = path.read_text()
        assert old in before, name
        path.write_text(before.replace(old, new, 1))

    return edit


def parameter(key: str, value: Any) -> Edit:
    """Set a key of params.yaml."""

    def edit(folder: Path) -> None:
        path = folder / "params.yaml"
        raw = yaml.safe_load(path.read_text())
        *parents, last = key.split(".")
        here = raw
        for part in parents:
            here = here[part]
        here[last] = value
        path.write_text(yaml.safe_dump(raw, sort_keys=False))

    return edit


TABLE: dict[str, tuple[Edit, set[str]]] = {
    "a docstring of flowmatch_core/discrete": (text("flowmatch_core/discrete/flow.py"), set()),
    "a docstring of flowmatch_core/normalizing": (text("flowmatch_core/normalizing/maf.py"), DENSITY),
    "the version": (text("flowmatch_core/__init__.py", "__version__ = ", "__version__ = 'x' + "), set()),
    "the tracker": (text("pipelines/runs/tracking.py"), set()),
    "the orchestration": (text("pipelines/orchestration/prefect.py"), set()),
    "a profile": (text("pipelines/config/profiles/paper.yaml", "#", "# Edited."), set()),
    "the README": (text("README.md", "flowmatch", "flowmatch (edited)"), set()),
    "a table's code": (text("pipelines/reporting/tables/claims.py"), RESULTS),
    "successor.evaluate": (parameter("successor.evaluate.likelihood_rows", 7), EVALUATE_SUCCESSOR | RESULTS),
    "density.evaluate": (parameter("density.evaluate.rows", 7), EVALUATE_DENSITY | RESULTS),
    "successor.sample": (
        parameter("successor.sample.samples", 7),
        SAMPLE_SUCCESSOR | EVALUATE_SUCCESSOR | RESULTS,
    ),
    "a new successor method": (
        parameter("successor.methods.mine", {"loss": "td2_cfm"}),
        of("train_successor", ENVIRONMENTS, ["mine"]) | SAMPLE_SUCCESSOR | EVALUATE_SUCCESSOR | RESULTS,
    ),
    "a new density method": (
        parameter("density.methods.mine", {"path": "cosine", "coupling": "independent", "loss": "cfm"}),
        of("train_density", DATASETS, ["mine"]) | SAMPLE_DENSITY | EVALUATE_DENSITY | RESULTS,
    ),
    "a new data set": (
        parameter("datasets.mine", {"kind": "moons", "noise": 0.1}),
        {"sources", "prepare@mine", "sample_density@mine", "evaluate_density@mine"}
        | of("train_density", ["mine"], DENSITIES)
        | RESULTS,
    ),
    "successor.fit": (parameter("successor.fit.steps", 7), TRAIN_SUCCESSOR | RESULTS),
    "seeds of a method": (
        parameter("successor.methods.td_cfm.seeds", [0, 7]),
        of("train_successor", ENVIRONMENTS, ["td_cfm"]) | SAMPLE_SUCCESSOR | EVALUATE_SUCCESSOR | RESULTS,
    ),
    "seeds of an environment": (
        parameter("environments.spiral.seeds", [0, 7]),
        {"collect@spiral", "sample_successor@spiral", "evaluate_successor@spiral"}
        | of("train_successor", ["spiral"], SUCCESSORS)
        | RESULTS,
    ),
    "a TD loss": (text("flowmatch_core/successor/losses/td2_cfm.py"), SUCCESSOR | EXPERIMENTS),
    "an objective": (text("flowmatch_core/objectives/cfm.py"), DENSITY | EXPERIMENTS),
    "a metric": (text("flowmatch_core/metrics.py"), EVALUATE_DENSITY | EVALUATE_SUCCESSOR | EXPERIMENTS),
    "a data set's code": (text("pipelines/datasets/moons.py"), PREPARE | EVALUATE_DENSITY | EXPERIMENTS),
    "an environment's code": (
        text("pipelines/environments/maze.py"),
        COLLECT | SUCCESSOR,  # the policies of a family are asked in training
    ),
    "the training loop": (text("pipelines/training/loop.py"), TRAIN_DENSITY | TRAIN_SUCCESSOR),
    "the base seed": (parameter("seed", 7), EVERYTHING - {"tables"}),
}


@pytest.mark.parametrize("edit", list(TABLE))
def test_an_edit_runs_these_stages_again(project: Path, edit: str) -> None:
    change, stages = TABLE[edit]
    before = {path: path.read_bytes() for path in project.rglob("*") if path.suffix in (".py", ".yaml", ".md")}
    try:
        change(project)
        assert graph.dirty(project) == stages
    finally:
        for path, content in before.items():
            if path.read_bytes() != content:
                path.write_bytes(content)
