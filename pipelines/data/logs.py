"""Make the tables of a log: transitions and episodes for training, and the futures of held-out episodes.

Episodes are held out by a hash of their names, so that an episode stays where it is when the log grows. The log is read
twice, one episode at a time: first for the lengths of its episodes, then for its rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines.base import metric_keys
from pipelines.base.errors import UserError
from pipelines.config.params import EnvironmentEntry
from pipelines.environments import Array, Log, Logged

HELD_OUT = 0.2  # share of the episodes
MASS = 0.01  # of a horizon beyond the steps that follow a start state, where `length` is null
STARTS = 64  # start states, where `starts` is null
ROWS = 1_000_000  # rows of the training episodes that are kept whole, where `rollouts` is null
PIECE = 10_000  # rows per frame of transitions


@dataclass(frozen=True)
class Entry:
    """An episode in the index of a log.

    Attributes:
        name: Its name.
        steps: Its steps.
        terminal: Whether it ends in a terminal state.
        share: Hash of its name, between 0 and 1.
    """

    name: str
    steps: int
    terminal: bool
    share: float

    def starts(self, length: int) -> int:
        """Return the number of its states that `length` steps follow, or a terminal state within fewer."""
        return self.steps if self.terminal else max(0, self.steps - length + 1)


class LogTables:
    """The tables of a log.

    Args:
        log: The log.
        entry: Entry of the environment; what is null there is chosen by the log.
        seed: Seed of the choice of episodes and start states.

    Attributes:
        length: Steps that follow a start state.

    Raises:
        UserError: The log has too few episodes, or they are too short.
    """

    def __init__(self, log: Log, entry: EnvironmentEntry, seed: int) -> None:
        self.log, self.entry, self.seed = log, entry, seed
        self.index = [
            Entry(episode.name, len(episode.states) - 1, episode.terminal, _share(seed, episode.name))
            for episode in self._episodes()
        ]
        self.length = self._length()
        self.held_out = self._held_out()
        self.training = [i for i in range(len(self.index)) if i not in self.held_out]
        available = sum(self.index[i].steps for i in self.training)
        self.count = entry.transitions or available
        if self.count > available:
            raise UserError(
                f"{self.count} transitions were asked of the log, whose training episodes have {available}; "
                "lower `transitions`, or write all."
            )
        self._taken = self._subset("transitions", self.count)
        self._whole = self._kept()
        self._starts = self._chosen()
        self._rollouts = list[pd.DataFrame]()
        self._windows = list[pd.DataFrame]()

    def transitions(self) -> Iterator[pd.DataFrame]:
        """Yield the transitions of the training episodes; `rollouts` and `evaluation` are complete after it.

        Raises:
            UserError: The log changed since its index was made, or the policy is not as it should be.
        """
        waiting, rows, episode = list[pd.DataFrame](), 0, None
        for number, (known, episode) in enumerate(zip_longest(self.index, self._episodes())):
            found = None if episode is None else (episode.name, len(episode.states) - 1)
            if known is None or episode is None or found != (known.name, known.steps):
                raise UserError(f"the log changed while it was read: {self.log.source}; run the same command again.")
            if number in self._whole:
                self._rollouts.append(self._rows(number, episode, slice(None)))
            for place, first in self._starts.get(number, ()):
                self._windows.append(self._window(place, episode, first))
            if number in self._taken:
                waiting.append(self._steps(number, episode, self._taken[number]))
                rows += len(waiting[-1])
                if rows >= PIECE:
                    yield pd.concat(waiting, ignore_index=True)
                    waiting, rows = [], 0
        if waiting:
            yield pd.concat(waiting, ignore_index=True)

    @property
    def rollouts(self) -> pd.DataFrame | None:
        """Training episodes as they were logged, of different lengths; None under another policy than the log's."""
        return pd.concat(self._rollouts, ignore_index=True) if self._rollouts else None

    @property
    def evaluation(self) -> pd.DataFrame:
        """Logged futures of states of held-out episodes; a terminal state repeats until the end."""
        return pd.concat(self._windows, ignore_index=True).sort_values(["episode", "step"], ignore_index=True)

    def neighbours(self) -> pd.DataFrame | None:
        """Return another logged future for every start state of the evaluation.

        It begins with the logged state and action of a training episode that are nearest to those of the start, in
        units of their standard deviations.
        """
        from scipy.spatial import cKDTree

        rollouts, evaluation = self.rollouts, self.evaluation
        if rollouts is None:
            return None
        columns = [
            *metric_keys.columns("state", self.log.state_names),
            *metric_keys.columns("action", self.log.action_names),
        ]
        ends = rollouts.groupby("episode")["step"].transform("max")
        over = rollouts.groupby("episode")["terminal"].transform("any")
        able = np.flatnonzero((rollouts["step"] < ends) & (over | (ends - rollouts["step"] >= self.length)))
        scale = rollouts[columns].to_numpy().std(0)
        scale[scale == 0] = 1
        starts = evaluation.loc[evaluation["step"] == 0, columns].to_numpy()
        _, nearest = cKDTree(rollouts[columns].to_numpy()[able] / scale).query(starts / scale)
        last = (np.arange(len(rollouts)) + (ends - rollouts["step"]).to_numpy())[able[nearest]]
        rows = np.minimum(able[nearest][:, None] + np.arange(self.length + 1), last[:, None])
        index = pd.DataFrame(
            {
                "episode": np.arange(len(starts)).repeat(self.length + 1),
                "step": np.tile(np.arange(self.length + 1), len(starts)),
                "behaviour": "recorded",
            }
        )
        return index.join(rollouts[[*columns, "terminal"]].iloc[rows.ravel()].reset_index(drop=True))

    def described(self) -> str:
        """Return how many episodes and steps there are for which purpose."""
        terminal = sum(entry.terminal for entry in self.index)
        held_out = len(self.held_out)
        return f"{len(self.index)} episodes, {held_out} of them held out, {terminal} that end in a terminal state"

    def _episodes(self) -> Iterator[Logged]:
        whole = map(self._whole_actions, self.log.episodes())
        return (episode for episode in whole if len(episode.states) > 1)

    def _whole_actions(self, episode: Logged) -> Logged:
        """Return an episode with an action in every state.

        The action in a terminal state has no effect. Where the log ends without the action in its last state, only a
        policy in place of the log's could say it; otherwise the last step is left out, because it has no next action.
        """
        steps = len(episode.states) - 1
        if len(episode.actions) > steps:
            return episode
        if episode.terminal or self.log.act is not None:
            return replace(episode, actions=np.concatenate([episode.actions, episode.actions[-1:]]))
        rewards = None if episode.rewards is None else episode.rewards[:-1]
        return replace(episode, states=episode.states[:-1], rewards=rewards)

    def _length(self) -> int:
        if self.log.act is not None:
            return 1  # the Bellman equation is one step
        gamma = self.entry.gamma
        return self.entry.length or (max(2, math.ceil(math.log(MASS) / math.log(gamma))) if gamma else 2)

    def _held_out(self) -> frozenset[int]:
        """Return the numbers of the episodes held out: of those that can be evaluated, at least one and not all."""
        if len(self.index) < 2:
            raise UserError(
                f"the log has {len(self.index)} episode with a step; expected at least two, one of them to be held "
                "out: give every episode a name of its own."
            )
        able = [i for i, entry in enumerate(self.index) if entry.starts(self.length)]
        if len(able) < 2:
            longest = max(entry.steps for entry in self.index)
            raise UserError(
                f"{len(able)} of {len(self.index)} episodes have {self.length} steps or a terminal end (the longest of "
                f"all has {longest} steps); expected two, so that at most {MASS:.0%} of the mass lies beyond: "
                "lower gamma, or set `length`, the steps that follow a start state, to fewer and accept more."
            )
        ranked = sorted(able, key=lambda i: self.index[i].share)
        chosen = {i for i, entry in enumerate(self.index) if entry.share < HELD_OUT}
        return frozenset((chosen | {ranked[0]}) - {ranked[-1]})

    def _subset(self, purpose: str, rows: int) -> dict[int, int]:
        """Return training episodes in random order until they have so many steps, and the steps of each."""
        left, taken = rows, dict[int, int]()
        for i in self._rng(purpose).permutation(self.training).tolist():
            if left <= 0:
                break
            taken[i] = min(left, self.index[i].steps)
            left -= taken[i]
        return taken

    def _kept(self) -> frozenset[int]:
        """Return the training episodes that are kept whole."""
        if self.log.act is not None:
            return frozenset()
        if self.entry.rollouts is None:
            return frozenset(self._subset("rollouts", ROWS))
        if self.entry.rollouts > len(self.training):
            raise UserError(
                f"rollouts is {self.entry.rollouts}, and the log has {len(self.training)} training episodes; expected "
                "no more."
            )
        order = self._rng("rollouts").permutation(self.training)
        return frozenset(order[: self.entry.rollouts].tolist())

    def _chosen(self) -> dict[int, list[tuple[int, int]]]:
        """Return the start states of the evaluation: by episode, their numbers and steps."""
        held_out = sorted(self.held_out)
        ends = np.cumsum([self.index[i].starts(self.length) for i in held_out])
        count = self.entry.starts or min(STARTS, int(ends[-1]))
        if not 2 <= count <= ends[-1]:
            raise UserError(
                f"{max(2, count)} start states were asked of the log, whose held-out episodes have {ends[-1]} that "
                f"{self.length} steps follow; lower `starts` or `length`."
            )
        chosen = dict[int, list[tuple[int, int]]]()
        for place, position in enumerate(np.sort(self._rng("starts").choice(int(ends[-1]), count, replace=False))):
            which = int(np.searchsorted(ends, position, side="right"))
            first = int(position - (ends[which - 1] if which else 0))
            chosen.setdefault(held_out[which], []).append((place, first))
        return chosen

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose.encode()])

    def _steps(self, number: int, episode: Logged, count: int) -> pd.DataFrame:
        states, names = episode.states[: count + 1], self.log.state_names
        following = episode.actions[1 : count + 1] if self.log.act is None else self._policy(states[1:])
        terminal = np.zeros(count, dtype=bool)
        terminal[-1] = episode.terminal and count == len(episode.states) - 1
        reward = {} if episode.rewards is None else {"reward": episode.rewards[:count]}
        return pd.DataFrame(
            {
                "episode": number,
                "step": np.arange(count),
                "behaviour": "recorded",
                **columns("state", names, states[:-1]),
                **columns("action", self.log.action_names, episode.actions[:count]),
                **columns("next_state", names, states[1:]),
                **columns("next_action", self.log.action_names, following),
                **reward,
                "terminal": terminal,
            }
        )

    def _policy(self, states: Array) -> Array:
        assert self.log.act is not None
        actions = self.log.act(states)
        if not np.isfinite(actions).all():
            state = states[~np.isfinite(actions).all(1)][0]
            raise UserError(f"the policy answered NaN or infinity in the state {state.tolist()}; expected an action.")
        return actions

    def _rows(self, number: int, episode: Logged, rows: slice | NDArray[np.int64]) -> pd.DataFrame:
        """Return states of an episode with their actions."""
        states, last = episode.states[rows], len(episode.states) - 1
        steps = np.arange(last + 1)[rows]
        return pd.DataFrame(
            {
                "episode": number,
                "step": np.arange(len(states)),
                "behaviour": "recorded",
                **columns("state", self.log.state_names, states),
                **columns("action", self.log.action_names, episode.actions[rows]),
                "terminal": episode.terminal & (steps == last),
            }
        )

    def _window(self, place: int, episode: Logged, first: int) -> pd.DataFrame:
        """Return a start state and its logged future, with the rewards of arriving in each state."""
        rows = np.minimum(np.arange(first, first + self.length + 1), len(episode.states) - 1)
        table = self._rows(place, episode, rows)
        if self.log.act is not None:
            names = metric_keys.columns("action", self.log.action_names)
            table.loc[1:, names] = self._policy(episode.states[rows[1:]])
        rewards = dict(self.log.rewards(episode.states[rows]))
        if self.log.reward is not None and episode.rewards is not None:
            rewards[self.log.reward] = np.concatenate([[0.0], episode.rewards[np.maximum(rows[1:] - 1, 0)]])
        return table.assign(**{f"reward_{name}": value for name, value in rewards.items()})


def columns(prefix: str, names: Iterable[str], rows: Array) -> dict[str, Array]:
    """Return the columns of vectors, by the names of their components."""
    return dict(zip(metric_keys.columns(prefix, names), rows.T, strict=True))


def _share(seed: int, name: str) -> float:
    """Return a number between 0 and 1 that depends on the seed and the name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) / 2**64
