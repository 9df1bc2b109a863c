"""New episodes, an edited policy, a changed file of the mirror: DVC runs what reads them, and nothing else."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.datasets import miniboone
from pipelines.environments import _entry_point, exorl
from pipelines.runs import graph, sources

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # of DVC
ROOT = Path(__file__).parents[2]
POLICY = "import numpy as np\nfrom my_policies.gain import GAIN\n\n\ndef swing(x):\n    return GAIN * x[:, 2:]\n"
SIMULATED = {"gamma": 0.9, "transitions": 20, "rollouts": 2, "length": 5, "starts": 2}
EXORL = {
    "kind": "exorl",
    "directory": "../episodes",
    "simulator": {"kind": "maze", "task": "loop", "action_repeat": 1},
    "reward": "loop",
    **SIMULATED,
}
PENDULUM = {"kind": "gymnasium", "id": "Pendulum-v1", "policy": "my_policies.swing:swing", "reward": "s0", **SIMULATED}


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def templates() -> dict[str, Any]:
    """The stages of the real dvc.yaml that read external files; the two that take longer only write their output."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name in ("prepare", "collect"):
        (out,) = stages[name]["outs"]
        stages[name]["cmd"] = f"mkdir -p {out} && echo done > {out}/table"
        stages[name]["deps"] = [dep for dep in stages[name]["deps"] if dep.startswith("data/")]
    return {"stages": {name: stages[name] for name in ("sources", "prepare", "collect")}}


def dvc(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with episodes, a mirror and a project whose stages have run."""
    folder = tmp_path_factory.mktemp("sources")
    root = folder / "project"
    write(root / "dvc.yaml", yaml.safe_dump(templates(), sort_keys=False))
    write(root / ".dvc/config", "[core]\n    no_scm = true\n    analytics = false\n")
    write(root / ".dvcignore", "__pycache__/\n.flowmatch/\n")
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw |= {"datasets": {"moons": raw["datasets"]["moons"], "real": {"kind": "miniboone"}}, "mirror": "../mirror"}
    raw["environments"] = {"recorded": EXORL, "swing": PENDULUM}
    raw["successor"]["evaluate"]["solver_steps"] = {}
    write(root / "params.yaml", yaml.safe_dump(raw))
    write(root / "my_policies/__init__.py", "")
    write(root / "my_policies/swing.py", POLICY)
    write(root / "my_policies/gain.py", "GAIN = -1\n")
    for name in (miniboone.TRAIN, miniboone.VAL, miniboone.TEST):
        write(folder / "mirror" / "maf" / name)
    write(folder / "episodes/000.npz", "first")
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, root)
        assert set(graph.dirty(root)) == {
            "sources",
            "prepare@moons",
            "prepare@real",
            "collect@recorded",
            "collect@swing",
        }
        done = dvc(root, "repro")
        assert done.returncode == 0, done.stdout + done.stderr
        assert graph.dirty(root) == set()
    return folder


def surroundings(patch: pytest.MonkeyPatch, root: Path) -> None:
    patch.chdir(root)
    patch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("FLOWMATCH_HOME", str(root / ".flowmatch"))
    for name in ("DVC_ROOT", "DVC_STAGE"):
        patch.delenv(name, raising=False)


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    root = tmp_path / "copy" / "project"
    surroundings(monkeypatch, root)
    assert graph.dirty(root) == set()
    return root


EDITS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "a new episode": (lambda root: write(root / "../episodes/more/001.npz", "second"), {"collect@recorded"}),
    "a changed episode": (lambda root: write(root / "../episodes/000.npz", "other"), {"collect@recorded"}),
    "a renamed episode": (
        lambda root: (root / "../episodes/000.npz").rename(root / "../episodes/009.npz"),
        {"collect@recorded"},
    ),
    "the policy": (lambda root: write(root / "my_policies/swing.py", f"{POLICY}\n"), {"collect@swing"}),
    "what the policy imports": (lambda root: write(root / "my_policies/gain.py", "GAIN = -2\n"), {"collect@swing"}),
    "the mirror": (lambda root: write(root / "../mirror/maf" / miniboone.VAL, "y"), {"prepare@real"}),
    "only a time": (lambda root: os.utime(root / "../episodes/000.npz", (1, 1)), set()),
    "bytecode": (lambda root: write(root / "my_policies/__pycache__/swing.pyc"), set()),
    "what is no episode": (lambda root: write(root / "../episodes/notes.txt"), set()),
    "another module": (lambda root: write(root / "unused.py"), set()),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_an_external_change_runs_what_reads_it(project: Path, edit: str) -> None:
    change, stages = EDITS[edit]
    change(project)
    assert graph.dirty(project) == stages | ({"sources"} if stages else set())


def test_a_bare_dvc_repro_notices_it_too(project: Path) -> None:
    def ran() -> list[str]:
        done = dvc(project, "repro")
        assert done.returncode == 0, done.stdout + done.stderr
        return re.findall(r"Running stage '([^']+)'", done.stdout)

    assert ran() == ["sources"]
    write(project / "../episodes/001.npz", "second")
    assert ran() == ["sources", "collect@recorded"]
    assert graph.dirty(project) == set()


def test_a_missing_folder_is_a_sentence_before_any_stage(project: Path) -> None:
    shutil.rmtree(project / "../episodes")
    with pytest.raises(UserError, match=r"^params.yaml: environments.recorded: .*set `directory`") as error:
        graph.dirty(project)
    assert "\n" not in str(error.value)
    done = dvc(project, "repro")
    assert done.returncode != 0
    assert str(error.value) in done.stderr
    assert "collect" not in done.stdout


def test_a_missing_file_of_the_mirror_is_a_sentence(project: Path) -> None:
    (project / "../mirror/maf" / miniboone.TEST).unlink()
    with pytest.raises(UserError, match=rf"^params.yaml: datasets.real: .*{miniboone.TEST} is missing.*`mirror`"):
        graph.dirty(project)


def test_a_file_that_cannot_be_read_is_a_sentence(project: Path) -> None:
    (project / "../episodes/001.npz").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"001\.npz cannot be read \(No such file or directory\)"):
        graph.dirty(project)


def test_a_fingerprint_is_written_only_if_it_differs(project: Path) -> None:
    given = params.load(project / "params.yaml")
    before = {path: path.stat().st_mtime_ns for path in layout.SOURCES.glob("*")}
    assert len(before) == 4
    sources.refresh(project, given)
    assert {path: path.stat().st_mtime_ns for path in layout.SOURCES.glob("*")} == before
    write(layout.source("former"), "{}")
    layout.source("moons").unlink()
    sources.refresh(project, given)
    assert set(layout.SOURCES.glob("*")) == before.keys()
    assert layout.source("moons").read_text() == "{}\n"


def test_a_project_of_experiments_alone_has_no_fingerprints(tmp_path: Path) -> None:
    write(tmp_path / "params.yaml", (ROOT / "params.yaml").read_text())
    given = params.load(tmp_path / "params.yaml").model_copy(update={"datasets": {}, "environments": {}})
    sources.refresh(tmp_path, given)
    assert list((tmp_path / layout.SOURCES).iterdir()) == []  # the output of the stage, which DVC wants to exist


def test_a_file_is_read_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = params.load(project / "params.yaml")
    for number in range(20):
        path = project / f"../episodes/{number:03}.npz"
        write(path, str(number))
        os.utime(path, (1e9, 1e9))
    (project / ".flowmatch/hashes.json").write_text("{damaged")
    reads: list[str] = []
    digest = hashlib.file_digest

    def reading(file: Any, name: str) -> object:
        reads.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", reading)
    sources.refresh(project, given)
    assert len([name for name in reads if name.endswith(".npz")]) == 20 + 1  # and a file of the mirror
    first = layout.source("recorded").read_text()
    reads.clear()
    sources.refresh(project, given)
    assert [name for name in reads if "episodes" in name] == []
    assert layout.source("recorded").read_text() == first
    (project / "../episodes/003.npz").write_text("4")  # as long as before
    sources.refresh(project, given)
    assert [Path(name).name for name in reads if "episodes" in name] == ["003.npz"]
    assert layout.source("recorded").read_text() != first


def test_a_fingerprint_does_not_depend_on_where_the_files_lie(project: Path) -> None:
    before = layout.source("recorded").read_text()
    (project / "../episodes").rename(project / "../elsewhere")
    raw = yaml_files.read_yaml(project / "params.yaml")
    raw["environments"]["recorded"]["directory"] = str((project / "../elsewhere").resolve())
    write(project / "params.yaml", yaml.safe_dump(raw))
    sources.refresh(project, params.load(project / "params.yaml"))
    assert layout.source("recorded").read_text() == before


def test_the_modules_of_entry_points(project: Path) -> None:
    write(project / "alone.py")
    write(project / "loose/inner.py")
    write(project / "loose/other.py")
    found = _entry_point.sources("my_policies.swing:swing", "alone:f", "loose.inner:g")
    assert set(found) == {
        "my_policies/__init__.py",
        "my_policies/swing.py",
        "my_policies/gain.py",
        "alone",
        "loose.inner",
    }
    assert found["loose.inner"] == project / "loose/inner.py"
    assert "my_policies" not in sys.modules
    assert {path.name for path in _entry_point.sources("yaml.nodes:Node", "numpy:sin").values()} == {
        "nodes.py",
        "__init__.py",
    }
    assert _entry_point.sources("math:sqrt", "sys:exit").keys() <= {"math"}
    for name in ("nowhere:f", "loose.nowhere:f"):
        with pytest.raises(UserError, match=f"'{name}' cannot be loaded"):
            _entry_point.sources(name)


def test_recorded_episodes_have_the_modules_of_both_policies(project: Path) -> None:
    settings = exorl.Settings.model_validate(
        {
            "directory": "../episodes",
            "simulator": {"kind": "gymnasium", "id": "a:B-v0", "policy": "my_policies.swing:swing"},
        }
    )
    write(project / "a.py")
    assert exorl.sources(settings, None).keys() >= {"000.npz", "a", "my_policies/swing.py"}
    driven = settings.model_copy(update={"policy": "a:f", "simulator": EXORL["simulator"]})
    assert exorl.sources(driven, None).keys() == {"000.npz", "a"}
