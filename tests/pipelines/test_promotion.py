"""The champion of a model changes only for a challenger that is better beyond the error, and the reason is kept."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.config.params import NetworkChoice
from pipelines.config.yaml_files import merge, read_yaml
from pipelines.evaluation.likelihood import Likelihood
from pipelines.models import build, saved
from pipelines.orchestration import __main__ as command_line
from pipelines.orchestration import contest, promotion
from pipelines.orchestration.contest import Scores, compare
from pipelines.runs import live, versions
from pipelines.runs.champions import Registry
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# ---- the rule ----


def scores(values: Any, error: float = 0.0) -> Scores:
    return Scores(np.asarray(values, dtype=np.float64), error)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("pairs", [8, 100])
def test_an_equal_challenger_wins_as_rarely_as_the_level_says(level: float, pairs: int) -> None:
    rng, trials = np.random.default_rng(0), 1000
    wins = 0
    for _ in range(trials):
        champion = rng.normal(2.0, 3.0, pairs)
        challenger = champion + rng.normal(0.0, 1.0, pairs)
        wins += compare(scores(challenger), scores(champion), level, 8).better
    error = math.sqrt(level * (1 - level) / trials)
    assert wins / trials == pytest.approx(1 - level, abs=4 * error)


def test_a_better_challenger_wins_and_a_worse_one_does_not() -> None:
    rng = np.random.default_rng(1)
    champion = rng.normal(2.0, 3.0, 500)
    noise = rng.normal(0.0, 0.1, 500)
    better = compare(scores(champion - 0.1 + noise), scores(champion), 0.95, 8)
    assert better.better
    assert better.difference == pytest.approx(0.1, abs=0.02)
    assert better.bound is not None and 0.08 < better.bound < better.difference
    assert "better, one-sided bound" in better.reason and "not beyond" not in better.reason
    worse = compare(scores(champion + 0.1 + noise), scores(champion), 0.95, 8)
    assert not worse.better
    assert re.fullmatch(r"[\d.]+ worse, one-sided bound -[\d.]+", worse.reason)


def test_what_is_not_beyond_the_error_keeps_the_champion_and_says_so() -> None:
    champion = np.zeros(10)
    verdict = compare(scores([-1.0, 0.9] * 5), scores(champion), 0.95, 8)
    assert not verdict.better
    assert verdict.reason.startswith("0.05 better, one-sided bound -")
    assert verdict.reason.endswith(": not beyond the error")


def test_the_bound_is_that_of_the_one_sided_t_test() -> None:
    from scipy import stats

    gain = np.random.default_rng(2).normal(0.3, 1.0, 12)
    bound = compare(scores(-gain), scores(np.zeros(12)), 0.9, 8).bound
    assert bound == pytest.approx(gain.mean() - stats.t.ppf(0.9, 11) * gain.std(ddof=1) / math.sqrt(12))


def test_the_error_of_the_solvers_is_no_reason_to_win() -> None:
    gain = np.full(20, 0.1) + np.random.default_rng(3).normal(0, 0.01, 20)
    assert compare(scores(-gain, 0.02), scores(np.zeros(20), 0.02), 0.95, 8).better
    assert not compare(scores(-gain, 0.06), scores(np.zeros(20), 0.05), 0.95, 8).better


def test_the_order_of_rows_has_no_effect() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 501))
    order = rng.permutation(501)
    assert compare(scores(a), scores(b), 0.95, 8) == compare(scores(a[order]), scores(b[order]), 0.95, 8)
    assert scores(a).mean == scores(a[order]).mean


def test_ties_missing_numbers_and_few_pairs_keep_the_champion() -> None:
    x, broken = np.arange(9.0), np.array([*range(8), np.nan])
    for challenger, champion, better, reason in (
        (x, x, False, "equally good"),
        (broken, x, False, "the challenger's score is not a finite number on 1 of 9 pairs"),
        (broken, None, False, "the challenger's score is not a finite number on 1 of 9 pairs"),
        (broken, broken, False, "the challenger's score is not a finite number on 1 of 9 pairs"),
        (np.full(9, -np.inf), x, False, "the challenger's score is not a finite number on 9 of 9 pairs"),
        (x, broken, True, "the champion's score is not a finite number on 1 of 9 pairs"),
        (x, None, True, "there was no champion"),
        (x[:2], None, True, "there was no champion"),
        (x[:7] - 100, x[:7], False, "only 7 pairs to compare on, expected at least 8"),
    ):
        verdict = compare(scores(challenger), None if champion is None else scores(champion), 0.95, 8)
        assert (verdict.better, verdict.reason) == (better, reason)


# ---- real models in a real registry ----

SMALL = {
    "seed": 1,
    "device": "cpu",
    "datasets": {"moons": {"train": 1000, "val": 50, "test": 200}},
    "density": {
        "methods": {"cfm": {"path": {"name": "cond_ot"}, "coupling": "independent", "loss": "cfm"}},
        "seeds": [0],
        "fit": {"network": {"hidden": [32, 32]}, "log_every": 50, "warmup": 5},
        "evaluate": {"likelihood_rows": 150, "steps": 16},
    },
    "environments": {"spiral": {"starts": 8, "fit": {"network": {"hidden": [8]}}}},
}


def save(file: Path, loc: float, columns: int = 2, conditions: int = 0, **meta: Any) -> None:
    """Write a network of random weights, whose samples lie about `loc`; one that is NaN breaks the network."""
    config = build.network_config(NetworkChoice(name="mlp", hidden=[8], activation="tanh"), columns, conditions)
    torch.manual_seed(0)
    network = build.network(config)
    if math.isnan(loc):
        for weights in network.parameters():
            torch.nn.init.constant_(weights, math.nan)
    described = {"network": config, "path": {"name": "cond_ot"}, "prediction": "velocity", **meta}
    middle = torch.full((columns,), 0.0 if math.isnan(loc) else loc)
    saved.save(file, network, middle, torch.ones(columns), described)


EXPERIMENTS = dict.fromkeys(read_yaml(ROOT / "params.yaml")["experiments"])


class Project:
    """A project of one data set, whose stages run in this process."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, 0

    def write(self, **changes: Any) -> None:
        given = read_yaml(ROOT / "params.yaml")
        for section in ("datasets", "environments"):
            given[section] = {name: given[section][name] for name in SMALL[section]}  # type: ignore[attr-defined]
        given["density"]["methods"] = {}
        params = merge(merge(given, SMALL), changes)
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))

    def stage(self, name: str) -> Stage:
        params = parameters.load()
        return Stage(name, params, RunRecord.start(name, {"profile": params.profile}))

    def prepare(self) -> None:
        from pipelines.data import prepare

        prepare.write(self.stage("prepare@moons"), "moons")

    def new_run(self, monkeypatch: pytest.MonkeyPatch) -> str:
        self.runs += 1
        monkeypatch.setenv("FLOWMATCH_INVOCATION", f"{999_999_000 + self.runs}-1.00")
        return f"{999_999_000 + self.runs}-1.00"

    def train(self, monkeypatch: pytest.MonkeyPatch, steps: int, **changes: Any) -> str:
        """Train in an invocation of its own and publish it."""
        from pipelines.training import density

        invocation = self.new_run(monkeypatch)
        self.write(**merge({"density": {"fit": {"steps": steps}}}, changes))
        stage = self.stage("train_density@moons-cfm")
        density.train(stage, "moons", "cfm")
        stage.record.finish("FINISHED")
        live.publish(invocation)
        return invocation

    def version(self, number: int) -> Any:
        return next(v for v in Registry().versions("moons.cfm") if v.number == number)

    def filed(self) -> list[promotion.Decision]:
        """The decisions on the runs of invocations, by challenger."""
        found = [json.loads(file.read_text()) for file in self.root.rglob("promotion/moons.cfm.json")]
        return sorted((promotion.Decision(**one) for one in found), key=lambda decision: decision.challenger)

    def register(
        self, monkeypatch: pytest.MonkeyPatch, loc: float, columns: int = 2, model: str = "moons.cfm", **meta: Any
    ) -> int:
        """Register a model that was not trained, the worse the further `loc` is off; its version."""
        invocation, (data, method) = self.new_run(monkeypatch), model.split(".")
        folder = layout.models(data, method)
        shutil.rmtree(folder, ignore_errors=True)
        save(layout.network(folder, 0), loc, columns, **meta)
        stage = self.stage(f"train@{data}-{method}")
        stage.record.artifact(folder)
        stage.record.tag("flowmatch.model", model)
        stage.record.finish("FINISHED")
        live.publish(invocation)
        return Registry().versions(versions.name_of(model, stage.params.profile))[0].number

    def champion(self) -> int | None:
        return Registry().champion("moons.cfm")


@pytest.fixture
def empty(project: Path, schema: Path) -> Project:
    """A project without runs; `project` is the current folder with records of its own."""
    shutil.copy(schema, project / "mlflow.db")
    made = Project(project)
    made.write()
    return made


@pytest.fixture
def prepared(empty: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    empty.new_run(monkeypatch)
    empty.prepare()
    return empty


def test_the_better_model_becomes_champion_and_a_worse_one_does_not_displace_it(
    prepared: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.models.registry import load

    prepared.train(monkeypatch, 20)
    (first,) = promotion.decide(prepared.root)
    assert (first.outcome, first.challenger, first.champion) == ("promoted", 1, None)
    assert first.reason == "there was no champion"
    assert promotion.decide(prepared.root) == []  # it is decided

    second = prepared.train(monkeypatch, 400)
    (better,) = promotion.decide(prepared.root, second)
    assert (better.outcome, better.challenger, better.champion) == ("promoted", 2, 1)
    assert better.champion_score == first.challenger_score  # the same bits in another call
    assert better.test == first.test and better.pairs == 150
    assert better.difference is not None and better.bound is not None
    assert 0 < better.bound < better.difference
    assert prepared.champion() == 2
    flow = load("models:/moons.cfm@champion")
    trained = load("models:/moons.cfm/2")
    x = torch.randn(5, 2)
    assert torch.equal(flow.log_prob(x), trained.log_prob(x))

    third = prepared.train(monkeypatch, 20, seed=2)
    (worse,) = promotion.decide(prepared.root, third)
    assert (worse.outcome, worse.challenger, worse.champion) == ("kept", 3, 2)
    assert re.fullmatch(r"[\d.]+ worse, one-sided bound -[\d.]+", worse.reason)
    assert prepared.champion() == 2

    # the decision stands on the version and on the run
    tags = prepared.version(3).tags
    assert (tags["promotion"], tags["promotion.reason"]) == ("kept", worse.reason)
    assert (tags["promotion.test"], tags["promotion.invocation"]) == (worse.test, third)
    assert float(tags["promotion.challenger_score"]) == worse.challenger_score
    assert prepared.filed() == [first, better, worse]

    # and back
    assert promotion.roll_back("moons.cfm") == "version 1 of moons.cfm is the champion again, in place of version 2."
    assert prepared.champion() == 1
    assert prepared.version(2).tags["promotion"] == "rolled back"
    assert promotion.decide(prepared.root) == []
    with pytest.raises(UserError, match="version 1 as its champion, and none before it"):
        promotion.roll_back("moons.cfm")


def test_the_same_weights_are_the_same_model(prepared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.register(monkeypatch, 1.0)
    promotion.decide(prepared.root)
    prepared.register(monkeypatch, 1.0)
    (same,) = promotion.decide(prepared.root)
    assert (same.outcome, same.reason, same.difference) == ("kept", "the same weights as the champion", 0.0)
    assert prepared.champion() == 1


def test_only_what_stands_in_the_folder_is_decided(
    prepared: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test rows are those of the folder: they say nothing of a model that was trained elsewhere."""
    prepared.register(monkeypatch, 1.0)
    prepared.register(monkeypatch, 2.0)
    networks = layout.models("moons", "cfm")
    save(layout.network(networks, 0), 3.0)
    assert command_line.main(["promote", "--workspace", "."]) == 0
    assert capsys.readouterr().out.startswith("nothing to decide")
    save(layout.network(networks, 0), 1.0)  # that of the older version, which the newer one does not hide
    (decision,) = promotion.decide(prepared.root)
    assert (decision.outcome, decision.challenger) == ("promoted", 1)


def test_a_decision_that_was_interrupted_is_made_again(prepared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.register(monkeypatch, 1.0)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Registry, "crown", die)
        promotion.decide(prepared.root)
    assert prepared.champion() is None
    (again,) = promotion.decide(prepared.root)
    assert (again.outcome, prepared.champion()) == ("promoted", 1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda kept: kept.unlink(), "(MLflow has lost the files of models:/moons.cfm/1"),
        (lambda kept: save(kept, 1.0, columns=3), "(it has the number of columns 3, the challenger 2)"),
        (lambda kept: save(kept, 1.0, path={"name": "of_yore"}), "does not hold a model of this version"),
    ],
    ids=["file gone", "other columns", "other version"],
)
def test_a_champion_that_cannot_be_compared_stays_until_the_operator_chooses(
    prepared: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    reason: str,
) -> None:
    prepared.register(monkeypatch, 5.0)
    promotion.decide(prepared.root)
    (kept,) = (file for file in (prepared.root / "mlartifacts").rglob("seed0.*"))
    spoil(kept)
    prepared.register(monkeypatch, 1.0)
    for _ in range(2):  # it is not decided, so that the next run tries again
        assert command_line.main(["promote", "--workspace", "."]) == 1
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 2
        assert "undecided" in shown[1]
        assert "the champion cannot be compared" in shown[1] and reason in shown[1]
        assert '; choose one by `make promote ARGS="--set moons.cfm <version>"`' in shown[1]
        assert prepared.champion() == 1
    assert command_line.main(["promote", "--set", "moons.cfm", "2"]) == 0
    assert capsys.readouterr().out == "version 2 of moons.cfm is the champion, after version 1.\n"
    assert prepared.champion() == 2
    assert promotion.decide(prepared.root) == []


def test_rows_that_a_model_was_trained_on_are_left_out(prepared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """New data came with another split: 60 of the champion's training rows are now test rows."""
    prepared.register(monkeypatch, 2.0)
    (first,) = promotion.decide(prepared.root)
    folder = layout.prepared("moons")
    train, test = (pd.read_parquet(layout.part(folder, part)) for part in ("train", "test"))
    files.write_table(layout.part(folder, "train"), pd.concat([train[60:], test[60:]]))
    files.write_table(layout.part(folder, "test"), pd.concat([test[:60], train[:60]]))
    prepared.register(monkeypatch, 1.0)
    (second,) = promotion.decide(prepared.root)
    assert (second.pairs, second.outcome) == (60, "promoted")
    assert second.reason.endswith("; 60 of 120 test rows are left out, because a model was trained on them")
    assert second.test != first.test

    files.write_table(layout.part(folder, "test"), pd.concat([test[60:67], train[:60]]))  # nothing is left
    prepared.register(monkeypatch, 0.5)
    (third,) = promotion.decide(prepared.root)
    assert (third.pairs, third.outcome) == (60, "promoted")  # of these rows the second was not trained
    files.write_table(layout.part(folder, "train"), train)
    prepared.register(monkeypatch, 0.4)
    (fourth,) = promotion.decide(prepared.root)
    assert fourth.outcome == "kept"
    assert fourth.reason.startswith("only 0 pairs to compare on, expected at least 8; 67 of 67 test rows are left out")


def test_the_unknown_training_rows_of_a_champion_by_hand_are_mentioned(
    prepared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.register(monkeypatch, 2.0)
    promotion.crown("moons.cfm", "1")
    prepared.register(monkeypatch, 1.0)
    (decision,) = promotion.decide(prepared.root)
    assert decision.reason.endswith("; it is not known which rows the champion was trained on")


def test_a_broken_network_has_no_score_and_is_no_first_champion(
    prepared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.register(monkeypatch, math.nan)
    (decision,) = promotion.decide(prepared.root)
    assert (decision.outcome, decision.challenger_score) == ("kept", None)
    assert decision.reason == "the challenger's score is not a finite number on 150 of 150 pairs"
    assert prepared.champion() is None
    assert json.loads(next(prepared.root.rglob("promotion/moons.cfm.json")).read_text())["challenger_score"] is None


def test_each_model_is_scored_given_the_conditions_as_it_encodes_them_and_by_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout.prepared("mine")
    words = ["a", "b", "b", "b"]
    for number, part in enumerate(layout.PARTS):
        table = pd.DataFrame({"x": np.arange(4.0) + 10 * number, "species": words, "weight": [1.0, 1.0, 3.0, 3.0]})
        files.write_table(tmp_path / layout.part(folder, part), table)
    given = {"name": "species", "kind": "words", "levels": ["a", "b"]}
    described = {"columns": ["x"], "conditions": [given], "weight": "weight", "rows": dict.fromkeys(layout.PARTS, 4)}
    files.write_json(tmp_path / layout.provenance(folder), described)
    monkeypatch.setattr(
        contest,
        "likelihoods",
        lambda file, parts, *rest: {"test": Likelihood(-parts["test"].cond[:, 0].astype(float), np.zeros(4))},
    )
    params = parameters.load(ROOT / "params.yaml")
    params = params.model_copy(update={"datasets": {"mine": params.datasets["moons"]}})
    judged = contest.DensityContest(tmp_path, params, "mine")
    order = np.argsort(judged.rows.x[:, 0])
    for levels, expected in ((["a", "b"], [0.5, 0, 0, 0]), (["b", "a", "c"], [0, 0.5, 1.5, 1.5])):
        file = tmp_path / "-".join(levels)
        monkeypatch.setattr(saved, "meta", lambda file, levels=levels: {"conditions": [{**given, "levels": levels}]})
        found = judged.score({0: file}).values[order]
        np.testing.assert_allclose(found, expected)


def test_the_order_of_the_test_table_has_no_effect(prepared: Project, tmp_path: Path) -> None:
    save(tmp_path / "m", 1.0)
    params = parameters.load()
    before = contest.DensityContest(prepared.root, params, "moons")
    path = layout.part(layout.prepared("moons"), "test")
    files.write_table(path, pd.read_parquet(path).sample(frac=1.0, random_state=0))
    after = contest.DensityContest(prepared.root, params, "moons")
    assert (after.digest, after.note) == (before.digest, "")
    first, again, other = (c.score({0: tmp_path / "m"}) for c in (before, before, after))
    assert np.array_equal(first.values, again.values) and np.array_equal(first.values, other.values)


def test_successor_measures_are_compared_at_each_start_state(empty: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.data import collect

    empty.write(
        environments={"spiral": {"transitions": 50, "rollouts": 4, "length": 60}},
        successor={"sample": {"samples": 64, "steps": 4}},
    )
    empty.new_run(monkeypatch)
    collect.write(empty.stage("collect@spiral"), "spiral")
    names = {"state_names": ["x", "y"], "action_names": ["x", "y"]}
    meta = {"gamma": 0.95, "conditions": 4, "model": "spiral.td_cfm", **names}
    empty.register(monkeypatch, 3.0, **meta)
    (first,) = promotion.decide(empty.root)
    assert (first.outcome, first.metric, first.pairs) == ("promoted", "emd", 8)
    empty.register(monkeypatch, 0.0, **meta)
    (second,) = promotion.decide(empty.root)
    assert (second.outcome, second.test) == ("promoted", first.test)
    assert second.champion_score == first.challenger_score
    empty.register(monkeypatch, 4.0, **meta)
    (third,) = promotion.decide(empty.root)
    assert (third.outcome, third.champion, third.champion_score) == ("kept", 2, second.challenger_score)
    empty.register(monkeypatch, 0.1, **(meta | {"gamma": 0.9}))
    (fourth,) = promotion.decide(empty.root)
    assert fourth.outcome == "undecided"
    assert "it has the discount 0.95, the challenger 0.9" in fourth.reason
    empty.register(monkeypatch, 0.1, **(meta | {"action_names": ["x", "z"]}))
    (fifth,) = promotion.decide(empty.root)
    assert "it has the actions ['x', 'y'], the challenger ['x', 'z']" in fifth.reason


def test_a_profile_has_champions_of_its_own(prepared: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.write(profile="tiny")
    prepared.register(monkeypatch, 1.0)
    (decision,) = promotion.decide(prepared.root)
    assert (decision.model, decision.outcome) == ("tiny.moons.cfm", "promoted")


def test_mistakes_are_one_sentence(
    prepared: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared.register(monkeypatch, 1.0)
    for arguments, words in (
        (["--set", "moons.cmf", "1"], "MLflow has no model 'moons.cmf', only moons.cfm; did you mean 'moons.cfm'?"),
        (["--set", "moons.cfm", "7"], "moons.cfm has no version '7' in MLflow, only 1."),
        (["--set", "moons.cfm", "x'"], 'moons.cfm has no version "x\'" in MLflow, only 1.'),
        (["--rollback", "moons.cfm"], "moons.cfm has no champion; choose one by `make promote ARGS="),
        (["--rollback", "it's"], 'MLflow has no model "it\'s", only moons.cfm.'),
        (["--workspace", "elsewhere"], "elsewhere/params.yaml"),
    ):
        assert command_line.main(["promote", *arguments]) == 1
        (sentence,) = capsys.readouterr().err.splitlines()
        assert words in sentence
    prepared.write(operation={"promote": {"models": ["moons.cmf"]}})
    with pytest.raises(UserError, match=r"operation.promote.models has 'moons.cmf', .* did you mean 'moons.cfm'"):
        promotion.decide(prepared.root)
    for key, value in (("level", 0.5), ("pairs", 1), ("models", ["moons"]), ("enable", False)):
        prepared.write(operation={"promote": {key: value}})
        with pytest.raises(UserError, match=f"operation.promote.{key}"):
            parameters.load()


@pytest.mark.slow
def test_a_decision_apart_is_the_same_and_fails_with_a_sentence(
    prepared: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.register(monkeypatch, 1.0)
    (apart,) = promotion.decide_apart(prepared.root, "1-1.00")
    assert [apart] == prepared.filed()
    (prepared.root / "mlflow.db").unlink()
    with pytest.raises(UserError, match="there are no runs in sqlite"):
        promotion.decide_apart(prepared.root, "1-1.00")


def test_a_decision_leaves_no_copies_of_models(
    prepared: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    prepared.register(monkeypatch, 2.0)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    promotion.decide(prepared.root)
    prepared.register(monkeypatch, 1.0)
    (decision,) = promotion.decide(prepared.root)
    assert decision.champion_score is not None
    assert list(scratch.iterdir()) == []


RETRAIN = """
import sys
from pipelines.orchestration.prefect import retrain

state = retrain(sys.argv[1], "default", return_state=True)
print(state.message)
sys.exit(not state.is_completed())
"""

ARTIFACT = "SELECT key, data FROM artifact WHERE key = 'promotion' ORDER BY created"


@pytest.mark.slow
def test_a_scheduled_run_decides_and_shows_it(tmp_path: Path) -> None:
    """A copy of the project with one data set and one method, retrained as the schedule does it."""
    root = tmp_path / "project"
    for name in ("pipelines", "flowmatch_core", ".dvc"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp", "*.local")
        )
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, root / name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWMATCH", "MLFLOW", "DVC"))}
    home = {"FLOWMATCH_HOME": str(root / ".flowmatch"), "PREFECT_HOME": str(root / ".prefect")}
    home |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def retrain(steps: int, **changes: Any) -> tuple[int, str]:
        fit = {"density": {"fit": {"steps": steps}, "sample": {"samples": 100}}, "environments": {"spiral": None}}
        Project(root).write(**merge({**fit, "experiments": EXPERIMENTS}, changes))
        env = {**others, **home, "PATH": path, "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}
        command = [sys.executable, "-c", RETRAIN, str(root)]
        made = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        return made.returncode, made.stdout + made.stderr

    def shown() -> list[dict[str, Any]]:
        with closing(sqlite3.connect(root / ".prefect" / "prefect.db")) as database:
            return [json.loads(json.loads(data))[0] for _, data in database.execute(ARTIFACT)]

    for steps in (20, 400):
        status, said = retrain(steps)
        assert status == 0, said
    assert [row["outcome"] for row in shown()] == ["promoted", "promoted"]
    assert shown()[0]["reason"] == "there was no champion"
    status, said = retrain(400)  # nothing to train
    assert (status, len(shown())) == (0, 2), said
    status, said = retrain(400, datasets={"moons": {"train": 900}}, density={"fit": {"steps": 20}})
    assert status == 0, said
    assert (shown()[2]["outcome"], "worse, one-sided bound -" in shown()[2]["reason"]) == ("kept", True)
    next((root / "mlartifacts").rglob(f"{champion_run(root)}/**/seed0.*")).unlink()
    status, said = retrain(30)
    assert status == 1, said
    assert "every stage is up to date, but moons.cfm: the champion cannot be compared" in said


def champion_run(root: Path) -> str:
    """The run that trained the champion."""
    query = (
        "SELECT run_id FROM model_versions JOIN registered_model_aliases USING (name, version) WHERE alias = 'champion'"
    )
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        return str(database.execute(query).fetchone()[0])
