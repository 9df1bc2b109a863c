"""A stage: exit status, one sentence, nothing half-written, and the same weights after a kill."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from pipelines.base import files
from pipelines.config import yaml_files
from pipelines.stages import _main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the smoke profile's params.yaml, the current one, as under an orchestrator, which publishes."""
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    merged = yaml_files.merge(raw, yaml_files.read_yaml(ROOT / "pipelines" / "config" / "profiles" / "smoke.yaml"))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "test")
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / ".flowmatch"))
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)  # in whose place a stage that runs in this process puts its own


def command(stage: str, **cell: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        f"pipelines.stages.{stage}",
        *(w for k, v in cell.items() for w in (f"--{k}", v)),
    ]


Finished = subprocess.CompletedProcess[str]


def run(project: Path, stage: str, **cell: str) -> Finished:
    """Run a stage in this process."""
    name, out, err = "@".join(filter(None, (stage, "-".join(cell.values())))), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = _main.guarded(importlib.import_module(f"pipelines.stages.{stage}").main, name, cell)
    return Finished(name, status, out.getvalue(), err.getvalue())


def start(project: Path, stage: str, **cell: str) -> Finished:
    """Run a stage as a process of its own, as DVC does."""
    return subprocess.run(command(stage, **cell), cwd=project, capture_output=True, text=True, timeout=120, check=False)


def fails(project: Path, stage: str, *words: str, how: Callable[..., Finished] = run, **cell: str) -> None:
    """One sentence with these words on stderr, exit status 1, and no temporary files."""
    result = how(project, stage, **cell)
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert not list(project.glob("data/**/*.tmp"))


def override(project: Path, key: str, value: object) -> None:
    raw = yaml.safe_load((project / "params.yaml").read_text())
    here = raw
    *parents, last = key.split(".")
    for part in parents:
        here = here[part]
    here[last] = value
    (project / "params.yaml").write_text(yaml.safe_dump(raw))


def test_prepare_writes_tables_that_it_describes(project: Path) -> None:
    assert run(project, "prepare", dataset="moons").returncode == 0
    folder = project / "data" / "prepared" / "moons"
    provenance = files.read_json(folder / "provenance.json")
    train = files.read_table(folder / "train.parquet", ["x", "y"])
    assert provenance["rows"]["train"] == len(train)
    np.testing.assert_allclose(train.mean(), provenance["loc"])
    np.testing.assert_allclose(train.std(ddof=0), provenance["scale"])
    record = json.loads((project / ".flowmatch/runs/test/prepare@moons.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["metrics"]["train_rows"] == len(train)


def test_the_same_parameters_give_the_same_bytes(project: Path) -> None:
    """In two processes: nothing depends on the order of a set."""
    written = []
    for how in (start, run):
        for stage, cell in (
            ("prepare", {"dataset": "moons"}),
            ("train_density", {"dataset": "moons", "method": "cfm"}),
        ):
            result = how(project, stage, **cell)
            assert result.returncode == 0, result.stderr
        files = [p for folder in ("prepared", "models") for p in (project / "data" / folder).rglob("*.*")]
        written.append({p.name: p.read_bytes() for p in files})
        shutil.rmtree(project / "data")
        shutil.rmtree(project / ".checkpoints")
    assert len(written[0]) == 5
    assert written[0] == written[1]


def test_a_malformed_params_file_stops_every_stage(project: Path) -> None:
    override(project, "density.fit.lrr", 0.1)
    fails(project, "prepare", "params.yaml", "density.fit.lrr", "'lr'", how=start, dataset="moons")
    fails(project, "tables", "params.yaml", "density.fit.lrr")
    assert not (project / "data").exists()


def test_a_missing_input_is_named(project: Path) -> None:
    fails(project, "train_density", "data/prepared/moons", "make repro", dataset="moons", method="cfm")
    fails(
        project,
        "train_successor",
        "data/transitions/spiral",
        "make repro",
        environment="spiral",
        method="td_cfm",
    )
    fails(project, "sample_density", "data/prepared/moons", dataset="moons")
    fails(project, "evaluate_successor", "data/transitions/spiral", environment="spiral")
    fails(project, "report", "data/")


def test_a_corrupt_table_is_named(project: Path) -> None:
    run(project, "prepare", dataset="moons")
    path = project / "data/prepared/moons/train.parquet"
    path.write_bytes(path.read_bytes()[:500])
    fails(project, "train_density", "train.parquet", "delete it", dataset="moons", method="cfm")
    assert not (project / "data/models").exists()


def test_a_nan_in_the_data_is_named(project: Path) -> None:
    run(project, "prepare", dataset="moons")
    path = project / "data/prepared/moons/train.parquet"
    table = pd.read_parquet(path)
    table.loc[7, "y"] = np.nan
    table.to_parquet(path)
    fails(project, "train_density", "train.parquet", "nan", "'y'", "row 7", dataset="moons", method="cfm")
    assert not (project / "data/models").exists()


def test_a_corrupt_model_is_named(project: Path) -> None:
    raw = yaml.safe_load((project / "params.yaml").read_text())
    del raw["density"]["methods"]["ot_cfm"]
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    run(project, "prepare", dataset="moons")
    run(project, "train_density", dataset="moons", method="cfm")
    path = project / "data/models/moons/cfm/seed0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    fails(project, "sample_density", "seed0.safetensors", "delete it", dataset="moons")
    assert not list((project / "data/samples").iterdir())


def test_a_cell_that_is_not_there_is_named(project: Path) -> None:
    fails(project, "prepare", "no dataset 'moon'", "moons", dataset="moon")


def test_a_column_that_is_missing_is_named(project: Path) -> None:
    run(project, "collect", environment="spiral")
    path = project / "data/transitions/spiral/transitions.parquet"
    pd.read_parquet(path).drop(columns="next_action_ux").to_parquet(path)
    cell = {"environment": "spiral", "method": "td_cfm"}
    fails(project, "train_successor", "transitions.parquet", "no column 'next_action_ux'", **cell)


def test_a_checkpoint_of_other_code_is_not_resumed(project: Path) -> None:
    code = project / "copy"
    shutil.copytree(ROOT / "pipelines", code / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "flowmatch_core", code / "flowmatch_core", ignore=shutil.ignore_patterns("__pycache__"))
    question = "from pipelines.training import checkpoints; print(checkpoints.folder('x', {'lr': 1}, []))"

    def key() -> str:
        env = {**os.environ, "PYTHONPATH": str(code)}
        return subprocess.run(
            [sys.executable, "-c", question], cwd=code, env=env, capture_output=True, text=True, check=True
        ).stdout

    before = key()
    assert key() == before
    with (code / "flowmatch_core" / "flow.py").open("a") as file:
        file.write("# changed\n")
    assert key() != before


def test_a_cuda_device_that_is_not_there_is_named(project: Path) -> None:
    run(project, "prepare", dataset="moons")
    override(project, "device", "cuda:99")
    fails(project, "train_density", "device is 'cuda:99'", "auto or cpu", dataset="moons", method="cfm")


def test_a_path_with_wrong_arguments_is_named(project: Path) -> None:
    run(project, "prepare", dataset="moons")
    override(project, "density.methods.cfm.path", {"name": "cond_ot", "sigma_max": 1.0})
    fails(
        project, "train_density", "density.methods.cfm.path.sigma_max is not a known key", dataset="moons", method="cfm"
    )


def test_a_mirror_that_is_not_there_is_named(project: Path) -> None:
    override(project, "datasets.boone", {"kind": "miniboone"})
    override(project, "mirror", str(project / "nowhere"))
    fails(project, "prepare", "miniboone", "nowhere", dataset="boone")


def test_a_killed_training_resumes_to_the_same_weights(project: Path) -> None:
    """Two seeds in two processes, killed twice after a checkpoint; DVC would run the same command again."""
    override(project, "density.seeds", [0, 1])
    override(project, "density.fit.steps", 3000)
    override(project, "density.fit.network.hidden", [96, 96, 96])  # seconds, of which a checkpoint takes one
    run(project, "prepare", dataset="moons")
    cell = {"dataset": "moons", "method": "cfm"}
    whole = run(project, "train_density", **cell)
    assert whole.returncode == 0, whole.stderr
    models = project / "data/models/moons/cfm"
    expected = {path.name: path.read_bytes() for path in models.iterdir()}
    assert set(expected) == {"seed0.safetensors", "seed1.safetensors"}
    assert not list((project / ".checkpoints").rglob("*.checkpoint"))
    shutil.rmtree(models)
    shutil.rmtree(project / ".checkpoints")

    def written() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in (project / ".checkpoints").rglob("*.checkpoint")}

    for sent in (signal.SIGTERM, signal.SIGKILL):
        before = written()
        process = subprocess.Popen(command("train_density", **cell), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not written() - before and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(30) != 0
        assert not models.exists()
    resumed = run(project, "train_density", **cell)
    assert resumed.returncode == 0, resumed.stderr
    assert {path.name: path.read_bytes() for path in models.iterdir()} == expected


def limited(project: Path, kibibytes: int, stage: str, **cell: str) -> subprocess.CompletedProcess[str]:
    """Run a stage that may write no larger file, which ends a write as a full disk does."""
    return subprocess.run(
        ["prlimit", f"--fsize={kibibytes << 10}", *command(stage, **cell)],
        cwd=project, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("prlimit"), reason="no prlimit (util-linux)")
@pytest.mark.parametrize(
    ("kibibytes", "file"),
    [(0, ".flowmatch/locks/prepare@moons.lock"), (20, "data/prepared/moons/train.parquet")],
)
def test_a_full_disk_is_one_sentence(project: Path, kibibytes: int, file: str) -> None:
    result = limited(project, kibibytes, "prepare", dataset="moons")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"{file} could not be written (File too large); free some space" in line
    assert not (project / "data/prepared/moons").exists()
    assert not list(project.rglob("*.tmp"))
    assert run(project, "prepare", dataset="moons").returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prlimit"), reason="no prlimit (util-linux)")
def test_a_checkpoint_that_cannot_be_written_is_one_sentence(project: Path) -> None:
    """Of a worker process, too: two seeds."""
    run(project, "prepare", dataset="moons")
    override(project, "density.seeds", [0, 1])
    result = limited(project, 60, "train_density", dataset="moons", method="cfm")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.search(r"^train_density@moons-cfm: \.checkpoints/.*/seed\d\.\w+ could not be written", line)
    record = json.loads((project / ".flowmatch/runs/test/train_density@moons-cfm.json").read_text())
    assert (record["status"], record["message"]) == ("FAILED", line.partition(": ")[2])
    assert not (project / "data/models").exists()
