"""Collection: tables that do not depend on the workers, follow the policy, and hold what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines import collection, members
from pipelines.environments import Array, linear_gaussian, maze
from pipelines.errors import UserError

KINDS = members.names("pipelines.environments")
SIZES = {"transitions": 25_000, "rollouts": 601, "length": 4, "starts": 260}


def draw(kind: str, seed: int = 0, workers: int | None = None, **sizes: int) -> collection.Collection:
    settings = members.load("pipelines.environments", kind).Settings()
    return collection.collect(kind, settings, seed=seed, workers=workers, **{**SIZES, **sizes})


def part(table: pd.DataFrame, prefix: str) -> Array:
    """The columns of a prefix, (rows, n)."""
    names = [name for name in table.columns if name.startswith(f"{prefix}_")]
    return table[names].to_numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_the_seed_and_not_on_the_workers(kind: str) -> None:
    one = draw(kind, workers=1)
    for workers in (2, 5, None):
        many = draw(kind, workers=workers)
        for name in ("transitions", "rollouts", "evaluation"):
            pd.testing.assert_frame_equal(getattr(one, name), getattr(many, name), check_exact=True)
    other = draw(kind, seed=1)
    for name in ("transitions", "rollouts", "evaluation"):
        assert (part(getattr(one, name), "state") != part(getattr(other, name), "state"))[:, :2].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_does_not_depend_on_the_size_of_the_others(kind: str) -> None:
    one, other = draw(kind), draw(kind, transitions=100, starts=300)
    more = draw(kind, transitions=30_000, rollouts=1300)
    pd.testing.assert_frame_equal(one.rollouts, other.rollouts, check_exact=True)
    pd.testing.assert_frame_equal(one.evaluation[:1250], other.evaluation[:1250], check_exact=True)
    pd.testing.assert_frame_equal(one.evaluation, more.evaluation, check_exact=True)
    pd.testing.assert_frame_equal(one.transitions[:20_000], more.transitions[:20_000], check_exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_tables_share_no_draw(kind: str) -> None:
    tables = draw(kind)
    first = [part(t[t["step"] == 0], "state")[:, :2] for t in (tables.transitions, tables.rollouts, tables.evaluation)]
    every = np.concatenate(first)
    assert len(np.unique(every, axis=0)) == len(every)


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_are_one_step_with_the_policys_next_action(kind: str) -> None:
    module = members.load("pipelines.environments", kind)
    environment, table = module.build(module.Settings()), draw(kind).transitions
    np.testing.assert_array_equal(part(table, "next_action"), environment.policy(part(table, "next_state")))
    assert list(table["episode"]) == list(range(25_000))
    assert (table["step"] == 0).all()
    assert (table["behaviour"] == "coverage").all()
    off_policy = np.abs(part(table, "action") - environment.policy(part(table, "state"))).max(-1)
    assert (off_policy > 1e-3).mean() > 0.99


def test_maze_transitions_are_those_of_the_physics() -> None:
    table = draw("maze").transitions
    environment = maze.build(maze.Settings())
    expected = environment.step(part(table, "state"), part(table, "action"), np.random.default_rng(0))
    np.testing.assert_array_equal(part(table, "next_state"), expected)


def test_spiral_noise_differs_from_row_to_row() -> None:
    table = draw("linear_gaussian").transitions
    noise = part(table, "next_state") - 0.99 * (part(table, "state") + part(table, "action"))
    assert noise.std() == pytest.approx(0.03, rel=0.02)
    assert len(np.unique(noise.round(12), axis=0)) == len(noise)


@pytest.mark.parametrize("name", ["rollouts", "evaluation"])
def test_maze_rollouts_follow_the_policy(name: str) -> None:
    table = getattr(draw("maze"), name)
    environment = maze.build(maze.Settings())
    episodes = table["episode"].nunique()
    assert list(table["episode"]) == list(np.arange(episodes).repeat(SIZES["length"] + 1))
    assert list(table["step"]) == list(range(SIZES["length"] + 1)) * episodes
    np.testing.assert_array_equal(part(table, "action"), environment.policy(part(table, "state")))
    states, actions = (part(table, p).reshape(episodes, SIZES["length"] + 1, -1) for p in ("state", "action"))
    for k in range(SIZES["length"]):
        following = environment.step(states[:, k], actions[:, k], np.random.default_rng(0))
        np.testing.assert_array_equal(states[:, k + 1], following)


def test_half_of_the_rollouts_begin_at_the_start_distribution() -> None:
    table = draw("maze").rollouts
    first = table[table["step"] == 0]
    assert first["behaviour"].value_counts().to_dict() == {"coverage": 301, "start": 300}
    start = part(first[first["behaviour"] == "start"], "state")
    assert (start[:, 0] < -0.15).all()
    assert (start[:, 1] > 0.15).all()
    assert (start[:, 2:] == 0).all()
    coverage = part(first[first["behaviour"] == "coverage"], "state")
    assert (coverage[:, 0] > 0).mean() > 0.3
    assert (coverage[:, 2:] != 0).all()
    assert (draw("maze").evaluation["behaviour"] == "start").all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_holds_every_reward_of_its_rows_state(kind: str) -> None:
    module = members.load("pipelines.environments", kind)
    table = draw(kind).evaluation
    rewards = module.build(module.Settings()).rewards(part(table, "state"))
    assert {name for name in table.columns if name.startswith("reward_")} == {f"reward_{name}" for name in rewards}
    for name, value in rewards.items():
        np.testing.assert_array_equal(table[f"reward_{name}"], value)


def test_columns_of_the_tables() -> None:
    tables = draw("maze", transitions=1, rollouts=2, length=1, starts=1)
    index, state, action = ["episode", "step", "behaviour"], ["x", "y", "vx", "vy"], ["ux", "uy"]
    rollout = [f"state_{name}" for name in state] + [f"action_{name}" for name in action]
    following = [f"next_state_{name}" for name in state] + [f"next_action_{name}" for name in action]
    assert list(tables.transitions.columns) == index + rollout + following
    assert list(tables.rollouts.columns) == index + rollout
    assert list(tables.evaluation.columns)[:9] == index + rollout


@pytest.mark.parametrize(("method", "column"), [("step", "next_state_y"), ("policy", "next_action_uy")])
def test_not_finite_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, method: str, column: str) -> None:
    original = getattr(linear_gaussian.Spiral, method)

    def broken(self: linear_gaussian.Spiral, *arguments: Any) -> Array:
        result: Array = original(self, *arguments)
        if len(result) > 1000:
            result[:3, 1] = np.nan
        return result

    monkeypatch.setattr(linear_gaussian.Spiral, method, broken)
    with pytest.raises(UserError) as error:
        draw("linear_gaussian", workers=2)
    text = str(error.value)
    # Pieces of 10,000, 10,000 and 5,000 rows, three bad ones each.
    assert "'linear_gaussian'" in text
    assert f"{column!r} in 9 of 25000 rows" in text
    assert "finite" in text
