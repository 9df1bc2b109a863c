"""The stages of each profile, by name: a change of the grid is seen here before it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import params
from pipelines.orchestration import workspace
from pipelines.runs import graph

ROOT = Path(__file__).parents[1]


def expected(loaded: params.Params) -> set[str]:
    density = [f"{d}-{m}" for d, entry in loaded.datasets.items() for m in loaded.density.methods if entry.runs(m)]
    successor = [
        f"{e}-{m}" for e, entry in loaded.environments.items() for m in loaded.successor.methods if entry.runs(m)
    ]
    return {
        "sources",
        *(f"{stage}@{d}" for stage in ("prepare", "sample_density", "evaluate_density") for d in loaded.datasets),
        *(f"{s}@{e}" for s in ("collect", "sample_successor", "evaluate_successor") for e in loaded.environments),
        *(f"train_density@{cell}" for cell in density),
        *(f"train_successor@{cell}" for cell in successor),
        *(f"plan_successor@{e}" for e in loaded.plans),
        *(f"experiment@{e}" for e in loaded.experiments),
        "tables",
        "report",
    }


@pytest.fixture(scope="module")
def here() -> dict[str, graph.Node]:
    return graph.load(ROOT)


def test_the_default_profile_has_a_stage_for_every_cell(here: dict[str, graph.Node]) -> None:
    assert set(here) == expected(params.load(ROOT / "params.yaml"))
    assert len(here) == 51


@pytest.mark.parametrize(
    ("profile", "stages"),
    [("smoke", 22), ("paper", 167), ("td_tables", 103), ("td_planning", 11), ("density_tables", 63)],
)
def test_the_other_profiles_too(tmp_path: Path, profile: str, stages: int) -> None:
    folder = workspace.prepare(ROOT, profile)
    loaded = params.load(folder / "params.yaml")
    nodes = graph.load(folder)
    assert set(nodes) == expected(loaded)
    assert len(nodes) == stages


def test_a_stage_waits_for_what_it_reads_and_for_nothing_else(here: dict[str, graph.Node]) -> None:
    deps = {name: set(node.deps) for name, node in here.items()}
    assert deps["sources"] == set()
    assert deps["prepare@moons"] == deps["collect@spiral"] == {"sources"}
    assert deps["train_density@moons-cfm"] == {"prepare@moons"}
    assert deps["train_successor@spiral-td2_cfm"] == {"collect@spiral"}
    methods = ("mc_cfm", "td_cfm", "td_cfm_coupled", "td2_cfm", "oracle")
    trained = {f"train_successor@spiral-{m}" for m in methods}
    assert deps["sample_successor@spiral"] == {"collect@spiral", *trained}
    assert deps["evaluate_successor@spiral"] == {"collect@spiral", "sample_successor@spiral", *trained}
    assert {f"evaluate_density@{d}" for d in ("moons", "digits")} < deps["tables"]
    assert deps["experiment@sde_vs_ode"] == set()
    assert {f"experiment@{e}" for e in ("sde_vs_ode", "memoryless_chain")} < deps["tables"]
    assert "tables" in deps["report"]


def test_data_sets_and_environments_do_not_wait_for_each_other(here: dict[str, graph.Node]) -> None:
    def above(name: str) -> set[str]:
        return {name}.union(*(above(dep) for dep in here[name].deps))

    assert above("evaluate_density@moons") & above("evaluate_successor@spiral") == {"sources"}
    assert above("evaluate_successor@maze_loop") & above("evaluate_successor@spiral") == {"sources"}
