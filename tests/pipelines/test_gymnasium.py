"""The gymnasium kind: steps are those of the environment, terminals absorb, time limits do not, mistakes are told."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

gym = pytest.importorskip("gymnasium", reason="the extra flowmatch[gymnasium]")

from pipelines.base.errors import UserError  # noqa: E402
from pipelines.data import collect  # noqa: E402
from pipelines.environments import Array  # noqa: E402
from pipelines.environments import gymnasium as member  # noqa: E402

HERE = "tests.pipelines.gymnasium_members"
CORRIDOR = {"id": f"{HERE}:Corridor-v0", "policy": f"{HERE}:right"}
PENDULUM = {"id": "Pendulum-v1", "policy": f"{HERE}:swing"}
INVERTED = {"id": "InvertedPendulum-v5", "policy": f"{HERE}:right"}


def draw(settings: dict[str, Any], **sizes: Any) -> collect.Collection:
    sizes = {"transitions": 3000, "rollouts": 30, "length": 12, "starts": 40, "seed": 0, **sizes}
    return collect.collect("gymnasium", member.Settings(**settings), **sizes)


def part(table: pd.DataFrame, prefix: str) -> Array:
    return table[[name for name in table.columns if name.startswith(f"{prefix}_")]].to_numpy()


def episodes(table: pd.DataFrame) -> list[pd.DataFrame]:
    return [group for _, group in table.groupby("episode", sort=False)]


def test_random_transitions_are_whole_episodes_with_terminals_but_without_time_limits() -> None:
    table = draw(CORRIDOR | {"arguments": {"noise": 0.0}}).transitions
    state, action, following = (part(table, p) for p in ("state", "action", "next_state"))
    np.testing.assert_allclose(following[:, 0], state[:, 0] + 0.2 * action[:, 0], atol=1e-12)
    np.testing.assert_array_equal(table["terminal"], following[:, 0] > 1)
    assert (table["behaviour"] == "random").all()
    np.testing.assert_array_equal(part(table, "next_action"), 0.5)
    lengths, ends = [], []
    for episode in episodes(table)[:-1]:
        assert list(episode["step"]) == list(range(len(episode)))
        np.testing.assert_array_equal(part(episode, "state")[1:], part(episode, "next_state")[:-1])
        assert not episode["terminal"].to_numpy()[:-1].any()
        lengths.append(len(episode))
        ends.append(bool(episode["terminal"].iloc[-1]))
    # The registered limit of 30 steps cuts most episodes off; that is no terminal.
    assert max(lengths) == 30
    assert [length < 30 for length, ended in zip(lengths, ends, strict=True) if not ended] == [False] * ends.count(
        False
    )
    assert 0 < sum(ends) < len(ends)
    assert abs(action.mean()) < 0.05
    assert np.abs(action).max() <= 1
    assert action.std() == pytest.approx(3**-0.5, rel=0.05)


@pytest.mark.parametrize("name", ["rollouts", "evaluation"])
def test_rollouts_follow_the_policy_and_stay_in_the_terminal_state(name: str) -> None:
    table = getattr(draw(CORRIDOR | {"arguments": {"noise": 0.0}}, length=60), name)
    assert (table["behaviour"] == "start").all()
    states, actions, terminal = (
        part(table, "state").reshape(-1, 61, 2),
        part(table, "action"),
        table["terminal"].to_numpy().reshape(-1, 61),
    )
    np.testing.assert_array_equal(actions, 0.5)
    # .1 a step from [-1, 0] to beyond 1: 11 to 20 steps, then nothing moves; 30 steps are no limit here.
    last = terminal.argmax(1)
    assert last.min() >= 10
    assert 19 <= last.max() <= 21
    for state, ended, end in zip(states, terminal, last, strict=True):
        np.testing.assert_allclose(state[: end + 1, 0], state[0, 0] + 0.1 * np.arange(end + 1), atol=1e-9)
        assert state[end, 0] > 1 >= state[end - 1, 0]
        assert ended[end:].all() and not ended[:end].any()
        np.testing.assert_array_equal(state[end:], np.broadcast_to(state[end], state[end:].shape))


def test_the_time_limit_does_not_end_rollouts() -> None:
    table = draw(CORRIDOR | {"arguments": {"noise": 0.0}, "policy": f"{HERE}:left"}, length=50)
    states = part(table.rollouts, "state").reshape(30, 51, 2)
    np.testing.assert_allclose(states[:, :, 1], 0.01 * np.arange(51)[None].repeat(30, 0), atol=1e-12)
    assert not table.rollouts["terminal"].any()


def test_a_limit_of_the_environments_own_is_told() -> None:
    with pytest.raises(UserError, match=r"cut an episode off after 9 steps.*expected 12"):
        draw(CORRIDOR | {"arguments": {"own_limit": 9}})


def test_rows_depend_on_the_seed_and_not_on_the_workers() -> None:
    settings = member.Settings(**CORRIDOR, behaviour="mixed")
    sizes = {"transitions": 25_000, "rollouts": 301, "length": 4, "starts": 3}
    one, many = (collect.collect("gymnasium", settings, **sizes, seed=3, workers=w) for w in (1, 3))
    other = collect.collect("gymnasium", settings, **sizes, seed=4)
    for name in ("transitions", "rollouts", "evaluation"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(many, name), check_exact=True)
        first, second = (part(getattr(t, name), "state")[:, 0] for t in (one, other))
        assert first[0] != second[0]
    assert one.transitions.groupby("episode")["step"].is_monotonic_increasing.all()
    assert not one.transitions.duplicated(["episode", "step"]).any()
    first = part(one.transitions[one.transitions["step"] == 0], "state")[:, 0]
    assert len(np.unique(first)) == len(first)


def replayed(kind: str, **more: Any) -> list[str]:
    settings = member.Settings(**CORRIDOR | {"id": f"{HERE}:{kind}", **more})
    return member.build(settings).checks(np.random.default_rng(0))


@pytest.mark.parametrize("behaviour", ["random", "mixed", "policy"])
@pytest.mark.parametrize("safe", [False, True])
def test_transitions_are_replayed(behaviour: str, safe: bool) -> None:
    found = replayed("Corridor-v0", behaviour=behaviour, thread_safe=safe)
    assert found == ["transitions replayed with the same seeds: 20 of 20 equal"]


def test_an_environment_whose_instances_share_state_is_stepped_by_one_thread() -> None:
    settings = CORRIDOR | {"id": f"{HERE}:Shared-v0"}
    table = draw(settings, transitions=12_000, workers=4).transitions
    state, action, following = (part(table, p) for p in ("state", "action", "next_state"))
    np.testing.assert_allclose(following[:, 0], state[:, 0] + 0.2 * action[:, 0], atol=1e-12)
    np.testing.assert_allclose(following[:, 1], state[:, 1] + 0.01, atol=1e-12)
    again = draw(settings, transitions=12_000, workers=2).transitions
    pd.testing.assert_frame_equal(table, again, check_exact=True)


def test_shared_state_is_said_and_refused_where_the_entry_says_that_there_is_none() -> None:
    (found,) = replayed("Shared-v0")
    assert found.startswith("transitions replayed with the same seeds: 20 of 20 equal, but ")
    assert "beside another instance, so that instances share state" in found
    with pytest.raises(UserError, match=r"Shared-v0 is not thread-safe.* [01] of 20 .*remove thread_safe: true"):
        replayed("Shared-v0", thread_safe=True)


def test_an_environment_that_ignores_seeds_is_a_sentence_and_no_error() -> None:
    (found,) = replayed("Unseeded-v0")
    assert found.startswith("transitions replayed with the same seeds: 0 of 20 equal")
    assert "does not honour seeds" in found


def test_behaviours() -> None:
    policy = draw(CORRIDOR | {"behaviour": "policy"}).transitions
    np.testing.assert_array_equal(part(policy, "action"), 0.5)
    mixed = draw(CORRIDOR | {"behaviour": "mixed"}).transitions
    kinds = mixed.groupby("episode")["behaviour"].agg(["nunique", "first"])
    assert (kinds["nunique"] == 1).all()
    assert set(kinds["first"]) == {"random", "visited"}
    own = part(mixed, "action")[:, 0] == 0.5
    assert own[mixed["behaviour"] == "random"].sum() == 0
    assert own[mixed["behaviour"] == "visited"].mean() == pytest.approx(0.5, abs=0.06)


def test_rewards_are_the_components_and_the_users_own() -> None:
    table = draw(CORRIDOR | {"rewards": {"progress": f"{HERE}:progress"}}).evaluation
    np.testing.assert_array_equal(table["reward_s1"], table["state_s1"])
    np.testing.assert_array_equal(table["reward_progress"], table["state_s0"].clip(lower=0))
    assert {name for name in table if name.startswith("reward_")} == {"reward_s0", "reward_s1", "reward_progress"}


@pytest.mark.parametrize(("settings", "states", "actions"), [(PENDULUM, 3, 1), (INVERTED, 4, 1)])
def test_gymnasiums_own_environments(settings: dict[str, Any], states: int, actions: int) -> None:
    built = member.build(member.Settings(**settings))
    assert (len(built.state_names), len(built.action_names)) == (states, actions)
    tables = draw(settings, transitions=400, rollouts=3, starts=2, length=250)
    assert tables.transitions["terminal"].any() == (settings is INVERTED)
    assert tables.rollouts["terminal"].any() == (settings is INVERTED)
    made = gym.make(settings["id"])
    if settings is PENDULUM:
        # Its dynamics, from its documentation: theta'' = 3 g / (2 l) sin theta + 3 u / (m l^2), 0.05 s a step.
        state, action, following = (part(tables.transitions, p) for p in ("state", "action", "next_state"))
        speed = np.clip(state[:, 2] + (15 * state[:, 1] + 3 * action[:, 0]) * 0.05, -8, 8)
        np.testing.assert_allclose(following[:, 2], speed, atol=1e-5)
        assert np.abs(action).max() <= made.action_space.high
    made.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": "Pendulm-v1"}, "cannot make 'Pendulm-v1'"),
        ({"id": "no_such_module:Mine-v0"}, "no_such_module"),
        ({"arguments": {"gravity": 1}}, "gravity"),
        ({"id": f"{HERE}:Grid-v0"}, r"observation_space Discrete\(3\).*Box"),
        ({"arguments": {"bounded": False}}, "no bounds on its actions"),
        ({"policy": f"{HERE}:rigth"}, "rigth"),
        ({"policy": "no_such_module:right"}, "no_such_module"),
        ({"policy": f"{HERE}:flat"}, r"shape \(1,\); expected shape \(1, 1\)"),
        ({"policy": f"{HERE}:nan"}, r":nan answered 1 of 1 rows with NaN or infinity, first the row \[-"),
        ({"policy": f"{HERE}:words"}, r":words answered 1 rows with a list that is no array of numbers.*\(1, 1\)"),
    ],
)
def test_a_users_mistake_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        draw(CORRIDOR | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["right", "tests.pipelines", "a:b:c", "a b:c", "a.:c"])
def test_an_entry_point_has_one_form(policy: str) -> None:
    with pytest.raises(ValueError, match="policy"):
        member.Settings(id="Pendulum-v1", policy=policy)


def test_without_gymnasium_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    settings = member.Settings(**PENDULUM)
    with pytest.raises(UserError, match=r"pip install -e '.\[gymnasium\]'"):
        member.build(settings)


# ---- families of policies ----

FAMILY = CORRIDOR | {"policy": f"{HERE}:pushing", "w": {"push": [0.2, 1.0]}, "arguments": {"noise": 0.0}}


def test_an_episode_under_a_family_follows_one_w() -> None:
    table = draw(FAMILY).rollouts
    seen = set()
    for episode in episodes(table):
        state, (action, w) = part(episode, "state"), part(episode, "action").T
        assert len(np.unique(w)) == 1
        np.testing.assert_array_equal(action, w)
        alive = ~episode["terminal"].to_numpy()
        np.testing.assert_allclose(np.diff(state[:, 0])[alive[:-1]], 0.2 * w[0], atol=1e-12)
        assert not np.diff(state, axis=0)[~alive[:-1]].any()
        seen.add(w[0])
    assert len(seen) == 30 and 0.2 <= min(seen) < 0.4 < 0.8 < max(seen) <= 1.0


def test_one_can_act_in_as_many_episodes_as_one_likes() -> None:
    built, asked = member.build(member.Settings(**FAMILY)), []

    def act(state: Array) -> Array:
        asked.append(state)
        return np.full((len(state), 1), 0.1 * len(asked))

    states = built.acted(act, 5, 8, np.random.default_rng(0))
    assert states.shape == (5, 9, 2)
    np.testing.assert_array_equal(np.stack(asked, 1), states[:, :-1])
    place = states[:, :1, 0] + 0.02 * np.concatenate([[0], np.arange(1, 9).cumsum()])
    over = np.maximum.accumulate(place > 1, 1)
    first = np.take_along_axis(place, over.argmax(1)[:, None], 1)
    np.testing.assert_allclose(states[..., 0], np.where(over, first, place))
    assert len(np.unique(states[:, 0, 0])) == 5
    again = built.acted(lambda state: np.zeros((len(state), 1)), 5, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(again[:, 0], states[:, 0])  # the starts do not depend on the policy


def test_a_familys_broken_policy_is_told_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"answered 1 rows with shape \(1, 2\); expected shape \(1, 1\)"):
        member.build(member.Settings(**(FAMILY | {"w": {"push": [0, 1], "pull": [0, 1]}})))
