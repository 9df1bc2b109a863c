"""Stored policies: their file, random search on a problem with a known answer, and rows for stable-baselines3."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.environments import Array, _actor
from pipelines.environments._actor import Actor
from pipelines.policies import train
from pipelines.policies.random_search import Moments, RandomSearch


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def actor(*sizes: int) -> Actor:
    draw = rng()
    layers = [(draw.standard_normal((o, i)), draw.standard_normal(o)) for i, o in pairwise(sizes)]
    return Actor(draw.standard_normal(sizes[0]), draw.uniform(0.5, 2, sizes[0]), tuple(layers))


@pytest.mark.parametrize("sizes", [(3, 2), (3, 5, 4, 2)])
def test_an_actor_is_read_as_it_was_written(sizes: tuple[int, ...], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "POLICIES", tmp_path)
    with pytest.raises(UserError, match=r"make it by `python -m pipelines\.policies\.train mine`"):
        _actor.read("mine")
    actor(*sizes).write("mine", {"return": 1.0})
    state = rng(1).standard_normal((50, 3))
    np.testing.assert_array_equal(_actor.read("mine")(state), actor(*sizes)(state))


def test_actions_of_an_actor_by_hand() -> None:
    state = rng(1).normal(0, 30, (200, 3))
    linear, deep = actor(3, 2), actor(3, 5, 2)
    z = np.clip((state - linear.loc) / linear.scale, -10, 10)
    ((weight, bias),) = linear.layers
    np.testing.assert_allclose(linear(state), np.clip(z @ weight.T + bias, -1, 1), atol=1e-12)
    z = np.clip((state - deep.loc) / deep.scale, -10, 10)
    (first, shift), (weight, bias) = deep.layers
    hidden = np.where(z @ first.T + shift > 0, z @ first.T + shift, 0)
    np.testing.assert_allclose(deep(state), np.tanh(hidden @ weight.T + bias), atol=1e-12)


def test_running_moments_are_those_of_all_rows() -> None:
    rows, moments = rng().normal(3, 2, (100, 4)), Moments(4)
    np.testing.assert_array_equal(moments.scale, 1)
    for part in np.split(rows, [10, 11, 60]):
        moments.add(part)
    np.testing.assert_allclose(moments.loc, rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.scale, rows.std(0), atol=1e-12)


class Regulator:
    """A linear system x' = x + a / 2, which sees x and how close it is to the origin."""

    state_names, action_names = ("x", "near"), ("a",)

    def roll(self, act: Any, n: int, length: int, rng: np.random.Generator, alike: bool = False) -> tuple[Array, ...]:
        x = np.repeat(rng.uniform(-1, 1, (1, 1)), n, 0) if alike else rng.uniform(-1, 1, (n, 1))
        states = [np.concatenate([x, np.exp(-10 * x**2)], -1)]
        for _ in range(length):
            x = x + act(states[-1]) / 2
            states.append(np.concatenate([x, np.exp(-10 * x**2)], -1))
        return np.stack(states, 1), np.empty(0), np.empty(0)


def test_random_search_brings_a_regulator_to_the_origin() -> None:
    search = RandomSearch(
        maximised="near", action_repeat=1, iterations=60, directions=8, top=4, step=0.2, noise=0.2, length=20, every=60
    )
    (found,) = search.candidates(Regulator(), 0)  # type: ignore[arg-type]

    def near(policy: Any) -> float:
        return float(Regulator().roll(policy, 50, 20, rng(1))[0][:, 1:, 1].mean())

    assert near(lambda state: 0 * state[:, :1]) < 0.4
    assert near(found) > 0.8
    assert found.layers[0][0][0, 0] < 0


def test_rows_are_cut_off_together_and_say_what_they_saw_last() -> None:
    pytest.importorskip("stable_baselines3", reason="run `pip install -e '.[policies]'`")
    pytest.importorskip("dm_control", reason="run `pip install -e '.[dmc]'`")
    from pipelines.environments import cheetah
    from pipelines.policies.actor_critic import Rows

    domain = cheetah.build(cheetah.Settings())
    rows, action = Rows(domain, 3, 2, np.zeros(17), np.ones(17), rng()), rng(1).uniform(-1, 1, (3, 6))
    state = np.clip(rows.reset(), -10, 10)
    begun, physics = rows.state, rows.physics
    np.testing.assert_allclose(state, np.clip(begun, -10, 10), rtol=1e-6)
    for age in (1, 2):
        begun, physics = domain.move(physics, action)
        seen, reward, over, infos = rows.step(action)
        np.testing.assert_allclose(reward, domain.rewards(begun)["run"], rtol=1e-6)
        assert (over == (age == 2)).all()
    assert [info["TimeLimit.truncated"] for info in infos] == [True] * 3
    np.testing.assert_allclose([info["terminal_observation"] for info in infos], np.clip(begun, -10, 10), rtol=1e-6)
    assert np.abs(seen[:, 8:] - np.clip(begun, -10, 10)[:, 8:]).max() > 0.1  # a new episode


def test_an_unknown_policy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["cheetah_fly"]) == 1
    assert capsys.readouterr().err == (
        "no policy 'cheetah_fly'; expected cheetah_run, walker_walk or quadruped_walk.\n"
    )
