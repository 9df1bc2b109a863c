"""`python -m pipelines sample` and `score`: rows from a trained model, and the scores of a file's rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines.base.errors import UserError
from pipelines.config.params import NetworkChoice
from pipelines.models import build, registry, saved
from pipelines.models.tables import DensityModel
from pipelines.orchestration.__main__ import main, parser

META: dict[str, Any] = {
    "path": {"name": "cond_ot"},
    "prediction": "velocity",
    "columns": ["length", "year"],
    "types": {"length": "float", "year": "integer", "species": "text", "mass": "float"},
    "discrete": {"year": {"how": "uniform", "low": 2007, "levels": None}},
    "constants": {"island": "Dream"},
    "conditions": [
        {"name": "species", "kind": "words", "levels": ["Adelie", "Gentoo"]},
        {"name": "mass", "kind": "number", "loc": 4000.0, "scale": 800.0, "low": 2700.0, "high": 6300.0},
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with two untrained networks, from which a user works."""
    monkeypatch.chdir(tmp_path)
    config = build.network_config(NetworkChoice.model_validate({"name": "mlp", "hidden": [8]}), 2, 3)
    for seed in (0, 3):
        torch.manual_seed(seed)
        units = torch.tensor([44.0, 2008.0]).double(), torch.tensor([5.0, 0.8]).double()
        meta = {**META, "network": config, "seed": seed}
        saved.save(tmp_path / "cfm" / f"seed{seed}.safetensors", build.network(config), *units, meta)
    return "cfm"


WHERE = ["--where", "species=Gentoo", "mass=5000"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_samples_are_a_table_as_the_user_knows_it(folder: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("new") / f"rows.{kind}"
    assert main(["sample", folder, "--n", "7", *WHERE, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote 7 rows to {out}\n"
    assert "DensityModel(p(length, year | species, mass))" in said.err
    table = pd.read_parquet(out) if kind == "parquet" else pd.read_csv(out, sep="\t" if kind == "tsv" else ",")
    assert list(table) == ["length", "year", "species", "mass", "island"]
    assert table["year"].dtype == np.int64
    assert set(table["species"]) == {"Gentoo"}
    model = registry.load(folder)
    assert isinstance(model, DensityModel)
    same = model.sample(7, {"species": "Gentoo", "mass": 5000.0}, torch.Generator().manual_seed(0))
    pd.testing.assert_frame_equal(table, same, check_exact=kind == "parquet", check_dtype=False)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def test_samples_are_printed_and_repeat_with_the_seed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*more: str) -> pd.DataFrame:
        assert main(["sample", folder, "--n", "4", *WHERE, *more]) == 0
        return pd.read_csv(io.StringIO(capsys.readouterr().out))

    first = printed()
    assert len(first) == 4
    assert first.equals(printed("--seed", "0"))
    assert not first.equals(printed("--seed", "1"))
    assert not first.equals(printed("--network", "3"))


def test_scores_are_those_of_the_model_with_their_error(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", folder, "--n", "30", *WHERE, "--out", "rows.csv"]) == 0
    rows = pd.read_csv("rows.csv").assign(other="words")
    rows.loc[3, "length"], rows.loc[5, "species"] = np.nan, "Emu"
    rows.to_csv("rows.csv", index=False)
    capsys.readouterr()
    assert main(["score", folder, "rows.csv", "--out", "nll.parquet"]) == 0
    said = capsys.readouterr()
    scored = pd.read_parquet("nll.parquet")
    used = ["length", "year", "species", "mass"]
    assert list(scored) == [*used, "nll"]
    pd.testing.assert_frame_equal(scored[used], rows[used], check_dtype=False)
    assert scored.index[scored["nll"].isna()].tolist() == [3, 5]
    mean, error = scored["nll"].mean(), scored["nll"].std() / 28**0.5
    assert f"NLL {mean:.4f} ± {error:.4f} nats (mean ± standard error) of 28 rows" in said.out
    assert "without a score: 1 rows, in which 'length' is missing" in said.err
    assert "without a score: 1 rows, in which 'species' is 'Emu', which training never saw" in said.err
    model = registry.load(folder, solver="dopri5")
    assert isinstance(model, DensityModel)
    assert np.allclose(model.log_prob(rows), -scored["nll"], atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "{}", "--where", "species=Gento", "mass=5000"], "'Gento', which training never saw; .*'Gentoo'"),
        (["sample", "{}", "--where", "specie=Gentoo", "mass=1"], "no condition 'specie'.*did you mean 'species'"),
        (["sample", "{}", "--where", "species=Gentoo"], "the condition 'mass' is not given"),
        (["sample", "{}", "--where", "species=Gentoo", "mass=heavy"], "the condition 'mass' is 'heavy', expected a"),
        (["sample", "{}", "--where", "Gentoo"], "--where was given 'Gentoo', expected NAME=VALUE"),
        (["sample", "{}", *WHERE, "--where", "mass=1"], "--where was given 'mass' twice"),
        (["sample", "{}", *WHERE, "--network", "1"], "has no seed 1, only 0, 3"),
        (["sample", "{}", *WHERE, "--device", "gpu"], "gpu"),
        (["score", "{}", "away.csv"], "away.csv"),
        (["score", "{}", "other.csv"], "needs the column 'length', of which other.csv has no such column, only a, b"),
        (["score", "{}", "empty.csv"], "empty.csv"),
        (["score", "{}", "lacking.csv"], "lacking.csv has no row with a score: in the first one, 'length' is missing"),
        (["score", "{}", "table.xlsx"], "table.xlsx"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    folder: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    Path("other.csv").write_text("a,b\n1,2\n")
    Path("empty.csv").write_text("")
    Path("lacking.csv").write_text("length,year,species,mass\n,2007,Gentoo,4000\n")
    Path("table.xlsx").write_text("x")
    assert main([folder if word == "{}" else word for word in arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    with pytest.raises(UserError, match=sentence):
        raise UserError(last)


def test_a_number_outside_the_range_of_training_is_a_warning(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", folder, "--n", "2", "--where", "species=Gentoo", "mass=9000"]) == 0
    assert "outside the range of training, 2700 to 6300" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "x", "--n", "0"], "0 is not at least 1"),
        (["sample", "x", "--out", "new.xlsx"], "'new.xlsx' should end in .csv, .tsv or .parquet"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
