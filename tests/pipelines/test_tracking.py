from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any

import pytest

from pipelines.runs import live, records, tracking, versions
from pipelines.runs.records import RunRecord
from tests.pipelines.conftest import PARAMS, write
from tests.pipelines.runs import children, curve, kept, parents, runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GONE = "999999999-1.00"  # an invocation whose owner does not run


@pytest.fixture(autouse=True)
def database(request: pytest.FixtureRequest, project: Path, schema: Path) -> None:
    if "fresh" not in request.node.name:
        shutil.copy(schema, project / "mlflow.db")


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> str:
    """An invocation that still runs, as an orchestrator's."""
    import psutil

    name = f"{psutil.Process().ppid()}-{psutil.Process(psutil.Process().ppid()).create_time():.2f}"
    monkeypatch.setenv("FLOWMATCH_INVOCATION", name)
    return name


def everything(project: Path) -> Any:
    return [
        (
            run.info.run_id,
            run.info.status,
            run.data.metrics,
            run.data.params,
            run.data.tags,
            curve(project, run),
        )
        for run in sorted(runs(project), key=lambda run: str(run.info.run_id))
    ]


def repro(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", *arguments], check=True)


def test_a_run_is_published_as_it_goes_on(project: Path, owner: str) -> None:
    whole = {"seed": 3, "device": "auto", "density": {"fit": {"lr": 0.1}}}
    record = RunRecord.start("train@moons-cfm", {"dataset": "moons", "seed": 3, "fit": {"lr": 0.1}}, whole)
    record.tag("device", "cpu")
    record._flushed = -100.0  # so that the next point is written at once
    record.series(0, {"loss": 4.0})
    live.publish(owner)
    (parent,) = parents(project)
    child = children(project, parent)["train@moons-cfm"]
    assert (parent.info.status, child.info.status) == ("RUNNING", "RUNNING")
    assert curve(project, child) == [(0, 4.0)]
    assert parent.data.params == {"seed": "3", "device": "auto", "density.fit.lr": "0.1"}  # params.yaml's
    assert child.data.params == {"dataset": "moons", "seed": "3", "fit.lr": "0.1"}
    record.series(1, {"loss": 2.0})
    record.metrics({"nll@test": 1.5})
    record.finish("FINISHED")
    live.publish(owner)
    child = children(project, parents(project)[0])["train@moons-cfm"]
    assert curve(project, child) == [(0, 4.0), (1, 2.0)]
    assert child.data.metrics["nll:test"] == 1.5
    assert child.data.tags["device"] == "cpu"
    assert child.info.status == "FINISHED"
    assert parents(project)[0].info.status == "RUNNING"  # others may follow


def test_publishing_again_changes_nothing(project: Path) -> None:
    repro()
    live.publish()
    before = everything(project)
    assert len(before) == 5
    live.publish()
    assert everything(project) == before
    client = tracking.Tracker(project / ".flowmatch").client
    for run in runs(project):  # as if the publisher had died after the points and before their offset
        client.set_tag(run.info.run_id, "flowmatch.offset", "0")
        client.delete_tag(run.info.run_id, "flowmatch.offset")
        client.update_run(run.info.run_id, "RUNNING")
        if "flowmatch.complete" in run.data.tags:
            client.delete_tag(run.info.run_id, "flowmatch.complete")
    live.publish()
    assert everything(project) == before


def test_a_bare_repro_is_completed_from_dvcs_side(project: Path) -> None:
    repro()
    live.publish()
    (parent,) = parents(project)
    own = children(project, parent)
    assert set(own) == {"leaf@a", "leaf@b", "join", "side"}
    assert {run.info.status for run in [parent, *own.values()]} == {"FINISHED"}
    assert parent.data.metrics == {"leaf:a/score": 1.5, "leaf:b/score": 1.5, "join/score": 2.0, "side/score": 3.0}
    assert parent.data.params["join.value"] == "2"
    assert json.loads(kept(project, parent, "lineage.json")) == {k: run.info.run_id for k, run in own.items()}
    assert kept(project, parent, "dvc.lock") == (project / "dvc.lock").read_text()
    assert kept(project, own["side"], "side.txt") == "3"
    assert curve(project, own["side"]) == [(0, 3.0), (1, 1.5), (2, 1.0)]


def test_what_dvc_skips_or_restores_points_to_the_run_that_made_it(project: Path) -> None:
    repro()
    live.publish()
    first = {name: run.info.run_id for name, run in children(project, parents(project)[0]).items()}
    write(project, "params.yaml", PARAMS.replace("side: {value: 3}", "side: {value: 4}"))
    repro()
    live.publish()
    second = parents(project)[1]
    (side,) = children(project, second).values()
    expected = {**first, "side": side.info.run_id}
    assert json.loads(kept(project, second, "lineage.json")) == expected
    assert second.data.metrics == {"side/score": 4.0}  # of the stage that ran, and of no other
    write(project, "params.yaml", PARAMS)
    with live.live(project, GONE) as outcome:  # nothing runs: side comes back from the run cache
        repro()
        outcome.status = "FINISHED"
    third = next(run for run in parents(project) if run.data.tags["flowmatch.invocation"] == GONE)
    assert children(project, third) == {}
    assert json.loads(kept(project, third, "lineage.json")) == first


def test_an_output_of_an_unknown_run_points_to_none(project: Path) -> None:
    repro("side")
    for path in (project / ".flowmatch/runs").rglob("*.json*"):
        path.unlink()
    repro("leaf@a")
    live.publish()
    (parent,) = parents(project)
    own = children(project, parent)
    assert json.loads(kept(project, parent, "lineage.json")) == {
        "leaf@a": own["leaf@a"].info.run_id,
        "side": None,
    }


def test_a_crash_becomes_killed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMATCH_INVOCATION", GONE)
    code = """
import os
from pipelines.runs.records import RunRecord
r = RunRecord.start('s', {})
r._flushed = -100.0
r.series(0, {'loss': 1})
r.series(1, {'loss': 0.5})
os.abort()
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    live.publish()
    (parent,) = parents(project)
    child = children(project, parent)["s"]
    assert (parent.info.status, child.info.status) == ("KILLED", "KILLED")
    assert "ended without a status" in child.data.tags["mlflow.note.content"]
    assert curve(project, child) == [(0, 1.0)]


def test_a_stage_found_faulty_after_it_was_published_is_failed(project: Path, owner: str) -> None:
    record = RunRecord.start("s", {})
    record.finish("FINISHED")
    live.publish(owner)
    record.finish("FAILED", "params.yaml has changed")
    live.publish(owner)
    (run,) = children(project, parents(project)[0]).values()
    assert (run.info.status, run.data.tags["mlflow.note.content"]) == ("FAILED", "params.yaml has changed")


def test_an_attempt_that_was_tried_again_stays_visible(project: Path, owner: str) -> None:
    RunRecord.start("s", {})
    live.publish(owner)
    time.sleep(0.01)
    RunRecord.start("s", {}).finish("FINISHED")
    live.publish(owner)
    statuses = sorted(run.info.status for run in runs(project) if run.info.run_name == "s")
    assert statuses == ["FAILED", "FINISHED"]


def test_concurrent_publishers_on_a_fresh_store_do_no_harm(project: Path) -> None:
    repro()
    command = [sys.executable, "-c", "from pipelines.runs import live; live.publish()"]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    (parent,) = parents(project)
    assert set(children(project, parent)) == {"leaf@a", "leaf@b", "join", "side"}


def test_a_store_that_was_deleted_is_made_afresh(project: Path) -> None:
    repro("side")
    code = "from pipelines.runs import live; live.publish()"
    subprocess.run([sys.executable, "-c", code], check=True)
    (project / "mlflow.db").unlink()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(parents(project)) == 1


def test_a_run_that_was_deleted_by_hand_stays_deleted(project: Path) -> None:
    repro("side")
    live.publish()
    client = tracking.Tracker(project / ".flowmatch").client
    for run in runs(project):
        client.delete_run(run.info.run_id)
    live.publish()
    assert {run.info.lifecycle_stage for run in runs(project)} == {"deleted"}
    assert len(runs(project)) == 2


def test_the_snapshot_is_taken_before_the_next_run_overwrites(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repro()
    monkeypatch.setenv("FLOWMATCH_INVOCATION", GONE)
    write(project, "params.yaml", PARAMS.replace("join: {value: 2}", "join: {value: 9}"))
    with live.live(project, GONE, every=600.0) as outcome:  # between two stages what has no owner seems over
        repro()
        outcome.status = "FINISHED"
    live.publish()
    ends = {run.data.tags["flowmatch.invocation"] == GONE: kept(project, run, "dvc.lock") for run in parents(project)}
    assert "value: 9" in ends[True]
    assert "value: 9" not in ends[False]


def test_the_outcome_is_the_orchestrators(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMATCH_INVOCATION", GONE)

    def interrupted() -> None:
        with live.live(project, GONE):
            RunRecord.start("s", {}).finish("FINISHED")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [run.info.status for run in parents(project)] == ["KILLED"]


def test_a_killed_orchestrator_leaves_killed_and_only_its_own_numbers(project: Path) -> None:
    repro()  # what stands in the workspace before
    code = """
import os, pathlib, sys
from pipelines.runs import live, records
from pipelines.runs.records import RunRecord
import psutil
os.environ["FLOWMATCH_INVOCATION"] = name = records.name_of(psutil.Process())
with live.live(pathlib.Path.cwd(), name, every=600.0):
    record = RunRecord.start("mine", {})
    record.metrics({"score": 7})
    record.finish("FINISHED")
    print(name, flush=True)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    live.publish()
    parent = next(run for run in parents(project) if run.data.tags["flowmatch.invocation"] == killed.stdout.strip())
    assert parent.info.status == "KILLED"
    assert parent.data.metrics == {"mine/score": 7.0}


def test_what_is_checked_out_afterwards_is_not_the_runs(project: Path) -> None:
    repro()
    before = {name: (project / name).read_text() for name in ("dvc.lock", "data/metrics/join.json", "params.yaml")}
    live.publish()
    (first,) = parents(project)
    write(project, "params.yaml", PARAMS.replace("join: {value: 2}", "join: {value: 9}"))
    repro()
    for name, text in before.items():  # git checkout
        write(project, name, text)
    live.publish()
    second = parents(project)[1]
    assert second.data.metrics == {"join/score": 9.0}
    assert second.data.params["join.value"] == "9"
    own = children(project, second)
    assert json.loads(kept(project, second, "lineage.json")) == {"join": own["join"].info.run_id}
    assert not (project / "mlartifacts" / second.info.run_id / "artifacts" / "dvc.lock").exists()
    assert json.loads(kept(project, first, "lineage.json"))["join"] != own["join"].info.run_id


def test_runs_in_a_row_keep_their_numbers_until_they_are_published(project: Path) -> None:
    for value in (5, 6, 7):
        write(project, "params.yaml", PARAMS.replace("side: {value: 3}", f"side: {{value: {value}}}"))
        repro("side")
    live.publish()
    assert [run.data.metrics for run in parents(project)] == [{"side/score": float(value)} for value in (5, 6, 7)]
    assert [run.data.params["side.value"] for run in parents(project)] == ["5", "6", "7"]


def test_the_digest_of_an_output_is_dvcs(project: Path) -> None:
    import yaml

    from pipelines.base import files

    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "step.py"], check=True)
    assert files.md5(project / "step.py") == yaml.safe_load((project / "step.py.dvc").read_text())["outs"][0]["md5"]
    write(project, "folder/b/2.txt", "2")
    write(project, "folder/b.txt", "b")
    write(project, "folder/a/1.txt", "1")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "folder"], check=True)
    assert files.md5(project / "folder") == yaml.safe_load((project / "folder.dvc").read_text())["outs"][0]["md5"]


@pytest.mark.slow
def test_experiments_of_dvc_are_not_mixed_with_what_is_checked_out(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        subprocess.run(command, check=True, capture_output=True)

    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "t@t")
    git("init", "-q")
    write(project, ".dvc/config", "[core]\n    analytics = false\n")
    write(project, ".gitignore", "/data\n/seen\n/.flowmatch\n/mlflow.db\n/mlartifacts\n/.dvc/tmp\n/.dvc/cache\n")
    repro()
    git("add", ".")
    git("commit", "-qm", "x")
    for value in (7, 8, 9):
        experiment = [sys.executable, "-m", "dvc", "exp", "run", "-q", "-S", f"join.value={value}"]
        subprocess.run(experiment, check=True)
    git("checkout", "-q", "-f", "HEAD")
    live.publish()
    assert [run.data.metrics.get("join/score") for run in parents(project)] == [2.0, 7.0, 8.0, 9.0]
    assert [run.data.params["join.value"] for run in parents(project)] == ["2", "7", "8", "9"]
    assert {run.info.status for run in parents(project)} == {"FINISHED"}


def test_live_publishes_while_stages_run(project: Path, owner: str) -> None:
    with live.live(project, owner, every=0.1) as outcome:
        RunRecord.start("s", {})
        until = time.monotonic() + 60
        while not runs(project):
            assert time.monotonic() < until, "nothing was published meanwhile"
            time.sleep(0.2)
        outcome.status = "FINISHED"


def test_a_tracker_that_is_away_costs_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record = RunRecord.start("s", {})
    record.finish("FINISHED")
    live.publish_quietly(record.invocation, "s")
    said = capsys.readouterr().err
    assert said.startswith("tracking: not published (")
    assert said.count("\n") == 1
    with live.live(project, record.invocation, every=0.01):
        time.sleep(0.3)
    assert capsys.readouterr().err.count("not published") == 1


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, pipelines.runs.records, pipelines.runs.tracking; print('mlflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


def test_a_stage_by_hand_is_complete_at_once(project: Path) -> None:
    record = RunRecord.start("s", {})
    record.finish("FINISHED")
    live.publish_quietly(record.invocation, "s")
    assert [run.info.status for run in parents(project)] == ["FINISHED"]


def test_records_know_their_invocation(project: Path) -> None:
    assert records.owner_of(GONE) == (999999999, 1.0)
    assert not records.is_alive(*records.owner_of(GONE))


def trained(project: Path, name: str = "spiral.td_cfm", **params: Any) -> str:
    """A finished training run with a tiny model of two seeds; its MLflow id."""
    import torch

    from pipelines.config.params import NetworkChoice
    from pipelines.models import build, saved

    data, method = name.split(".")
    folder = project / "data" / "models" / data / method
    config = build.network_config(NetworkChoice(name="mlp", hidden=[8], activation="tanh"), 2, 3)
    meta = {"network": config, "path": {"name": "cond_ot"}, "prediction": "velocity", "gamma": 0.75}
    meta |= {"state_names": ["x", "y"], "action_names": ["push"]}
    for seed in (1, 2):
        torch.manual_seed(seed)
        loc, scale = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0])
        saved.save(folder / f"seed{seed}.safetensors", build.network(config), loc, scale, {**meta, "seed": seed})
    # an invocation of its own: one that is complete takes no more runs
    owner = {"FLOWMATCH_INVOCATION": f"{999_999_000 + len(list((project / '.flowmatch' / 'runs').glob('*')))}-1.00"}
    with unittest.mock.patch.dict(os.environ, owner):
        record = RunRecord.start(f"train_successor@{data}-{method}", {"environment": data, **params})
    record.artifact(folder.relative_to(project))
    record.tag("flowmatch.model", name)
    record.finish("FINISHED")
    live.publish(record.invocation)
    run = max(runs(project), key=lambda run: run.data.tags.get("flowmatch.started", ""))
    return str(run.info.run_id)


def trained_by(project: Path, name: str) -> list[str]:
    client = tracking.Tracker(project / ".flowmatch").client
    return [str(version.run_id) for version in client.search_model_versions(f"name = '{name}'")]


def test_a_trained_model_is_registered_and_answers(project: Path) -> None:
    import torch

    from flowmatch_core.successor import HorizonModel
    from pipelines.models import successor
    from pipelines.models.registry import load

    run = trained(project)
    assert trained_by(project, "spiral.td_cfm") == [run]
    file = project / "data/models/spiral/td_cfm/seed1.safetensors"
    truth = successor.load(file, torch.device("cpu"), "rk4", 20)
    shutil.rmtree(project / "data")  # MLflow has its own copy
    state, action = torch.randn(5, 2), torch.randn(5, 1)

    def answers(model: Any) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        values = model.value(lambda x: x[..., 0], state, action, 7, generator=g)
        return [model.sample(state, action, 7, generator=g), model.log_prob(state, state, action), values]

    expected = answers(truth)
    assert [tuple(answer.shape) for answer in expected] == [(7, 5, 2), (5,), (5,)]
    client = tracking.Tracker(project / ".flowmatch").client
    client.set_registered_model_alias("spiral.td_cfm", "champion", "1")
    base = "models:/spiral.td_cfm"
    kept = project / "mlartifacts" / run / "artifacts" / "td_cfm"
    for uri in ("spiral.td_cfm", f"{base}/latest", f"{base}/1", f"{base}@champion", f"runs:/{run}", str(kept)):
        model = load(uri)
        assert isinstance(model, HorizonModel)
        for answer, should in zip(answers(model), expected, strict=True):
            assert torch.equal(answer, should), uri
    other = answers(load(f"{base}/latest", seed=2))
    assert not torch.equal(other[0], expected[0])


def test_latest_is_the_last_one_trained_and_not_another_profiles(project: Path) -> None:
    first, second = trained(project), trained(project)
    smoke = trained(project, profile="smoke")
    assert trained_by(project, "spiral.td_cfm") == [second, first]
    assert trained_by(project, "smoke.spiral.td_cfm") == [smoke]
    client = tracking.Tracker(project / ".flowmatch").client
    assert versions._find(client, "spiral.td_cfm", "latest", "").run_id == second
    assert versions._find(client, "spiral.td_cfm", "1", "").run_id == first


def test_a_name_may_leave_out_the_profile_if_it_leads_to_one_model(project: Path) -> None:
    from pipelines.base.errors import UserError

    trained(project, profile="smoke")
    assert versions.resolve("spiral.td_cfm") == "models:/smoke.spiral.td_cfm/latest"
    trained(project, profile="paper")
    with pytest.raises(UserError, match=r"each of the models paper\.spiral.td_cfm, smoke\.spiral\.td_cfm; give one"):
        versions.resolve("spiral.td_cfm")
    assert versions.resolve("paper.spiral.td_cfm") == "models:/paper.spiral.td_cfm/latest"
    trained(project)
    assert versions.resolve("spiral.td_cfm") == "models:/spiral.td_cfm/latest"


def test_loading_leaves_no_copies(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    from pipelines.models.registry import load

    trained(project)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    load("spiral.td_cfm")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_model_is_registered_once(project: Path) -> None:
    run = trained(project)
    client = tracking.Tracker(project / ".flowmatch").client
    for found in runs(project):  # as if the publisher had died before it said that the run is over
        client.update_run(found.info.run_id, "RUNNING")
        if "flowmatch.complete" in found.data.tags:
            client.delete_tag(found.info.run_id, "flowmatch.complete")
    live.publish()
    assert trained_by(project, "spiral.td_cfm") == [run]


def test_what_a_failed_training_left_is_no_model(project: Path) -> None:
    record = RunRecord.start("train_successor@spiral-mc_cfm", {})
    record.tag("flowmatch.model", "spiral.mc_cfm")
    record.finish("FAILED", "stopped")
    live.publish(record.invocation)
    assert [run.info.run_name for run in runs(project) if run.info.status == "FAILED"] != []
    assert trained_by(project, "spiral.mc_cfm") == []


def test_a_model_that_cannot_be_had_is_one_sentence(project: Path) -> None:
    from pipelines.base.errors import UserError
    from pipelines.models.registry import load

    trained(project)
    untrained = next(run.info.run_id for run in parents(project))
    for uri, words in (
        ("models:/spiral.td_cmf/latest", "no model 'spiral.td_cmf', only spiral.td_cfm; did you mean 'spiral.td_cfm'"),
        ("models:/spiral.td_cfm/7", "no model 'models:/spiral.td_cfm/7'"),
        ("models:/spiral.td_cfm@champion", "no model 'models:/spiral.td_cfm@champion'"),
        ("models:/spiral.td_cfm", "models:/<name>/<version>"),
        ("spiral.td_cmf", "no model 'spiral.td_cmf', only spiral.td_cfm; did you mean 'spiral.td_cfm'"),
        ("runs:/0123", "no model 'runs:/0123'"),
        (f"runs:/{untrained}", "expected one that trained a model"),
    ):
        with pytest.raises(UserError) as caught:
            load(uri)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no seed 3, only 1, 2"):
        load("models:/spiral.td_cfm/latest", seed=3)


def test_to_load_a_model_where_no_runs_are_makes_no_database(project: Path) -> None:
    from pipelines.base.errors import UserError
    from pipelines.models.registry import load

    (project / "mlflow.db").unlink()
    with pytest.raises(UserError, match="there are no runs in sqlite"):
        load("models:/spiral.td_cfm/latest")
    assert not (project / "mlflow.db").exists()
