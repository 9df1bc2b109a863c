"""Several processes train as one: the same losses and weights for every method; one that dies ends all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.base import files
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import collect, prepare
from pipelines.training import distributed
from tests.pipelines import distributed_member as member

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the smoke profile's moons and spiral."""
    folder = tmp_path_factory.mktemp("project")
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw = yaml_files.merge(raw, yaml_files.read_yaml(ROOT / "pipelines/config/profiles/smoke.yaml"))
    raw["device"] = "cpu"
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FLOWMATCH_INVOCATION", "test")
        loaded = params.load()
        for stage, entry in ((prepare, "moons"), (collect, "spiral")):
            stage.main(Stage("test", loaded, RunRecord.start("test", {})), entry)
        yield folder


def environment(**more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLOWMATCH_INVOCATION": "test"}
    return {**os.environ, **own, **more}


def start(project: Path, processes: int, *command: str) -> list[subprocess.Popen[str]]:
    """Start the processes of one training as torchrun does, without the seconds that it takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=project,
            env=environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return the exit status and the output of each process."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def together(project: Path) -> Path:
    """The folder into which two processes wrote what they trained together."""
    out = project / "together"
    ends = finish(start(project, 2, "tests.pipelines.distributed_member", str(out)))
    assert [status for status, _ in ends] == [0, 0], ends
    return out


@pytest.mark.parametrize("method", member.METHODS)
def test_two_processes_train_as_one(together: Path, tmp_path: Path, method: str) -> None:
    alone = member.train(member.job(method), tmp_path / "checkpoint")
    each = [files.read_tensors(together / f"{method}.{rank}.safetensors") for rank in range(2)]
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(each[0][0][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(each[0][0][name], each[1][0][name]), name
    for row, expected in zip(each[0][1]["curve"], alone.curve, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert each[0][1]["curve"] == each[1][1]["curve"]


@pytest.mark.parametrize(("rows", "world"), [(33, 2), (4, 4), (10, 3)])
def test_every_row_has_one_process(monkeypatch: pytest.MonkeyPatch, rows: int, world: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen: list[int] = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        seen += range(rows)[distributed._share(rows)]
    assert seen == list(range(rows))


def test_one_device_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="device is 'cuda:1' for 2 processes, which take a device each; expected cuda"),
        distributed.group(torch.device("cuda:1")),
    ):
        pass


def override(project: Path, changes: dict[str, Any]) -> None:
    raw = yaml_files.merge(yaml.safe_load((project / "params.yaml").read_text()), changes)
    (project / "params.yaml").write_text(yaml.safe_dump(raw))


STAGE = ("pipelines.stages.train_density", "--dataset", "moons", "--method", "cfm")


@pytest.mark.slow
def test_a_stage_under_torchrun_writes_once_and_the_stage_alone_takes_its_networks(project: Path) -> None:
    override(project, {"density": {"seeds": [0, 1], "fit": {"steps": 40}}})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *STAGE]
    ran = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("train_density@moons-cfm: done in") == 1
    models = project / "data/models/moons/cfm"
    written = {path.name: path.read_bytes() for path in models.iterdir()}
    assert set(written) == {"seed0.safetensors", "seed1.safetensors"}
    records = list((project / ".flowmatch/runs/test").glob("train_density*.json"))
    record = files.read_json(*records)
    assert record["status"] == "FINISHED" and record["params"]["processes"] == 2

    alone = subprocess.run(
        [sys.executable, "-m", *STAGE], cwd=project, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert alone.returncode == 0, alone.stderr
    assert "seeds [0, 1] are finished" in alone.stdout and "seeds [] on cpu" in alone.stdout
    assert {path.name: path.read_bytes() for path in models.iterdir()} == written


@pytest.mark.slow
def test_a_process_that_dies_ends_all_and_one_process_continues(project: Path) -> None:
    override(project, {"density": {"seeds": [0], "fit": {"steps": 3000, "log_every": 10}}})
    processes = start(project, 2, *STAGE)
    deadline = time.monotonic() + 120
    while not list((project / ".checkpoints").rglob("*.checkpoint")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    (status, output), (killed, _) = finish(processes)
    assert (status, killed) == (1, -signal.SIGKILL)
    assert "Traceback" not in output
    assert "process 0 of 2 has lost another one" in output.splitlines()[-1]
    assert "run the same command to continue" in output
    (checkpoint,) = (project / ".checkpoints").rglob("*.checkpoint")
    done = files.read_tensors(checkpoint)[1]["step"]

    alone = subprocess.run(
        [sys.executable, "-m", *STAGE], cwd=project, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert alone.returncode == 0, alone.stderr
    rows = (project / ".flowmatch/runs/test/train_density@moons-cfm.jsonl").read_text().splitlines()
    assert 0 < done < json.loads(rows[0])["step"] <= json.loads(rows[-1])["step"] == 3000
