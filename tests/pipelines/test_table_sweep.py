"""Tables that packages ship, written as a user would: each goes from file to report, or ends in one true sentence."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.data import prepare
from pipelines.models import registry
from pipelines.models.tables import DensityModel
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import _main
from tests.support.tables import PublicTable, tables

ROOT = Path(__file__).parents[2]
TABLES = tables()


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_public_table_is_prepared_as_it_is_or_ends_in_one_true_sentence(
    table: PublicTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / ".flowmatch"))
    frame = table.write(tmp_path)
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw["datasets"] = {"mine": {"kind": "table", "file": table.file, **table.entry}}
    loaded = params.parse(raw, Path("params.yaml"))
    stage = Stage("prepare@mine", loaded, RunRecord.start("prepare@mine", {}))
    if table.refused:
        with pytest.raises(UserError) as error:
            prepare.write(stage, "mine")
        assert all(word in str(error.value) for word in table.refused), error.value
        assert "\n" not in str(error.value)
        return
    prepare.write(stage, "mine")
    folder = layout.prepared("mine")
    provenance = files.read_json(layout.provenance(folder))
    rows = pd.concat([files.read_table(layout.part(folder, part)) for part in layout.PARTS])
    assert len(rows) == len(frame) - provenance["missing"]
    used = [*provenance["columns"], *(one["name"] for one in provenance["conditions"])]
    whole = frame[[*used, *provenance["constants"]]].dropna()
    assert len(whole) == len(rows)
    for name in provenance["columns"]:
        values = np.sort(np.floor(rows[name]) if name in provenance["discrete"] else rows[name])
        if provenance["types"][name] == "text":
            counts = np.bincount(values.astype(int))
            assert sorted(counts) == sorted(whole[name].value_counts().loc[lambda n: n > 0])
        else:
            np.testing.assert_allclose(values, np.sort(whole[name].astype(float)), rtol=1e-14)
    for name, value in provenance["constants"].items():
        assert set(whole[name]) == {value}
    assert all(message.endswith(".") for message in provenance["messages"])


SMALL = {"hidden": [32, 32], "frequencies": 4, "activation": "silu"}
METHODS = {
    "gaussian_mixture": {"loss": "gaussian_mixture"},
    "ot_cfm": {"path": "cond_ot", "coupling": "minibatch_ot", "loss": "cfm"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "table",
    [table for table in TABLES.values() if not table.refused],
    ids=[name for name, table in TABLES.items() if not table.refused],
)
def test_a_public_table_goes_from_file_to_report_and_its_models_take_its_rows(
    table: PublicTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / ".flowmatch"))
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "test")  # an orchestrator would publish
    frame = table.write(tmp_path)
    changes = {
        "datasets": {"mine": {"kind": "table", "file": table.file, **table.entry}},
        "environments": {},
        "experiments": {},
        "density": {"methods": METHODS, "seeds": [0], "fit": {"network": {"name": "mlp", **SMALL}, "steps": 100}},
    }
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw = {**raw, **changes, "density": yaml_files.merge(raw["density"], changes["density"])}
    raw["density"] |= {"methods": METHODS}
    raw["density"]["evaluate"] |= {"rows": 300, "likelihood_rows": 200, "steps": 16}
    raw["density"]["sample"] |= {"samples": 300}
    raw["successor"] |= {"evaluate": {**raw["successor"]["evaluate"], "solver_steps": {}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    for folder in layout.GATHERED:
        folder.mkdir(parents=True, exist_ok=True)
    cells = [{"dataset": "mine", "method": method} for method in METHODS]
    for stage, cell in (
        ("prepare", {"dataset": "mine"}),
        *(("train_density", cell) for cell in cells),
        ("sample_density", {"dataset": "mine"}),
        ("evaluate_density", {"dataset": "mine"}),
        ("tables", {}),
        ("report", {}),
    ):
        assert _main.guarded(importlib.import_module(f"pipelines.stages.{stage}").main, stage, cell) == 0, stage
    found = files.read_json(layout.metrics("mine"))
    assert all(math.isfinite(found[method][name]) for method in METHODS for name in ("nll_train", "nll", "emd"))
    assert "mine" in layout.page(layout.REPORT).read_text()
    for method in METHODS:
        model = registry.read(layout.models("mine", method), method)
        assert isinstance(model, DensityModel)
        given = frame.dropna().head(20)
        drawn = model.sample(1, given) if model.conditions.names else model.sample(20)
        for name in model.columns:
            assert drawn[name].notna().all()
        score = np.asarray(model.log_prob(given))
        assert np.isfinite(score).all(), (method, score)
