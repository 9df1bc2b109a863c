"""The layout of `data/`: every path is its own, is found again, and is the one that dvc.yaml names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.base import layout

ROOT = Path(__file__).parents[2]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SETS, METHODS, SEEDS = ("moons", "spiral"), ("cfm", "td2_cfm"), (0, 3, 12)


def paths() -> Iterator[tuple[str, Path]]:
    """Every path of two sets of data with two methods, and of two experiments, by the function that makes it."""
    for name in SETS:
        folders = {function: getattr(layout, function)(name) for function in ("prepared", "collected", "evaluations")}
        yield from folders.items()
        for part in layout.PARTS:
            yield "part", layout.part(folders["prepared"], part)
        for function in ("transitions", "rollouts", "evaluation", "counterfactual", "film", "neighbours"):
            yield function, getattr(layout, function)(folders["collected"])
        yield "marginals", layout.marginals(folders["prepared"])
        for folder in (folders["prepared"], folders["collected"]):
            yield "provenance", layout.provenance(folder)
        for function in ("cells", "truth", "log_prob"):
            yield function, getattr(layout, function)(folders["evaluations"])
        samples, result = layout.samples(name), layout.experiment(name)
        yield from (("samples", samples), ("experiment", result), ("value_map", layout.value_map(samples)))
        yield from (("metrics", layout.metrics(name)), ("findings", layout.findings(name)))
        yield "source", layout.source(name)
        plans = layout.plans(name)
        yield from (("plans", plans), ("episodes", layout.episodes(plans)), ("paths", layout.paths(plans)))
        yield "planned", layout.planned(name)
        for function in ("results", "figure", "summary"):
            yield function, getattr(layout, function)(result)
        for method in METHODS:
            models = layout.models(name, method)
            yield "models", models
            yield from (("network", layout.network(models, seed)) for seed in SEEDS)
            yield from (("skipped", layout.skipped(models)), ("closed_form", layout.closed_form(models)))
            yield from (("curve", layout.curve(name, method)), ("final_losses", layout.final_losses(name, method)))
            for function in ("sampled", "trajectory", "field"):
                yield function, getattr(layout, function)(samples, method)
    for kind in ("csv", "md", "json"):
        yield "table", layout.table(layout.TABLES, "claims", kind)
    yield from (("page", layout.page(layout.REPORT)), ("figures", layout.figures(layout.REPORT)))


def test_every_function_of_the_layout_is_looked_at() -> None:
    own = {
        name for name, found in inspect.getmembers(layout, inspect.isfunction) if found.__module__ == layout.__name__
    }
    assert {name for name, _ in paths()} == own - {"networks", "actor", "actor_provenance"}


def test_stored_policies_lie_beside_the_code_that_makes_them() -> None:
    found = {function(name) for function in (layout.actor, layout.actor_provenance) for name in ("a_run", "b_walk")}
    assert len(found) == 4
    assert {path.parent for path in found} == {ROOT / "pipelines" / "policies"}


def test_paths_are_different_and_below_the_folder_of_data() -> None:
    found = [path for _, path in paths()]
    assert len(set(found)) == len(found)
    for path in found:
        assert path.is_relative_to(layout.DATA), path
        assert not path.is_relative_to(layout.RAW), path  # which no stage writes


def test_networks_are_found_by_their_seeds(tmp_path: Path) -> None:
    folder = tmp_path / layout.models("spiral", "td2_cfm")
    folder.mkdir(parents=True)
    assert layout.networks(folder) == {}
    for file in (*(layout.network(folder, seed) for seed in SEEDS), layout.skipped(folder), layout.closed_form(folder)):
        file.touch()
    assert layout.networks(folder) == {seed: layout.network(folder, seed) for seed in SEEDS}


# ---- dvc.yaml ----


def named(entries: list[Any]) -> set[Path]:
    """The paths below `data/` of a list in dvc.yaml, with names in place of `${item.…}`."""
    names = {"dataset": "moons", "environment": "spiral", "method": "cfm", "experiment": "sde_vs_ode"}
    texts = [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]
    found = {Path(re.sub(r"\$\{item\.(\w+)\}", lambda match: names[match[1]], text)) for text in texts}
    return {path for path in found if path.is_relative_to(layout.DATA)}


def trained(name: str) -> set[Path]:
    return {layout.models(name, "cfm"), layout.curve(name, "cfm"), layout.final_losses(name, "cfm")}


def scored(name: str) -> set[Path]:
    return {layout.evaluations(name), layout.metrics(name)}


def models(name: str) -> Path:
    """The folder of all methods."""
    return layout.models(name, "cfm").parent


PREPARED, COLLECTED = layout.prepared("moons"), layout.collected("spiral")
EXPERIMENT = {layout.experiment("sde_vs_ode"), layout.findings("sde_vs_ode")}
EXPECTED: dict[str, tuple[set[Path], set[Path]]] = {
    "sources": (set(), {layout.SOURCES}),
    "prepare": ({layout.source("moons")}, {PREPARED}),
    "collect": ({layout.source("spiral")}, {COLLECTED}),
    "train_density": ({PREPARED}, trained("moons")),
    "train_successor": ({COLLECTED}, trained("spiral")),
    "sample_density": ({PREPARED, models("moons")}, {layout.samples("moons")}),
    "sample_successor": ({COLLECTED, models("spiral")}, {layout.samples("spiral")}),
    "evaluate_density": ({PREPARED, models("moons"), layout.samples("moons")}, scored("moons")),
    "evaluate_successor": ({COLLECTED, models("spiral"), layout.samples("spiral")}, scored("spiral")),
    "plan_successor": ({COLLECTED, models("spiral")}, {layout.plans("spiral"), layout.planned("spiral")}),
    "experiment": (set(), EXPERIMENT),
    "tables": ({layout.LOGS, layout.METRICS, layout.PREPARED, layout.TRANSITIONS}, {layout.TABLES}),
    "report": ({*layout.GATHERED, layout.TABLES}, {layout.REPORT}),
}


@pytest.mark.parametrize("stage", sorted({*STAGES, *EXPECTED}))
def test_a_stage_names_the_paths_of_the_layout(stage: str) -> None:
    written = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", []), *STAGES[stage].get("plots", [])]
    assert (named(STAGES[stage].get("deps", [])), named(written)) == EXPECTED[stage]


def test_gathered_folders_are_those_that_the_stages_of_the_whole_project_read() -> None:
    whole = [stage for stage in STAGES.values() if "matrix" not in stage]
    read, made = (set().union(*(named(stage.get(key, [])) for stage in whole)) for key in ("deps", "outs"))
    assert read - made == set(layout.GATHERED)
    assert len(set(layout.GATHERED)) == len(layout.GATHERED)
