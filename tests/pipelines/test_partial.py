"""A run in which a stage failed leaves tables and a page of the entries that are complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.base import layout
from pipelines.config import params
from pipelines.reporting import partial
from pipelines.runs.graph import Node

ROOT = Path(__file__).parents[2]
PARAMS = params.load(ROOT / "params.yaml")


def node(name: str, *deps: str, out: Path | None = None) -> Node:
    return Node(name, deps, "command", () if out is None else (out.as_posix(),), {})


def graph() -> dict[str, Node]:
    """For each entry a chain of two stages, and a training stage beside the first of them."""
    nodes = []
    for name in (*PARAMS.datasets, *PARAMS.environments):
        nodes += [node(f"make@{name}"), node(f"train@{name}", f"make@{name}")]
        nodes += [node(f"evaluate@{name}", f"make@{name}", f"train@{name}", out=layout.metrics(name))]
    nodes += [node(f"experiment@{name}", out=layout.findings(name)) for name in PARAMS.experiments]
    nodes += [node("tables", *(n.name for n in nodes))]
    return {n.name: n for n in nodes}


def test_everything_is_complete_if_only_tables_and_report_are_not() -> None:
    kept, missing = partial.complete(PARAMS, graph(), {"tables", "report"})
    assert missing == []
    assert kept == PARAMS


@pytest.mark.parametrize("stage", ["make", "train", "evaluate"])
def test_an_entry_is_missing_if_any_stage_before_its_metrics_is_not_up_to_date(stage: str) -> None:
    kept, missing = partial.complete(PARAMS, graph(), {f"{stage}@moons", f"{stage}@spiral", "tables"})
    assert missing == ["data set moons", "environment spiral"]
    assert set(kept.datasets) == set(PARAMS.datasets) - {"moons"}
    assert set(kept.environments) == set(PARAMS.environments) - {"spiral"}
    assert kept.experiments == PARAMS.experiments
    assert "moons" in PARAMS.datasets  # the parameters of the run are left as they are


def test_an_entry_that_no_stage_makes_is_missing() -> None:
    nodes = graph()
    del nodes["experiment@sde_vs_ode"]
    assert partial.complete(PARAMS, nodes, set())[1] == ["experiment sde_vs_ode"]


def test_nothing_complete_is_one_sentence_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = graph()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(partial.parameters, "load", lambda: PARAMS)
    monkeypatch.setattr(partial.graph, "compare", lambda here: (nodes, set(nodes)))
    assert partial.main("7-1.50") == 1
    said = capsys.readouterr()
    assert said.err == "partial report: no entry of params.yaml is complete, so there is no partial report.\n"
    assert said.out == "" and list(tmp_path.iterdir()) == []
