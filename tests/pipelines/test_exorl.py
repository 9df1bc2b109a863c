"""The exorl kind: alignment of actions, terminals, a fair part of the episodes, rollouts in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.base.errors import UserError
from pipelines.data import collect
from pipelines.environments import Array, exorl, maze

SIMULATOR = {"kind": "maze", "task": "reach_top_right", "action_repeat": 1}
LENGTHS = [7, 1, 12, 30, 5]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """Episodes of the maze under random actions, as ExORL stores them: the action beside what it led to."""
    simulator = maze.build(maze.Settings(action_repeat=1))
    for number, length in enumerate(LENGTHS):
        draw = rng(number)
        state = simulator.starts(draw, 1)
        states, actions = [state[0]], [np.full(2, 9.0)]  # the first action never happened
        for _ in range(length):
            action = simulator.actions(draw, 1)
            state = simulator.step(state, action, draw)
            states.append(state[0])
            actions.append(action[0])
        discount = np.ones((length + 1, 1), dtype=np.float32)
        discount[0] = 0  # as meaningless as the first action
        if number == 2:
            discount[-1] = 0
        write(
            tmp_path / "buffer" / f"episode_{number:06d}_{length}.npz",
            observation=np.array(states),
            action=np.array(actions),
            reward=np.full((length + 1, 1), 7.0),
            discount=discount,
            physics=np.array(states),
        )
    return tmp_path


def settings(folder: Path, **changes: Any) -> exorl.Settings:
    return exorl.Settings(**{"directory": folder, "simulator": SIMULATOR, **changes})


def part(table: pd.DataFrame, prefix: str) -> Array:
    return table[[name for name in table.columns if name.startswith(f"{prefix}_")]].to_numpy()


def draw(choice: exorl.Settings, transitions: int = sum(LENGTHS), seed: int = 0) -> collect.Collection:
    return collect.collect("exorl", choice, transitions=transitions, rollouts=6, length=20, starts=4, seed=seed)


def test_transitions_are_those_of_the_physics(episodes: Path) -> None:
    table = draw(settings(episodes)).transitions
    simulator = maze.build(maze.Settings(**{k: v for k, v in SIMULATOR.items() if k != "kind"}))
    state, action, following = (part(table, p) for p in ("state", "action", "next_state"))
    assert np.abs(action).max() <= 1
    np.testing.assert_array_equal(following, simulator.step(state, action, rng()))
    np.testing.assert_array_equal(part(table, "next_action"), simulator.policy(following))
    assert (table["behaviour"] == "recorded").all()
    counts = table.groupby("episode")["step"].agg(["size", "min", "max"])
    assert counts["size"].tolist() == LENGTHS
    assert (counts["max"] == counts["size"] - 1).all()
    assert (counts["min"] == 0).all()


def test_terminal_is_where_the_discount_is_zero_and_not_where_time_ran_out(episodes: Path) -> None:
    table = draw(settings(episodes)).transitions
    assert table.loc[table["terminal"], ["episode", "step"]].to_numpy().tolist() == [[2, 11]]


def test_a_shorter_table_is_a_mixture_of_early_and_late_episodes(episodes: Path) -> None:
    for number in range(5, 60):
        write(
            episodes / f"episode_{number:06d}.npz",
            observation=rng(number).standard_normal((3, 4)),
            action=np.zeros((3, 2)),
            discount=np.ones(3),
        )
    choice = settings(episodes)
    long, short = draw(choice, 150).transitions, draw(choice, 60, seed=1).transitions
    pd.testing.assert_frame_equal(long[:60], short)
    assert short["episode"].max() > 40
    assert np.abs(np.diff(short["episode"].unique())).max() > 10


@pytest.mark.parametrize("count", [1, 2, 6, 7, 20])
def test_rows_do_not_depend_on_the_pieces(episodes: Path, count: int) -> None:
    environment = exorl.build(settings(episodes))
    whole = environment.transitions(range(sum(LENGTHS)), 1, rng())
    for first in range(0, sum(LENGTHS) - count, 5):
        rows = environment.transitions(range(first, first + count), 1, rng(1))
        for name, column in vars(rows).items():
            np.testing.assert_array_equal(column, getattr(whole, name)[first : first + count])


def test_more_rows_than_there_are_is_told(episodes: Path) -> None:
    with pytest.raises(UserError, match="56 transitions were asked of the environment 'exorl', which has 55"):
        draw(settings(episodes), 56)


@pytest.mark.parametrize("policy", [None, "tests.pipelines.policies:still"])
def test_rollouts_are_the_simulators_under_the_policy(episodes: Path, policy: str | None) -> None:
    tables = draw(settings(episodes, policy=policy))
    simulator = maze.build(maze.Settings(task="reach_top_right", action_repeat=1))
    for table in (tables.rollouts, tables.evaluation):
        states, actions = (part(table, p).reshape(-1, 21, n) for p, n in (("state", 4), ("action", 2)))
        expected = np.zeros((len(states) * 21, 2)) if policy else simulator.policy(states.reshape(-1, 4))
        np.testing.assert_array_equal(actions.reshape(-1, 2), expected)
        for k in range(20):
            np.testing.assert_array_equal(states[:, k + 1], simulator.step(states[:, k], actions[:, k], rng()))
    following = part(tables.transitions, "next_action")
    assert (following == 0).all() == (policy is not None)
    assert "reward_reach_top_right" in tables.evaluation


def test_what_executes_is_not_loaded(episodes: Path) -> None:
    write(episodes / "bad.npz", observation=np.array([{}, {}]), action=np.zeros((2, 2)), discount=np.array([{}, 1]))
    with pytest.raises(UserError, match=r"bad.npz is no episode of ExORL.*allow_pickle"):
        draw(settings(episodes), 10)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"observation": np.zeros((3, 4)), "action": np.zeros((3, 2))}, "discount"),
        ({"observation": np.zeros((3, 5)), "action": np.zeros((3, 2)), "discount": np.ones(3)}, r"\(3, 5\).*\(3, 4\)"),
        ({"observation": np.zeros((3, 4)), "action": np.zeros((2, 2)), "discount": np.ones(3)}, r"\(2, 2\).*\(3, 2\)"),
        ({"observation": np.zeros((3, 4)), "action": np.zeros((3, 2)), "discount": np.float64(1)}, "no axis|one row"),
        ({"observation": np.full((3, 4), np.nan), "action": np.zeros((3, 2)), "discount": np.ones(3)}, "NaN"),
    ],
)
def test_a_damaged_episode_is_told(episodes: Path, arrays: dict[str, Any], sentence: str) -> None:
    write(episodes / "bad.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        draw(settings(episodes), sum(LENGTHS) + (2 if "discount" in arrays and arrays["discount"].ndim else 0))


def test_a_cut_off_file_is_told(episodes: Path) -> None:
    whole = next(episodes.rglob("*.npz"))
    (episodes / "cut.npz").write_bytes(whole.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut.npz is no episode"):
        draw(settings(episodes), 10)


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no .npz files"):
        exorl.build(settings(tmp_path))


@pytest.mark.parametrize(
    ("simulator", "sentence"),
    [
        ({}, "key kind"),
        ({"kind": "exorl"}, "key kind"),
        ({"kind": "maize"}, "did you mean 'maze'"),
        ({"kind": "maze", "task": "run"}, "task"),
        ({"kind": "maze", "tusk": "loop"}, "tusk"),
    ],
)
def test_the_simulator_is_checked(tmp_path: Path, simulator: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings(tmp_path, simulator=simulator)
    with pytest.raises(ValueError, match="policy"):
        settings(tmp_path, policy="still")


def test_one_policy_only(episodes: Path) -> None:
    pytest.importorskip("gymnasium", reason="the extra flowmatch[gymnasium]")
    here = "tests.pipelines.gymnasium_members"
    simulator = {"kind": "gymnasium", "id": f"{here}:Corridor-v0", "policy": f"{here}:right"}
    with pytest.raises(UserError, match="policy in one place"):
        exorl.build(settings(episodes, simulator=simulator, policy=f"{here}:right"))
    for number in range(2):
        write(
            episodes / "corridor" / f"{number}.npz",
            observation=np.zeros((9, 2)),
            action=np.zeros((9, 1)),
            discount=np.ones(9),
        )
    choice = settings(episodes / "corridor", simulator=simulator)
    tables = draw(choice, 16)
    assert (tables.rollouts["behaviour"] == "start").all()
    np.testing.assert_array_equal(part(tables.transitions, "next_action"), 0.5)
    np.testing.assert_array_equal(part(tables.rollouts, "action"), 0.5)


def test_the_evaluation_stays_the_same_when_episodes_are_added(episodes: Path) -> None:
    """So that champions of different nights are scored on the same start states, of which none is a training row."""
    before = draw(settings(episodes))
    archive = next(episodes.rglob("*_7.npz"))
    write(archive.with_name("episode_000099_7.npz"), **dict(np.load(archive)))
    after = draw(settings(episodes), transitions=sum(LENGTHS) + 7)
    assert len(after.transitions) == len(before.transitions) + 7
    pd.testing.assert_frame_equal(after.evaluation, before.evaluation)
    trained = {row.tobytes() for table in (after.transitions, after.rollouts) for row in part(table, "state")}
    assert trained.isdisjoint(row.tobytes() for row in part(after.evaluation, "state"))


def test_all_transitions_are_those_of_every_episode(episodes: Path) -> None:
    assert collect.Collector("exorl", settings(episodes), 0).available() == sum(LENGTHS)
    with pytest.raises(UserError, match=r"^transitions is all, and the environment 'maze' draws"):
        collect.Collector("maze", maze.Settings(), 0).available()
