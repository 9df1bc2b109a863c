"""Seeds that stay: a stage that runs again trains only what is missing, to the bits of training all."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from pipelines.base import files, layout
from pipelines.config import params, yaml_files
from pipelines.config.params import Params
from pipelines.data import prepare
from pipelines.runs import records
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.training import checkpoints, density, fit

ROOT = Path(__file__).parents[2]
NAME = "train_density@moons-cfm"


class Project:
    """A folder in which the training stage of one method runs, in this process.

    Attributes:
        trained: Seeds that were trained, in order.
    """

    def __init__(self) -> None:
        raw = yaml_files.read_yaml(ROOT / "params.yaml")
        raw = yaml_files.merge(raw, yaml_files.read_yaml(ROOT / "pipelines/config/profiles/smoke.yaml"))
        raw = yaml_files.merge(raw, {"density": {"fit": {"steps": 20, "log_every": 5, "network": {"hidden": [8]}}}})
        self.raw = raw
        self.trained: list[int] = []
        prepare.write(self.stage(), "moons")

    def stage(self) -> Stage:
        files.write_json(Path("params.yaml"), self.raw)
        loaded: Params = params.load()
        return Stage(NAME, loaded, RunRecord.start(NAME, {}))

    def train(self, *seeds: int, steps: int = 20) -> dict[str, bytes]:
        """Run the stage and return what it wrote."""
        self.raw["density"] |= {"seeds": list(seeds), "fit": {**self.raw["density"]["fit"], "steps": steps}}
        density.train(self.stage(), "moons", "cfm")
        written = [*layout.models("moons", "cfm").iterdir()]
        written += [layout.curve("moons", "cfm"), layout.final_losses("moons", "cfm")]
        return {path.name: path.read_bytes() for path in written}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_CORES", "1")
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "first")
    made = Project()
    work = fit._fit_one

    def noted(seed: int, report: Callable[..., None], **how: object) -> object:
        made.trained.append(seed)
        return work(seed, report, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(fit, "_fit_one", noted)
    return made


def kept() -> list[str]:
    return sorted(path.name for path in checkpoints.ROOT.rglob("seed*"))


def test_a_seed_that_is_added_is_trained_alone_to_the_same_bits(project: Project) -> None:
    project.train(0)
    more = project.train(0, 1)
    assert project.trained == [0, 1]
    assert set(more) == {"seed0.safetensors", "seed1.safetensors", "cfm.csv", "cfm.json"}
    shutil.rmtree(checkpoints.ROOT)
    assert project.train(0, 1) == more
    assert project.trained == [0, 1, 0, 1]


def test_a_seed_that_is_removed_is_not_written_and_none_is_trained(project: Project) -> None:
    both = project.train(1, 0)
    one = project.train(0)
    assert project.trained == [1, 0]
    assert set(one) == {"seed0.safetensors", "cfm.csv", "cfm.json"}
    assert one["seed0.safetensors"] == both["seed0.safetensors"]
    assert b"1" not in one["cfm.csv"].splitlines()[0]


def test_other_settings_train_all_and_leave_nothing_of_the_former(project: Project) -> None:
    first = project.train(0)
    folders = set((checkpoints.ROOT / NAME).iterdir())
    second = project.train(0, steps=10)
    assert project.trained == [0, 0]
    assert first["seed0.safetensors"] != second["seed0.safetensors"]
    left = set((checkpoints.ROOT / NAME).iterdir())
    assert len(left) == 1
    assert left.isdisjoint(folders)
    assert kept() == ["seed0.json", "seed0.safetensors"]


def test_a_forced_run_trains_all_and_continues_what_it_began(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = project.train(0)
    monkeypatch.setattr(records, "forced", lambda: True)
    monkeypatch.setenv("FLOWMATCH_INVOCATION", "second")
    assert project.train(0) == before
    assert project.trained == [0, 0]
    assert project.train(0) == before  # as a second attempt of the same run
    assert project.trained == [0, 0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "summary"])
def test_a_kept_network_that_is_damaged_is_trained_again(project: Project, damage: str) -> None:
    before = project.train(0)
    model, summary = (next(checkpoints.ROOT.rglob(name)) for name in ("seed0.safetensors", "seed0.json"))
    whole = model.read_bytes()
    if damage == "cut":
        model.write_bytes(whole[:-8])
    elif damage == "flipped":
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "missing":
        model.unlink()
    else:
        summary.write_text(summary.read_text()[:40])
    assert project.train(0) == before
    assert project.trained == [0, 0]


@pytest.mark.parametrize(
    ("words", "forced"),
    [
        ("-m dvc repro", False),
        ("-m dvc repro --force", True),
        ("-m dvc repro -f train_density@moons-cfm", True),
        ("/usr/bin/dvc repro -sf report", True),
        ("/usr/bin/dvc exp run --force", True),
        ("/usr/bin/dvc exp run -Sdensity.fit.lr=1e-3", False),
        ("/usr/bin/dvc exp run -n -S density.fit.lr=1e-3", False),
        ("/usr/bin/make --force", False),
    ],
)
def test_a_forced_run_is_known_by_the_command_of_dvc(monkeypatch: pytest.MonkeyPatch, words: str, forced: bool) -> None:
    commands: Sequence[list[str]] = [["sh", "-c", "python -m ..."], [sys.executable, *words.split()], ["bash", "-f"]]

    class Ancestor:
        def __init__(self, command: list[str]) -> None:
            self.cmdline = lambda: command

    monkeypatch.setattr(psutil.Process, "parents", lambda self: [Ancestor(command) for command in commands])
    assert records.forced() is forced
