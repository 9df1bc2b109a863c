"""Make the tables of an environment on all cores: transitions, on-policy rollouts and evaluation rollouts.

Columns: `episode`, `step`, `behaviour`, then numbers named by prefix and component (`state_x`, `action_ux`,
`next_state_x`, `next_action_ux`, `reward_loop`), and `terminal`. Every table is drawn in pieces of fixed size, each
with its own seed, so that rows depend on the seed and not on the number of workers. Workers are threads: physics and
NumPy release the global interpreter lock, and processes would take longer to start than to work. An environment that is
not thread-safe has one worker. Pieces of transitions are written as soon as they are drawn, so that only a few are in
memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import environments
from pipelines.base import files, layout, metric_keys, plugins
from pipelines.base.errors import UserError
from pipelines.config.params import EnvironmentEntry
from pipelines.data import moments
from pipelines.data.logs import LogTables, columns
from pipelines.data.moments import Moments
from pipelines.environments import Beginning, Environment, Family, Log, Process, Simulator
from pipelines.runs.context import Stage

TRANSITIONS, EPISODES = 10_000, 250  # rows or episodes per piece
GROUP = 100_000  # rows per row group of a file
AHEAD = 2  # pieces per worker that may wait to be used
COUNTERFACTUALS = 8  # start states with a replaced state or action; a mean over few has little enough noise


def write(stage: Stage, environment: str) -> None:
    """Collect the tables of an environment and write them with their provenance."""
    entry = stage.params.environments[environment]
    built = environments.build(entry.kind, entry.settings())
    make = _from_log if isinstance(built, Log) else _from_environment
    with stage.output(layout.collected(environment)) as folder:
        described = make(folder, entry, stage.seed("collect", environment))
        files.write_json(
            layout.provenance(folder),
            {
                "kind": entry.kind,
                "settings": entry.settings().model_dump(mode="json"),
                "source": built.source,
                "fidelity": built.fidelity,
                "truth": built.truth,
                "state_names": list(built.state_names),
                "action_names": list(built.action_names),
                "closed_form": built.oracle() is not None,
                **described,
            },
        )
    stage.metrics({f"{name}_rows": number for name, number in described["rows"].items()})
    for message in described["messages"]:
        stage.log(message)
    stage.log(f"{', '.join(f'{number} {name}' for name, number in described['rows'].items())}: {built.source}")


def _from_environment(folder: Path, entry: EnvironmentEntry, seed: int) -> dict[str, Any]:
    """Draw and write the tables of an environment, and return what describes them."""
    collector = Collector(entry.kind, entry.settings(), seed)
    built, messages = collector.environment, collector.checks()
    # an entry without them is one of a log
    assert entry.rollouts is not None
    assert entry.length is not None
    assert entry.starts is not None
    count = entry.transitions or collector.available()
    # Models standardise with `loc` and `scale`, and report in the units of the environment; samples far outside the
    # range from `low` to `high` count as diverged.
    units, constants = _write_transitions(folder, collector.transitions(count, entry.length), built)
    if built.family is not None:
        units |= _of_family(built.family, built, units)
    rollouts = collector.rollouts(entry.rollouts, entry.length)
    files.write_table(layout.rollouts(folder), rollouts)
    evaluation = collector.evaluation(entry.starts, entry.length)
    files.write_table(layout.evaluation(folder), evaluation)
    unseen = built.film(layout.film(folder), np.random.default_rng(collector.seeds[6]))
    exchanged = collector.counterfactuals(evaluation, entry.length)
    if exchanged is not None:
        files.write_table(layout.counterfactual(folder), exchanged)
    return {
        "bounds": list(built.bounds),
        "walls": [list(wall) for wall in built.walls],
        "cut_off_mass": entry.gamma**entry.length,
        "rows": {"transitions": count, "rollouts": len(rollouts), "evaluation": len(evaluation)},
        "starts": entry.starts,
        "messages": [*messages, *constants, *filter(None, [unseen])],
        **units,
    }


def _of_family(family: Family, built: Environment, units: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names and the units of what models are conditioned on beside the state, actions and then w."""
    loc, scale = family.units
    return {
        "family": {
            "names": list(family.names),
            "source": family.source,
            "low": family.low.tolist(),
            "high": family.high.tolist(),
        },
        "action_names": list(built.inputs),
        "action_loc": [*units["action_loc"], *loc.tolist()],
        "action_scale": [*units["action_scale"], *scale.tolist()],
    }


def _from_log(folder: Path, entry: EnvironmentEntry, seed: int) -> dict[str, Any]:
    """Write the tables of a log, and return what describes them."""
    log = environments.build(entry.kind, entry.settings())
    assert isinstance(log, Log)
    tables = LogTables(log, entry, seed)
    units, constants = _write_transitions(folder, tables.transitions(), log)
    rollouts, evaluation, neighbours = tables.rollouts, tables.evaluation, tables.neighbours()
    files.write_table(layout.evaluation(folder), evaluation)
    if rollouts is not None:
        files.write_table(layout.rollouts(folder), rollouts)
    if neighbours is not None:
        files.write_table(layout.neighbours(folder), neighbours)
    ends = [(a, b) if b > a else (a - 1, b + 1) for a, b in zip(units["low"][:2], units["high"][:2], strict=True)]
    return {
        "bounds": [ends[0][0], ends[-1][0], ends[0][1], ends[-1][1]],
        "walls": [],
        "cut_off_mass": entry.gamma**tables.length,
        "rows": {
            "transitions": tables.count,
            "rollouts": 0 if rollouts is None else len(rollouts),
            "evaluation": len(evaluation),
        },
        "starts": evaluation["episode"].nunique(),
        "length": tables.length,
        "episodes": tables.described(),
        "messages": constants,
        **units,
    }


def _write_transitions(
    folder: Path, frames: Iterable[pd.DataFrame], built: Process
) -> tuple[dict[str, Any], list[str]]:
    """Write the table of transitions, and return their units and sentences on constant components."""
    measured = metric_keys.columns("next_state", built.state_names) + metric_keys.columns("action", built.action_names)
    found = write_frames(layout.transitions(folder), frames, measured)
    return moments.units(found, built.state_names, built.action_names)


@dataclass(frozen=True)
class Collection:
    """The tables of one environment, ordered by episode and step.

    Attributes:
        transitions: Off-policy rows, with the policy's action in the next state, unless there is a family of policies,
            whose w every training batch draws anew. Rows that cover the state space are
            one episode each (`behaviour` "coverage"). `terminal` is true if the next state is terminal; a time limit
            does not make it so.
        rollouts: Episodes under the policy: rows S_0, ..., S_length with the policy's action. Half start from coverage
            states ("coverage") if the environment has them, the others from the start distribution ("start"). A
            terminal state is absorbing: `terminal` rows repeat it until the end. With a family, w is part of actions.
        evaluation: As `rollouts`, but from the start distribution only, with every reward of the row's state.
    """

    transitions: pd.DataFrame
    rollouts: pd.DataFrame
    evaluation: pd.DataFrame


@dataclass(frozen=True)
class Piece:
    """A unit of work: the numbers of the rows or episodes to draw, and their seed."""

    numbers: range
    seed: np.random.SeedSequence


class Collector:
    """The collector of one environment's tables; each table has its own seed.

    Args:
        kind: Name of the environment's plugin.
        settings: Settings of the plugin.
        seed: Seed of all tables.
        workers: Number of threads; None is one per core.
    """

    def __init__(self, kind: str, settings: plugins.Settings, seed: int, workers: int | None = None) -> None:
        built = environments.build(kind, settings)
        assert isinstance(built, Environment), kind
        self.environment = built
        self.kind = kind
        self.seeds = np.random.SeedSequence(seed).spawn(7)
        self.workers = (workers or os.cpu_count() or 1) if self.environment.thread_safe else 1

    def checks(self) -> list[str]:
        """Try the environment, and return sentences on what was found."""
        return self.environment.checks(np.random.default_rng(self.seeds[5]))

    def available(self) -> int:
        """Return the number of recorded transitions.

        Raises:
            UserError: They are drawn, so that there is no last one.
        """
        available = self.environment.available()
        if available is None:
            raise UserError(
                f"transitions is all, and the environment {self.kind!r} draws as many as it is asked for; expected a "
                "number."
            )
        return available

    def transitions(self, count: int, length: int) -> Iterator[pd.DataFrame]:
        """Yield the table of transitions in pieces.

        Args:
            count: Number of rows.
            length: Steps per episode, for rows that come from episodes.

        Raises:
            UserError: The environment has fewer rows.
        """
        if (available := self.environment.available()) is not None and count > available:
            raise UserError(
                f"{count} transitions were asked of the environment {self.kind!r}, which has {available}; "
                "lower `transitions`."
            )
        return self._draw(partial(_transitions, self.environment, length), _pieces(count, TRANSITIONS, self.seeds[0]))

    def rollouts(self, count: int, length: int) -> pd.DataFrame:
        """Return `count` episodes of `length` steps under the policy, divided among the environment's beginnings."""
        beginnings = self.environment.beginnings
        covered = count - count // 2 if len(beginnings) > 1 else 0
        parts = [
            *self._episodes("coverage", _pieces(covered, EPISODES, self.seeds[1]), length),
            *self._episodes("start", _pieces(count - covered, EPISODES, self.seeds[2], first=covered), length),
        ]
        return pd.concat(parts, ignore_index=True)

    def evaluation(self, count: int, length: int) -> pd.DataFrame:
        """Return `count` episodes of `length` steps from the start distribution, with every reward."""
        pieces = _pieces(count, EPISODES, self.seeds[3])
        table = pd.concat(list(self._episodes("start", pieces, length)), ignore_index=True)
        states = table[metric_keys.columns("state", self.environment.state_names)].to_numpy()
        return table.assign(**{f"reward_{name}": value for name, value in self.environment.rewards(states).items()})

    def counterfactuals(self, evaluation: pd.DataFrame, length: int) -> pd.DataFrame | None:
        """Return rollouts from the first start states with another state or another action.

        Args:
            evaluation: Table of evaluation episodes; its first episodes are used.
            length: Steps per rollout.

        Returns:
            Rollouts under the policy after the replacement, with the columns of rollouts and `exchanged`: "state" (the
                start
            state is that of the next episode) or "action" (a random one). None if the environment cannot be set to any
                state.
        """
        simulator = getattr(self.environment, "simulator", self.environment)  # recorded episodes have a simulator
        if not isinstance(simulator, Simulator):
            return None
        family, count = self.environment.family, len(self.environment.action_names)
        rng = np.random.default_rng(self.seeds[4])
        first = evaluation[evaluation["step"] == 0].head(COUNTERFACTUALS)
        names, actions = self.environment.state_names, self.environment.inputs
        state, action = first[metric_keys.columns("state", names)], first[metric_keys.columns("action", actions)]
        here, own = state.to_numpy(), action.to_numpy()
        w = own[:, count:]
        parts = []
        for exchanged, now, act in (
            ("state", np.roll(here, -1, 0), own),
            ("action", here, np.concatenate([simulator.actions(rng, len(here)), w], -1)),
        ):
            for step in range(length + 1):
                parts.append(
                    pd.DataFrame(
                        {
                            "exchanged": exchanged,
                            "episode": first["episode"].to_numpy(),
                            "step": step,
                            **columns("state", names, now),
                            **columns("action", actions, act),
                        }
                    )
                )
                now = simulator.step(now, act[:, :count], rng)
                following = self.environment.policy(now) if family is None else family.act(now, w)
                act = np.concatenate([following, w], -1)
        table = pd.concat(parts, ignore_index=True)
        return table.sort_values(["exchanged", "episode", "step"], ignore_index=True)

    def _episodes(self, beginning: Beginning, pieces: list[Piece], length: int) -> Iterator[pd.DataFrame]:
        return self._draw(partial(_rollout, self.environment, beginning, length), pieces)

    def _draw(self, work: Callable[[Piece], pd.DataFrame], pieces: Iterable[Piece]) -> Iterator[pd.DataFrame]:
        """Yield the frames of the pieces in order, drawn by threads at most `AHEAD` pieces per worker in advance."""
        remaining, waiting = iter(pieces), deque[Future[pd.DataFrame]]()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                while True:
                    while len(waiting) < AHEAD * self.workers and (piece := next(remaining, None)) is not None:
                        waiting.append(pool.submit(work, piece))
                    if not waiting:
                        return
                    yield self._checked(waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _checked(self, frame: pd.DataFrame) -> pd.DataFrame:
        for name in frame.columns.drop(["episode", "step", "behaviour"]):
            bad = ~np.isfinite(frame[name].to_numpy())
            if bad.any():
                episode = frame["episode"].to_numpy()[bad.argmax()]
                raise UserError(
                    f"the environment {self.kind!r} gave NaN or infinity in column {name!r} in {int(bad.sum())} of "
                    f"{len(frame)} rows, first in episode {episode}, expected finite numbers; fix it or change its "
                    "settings."
                )
        return frame


def collect(
    kind: str,
    settings: plugins.Settings,
    *,
    transitions: int,
    rollouts: int,
    length: int,
    starts: int,
    seed: int,
    workers: int | None = None,
) -> Collection:
    """Draw the tables of an environment into memory.

    Args:
        kind: Name of the environment's plugin.
        settings: Settings of the plugin.
        transitions: Number of transitions.
        rollouts: Number of on-policy episodes.
        length: Transitions per episode; a geometric horizon from its first state exceeds it with probability
            gamma^length.
        starts: Number of evaluation episodes.
        seed: Seed of all tables.
        workers: Number of threads; None is one per core.

    >>> spiral = plugins.load("pipelines.environments", "linear_gaussian")
    >>> tables = collect(
    ...     "linear_gaussian", spiral.Settings(), transitions=10, rollouts=4, length=3, starts=2, seed=0
    ... )
    >>> len(tables.transitions), len(tables.rollouts), len(tables.evaluation)
    (10, 16, 8)
    """
    collector = Collector(kind, settings, seed, workers)
    return Collection(
        pd.concat(list(collector.transitions(transitions, length)), ignore_index=True),
        collector.rollouts(rollouts, length),
        collector.evaluation(starts, length),
    )


def write_frames(path: Path, frames: Iterable[pd.DataFrame], columns: Sequence[str]) -> dict[str, list[float]]:
    """Write frames as one parquet table, one row group at a time.

    Args:
        path: File to write.
        frames: Frames with the same columns.
        columns: Columns whose moments are computed.

    Returns:
        Mean `loc` and standard deviation `scale` of the columns, with which models standardise, and their range from
            `low`
        to `high`; see `Moments.result`.
    """
    running = Moments(columns)
    files.write_chunks(path, running.including(_groups(frames)))
    return running.result()


def _groups(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Yield the same rows in frames of at least `GROUP` rows."""
    waiting, rows = list[pd.DataFrame](), 0
    for frame in frames:
        waiting.append(frame)
        rows += len(frame)
        if rows >= GROUP:
            yield pd.concat(waiting, ignore_index=True)
            waiting, rows = [], 0
    if waiting:
        yield pd.concat(waiting, ignore_index=True)


def _pieces(count: int, size: int, seed: np.random.SeedSequence, first: int = 0) -> list[Piece]:
    offsets = range(0, count, size)
    return [
        Piece(range(first + offset, first + min(offset + size, count)), child)
        for offset, child in zip(offsets, seed.spawn(len(offsets)), strict=True)
    ]


def _transitions(environment: Environment, length: int, piece: Piece) -> pd.DataFrame:
    rows = environment.transitions(piece.numbers, length, np.random.default_rng(piece.seed))
    following = None if environment.family is not None else environment.policy(rows.next_state)
    return pd.DataFrame(
        {
            "episode": rows.episode,
            "step": rows.step,
            "behaviour": rows.behaviour,
            **columns("state", environment.state_names, rows.state),
            **columns("action", environment.action_names, rows.action),
            **columns("next_state", environment.state_names, rows.next_state),
            **({} if following is None else columns("next_action", environment.action_names, following)),
            "terminal": rows.terminal,
        }
    )


def _rollout(environment: Environment, beginning: Beginning, length: int, piece: Piece) -> pd.DataFrame:
    count = len(piece.numbers)
    drawn = environment.episodes(beginning, count, length, np.random.default_rng(piece.seed))
    return pd.DataFrame(
        {
            "episode": np.array(piece.numbers).repeat(length + 1),
            "step": np.tile(np.arange(length + 1), count),
            "behaviour": beginning,
            **columns("state", environment.state_names, drawn.states.reshape(-1, drawn.states.shape[2])),
            **columns("action", environment.inputs, drawn.actions.reshape(-1, drawn.actions.shape[2])),
            "terminal": drawn.terminal.ravel(),
        }
    )
