"""Domains of the DeepMind Control Suite agree with dm_control: physics, observations, rewards, starts."""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

os.environ.setdefault("MUJOCO_GL", "disabled")
pytest.importorskip("dm_control", reason="run `pip install -e '.[dmc]'`")

from pipelines.base import layout, plugins
from pipelines.base.errors import UserError
from pipelines.environments import Array, _film, _suite

DOMAINS = ("cheetah", "walker")
STORED = (("cheetah", "run"), ("walker", "walk"))
TASKS = (("cheetah", "run"), ("walker", "stand"), ("walker", "walk"), ("walker", "run"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@cache
def make(domain: str, repeat: int = 1) -> Any:
    module = plugins.load("pipelines.environments", domain)
    return module.build(module.Settings(action_repeat=repeat))


@cache
def reference(domain: str, task: str) -> Any:
    from dm_control import suite

    return suite.load(domain, task, task_kwargs={"random": 0}, environment_kwargs={"flat_observation": True})


def observation(step: Any) -> Array:
    return np.asarray(step.observation["observations"], dtype=float)


@cache
def recorded(domain: str, task: str, steps: int = 200) -> tuple[Array, Array, Array]:
    """Observations (steps + 1, s), actions and rewards of one episode of dm_control under random actions."""
    environment, draw = reference(domain, task), rng()
    states, rewards = [observation(environment.reset())], []
    actions = draw.uniform(-1, 1, (steps, environment.action_spec().shape[0]))
    for action in actions:
        step = environment.step(action)
        states.append(observation(step))
        rewards.append(step.reward)
    return np.array(states), actions, np.array(rewards)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_step_is_that_of_dm_control(domain: str) -> None:
    states, actions, _ = recorded(domain, "run")
    assert np.ptp(states, 0).min() > 0.05  # everything moves
    np.testing.assert_allclose(make(domain).step(states[:-1], actions, rng()), states[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_repeated_action_is_that_many_steps(domain: str) -> None:
    states, actions, _ = recorded(domain, "run")
    now, action = states[:-1:10], actions[::10]
    once = now
    for _ in range(3):
        once = make(domain).step(once, action, rng())
    np.testing.assert_allclose(make(domain, 3).step(now, action, rng()), once, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("domain", "task"), TASKS)
def test_rewards_are_those_of_dm_control(domain: str, task: str) -> None:
    states, _, rewards = recorded(domain, task)
    np.testing.assert_allclose(make(domain).rewards(states[1:])[task], rewards, rtol=0, atol=1e-12)
    assert np.ptp(rewards) > 1e-3


def test_the_linear_tolerance_ends_at_two_margins() -> None:
    from dm_control.utils import rewards

    x = np.linspace(-12, 12, 101)
    for bound, margin, value in ((10.0, 10.0, 0.0), (1.0, 0.5, 0.5), (8.0, 4.0, 0.5)):
        theirs = rewards.tolerance(x, (bound, np.inf), margin, "linear", value)
        np.testing.assert_allclose(_suite.tolerance(x, bound, margin, value), theirs, atol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_observation_is_inverted_and_rows_do_not_depend_on_each_other(domain: str) -> None:
    states, actions, _ = recorded(domain, "run")
    environment = make(domain)
    np.testing.assert_allclose(environment.observe(environment.physics(states)), states, rtol=0, atol=1e-12)
    whole = environment.step(states[:-1], actions, rng())
    np.testing.assert_array_equal(environment.step(states[50:53], actions[50:53], rng()), whole[50:53])
    assert environment.step(states[:0], actions[:0], rng()).shape == (0, states.shape[1])


def test_samples_off_the_circle_are_projected_on_it() -> None:
    states, *_ = recorded("walker", "run")
    longer = states.copy()
    longer[:, :14] *= 1.7
    for task, rewards in make("walker").rewards(states).items():
        np.testing.assert_allclose(make("walker").rewards(longer)[task], rewards, atol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_starts_have_the_law_of_dm_control(domain: str) -> None:
    theirs = np.array([observation(reference(domain, "run").reset()) for _ in range(80)])
    ours = make(domain).starts(rng(), 1000)
    moving = np.ptp(theirs, 0) > 1e-9
    np.testing.assert_array_equal(np.ptp(ours, 0) > 1e-9, moving)
    np.testing.assert_allclose(ours[0, ~moving], theirs[0, ~moving], atol=1e-12)
    for component in np.flatnonzero(moving):
        assert stats.ks_2samp(theirs[:, component], ours[:, component]).pvalue > 1e-4, component


@pytest.mark.parametrize(("domain", "task"), STORED)
def test_the_stored_policy_still_earns_what_it_did(domain: str, task: str) -> None:
    (found,) = make(domain).checks(rng())
    assert found.startswith(f"the stored policy {domain}_{task} has a return of ")


def test_a_policy_that_is_not_stored_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "POLICIES", tmp_path)
    walker = plugins.load("pipelines.environments", "walker")
    for ask in (lambda: walker.sources(walker.Settings(), None), lambda: walker.build(walker.Settings()).actor):
        with pytest.raises(UserError, match=r"make it by `python -m pipelines\.policies\.train walker_walk`\.$"):
            ask()


def test_a_stored_policy_that_is_worse_here_stops_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = make("cheetah")
    monkeypatch.setattr(type(environment), "policy", lambda self, state: np.zeros((len(state), 6)))
    with pytest.raises(UserError, match=r"cheetah_run has a return of \d+ on mujoco .* expected at least 90% of it"):
        environment.checks(rng())


@pytest.mark.parametrize(("domain", "task"), STORED)
def test_mixed_episodes_have_odds_of_random_actions_from_none_to_one(domain: str, task: str) -> None:
    environment, length = make(domain, 2), 50
    assert environment.settings.task == task
    rows = environment.transitions(range(400, 400 + 8 * length), length, rng())
    own = np.abs(rows.action - environment.policy(rows.state)).max(-1) < 1e-9
    share = 1 - own.reshape(8, length).mean(1)
    np.testing.assert_array_equal(share[[0, 4]], 0)
    np.testing.assert_array_equal(share[[3, 7]], 1)
    assert stats.binomtest(round(length * share[[1, 5]].sum()), 2 * length, 0.25).pvalue > 1e-4
    assert stats.binomtest(round(length * share[[2, 6]].sum()), 2 * length, 0.5).pvalue > 1e-4
    assert list(rows.behaviour[::length]) == ["policy", "visited", "visited", "random"] * 2
    np.testing.assert_array_equal(rows.episode, 400 + np.arange(8 * length) // length)
    np.testing.assert_allclose(environment.step(rows.state, rows.action, rng()), rows.next_state, atol=1e-9)
    same = (rows.next_state[:-1] == rows.state[1:]).all(-1)
    np.testing.assert_array_equal(same, rows.step[1:] > 0)


def test_a_step_of_the_quadruped_is_that_of_dm_control() -> None:
    theirs, ours, draw = reference("quadruped", "walk"), make("quadruped"), rng()
    data, specification = theirs.physics.data, theirs.action_spec()
    actions = draw.uniform(specification.minimum, specification.maximum, (200, 12))
    states, physics, rewards = [observation(theirs.reset())], [np.concatenate([data.qpos, data.qvel, data.act])], []
    for action in actions:
        step = theirs.step(action)
        states.append(observation(step))
        physics.append(np.concatenate([data.qpos, data.qvel, data.act]))
        rewards.append(step.reward)
    followed, integrated = ours.move(np.array(physics[:-1]), actions)
    np.testing.assert_allclose(integrated, physics[1:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(followed[:, :48], np.array(states)[1:, :48], rtol=0, atol=1e-12)
    np.testing.assert_allclose(followed, states[1:], rtol=0, atol=1e-10)  # contact forces, to the solver's tolerance
    np.testing.assert_allclose(ours.rewards(np.array(states[1:]))["walk"], rewards, rtol=0, atol=1e-12)


def test_starts_of_the_quadruped_have_the_law_of_dm_control() -> None:
    theirs = np.array([observation(reference("quadruped", "walk").reset()) for _ in range(80)])
    ours = make("quadruped").starts(rng(), 300)
    for component in (*range(44, 48), *range(48, 54)):  # of the torso, the velocities of which are 0
        assert stats.ks_2samp(theirs[:, component], ours[:, component]).pvalue > 1e-4, component
    np.testing.assert_allclose(ours[:, :44], 0, atol=1e-12)
    np.testing.assert_allclose(theirs[:, :44], 0, atol=1e-12)


@pytest.mark.parametrize(("domain", "task"), STORED)
def test_a_film_shows_the_policy_or_says_why_not(domain: str, task: str, tmp_path: Path) -> None:
    file = tmp_path / "film.png"
    environment = make(domain, 2)
    sentence = environment.film(file, rng())
    if sentence is not None:
        assert sentence == f"no film of {domain}_{task}: MuJoCo renders neither by EGL nor by OSMesa here"
        return
    frames = np.split(np.asarray(Image.open(file).convert("RGB"), dtype=float), 8, 1)
    assert all(frame.std() > 10 for frame in frames)
    assert all(np.abs(one - other).mean() > 1 for one, other in pairwise(frames))


def test_without_a_display_there_is_a_sentence_and_no_film(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_film, "PLATFORMS", ("none",))
    sentence = make("cheetah", 2).film(tmp_path / "film.png", rng())
    assert sentence == "no film of cheetah_run: MuJoCo renders neither by EGL nor by OSMesa here"
    assert not list(tmp_path.iterdir())
