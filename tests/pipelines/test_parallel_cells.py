"""Models that are sampled and scored in parallel processes give the bytes of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.base import layout
from pipelines.config import params, yaml_files
from pipelines.evaluation import cells
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import (
    collect,
    evaluate_density,
    evaluate_successor,
    prepare,
    sample_density,
    sample_successor,
    train_density,
    train_successor,
)

ROOT = Path(__file__).parents[2]
CHANGES = {
    "density": {"seeds": [0, 1], "fit": {"steps": 5, "network": {"hidden": [8]}}, "sample": {"samples": 50}},
    "successor": {
        "seeds": [3, 0], "fit": {"steps": 5, "network": {"hidden": [8]}}, "sample": {"samples": 40, "steps": 4},
        "evaluate": {"likelihood_rows": 4, "steps": 4, "solver_steps": {"spiral": [2]}},
    },
}  # fmt: skip


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage of a project with two trained methods on the moons, and two and the closed form on the spiral."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_CORES", "1")
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw = yaml_files.merge(raw, yaml_files.read_yaml(ROOT / "pipelines/config/profiles/smoke.yaml"))
    raw = yaml_files.merge(raw, CHANGES) | {"device": "cpu"}
    raw["environments"]["spiral"] |= {"methods": ["td_cfm", "td2_cfm", "oracle"], "seeds": None}
    raw["datasets"]["moons"] |= {"methods": ["cfm"], "seeds": [3, 8], "evaluate": {"steps": 8}}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    made = Stage("test", params.load(), RunRecord.start("test", {}))
    prepare.main(made, "moons")
    collect.main(made, "spiral")
    for method in made.params.density.methods:
        train_density.main(made, "moons", method)
    for method in made.params.successor.methods:
        train_successor.main(made, "spiral", method)
    return made


def results(stage: Stage) -> dict[Path, bytes]:
    for step in (sample_density, evaluate_density):
        step.main(stage, "moons")
    for step in (sample_successor, evaluate_successor):
        step.main(stage, "spiral")
    folders = (layout.SAMPLES, layout.EVALUATIONS, layout.METRICS)
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_parallel_processes_give_the_bytes_of_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = results(stage)
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.setenv("FLOWMATCH_CORES", "2")
    monkeypatch.setattr(cells, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(cells.Cell, "__str__", lambda cell: "worked on in this process")
    assert results(stage) == alone
    parallel = capsys.readouterr().out.splitlines()
    assert sorted(parallel) == sorted(lines)  # also what a process of its own says, which has another name for a cell
    assert any("oracle seed 0: EMD" in line for line in parallel)
    assert {"td_cfm.path.parquet", "value_map.parquet", "cfm.field.parquet", "cells.parquet"} <= {p.name for p in alone}
