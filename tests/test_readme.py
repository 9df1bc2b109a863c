"""What the README says can be done, can be done; its numbers are the pipeline's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.reporting import readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATA_SET_PAGE = (ROOT / "docs" / "how-to" / "data-set.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_results_are_those_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    written = dict(readme.documents())
    assert {"README.md", "docs/results/default.md"} <= {page.as_posix() for page in written}
    for page, text in written.items():
        assert page.read_text() == text, page


def test_the_headline_has_at_most_six_rows() -> None:
    shown = re.search(r"<!-- headline: written by `make readme` -->\n(.*?)<!-- /headline -->", README, re.DOTALL)
    assert shown is not None
    assert 2 <= len(shown[1].strip().splitlines()) - 2 <= 6


def test_it_names_the_two_commands() -> None:
    named = set(re.findall(r"`make ([a-z-]+)", README))
    assert {"repro", "test"} <= named


def test_the_library_example_prints_what_it_promises() -> None:
    example = next(block for block in blocks(README, "python") if "cfm_loss" in block)
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", result.stdout)]
    mean_x, mean_y, log_prob = numbers
    assert (mean_x, mean_y) == pytest.approx((1.0, -1.0), abs=0.1)
    assert log_prob == pytest.approx(-0.45, abs=0.15)


def test_a_new_data_set_is_one_file_and_one_entry(tmp_path: Path) -> None:
    """As the page shows it: the file, the entry, and the stages appear and run."""
    source = next(block for block in blocks(DATA_SET_PAGE, "python") if "class Settings" in block)
    entry = yaml.safe_load(next(block for block in blocks(DATA_SET_PAGE, "yaml") if "kind: ring" in block))
    copy = tmp_path / "flowmatch"
    for name in ("pipelines", "flowmatch_core"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "data" / "raw", copy / "data" / "raw")
    (copy / "pipelines" / "datasets" / "ring.py").write_text(source)
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["datasets"] |= {"ring": {**entry["ring"], "fit": {"steps": 50}}}
    density = params["density"]
    density |= {"methods": {"cfm": density["methods"]["cfm"]}, "seeds": [0]}
    density["evaluate"] |= {"likelihood_rows": 50, "steps": 8}
    (copy / "params.yaml").write_text(yaml.safe_dump(params))
    env = {**os.environ, "PYTHONPATH": str(copy), "FLOWMATCH_INVOCATION": "test"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"

    def run(*command: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=copy, env=env, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    run("dvc", "init", "--no-scm", "-q")
    stages = run("dvc", "stage", "list", "--name-only").split()
    assert {"prepare@ring", "train_density@ring-cfm", "evaluate_density@ring"} <= set(stages)
    run("dvc", "repro", "evaluate_density@ring")
    assert (copy / "data" / "metrics" / "ring.json").exists()
    assert not (copy / "data" / "metrics" / "moons.json").exists()
