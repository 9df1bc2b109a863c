"""The whole pipeline on the smoke profile, in a copy of the project, as a user would run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PATTERNS = shutil.ignore_patterns(
    ".venv*", ".git", "cache", "tmp", "mlflow.db*", "mlartifacts", ".flowmatch", ".prefect", ".workspaces",
    ".checkpoints", "__pycache__", ".*_cache", "*.egg-info", "dvc.lock",
)  # fmt: skip


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a fresh copy does not have; `data` and `site` at the top are results, `pipelines/data` is code."""
    return set(PATTERNS(folder, names)) | ({"data", "site"} if Path(folder) == ROOT else set())


def run(project: Path, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLOWMATCH", "MLFLOW", "DVC", "PREFECT"))}
    environment |= {
        "PYTHONPATH": str(project),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=project, env=environment, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


REMOVED = ("checkerboard", "digits", "memoryless_chain")
"""Entries that a user took out of params.yaml, one of which the profile changes."""
LEFT_OUT = "profile smoke: params.yaml lacks experiments.memoryless_chain; left out.\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of the project without its results and some of its entries, where the smoke profile ran once."""
    copy = tmp_path_factory.mktemp("fresh größe") / "my project"
    shutil.copytree(ROOT, copy, ignore=left_out)
    remove_entries(copy / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    first = run(copy, "pipelines.orchestration", "repro", "--profile", "smoke")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert first.stdout.strip().splitlines()[-1].endswith("data/report/index.html")
    assert first.stderr.startswith(LEFT_OUT)
    return copy


def remove_entries(path: Path) -> None:
    """Take entries out of params.yaml, and most methods of the maze, as an editor does."""
    text = path.read_text(encoding="utf-8")
    for name in REMOVED:
        text, found = re.subn(rf"^  {name}:.*\n(?:    .*\n)*", "", text, flags=re.MULTILINE)
        assert found == 1, name
    text, found = re.subn(
        "^    reward: loop\n", "    reward: loop\n    methods: [td2_cfm, oracle]\n", text, flags=re.MULTILINE
    )
    assert found == 1
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def workspace(project: Path) -> Path:
    return project / ".workspaces" / "smoke"


def metrics(workspace: Path, name: str) -> dict[str, dict[str, float]]:
    loaded: dict[str, dict[str, float]] = json.loads((workspace / "data" / "metrics" / f"{name}.json").read_text())
    return loaded


def test_the_oracles_numbers_are_the_known_ones(workspace: Path) -> None:
    """The closed form goes through sampling, likelihood and evaluation: a wrong number is a fault of the plumbing."""
    spiral = metrics(workspace, "spiral")
    oracle, floor = spiral["oracle"], spiral["floor"]
    assert oracle["nll"] == pytest.approx(floor["nll"], abs=2e-3)
    assert oracle["emd"] < 1.35 * floor["emd"]
    assert oracle["mse_v"] < 4 * floor["mse_v"] + 0.05
    for method in ("td_cfm", "td2_cfm"):
        assert spiral[method]["nll"] > floor["nll"] + 0.05
    assert metrics(workspace, "maze_loop")["oracle"] == {"skipped": "maze_loop has no closed form"}


def test_nothing_is_written_into_the_developers_tree(project: Path) -> None:
    assert not (project / "data").exists()
    assert not (project / "dvc.lock").exists()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "src" and tag == "img":
                self.images.append(value or "")
            if key in ("src", "href") and tag != "a" and not (value or "").startswith("data:"):
                self.outside.append(f"{tag} {key}={value}")


def test_the_report_is_one_page_with_pictures_and_holes_explained(workspace: Path) -> None:
    text = (workspace / "data" / "report" / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.outside == []
    assert len(page.images) >= 8
    assert all(len(image) > 3000 for image in page.images)
    assert "maze_loop, oracle: left out, maze_loop has no closed form." in text
    assert "<script" not in text


def test_a_second_run_does_nothing_and_says_so(project: Path) -> None:
    again = run(project, "pipelines.orchestration", "repro", "--profile", "smoke")
    assert again.returncode == 0
    assert "Running stage" not in again.stdout
    assert re.search(r"nothing|up to date", again.stdout, re.IGNORECASE), again.stdout


def test_mlflow_has_a_parent_with_a_child_for_every_stage_and_every_cell(project: Path, workspace: Path) -> None:
    from mlflow.tracking import MlflowClient

    from pipelines.runs import graph

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flowmatch")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=200)
    assert {run.info.status for run in runs} == {"FINISHED"}
    invocations, stages, cells = (
        {run.data.tags["mlflow.runName"]: run for run in runs if run.data.tags["kind"] == kind}
        for kind in ("invocation", "stage", "cell")
    )
    (parent,) = invocations.values()
    assert {run.data.tags["mlflow.parentRunId"] for run in [*stages.values(), *cells.values()]} == {parent.info.run_id}
    assert set(stages) == set(graph.load(workspace)) - {"sources"}  # which computes nothing
    assert set(cells) == {
        *(f"moons {method} seed 0" for method in ("cfm", "ot_cfm")),
        *(f"spiral {method} seed 0" for method in ("td_cfm", "td2_cfm", "oracle")),
        "maze_loop td2_cfm seed 0",
    }
    cell = cells["spiral td2_cfm seed 0"]
    assert len(client.get_metric_history(cell.info.run_id, "train/bootstrap")) == 6
    assert {"emd", "emd_over_floor", "nll_per_dim", "mse_v", "train/seconds"} <= set(cell.data.metrics)
    assert {"emd", "emd_over_floor", "nll_per_dim", "nll"} <= set(cells["moons cfm seed 0"].data.metrics)
    assert cell.data.metrics["emd"] == parent.data.metrics["spiral/td2_cfm/emd"]
    assert [entry.tags[0].value for entry in cell.inputs.dataset_inputs] == ["training, evaluation"]
    assert parent.data.params["device"] == "auto"
    assert parent.data.tags["device"] == "cpu"
    trained = stages["train_successor@spiral-td2_cfm"]
    assert trained.data.metrics["system/memory_mib_max"] > 0
    files = sorted(f.path for f in client.list_artifacts(trained.info.run_id, "td2_cfm"))
    assert files == [f"td2_cfm/{name}" for name in ("MLmodel", "input_example.json", "seed0.safetensors")]
    (version,) = client.search_model_versions("name = 'smoke.spiral.td2_cfm'")
    assert float(version.tags["score"]) == pytest.approx(cell.data.metrics["emd"], rel=1e-5)


def test_a_trained_model_loads_by_the_line_in_the_documentation(project: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "trained-model.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "registry" in block)
    code = example.replace("models:/spiral", "models:/smoke.spiral") + "print(future.shape, future.isfinite().all())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLOWMATCH", "MLFLOW", "DVC"))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env={**environment, "PYTHONPATH": str(project)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "torch.Size([512, 5, 2]) tensor(True)" in result.stdout
    assert "nan" not in result.stdout


def test_dvc_answers_about_the_metrics_and_the_graph(workspace: Path) -> None:
    shown = run(workspace, "dvc", "metrics", "show", "--json")
    assert "emd" in shown.stdout, shown.stderr
    graph = run(workspace, "dvc", "dag", "--dot")
    assert '"train_successor@spiral-td2_cfm"' in graph.stdout, graph.stderr
    assert run(workspace, "dvc", "plots", "show", "-o", "plots").returncode == 0


def test_bad_parameters_stop_before_any_stage(project: Path) -> None:
    path = project / "params.yaml"
    text = path.read_text()
    for old, new, word in (
        ("gamma: 0.95", "gamma: 1", "gamma is 1"),
        ("coupling: minibatch_ot", "coupling: minibatch", "'minibatch_ot'"),
        ("\nseed: 1\n", "\nseed: 1\nseed: 2\n", "'seed' stands twice"),
        ("device: auto", "device: cuda:7", "device is 'cuda:7'"),
        ("kind: moons", "kind: moon", "'moons'"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        result = run(project, "pipelines.orchestration", "repro", "--profile", "smoke")
        path.write_text(text)
        assert result.returncode == 1, new
        assert word in result.stderr, result.stderr
        assert len(result.stderr.removeprefix(LEFT_OUT).strip().splitlines()) == 1, result.stderr
        assert "Running stage" not in result.stdout


@pytest.mark.parametrize("command", ["repro", pytest.param("flow", marks=pytest.mark.slow)])
def test_a_failed_data_set_costs_no_other_entry_its_tables_and_page(
    project: Path, workspace: Path, command: str
) -> None:
    """And then a changed parameter runs only what depends on it, because no result was lost."""
    path, data = project / "params.yaml", workspace / "data"
    text, lock, report = path.read_text(), locked(workspace), (data / "report" / "index.html").read_bytes()
    path.write_text(text.replace("    lr: 1.0e-2 ", "    lr: 1.0e+30 ", 1))
    failed = run(project, "pipelines.orchestration", command, "--profile", "smoke")
    path.write_text(text)
    assert failed.returncode == 1, failed.stdout[-3000:] + failed.stderr[-3000:]
    assert failed.stdout.strip().splitlines()[-1] == "partial report: .workspaces/smoke/data/partial/index.html"
    page = (data / "partial" / "index.html").read_text()
    assert page.index("Missing on this page: data set moons.") < page.index("Profile <b>smoke</b>")
    for method in ("cfm", "ot_cfm"):  # the first failure does not keep the second stage from its own
        assert re.search(rf"<b>train_density@moons-{method}</b>: [^<]*(\bnan\b|\binf\b)", page)
    assert 'id="maze_loop"' in page and 'id="sde_vs_ode"' in page and 'id="densities"' not in page
    assert "td2_cfm" in (data / "partial" / "tables" / "successor.csv").read_text()
    # What DVC knows of the tables and the report is the last complete run.
    assert [locked(workspace)[name] for name in ("tables", "report")] == [lock["tables"], lock["report"]]
    assert (data / "report" / "index.html").read_bytes() == report
    path.write_text(text.replace("projections: 256", f"projections: {len(command)}"))
    again = run(project, "pipelines.orchestration", command, "--profile", "smoke")
    path.write_text(text)
    assert again.returncode == 0, again.stderr
    assert not (data / "partial").exists()
    ran = set(re.findall(r"Running stage '([^']+)'", again.stdout + again.stderr))  # Prefect logs to the latter
    assert ran - {"sources"} == {"evaluate_density@moons", "tables", "report"}


def locked(workspace: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    stages: dict[str, Any] = yaml.safe_load((workspace / "dvc.lock").read_text())["stages"]
    return stages


@pytest.mark.slow
def test_the_flow_runs_the_same_stages(project: Path, workspace: Path) -> None:
    path = project / "params.yaml"
    text = path.read_text()
    path.write_text(text.replace("projections: 256", "projections: 64"))
    result = run(project, "pipelines.orchestration", "flow", "--profile", "smoke")
    path.write_text(text)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
