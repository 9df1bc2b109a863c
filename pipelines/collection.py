"""Draws the tables of an environment on all cores: transitions, on-policy rollouts and evaluation rollouts.

Columns: `episode`, `step`, `behaviour`, then numbers named by prefix and component (`state_x`, `action_ux`,
`next_state_x`, `next_action_ux`, `reward_loop`). Every table is drawn in pieces of fixed size, each with a
seed of its own, so that rows depend on the seed and not on the number of workers. Workers are threads: what
costs time, physics and NumPy, lets go of Python's lock, and processes would take longer to start than work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd

from pipelines import members
from pipelines.environments import Array, Environment
from pipelines.errors import UserError

TRANSITIONS, EPISODES = 10_000, 250  # rows, respectively episodes, of a piece


@dataclass(frozen=True)
class Collection:
    """The tables of one environment, ordered by episode and step.

    Attributes:
        transitions: independent rows off the policy (each its own episode, `behaviour` "coverage") with the
            policy's action in the next state.
        rollouts: episodes under the policy, half from coverage states ("coverage"), half from the start
            distribution ("start"): rows S_0, ..., S_length with the policy's action.
        evaluation: the same from the start distribution only, with every reward of the row's state.
    """

    transitions: pd.DataFrame
    rollouts: pd.DataFrame
    evaluation: pd.DataFrame


@dataclass(frozen=True)
class Piece:
    """What a worker draws at a time: `count` episodes, numbered from `first` on."""

    behaviour: Literal["coverage", "start"]
    first: int
    count: int
    seed: np.random.SeedSequence


def collect(
    kind: str,
    settings: members.Settings,
    *,
    transitions: int,
    rollouts: int,
    length: int,
    starts: int,
    seed: int,
    workers: int | None = None,
) -> Collection:
    """Draw the tables of an environment.

    Arguments:
        transitions: rows of the table of transitions.
        rollouts: on-policy episodes.
        length: transitions of an episode; a geometric horizon from its first state reaches beyond its end
            with probability gamma^length.
        starts: evaluation episodes.
        workers: threads; None is one a core.

    >>> spiral = members.load("pipelines.environments", "linear_gaussian")
    >>> tables = collect(
    ...     "linear_gaussian", spiral.Settings(), transitions=10, rollouts=4, length=3, starts=2, seed=0
    ... )
    >>> len(tables.transitions), len(tables.rollouts), len(tables.evaluation)
    (10, 16, 8)
    """
    environment: Environment = members.load("pipelines.environments", kind).build(settings)
    seeds = np.random.SeedSequence(seed).spawn(4)
    rollout = partial(_rollout, environment, length)
    covered = rollouts - rollouts // 2
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            steps = pool.map(
                partial(_transitions, environment), _pieces("coverage", transitions, TRANSITIONS, seeds[0])
            )
            covering = pool.map(rollout, _pieces("coverage", covered, EPISODES, seeds[1]))
            starting = pool.map(rollout, _pieces("start", rollouts - covered, EPISODES, seeds[2], first=covered))
            evaluating = pool.map(rollout, _pieces("start", starts, EPISODES, seeds[3]))
            tables = Collection(_join(kind, steps), _join(kind, covering, starting), _join(kind, evaluating))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    states = tables.evaluation[[f"state_{name}" for name in environment.state_names]].to_numpy()
    for name, reward in environment.rewards(states).items():
        tables.evaluation[f"reward_{name}"] = reward
    return tables


def _pieces(
    behaviour: Literal["coverage", "start"],
    count: int,
    size: int,
    seed: np.random.SeedSequence,
    first: int = 0,
) -> list[Piece]:
    offsets = range(0, count, size)
    return [
        Piece(behaviour, first + offset, min(size, count - offset), child)
        for offset, child in zip(offsets, seed.spawn(len(offsets)), strict=True)
    ]


def _transitions(environment: Environment, piece: Piece) -> pd.DataFrame:
    rng = np.random.default_rng(piece.seed)
    state, action = environment.coverage(rng, piece.count)
    next_state = environment.step(state, action, rng)
    numbers = {
        **_columns("state", environment.state_names, state),
        **_columns("action", environment.action_names, action),
        **_columns("next_state", environment.state_names, next_state),
        **_columns("next_action", environment.action_names, environment.policy(next_state)),
    }
    return _table(piece, 1, numbers)


def _rollout(environment: Environment, length: int, piece: Piece) -> pd.DataFrame:
    rng = np.random.default_rng(piece.seed)
    if piece.behaviour == "start":
        state = environment.starts(rng, piece.count)
    else:
        state, _ = environment.coverage(rng, piece.count)
    states, actions = [state], [environment.policy(state)]
    for _ in range(length):
        states.append(environment.step(states[-1], actions[-1], rng))
        actions.append(environment.policy(states[-1]))
    numbers = {
        **_columns("state", environment.state_names, np.stack(states, 1).reshape(-1, state.shape[1])),
        **_columns("action", environment.action_names, np.stack(actions, 1).reshape(-1, actions[0].shape[1])),
    }
    return _table(piece, length + 1, numbers)


def _columns(prefix: str, names: tuple[str, ...], rows: Array) -> dict[str, Array]:
    return {f"{prefix}_{name}": rows[:, i] for i, name in enumerate(names)}


def _table(piece: Piece, steps: int, numbers: dict[str, Array]) -> pd.DataFrame:
    episode = piece.first + np.arange(piece.count).repeat(steps)
    step = np.tile(np.arange(steps), piece.count)
    return pd.DataFrame({"episode": episode, "step": step, "behaviour": piece.behaviour, **numbers})


def _join(kind: str, *parts: Iterator[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat([frame for part in parts for frame in part], ignore_index=True)
    for name in table.columns.drop(["episode", "step", "behaviour"]):
        bad = int((~np.isfinite(table[name].to_numpy())).sum())
        if bad:
            raise UserError(
                f"the environment {kind!r} gave NaN or infinity in column {name!r} in {bad} of "
                f"{len(table)} rows, expected finite numbers; mend it or change its settings."
            )
    return table
