"""Planners: their candidates, choices by simulation and by models, and the stage that compares returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.successor import GeometricHorizonModel
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import changes, params, yaml_files
from pipelines.config.params import CandidateLaw, Params
from pipelines.environments import Array, linear_gaussian, maze
from pipelines.planning import planners, returns, singles
from pipelines.planning.choices import ByModel, BySimulation
from pipelines.planning.planner import Planner, fresh
from pipelines.reporting.tables import planning, planning_claims
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import (
    collect,
    evaluate_successor,
    plan_successor,
    report,
    sample_successor,
    tables,
    train_successor,
)

ROOT = Path(__file__).parents[2]
NAME, REWARDS = "maze_goals", ("square", "reach_bottom_left")
DEFAULT = np.array([-0.15, 0.15])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def goals() -> maze.Maze:
    return maze.build(maze.Settings(family="goals"))


class Recorded:
    """A choice of one candidate in every state, which keeps what it was asked."""

    def __init__(self, chosen: int) -> None:
        self.chosen = chosen
        self.asked: list[tuple[Array, Array, Array]] = []

    def __call__(self, state: Array, actions: Array, w: Array) -> NDArray[np.int64]:
        self.asked.append((state, actions, w))
        return np.full(len(state), self.chosen)


# ---- candidates ----


def test_candidates_are_the_default_the_present_and_new_ones_and_plans_are_some_steps_apart() -> None:
    choose, state = Recorded(3), goals().starts(rng(), 5)
    planner = Planner(maze.Goals(), choose, DEFAULT, candidates=6, every=3, rng=rng())
    followed = []
    for _ in range(8):
        action = planner.act(state)
        assert planner.w is not None
        np.testing.assert_array_equal(action, maze.Goals().act(state, planner.w))
        followed.append(planner.w)
    assert len(choose.asked) == 3  # at steps 0, 3 and 6
    for number, (asked, actions, w) in enumerate(choose.asked):
        assert w.shape == (5, 6, 2) and asked is state
        np.testing.assert_array_equal(w[:, 0], np.tile(DEFAULT, (5, 1)))
        np.testing.assert_array_equal(w[:, 1], followed[3 * number - 1] if number else w[:, 0])
        assert len(np.unique(w[:, 2:].reshape(-1, 2), axis=0)) == 20
        for row in range(5):
            np.testing.assert_array_equal(actions[row], maze.Goals().act(np.tile(state[row], (6, 1)), w[row]))
        np.testing.assert_array_equal(followed[3 * number], w[:, 3])
    with pytest.raises(UserError, match=r"^2 states follow 5; expected as many"):
        planner.act(state[:2])
    planner.reset()
    planner.act(state)
    np.testing.assert_array_equal(choose.asked[-1][2][:, 1], choose.asked[-1][2][:, 0])


@pytest.mark.parametrize("law", ["random", "local", "train"])
def test_candidates_of_every_law_are_within_that_of_the_family(law: CandidateLaw) -> None:
    family, default = maze.Goals(), np.array([0.2, -0.2])
    w = fresh(family, law, default, 4000, rng())
    family.check(w)
    away = np.linalg.norm(w - default, axis=1)
    assert (away.mean() < 0.12) == (law == "local")


def test_a_default_outside_the_law_or_no_candidates_are_one_sentence() -> None:
    with pytest.raises(UserError, match="outside the law"):
        Planner(maze.Goals(), Recorded(0), np.array([0.0, 0.9]), rng=rng())
    with pytest.raises(UserError, match=r"candidates is 1 and every 4; expected at least 2"):
        Planner(maze.Goals(), Recorded(0), DEFAULT, candidates=1, rng=rng())


# ---- choices ----


def test_simulation_chooses_the_greatest_discounted_return() -> None:
    environment, family = goals(), maze.Goals()
    state, _ = environment.coverage(rng(), 6)
    w = family.draw(6 * 5, rng(1)).reshape(6, 5, 2)
    actions = np.stack([family.act(state, w[:, i]) for i in range(5)], 1)

    def reward(x: Array) -> Array:
        return environment.rewards(x)["reach_top_right"]

    chosen = BySimulation(environment, family, reward, 0.9, 12, rng())(state, actions, w)
    for row in range(6):
        values = []
        for i in range(5):
            now, total = state[row : row + 1], 0.0
            for k in range(12):
                now = environment.step(now, family.act(now, w[row, i : i + 1]), rng())
                total += 0.9**k * float(reward(now)[0])
            values.append(total)
        assert values[chosen[row]] == pytest.approx(max(values), abs=1e-12)


def to_w(t: Tensor, x: Tensor, cond: Tensor) -> Tensor:
    """The field of X = X_0 / 10 + w + action, whose conditions are state, action and w."""
    time, end = as_time(t, x).expand(len(x))[:, None], cond[:, 2:4] + cond[:, 4:]
    return end - 0.9 * (x - time * end) / (1 - 0.9 * time)


def test_a_model_chooses_by_the_reward_of_where_it_leads() -> None:
    model = GeometricHorizonModel(to_w, (2,), 0.9, "midpoint", 2)
    w = rng(1).normal(size=(7, 5, 2))
    actions, state = rng(2).normal(size=(7, 5, 2)), np.zeros((7, 2))

    def chosen(margin: float, reward: Any) -> NDArray[np.int64]:
        return ByModel(model, reward, 64, margin, torch.Generator().manual_seed(0))(state, actions, w)

    np.testing.assert_array_equal(chosen(0.0, lambda x: x[:, 0]), (w + actions)[..., 0].argmax(1))
    np.testing.assert_array_equal(chosen(1.5, lambda x: -x[:, 1]), (w + actions)[..., 1].argmin(1))
    np.testing.assert_array_equal(chosen(np.inf, lambda x: x[:, 0]), np.zeros(7))


def test_a_model_that_diverges_leaves_the_default() -> None:
    def field(t: Tensor, x: Tensor, cond: Tensor) -> Tensor:
        return x * torch.nan

    model = GeometricHorizonModel(field, (2,), 0.9, "euler", 1)
    choose = ByModel(model, lambda x: x[:, 0], 4, 0.0, torch.Generator())
    np.testing.assert_array_equal(choose(np.zeros((3, 2)), np.zeros((3, 4, 2)), np.ones((3, 4, 2))), np.zeros(3))


def test_the_best_single_policy_has_the_greatest_return() -> None:
    environment = linear_gaussian.build(
        linear_gaussian.Settings.model_validate(
            {"policy": "tests.pipelines.policies:towards", "w": {"wx": (-1, 1), "wy": (-1, 1)}, "noise": 1e-9}
        )
    )
    family = environment.family
    assert family is not None
    best = singles.best(environment, family, ["bump"], 64, rng(5), 30)["bump"]
    draw = rng(5)
    w = family.draw(64, draw)
    goal = np.linalg.norm(w - np.array([1.0, 0.0]), axis=1)  # the nearer to the bump's middle, the more reward
    assert np.linalg.norm(best - [1.0, 0.0]) <= np.sort(goal)[9]


# ---- the stage ----


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """The folder in which the smoke profile has planned, and its parameters."""
    here = tmp_path_factory.mktemp("planning")
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    profile = yaml_files.read_yaml(ROOT / "pipelines" / "config" / "profiles" / "td_planning_smoke.yaml")
    given, _ = changes.apply(raw, profile)
    loaded = params.parse(given, Path("params.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("FLOWMATCH_CORES", "1")
        patch.setenv("FLOWMATCH_HOME", str(here / "home"))
        patch.setenv("FLOWMATCH_INVOCATION", "test")
        patch.setattr(Stage, "log", lambda self, message: None)
        stage = Stage("test", loaded, RunRecord.start("test", {}))
        collect.main(stage, NAME)
        for method in loaded.successor.methods:
            train_successor.main(stage, NAME, method)
        plan_successor.main(stage, NAME)
        sample_successor.main(stage, NAME)
        evaluate_successor.main(stage, NAME)
        tables.main(stage)
        report.main(stage)
    return here, loaded


def test_every_method_has_its_episodes_from_the_same_starts(results: tuple[Path, Params]) -> None:
    here, loaded = results
    folder = here / layout.plans(NAME)
    table, paths = pd.read_parquet(layout.episodes(folder)), pd.read_parquet(layout.paths(folder))
    methods = {"single", "expert", "simulation", *loaded.successor.methods}
    seen = table.groupby(["reward", "method", "law"])["seed"].agg(["size", "nunique"])
    assert set(seen.index) == {
        (r, m, "none" if m in ("single", "expert") else "train") for r in REWARDS for m in methods
    }
    assert (seen["size"] == 4).all() and (seen["nunique"] == 2).all()  # two episodes of two seeds
    first = paths[paths["step"] == 0].filter(regex="^(state|episode)")
    assert (first.groupby("episode").nunique() == 1).all(axis=None)
    assert set(paths["method"]) == methods - {"expert"}


@pytest.mark.parametrize("reward", REWARDS)
def test_returns_are_the_sums_of_rewards_of_the_policies(results: tuple[Path, Params], reward: str) -> None:
    here, _ = results
    folder, environment = here / layout.plans(NAME), goals()
    table, paths = pd.read_parquet(layout.episodes(folder)), pd.read_parquet(layout.paths(folder))
    own = paths[(paths["reward"] == reward) & (paths["method"] == "single") & (paths["step"] == 0)]
    start, w = (own.filter(regex=f"^{part}_").to_numpy() for part in ("state", "w"))
    assert len(np.unique(w, axis=0)) == 1
    policies = {"single": lambda s: maze.Goals().act(s, w), "expert": environment.expert(reward)}
    for method, act in policies.items():
        states, _ = environment.roll(start, 8, act, rng())
        expected = sum(environment.rewards(states[:, k])[reward] for k in range(1, 9))
        found = table[(table["reward"] == reward) & (table["method"] == method) & (table["seed"] == 0)]
        np.testing.assert_allclose(found["return"], expected)


def test_metrics_and_tables_have_the_mean_returns_in_physics_steps(results: tuple[Path, Params]) -> None:
    here, loaded = results
    found = files.read_json(here / layout.planned(NAME))
    table = pd.read_parquet(layout.episodes(here / layout.plans(NAME)))
    mean = table[(table["reward"] == "square") & (table["method"] == "td2_cfm")]["return"].mean()
    assert found["square"]["td2_cfm"]["return_train"] == pytest.approx(mean)
    rows = planning.build(loaded, {f"plans/{NAME}": found}, {}, {}).rows
    assert set(rows["task"]) == {*REWARDS, "mean"} and len(rows) == 3 * 5
    row = rows[(rows["task"] == "square") & (rows["method"] == "td2_cfm")].iloc[0]
    assert float(row["train"].split()[0]) == pytest.approx(5 * mean, rel=1e-2, abs=1e-9)
    paper = rows[(rows["task"] == "mean") & (rows["method"] == "td2_cfm")].iloc[0]
    assert paper["paper: train"] == "801"


def test_the_report_has_a_picture_of_every_task(results: tuple[Path, Params]) -> None:
    folder = results[0] / layout.REPORT
    page = layout.page(folder).read_text()
    assert "Planning in maze_goals" in page and "in place of Forward-Backward" in page
    assert "Claims about planning" in page
    for reward in REWARDS:
        assert (layout.figures(folder) / f"{NAME}-{reward}.png").stat().st_size > 1000


def test_a_maze_with_a_family_has_no_task_of_the_paper(results: tuple[Path, Params]) -> None:
    """Its models are not those of one policy, so that the claims about them are not asked."""
    table = files.read_json(layout.table(results[0] / layout.TABLES, "claims", "json"))
    assert table["rows"] == []


def test_a_trained_planner_answers(results: tuple[Path, Params], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results[0])
    folder = str(layout.models(NAME, "td2_cfm"))
    state = goals().starts(rng(), 4)
    still = planners.load(folder, "square", w=DEFAULT, margin=np.inf)  # which never leaves the default
    np.testing.assert_array_equal(still.act(state), maze.Goals().act(state, np.tile(DEFAULT, (4, 1))))
    one, two = (planners.load(folder, "square", w=DEFAULT, margin=0.0).act(state) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(UserError, match=r"no reward 'squar', expected one of .*square"):
        planners.load(folder, "squar", w=DEFAULT)
    with pytest.raises(UserError, match="outside the law"):
        planners.load(folder, "square", w=np.array([0.0, 1.0]))


def changed(loaded: Params, entry: dict[str, Any] | None = None, **plan: Any) -> Params:
    """The parameters with other keys of the environment and of its planning."""
    raw = loaded.model_dump(mode="json", exclude_unset=True)
    raw["environments"][NAME] |= entry or {}
    raw["plans"][NAME] |= plan
    return params.parse(raw, Path("params.yaml"))


@pytest.mark.parametrize(
    ("entry", "plan", "words"),
    [
        ({"family": None}, {}, "plans has 'maze_goals', which has no family of policies; expected an env"),
        ({}, {"rewards": ["walk"]}, "plans.maze_goals.rewards has 'walk'; expected of loop, "),
        ({}, {"candidates": 1}, "candidates"),
        ({}, {"methods": ["walk"]}, "plans.maze_goals.methods has 'walk'; expected of those it runs: td_cfm, td2_cfm"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    results: tuple[Path, Params],
    monkeypatch: pytest.MonkeyPatch,
    entry: dict[str, Any],
    plan: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(results[0])
    monkeypatch.setenv("FLOWMATCH_HOME", str(results[0] / "home"))
    with pytest.raises(UserError, match=words):
        returns.plan(Stage("test", changed(results[1], entry, **plan), RunRecord.start("test", {})), NAME)


# ---- claims ----


@pytest.mark.parametrize(
    ("planned", "verdict"), [((1.6, 1.7, 1.8), "holds"), ((1.0, 1.1, 1.2), "FAILS"), ((0.9, 1.4, 1.9), "open")]
)
def test_a_claim_is_decided_by_the_excess_over_the_best_single_policy(
    results: tuple[Path, Params], planned: tuple[float, ...], verdict: str
) -> None:
    single = {f"return_seed{seed}": value for seed, value in enumerate((1.0, 1.01, 0.99))}
    cells = {"td2_cfm": {f"return_train_seed{seed}": value for seed, value in enumerate(planned)}, "single": single}
    found = dict.fromkeys(REWARDS, cells)
    rows = planning_claims.build(results[1], {f"plans/{NAME}": found}, {}, {}).rows.set_index("claim")
    row = rows.loc["square: GPI returns at least 1.4 times the best single policy"]
    assert row["verdict"] == verdict
    assert row["ratio"] == pytest.approx(sum(planned) / 3)
