"""`python -m pipelines try FILE`: the profile that it makes, what it refuses, and the whole way on a small table."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines.config import params
from pipelines.orchestration import workspace
from pipelines.orchestration.__main__ import main
from pipelines.orchestration.commands import _workspace
from tests.pipelines.conftest import ROOT

PENGUINS = ROOT / "data" / "raw" / "penguins.csv"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose runs end at once, with a table."""
    root = tmp_path / "my größe"
    (root / "data" / "raw").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root)
    shutil.copy(PENGUINS, root / "data" / "raw")
    monkeypatch.chdir(root)
    monkeypatch.setattr(_workspace, "run_changed", lambda options, execute: 3)
    return root


def made(root: Path, name: str = "penguins") -> dict[str, Any]:
    """The profile of a try, after its schema has accepted it."""
    raw, skipped = workspace.parameters(root, name)
    assert skipped == []
    assert params.parse(raw, root / "params.yaml").profile == name
    return raw


def test_a_file_becomes_the_only_entry_of_a_profile(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    assert main(["try", "data/raw/penguins.csv"]) == 3
    found, base = made(root), yaml.safe_load((root / "params.yaml").read_text())
    assert list(found["datasets"]) == ["penguins"]
    assert found["environments"] == found["experiments"] == {}
    assert found["datasets"]["penguins"] == {
        "kind": "table",
        "file": "data/raw/penguins.csv",
        "missing": "drop",
        "discrete": {"flipper_length_mm": "uniform", "year": "uniform"},  # the masses are multiples of 25
    }
    assert found["density"]["methods"] == base["density"]["methods"]
    assert (root / "params.yaml").read_bytes() == before
    assert [path.name for path in (root / ".workspaces").iterdir()] == ["penguins.yaml"]


def test_options_go_into_the_profile(root: Path) -> None:
    columns = ["--columns", "bill_length_mm", "year", "sex", "--condition", "species", "--discrete", "year=steps"]
    more = ["--missing", "error", "--transform", "marginals", "--steps", "70", "--seeds", "3", "--name", "birds"]
    assert main(["try", str(root / "data/raw/penguins.csv"), *columns, *more]) == 3
    found = made(root, "birds")
    assert found["datasets"]["birds"] == {
        "kind": "table",
        "file": "data/raw/penguins.csv",
        "columns": ["bill_length_mm", "year", "sex"],
        "condition": ["species"],
        "missing": "error",
        "transform": "marginals",
        "discrete": {"year": "steps", "sex": "uniform"},
    }
    assert found["density"]["seeds"] == [0, 1, 2]
    assert found["density"]["fit"]["steps"] == 70


def test_a_method_that_needs_conditions_is_left_out_where_there_are_none(root: Path) -> None:
    base = yaml.safe_load((root / "params.yaml").read_text())
    base["density"]["methods"]["given"] = {"loss": "cfm", "coupling": "conditional_ot"}
    (root / "params.yaml").write_text(yaml.safe_dump(base))
    assert main(["try", "data/raw/penguins.csv"]) == 3
    assert "given" not in made(root)["density"]["methods"]
    assert main(["try", "data/raw/penguins.csv", "--condition", "species", "--methods", "given", "--name", "two"]) == 3
    assert list(made(root, "two")["density"]["methods"]) == ["given"]


def test_several_files_are_one_table(root: Path, tmp_path: Path) -> None:
    for year in (1, 2):
        pd.DataFrame({"x": np.arange(9.0) + 0.5, "k": np.arange(9) * 3}).to_parquet(tmp_path / f"part{year}.parquet")
    parts = [str(tmp_path / f"part{year}.parquet") for year in (1, 2)]
    assert main(["try", *parts, "--name", "mine"]) == 3
    assert made(root, "mine")["datasets"]["mine"] == {"kind": "table", "file": parts, "missing": "drop"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data/raw/penguin.csv"], ["data/raw/penguin.csv is missing", "did you mean 'penguins.csv'"]),
        (["data/raw"], ["data/raw is a folder"]),
        (["params.yaml"], ["params.yaml ends in '.yaml', expected"]),
        (["data/raw/penguins.csv", "--columns", "bil_depth_mm"], ["no column 'bil_depth_mm'", "mean 'bill_depth_mm'"]),
        (["data/raw/penguins.csv", "--condition", "spcies"], ["no column 'spcies'", "did you mean 'species'"]),
        (["data/raw/penguins.csv", "--weight", "wt"], ["no column 'wt'"]),
        (["data/raw/penguins.csv", "--methods", "cmf"], ["no method 'cmf'", "did you mean 'cfm'"]),
        (["data/raw/penguins.csv", "--discrete", "year"], ["--discrete was given 'year', expected COLUMN=uniform"]),
        (["data/raw/penguins.csv", "--name", "My Table"], ["My Table"]),
        (["data/raw/penguins.csv", "--name", "default"], ["'default' is the name of a profile", "--name"]),
    ],
)
def test_what_cannot_be_tried_is_one_sentence_before_any_work(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["try", *arguments]) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.count("\n") == 1
    assert not (root / ".workspaces").exists()


def test_another_file_under_the_same_name_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "data/raw/penguins.csv"]) == 3
    before = (root / ".workspaces" / "penguins.yaml").read_bytes()
    shutil.copy("data/raw/penguins.csv", "penguins.csv")
    assert main(["try", "penguins.csv", "--steps", "9"]) == 1
    assert "'penguins' is the name of a try of data/raw/penguins.csv; choose another one" in capsys.readouterr().err
    assert (root / ".workspaces" / "penguins.yaml").read_bytes() == before
    assert main(["try", os.path.abspath("data/raw/penguins.csv"), "--steps", "9"]) == 3  # the same file
    assert made(root)["density"]["fit"]["steps"] == 9


def test_a_stopped_try_says_how_to_go_on() -> None:
    options = argparse.Namespace(command="try", profile="penguins")
    assert _workspace.what_is_left(options) == "completed stages are kept, continue with the same command"


@pytest.mark.slow
def test_from_a_file_to_samples_and_scores(tmp_path: Path) -> None:
    """A fresh clone, the commands of the documentation, twice; then samples and scores by the printed lines."""
    project = tmp_path / "my project"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLOWMATCH", "MLFLOW", "DVC"))}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pipelines", *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    rng = np.random.default_rng(0)
    group = rng.integers(0, 2, 1500)
    table = {"weight": rng.normal(5.0 * group, 1.0), "time": rng.normal(6e6, 0.3, 1500), "seed": group + 7}
    pd.DataFrame({**table, "group": np.array(["a", "b"])[group], "unit": 1}).to_csv(project / "mine.csv", index=False)
    arguments = ("try", "mine.csv", "--condition", "group", "--steps", "600", "--seeds", "1")
    said = run(*arguments)
    sampled = next(line.split() for line in said.splitlines() if " sample " in line)
    scored = next(line.split() for line in said.splitlines() if " score " in line)
    assert "nothing has changed" in run(*arguments)
    run(*sampled[sampled.index("sample") :])
    new = pd.read_csv(project / "new.csv")
    assert set(new) == {"weight", "time", "seed", "group", "unit"}
    assert set(new["unit"]) == {1}
    assert new["seed"].dtype == np.int64
    assert abs(new["time"].mean() - 6e6) < 0.1
    assert abs(new["weight"].mean()) < 1.0  # the line names the first group; that of the other is 5
    assert "of 1,500 rows" in run(*scored[scored.index("score") :])
    shutil.rmtree(project)
