"""Stored policies: their file, and rows for stable-baselines3."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.environments import _actor
from pipelines.environments._actor import Actor
from pipelines.policies import train


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
    state, deep = rng(1).normal(0, 30, (200, 3)), actor(3, 5, 2)
    z = np.clip((state - deep.loc) / deep.scale, -10, 10)
    (first, shift), (weight, bias) = deep.layers
    hidden = np.where(z @ first.T + shift > 0, z @ first.T + shift, 0)
    np.testing.assert_allclose(deep(state), np.tanh(hidden @ weight.T + bias), atol=1e-12)
    assert (np.abs(z) == 10).any()


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
