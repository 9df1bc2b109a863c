"""Tables that packages ship, written as a user would: each is prepared as it is, or ends in one true sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.data import prepare
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
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
