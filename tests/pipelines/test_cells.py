"""Runs of cells: methods and seeds side by side in MLflow, their models, and the table of `compare`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import unittest.mock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.base import files
from pipelines.runs import live, store, tracking, versions
from pipelines.runs.champions import Registry
from pipelines.runs.records import Cell, CellKey, RunRecord
from tests.pipelines.runs import children, parents, runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STATES, ACTIONS = ["x", "y"], ["push"]


@pytest.fixture(autouse=True)
def database(project: Path, schema: Path) -> None:
    shutil.copy(schema, project / "mlflow.db")


def network(project: Path, data: str, method: str, seed: int) -> Path:
    """A tiny model of an environment with two-dimensional states, or of a data set if the name is `table`."""
    import torch

    from pipelines.config.params import NetworkChoice
    from pipelines.models import build, saved

    density = data == "table"
    choice = NetworkChoice.model_validate({"name": "mlp", "hidden": [8], "activation": "tanh"})
    config = build.network_config(choice, 2, 0 if density else 3)
    meta: dict[str, Any] = {"network": config, "path": {"name": "cond_ot"}, "prediction": "velocity", "seed": seed}
    own = {"columns": ["a", "b"]} if density else {"gamma": 0.75, "state_names": STATES, "action_names": ACTIONS}
    file = project / "data" / "models" / data / method / f"seed{seed}.safetensors"
    torch.manual_seed(sum(map(ord, data + method)) + seed)
    loc, scale = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
    saved.save(file, build.network(config), loc, scale, meta | own)
    return file


def train(project: Path, data: str, method: str, seeds: tuple[int, ...] = (0, 1), profile: str = "default") -> None:
    """What a training stage records."""
    record = RunRecord.start(f"train@{data}-{method}", {"profile": profile}, {"profile": profile, "device": "auto"})
    record.tag("device", "cpu")
    record.tag("flowmatch.model", f"{data}.{method}")
    provenance = {"source": "a generator", "state_names": STATES, "action_names": ACTIONS}
    files.write_json(project / "data" / "transitions" / data / "provenance.json", provenance)
    record.data(data, "training", Path("data/transitions") / data, provenance)
    record.cells([Cell(data, method, seed, {"fit.lr": 0.1}) for seed in seeds])
    for step in (50, 100):
        for seed in seeds:
            record.series(step, {"train/loss": 1 / step + seed}, CellKey(data, method, seed))
    for seed in seeds:
        digest = files.md5(network(project, data, method, seed))
        record.cells([Cell(data, method, seed, {}, {"train/seconds": 2.0}, digest, trained=True)])
    record.artifact(Path("data/models") / data / method)
    record.finish("FINISHED")


def evaluate(project: Path, data: str, numbers: Mapping[tuple[str, int], float], profile: str = "default") -> None:
    """What an evaluation records."""
    record = RunRecord.start(f"evaluate@{data}", {"profile": profile}, {"profile": profile})
    record.tag("score_metric", "emd")
    folder = Path("data/transitions") / data
    record.data(data, "evaluation", folder, files.read_json(folder / "provenance.json"))
    for (method, seed), emd in numbers.items():
        model = files.md5(project / "data" / "models" / data / method / f"seed{seed}.safetensors")
        record.cells([Cell(data, method, seed, metrics={"emd": emd, "emd_over_floor": emd / 0.5}, model=model)])
    record.finish("FINISHED")


@pytest.fixture
def invocation(project: Path) -> Any:
    """A context for an invocation, which is published at its end."""
    count = 0

    class Invocation:
        def __enter__(self) -> None:
            nonlocal count
            count += 1
            self.name = f"{999_990_000 + count}-1.00"
            self.patch = unittest.mock.patch.dict(os.environ, {"FLOWMATCH_INVOCATION": self.name})
            self.patch.__enter__()

        def __exit__(self, *error: object) -> None:
            self.patch.__exit__(None, None, None)
            live.publish(self.name)

    return Invocation


NUMBERS = {("td_cfm", 0): 1.0, ("td_cfm", 1): 3.0, ("mc_cfm", 0): 0.5, ("mc_cfm", 1): 0.5}


def test_methods_and_seeds_have_the_same_names_and_differ_in_tags(project: Path, invocation: Any) -> None:
    with invocation():
        train(project, "maze", "td_cfm")
        train(project, "maze", "mc_cfm")
        other = RunRecord.start("other", {})
        live.publish(os.environ["FLOWMATCH_INVOCATION"])  # while a stage runs
        evaluate(project, "maze", NUMBERS)
        other.finish("FINISHED")
    (parent,) = parents(project)
    below = children(project, parent)
    cells = {name: run for name, run in below.items() if run.data.tags["kind"] == "cell"}
    assert set(below) - set(cells) == {"train@maze-td_cfm", "train@maze-mc_cfm", "evaluate@maze", "other"}
    assert {below[name].data.tags["kind"] for name in set(below) - set(cells)} == {"stage"}
    assert {run.info.status for run in below.values()} == {"FINISHED"}
    assert len(cells) == 4
    expected = {"train/loss", "train/seconds", "emd", "emd_over_floor"}
    for run in cells.values():
        tags = run.data.tags
        key = (tags["method"], int(tags["seed"]))
        assert set(run.data.metrics) == expected
        assert run.data.metrics["emd"] == NUMBERS[key]
        assert (tags["data"], tags["profile"], tags["device"]) == ("maze", "default", "cpu")
        assert run.data.params == {"data": "maze", "method": key[0], "seed": str(key[1]), "fit.lr": "0.1"}
        (given,) = run.inputs.dataset_inputs
        assert given.dataset.name == "maze"
        assert given.dataset.digest == files.md5(project / "data/transitions/maze")
        assert json.loads(given.dataset.source) == {"uri": "data/transitions/maze", "description": "a generator"}
        assert [column["name"] for column in json.loads(given.dataset.schema)["mlflow_colspec"]] == [*STATES, *ACTIONS]
        assert given.tags[0].value == "training, evaluation"
    client = tracking.Tracker(project / ".flowmatch").client
    history = client.get_metric_history(cells["maze td_cfm seed 1"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(50, 1.02), (100, 1.01)]
    assert len(client.get_metric_history(cells["maze td_cfm seed 1"].info.run_id, "train/seconds")) == 1
    assert parent.data.metrics["maze/td_cfm/emd"] == 2.0
    assert parent.data.metrics["maze/mc_cfm/emd"] == 0.5
    assert parent.data.params == {"profile": "default", "device": "auto"}
    assert parent.data.tags["device"] == "cpu"
    assert parent.data.tags["kind"] == "invocation"


def test_an_evaluation_alone_points_to_the_run_that_trained(project: Path, invocation: Any) -> None:
    with invocation():
        train(project, "maze", "td_cfm")
    with invocation():
        evaluate(project, "maze", {("td_cfm", 0): 1.0, ("td_cfm", 1): 2.0})
    first, second = (
        children(project, parent)
        for parent in sorted(parents(project), key=lambda run: run.data.tags["flowmatch.invocation"])
    )
    assert set(first["maze td_cfm seed 0"].data.metrics) == {"train/loss", "train/seconds"}
    for seed in (0, 1):
        name = f"maze td_cfm seed {seed}"
        assert second[name].data.tags["trained_by"] == first[name].info.run_id
        assert second[name].data.params == first[name].data.params
        assert set(second[name].data.metrics) == {"emd", "emd_over_floor"}
    client = tracking.Tracker(project / ".flowmatch").client
    (version,) = client.search_model_versions("name = 'maze.td_cfm'")
    assert version.run_id == first["train@maze-td_cfm"].info.run_id
    assert {key: version.tags[key] for key in ("score", "score_metric", "score_seeds", "profile")} == {
        "score": "1.5",
        "score_metric": "emd",
        "score_seeds": "2",
        "profile": "default",
    }


def test_a_diverged_seed_has_no_score(project: Path, invocation: Any) -> None:
    with invocation():
        train(project, "maze", "td_cfm")
        evaluate(project, "maze", {("td_cfm", 0): 1.0, ("td_cfm", 1): float("nan")})
    client = tracking.Tracker(project / ".flowmatch").client
    assert client.search_model_versions("name = 'maze.td_cfm'")[0].tags["score"] == "nan"


def test_publishing_cells_again_changes_nothing(project: Path, invocation: Any) -> None:
    def everything() -> list[Any]:
        rows = sorted(runs(project), key=lambda run: str(run.info.run_id))
        return [(run.info.run_id, run.info.status, run.data.metrics, run.data.params, run.data.tags) for run in rows]

    with invocation():
        train(project, "maze", "td_cfm")
        evaluate(project, "maze", {("td_cfm", 0): 1.0})
    before = everything()
    client = tracking.Tracker(project / ".flowmatch").client
    for run in runs(project):  # as if the publisher had died before its end
        client.update_run(run.info.run_id, "RUNNING")
        for tag in ("flowmatch.complete", "flowmatch.state", "flowmatch.offset"):
            if tag in run.data.tags:
                client.delete_tag(run.info.run_id, tag)
    live.publish()
    assert everything() == before


@pytest.mark.filterwarnings("ignore::UserWarning")  # of MLflow about its own type hints
def test_a_version_is_a_model_of_mlflow_without_pickle(project: Path, invocation: Any) -> None:
    import mlflow.pyfunc
    import torch

    from pipelines.models.registry import load

    with invocation():
        for data in ("maze", "table"):
            train(project, data, "td_cfm")
            evaluate(project, data, {("td_cfm", 0): 1.0})
    shutil.rmtree(project / "data")
    folder = versions.files("models:/maze.td_cfm/1")
    assert sorted(file.name for file in folder.iterdir()) == [
        *("MLmodel", "input_example.json", "seed0.safetensors", "seed1.safetensors"),
    ]
    mlflow.set_tracking_uri(store.uri(project / ".flowmatch"))
    model = mlflow.pyfunc.load_model("models:/maze.td_cfm/1")
    example = model.input_example
    assert list(example) == ["state_x", "state_y", "action_push"]
    assert len(example) == 2
    assert [column.name for column in model.metadata.signature.outputs] == ["future_x", "future_y"]
    drawn = model.predict(example, params={"seed": 3})
    assert list(drawn) == ["future_x", "future_y"]
    assert np.isfinite(drawn.to_numpy()).all()
    assert np.array_equal(drawn, model.predict(example, params={"seed": 3}))
    assert not np.array_equal(drawn, model.predict(example, params={"seed": 4}))
    table = mlflow.pyfunc.load_model("models:/table.td_cfm/latest")
    rows = table.input_example
    assert list(rows) == ["a", "b"]
    flow = load("models:/table.td_cfm/1")
    expected = flow.log_prob(torch.tensor(rows.to_numpy(), dtype=torch.float32))  # type: ignore[call-arg]
    assert np.allclose(table.predict(rows)["log_prob"], expected.detach().numpy())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of MLflow about its own type hints
def test_a_conditional_model_has_the_users_columns_in_its_signature(project: Path, invocation: Any) -> None:
    import mlflow.pyfunc
    import torch

    from pipelines.config.params import NetworkChoice
    from pipelines.models import build, saved

    config = build.network_config(NetworkChoice.model_validate({"name": "mlp", "hidden": [8]}), 3, 3)
    meta = {
        "network": config,
        "path": {"name": "cond_ot"},
        "prediction": "velocity",
        "seed": 0,
        "constants": {"unit": 1},
        "columns": ["length", "year", "sex"],
        "types": {"length": "float", "year": "integer", "sex": "text", "species": "text", "mass": "integer"},
        "discrete": {
            "year": {"how": "uniform", "low": 2007, "levels": None},
            "sex": {"how": "uniform", "low": 0, "levels": ["f", "m"]},
        },
        "conditions": [
            {"name": "species", "kind": "words", "levels": ["Adelie", "Gentoo"]},
            {"name": "mass", "kind": "number", "loc": 4000.4, "scale": 800.0, "low": 2700.0, "high": 6300.0},
        ],
    }
    units = torch.tensor([44.0, 2008.6, 0.9]).double(), torch.tensor([5.0, 0.8, 1.4]).double()
    saved.save(project / "data/models/birds/cfm/seed0.safetensors", build.network(config), *units, meta)
    with invocation():
        record = RunRecord.start("train@birds-cfm", {"profile": "default"})
        record.tag("flowmatch.model", "birds.cfm")
        record.artifact(Path("data/models/birds/cfm"))
        record.finish("FINISHED")
    mlflow.set_tracking_uri(store.uri(project / ".flowmatch"))
    model = mlflow.pyfunc.load_model("models:/birds.cfm/1")
    inputs = [(column.name, column.type.name) for column in model.metadata.signature.inputs]
    assert inputs == [
        ("length", "double"),
        ("year", "long"),
        ("sex", "string"),
        ("species", "string"),
        ("mass", "long"),
    ]
    example = model.input_example
    assert example.to_dict("records") == [
        {"length": 44.0, "year": 2008, "sex": "f", "species": "Adelie", "mass": 4000},
        {"length": 49.0, "year": 2009, "sex": "m", "species": "Adelie", "mass": 4000},
    ]
    scores = model.predict(example)["log_prob"]
    assert np.isfinite(scores).all()
    assert scores.equals(model.predict(example[list(reversed(example.columns))])["log_prob"])
    assert not scores.equals(model.predict(example, params={"seed": 1})["log_prob"])  # other dequantisations


def test_the_example_of_a_transformed_table_is_in_its_units(tmp_path: Path) -> None:
    import torch

    from flowmatch_core.marginals import Marginals, Steps
    from pipelines.runs import flavour

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    x = noise * torch.tensor([0.3, 2.0, 5.0, 0.5]) + torch.tensor([6e6, 40.0, 7.0, -3.0], dtype=torch.float64)
    fitted = Marginals.fit(x[:, :3], kinds=["mixture", "steps", "identity"]).columns
    marginals = Marginals([*fitted, Steps.fit(x[:, 3], start=-3.01, width=0.1)])  # type: ignore[list-item]
    u = marginals(x)[0]
    loc, scale = (u.mean(0), u.std(0))
    state = {f"marginals.{name}": value for name, value in marginals.state_dict().items()}
    files.write_tensors(
        tmp_path / "seed0.safetensors",
        {**state, "loc": loc, "scale": scale},
        {"columns": ["a", "b", "c", "d"], "marginals": marginals.description},
    )
    flavour.write(tmp_path, tmp_path, "0" * 32)
    first, second = np.array(json.loads((tmp_path / "input_example.json").read_text())["data"])
    assert np.allclose(first, x.mean(0), atol=[0.01, 0.1, 1e-6, 0.01], rtol=0)
    assert np.allclose(second - first, x.std(0), rtol=0.05)


def test_the_example_of_an_environment_has_its_constants_and_mean_actions(tmp_path: Path) -> None:
    import torch

    from pipelines.runs import flavour

    meta = {
        "gamma": 0.9,
        "state_names": ["x", "height", "y"],
        "action_names": ["push"],
        "constants": {"height": 1.5},
        "action_loc": [400.0],
        "action_scale": [50.0],
    }
    tensors = {
        "loc": torch.tensor([6e6 + 0.25, 1.5, 2.0], dtype=torch.float64),
        "scale": torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64),
    }
    files.write_tensors(tmp_path / "seed0.safetensors", tensors, meta)
    flavour.write(tmp_path, tmp_path, "0" * 32)
    example = json.loads((tmp_path / "input_example.json").read_text())
    assert example["columns"] == ["state_x", "state_height", "state_y", "action_push"]
    assert example["data"] == [[6e6 + 0.25, 1.5, 2.0, 400.0], [6e6 + 0.75, 1.5, 5.0, 400.0]]


def test_aliases_and_tags_of_versions(project: Path, invocation: Any) -> None:
    for _ in range(2):
        with invocation():
            train(project, "maze", "td_cfm", seeds=(0,))
    registry = Registry()
    assert [version.number for version in registry.versions("maze.td_cfm")] == [2, 1]
    registry.crown("maze.td_cfm", 1, None)
    registry.tag("maze.td_cfm", 1, {"reason": "the first"})
    assert registry.champion("maze.td_cfm") == 1
    assert registry.versions("maze.td_cfm")[1].tags["reason"] == "the first"
    assert versions.files("models:/maze.td_cfm@champion").is_dir()
    assert registry.versions("maze.other") == []


def test_compare_prints_the_newest_cells_with_their_intervals(
    project: Path, invocation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowmatch_core.intervals import t_interval
    from pipelines.orchestration.__main__ import main

    with invocation():
        train(project, "maze", "td_cfm")
        train(project, "maze", "mc_cfm")
        evaluate(project, "maze", dict.fromkeys(NUMBERS, 9.0))  # replaced by what follows
    with invocation():
        evaluate(project, "maze", NUMBERS)
    with invocation():
        evaluate(project, "maze", {("td_cfm", 0): 7.0}, profile="smoke")
    with invocation():
        train(project, "maze", "td_cfm")  # not evaluated
    capsys.readouterr()
    assert main(["compare", "--json", "--metric", "emd"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"td_cfm", "mc_cfm"}
    expected = t_interval([1.0, 3.0])
    emd = rows["td_cfm"]["metrics"]["emd"]
    assert (emd["mean"], emd["low"], emd["high"]) == pytest.approx(expected[:3])
    assert emd["seeds"] == {"0": 1.0, "1": 3.0}
    second = next(run for run in parents(project) if run.data.metrics.get("maze/td_cfm/emd") == 2.0)
    assert rows["td_cfm"]["run"].endswith(f"/runs/{second.info.run_id}")
    assert main(["compare", "--data", "maze"]) == 0
    first, *lines, blank, link = capsys.readouterr().out.splitlines()
    assert first.split() == ["data", "method", "seeds", "emd", "emd_over_floor", "run"]
    assert [line.split()[:6] for line in lines] == [
        ["maze", "mc_cfm", "2", "0.5", "±", "0"],
        ["maze", "td_cfm", "2", "2", "±", "13"],
    ]
    assert (blank, link.count("%22")) == ("", 2 * len(NUMBERS) + 2)  # quotes around the ids of runs and experiment
    assert main(["compare", "--data", "nowhere"]) == 1
    assert "no finished run of profile 'default' with emd" in capsys.readouterr().err


def test_a_users_table_is_an_input_of_mlflow_with_its_file_and_types(project: Path, invocation: Any) -> None:
    """Its address is that of the file in the project, whichever folder the stage ran in."""
    import mlflow.data

    provenance = {
        "source": "a table",
        "columns": ["length", "year"],
        "conditions": [{"name": "species", "kind": "words"}],
        "types": {"length": "float", "year": "integer", "species": "text"},
        "loc": [0.0, 0.0],
        "files": {"../../data/raw/b.csv": "b" * 64, "../../data/raw/a.csv": "a" * 64},
    }
    here = project / ".workspaces" / "mine"
    files.write_json(here / "data/prepared/table/provenance.json", provenance)
    with invocation(), contextlib.chdir(here):
        record = RunRecord.start("train@table-cfm", {"profile": "mine"})
        record.data("table", "training", Path("data/prepared/table"), provenance)
        record.cells([Cell("table", "cfm", 0)])
        record.finish("FINISHED")
    cell = children(project, parents(project)[0])["table cfm seed 0"]
    (given,) = cell.inputs.dataset_inputs
    assert given.dataset.name == "table"
    assert given.dataset.digest == files.md5(here / "data/prepared/table")
    columns = json.loads(given.dataset.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [
        *(("length", "double"), ("year", "long"), ("species", "string")),
    ]
    source = json.loads(given.dataset.source)
    assert source["sha256"] == {"data/raw/a.csv": "a" * 64, "data/raw/b.csv": "b" * 64}
    assert mlflow.data.get_source(given).uri == "data/raw/a.csv"  # type: ignore[attr-defined]
