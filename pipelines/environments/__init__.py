"""Environments: one file each, found by its name (`plugins.load("pipelines.environments", name)`).

A member holds `Settings` and `build(settings) -> Environment`; `pipelines.collection` draws tables from one. What
can be set to any state is a `Simulator`, which needs to say little more than how a step goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base import plugins

if TYPE_CHECKING:
    from flowmatch_core.oracles import LinearGaussianMDP

Array = NDArray[np.float64]
Rectangle = tuple[float, float, float, float]
Beginning = Literal["coverage", "start"]
Behaviour = Literal["coverage", "random", "policy", "visited", "recorded"]


@dataclass(frozen=True)
class Steps:
    """Rows of one step each.

    Attributes:
        state, action, next_state: (n, states), (n, actions), (n, states).
        terminal: (n,), whether the next state ends the episode for good. A time limit is no terminal.
        episode, step: (n,), the number of the row's episode and of the row in it; the numbers of a table's episodes
            are different, and not always consecutive.
        behaviour: (n,), how the row came about.
    """

    state: Array
    action: Array
    next_state: Array
    terminal: NDArray[np.bool_]
    episode: NDArray[np.int64]
    step: NDArray[np.int64]
    behaviour: NDArray[np.str_]

    @classmethod
    def join(cls, *parts: Steps) -> Steps:
        """The rows of all parts."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, rows: slice) -> Steps:
        return Steps(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Episodes:
    """Episodes of one length under the policy. A terminal state is absorbing: it repeats until the end.

    Attributes:
        states: (n, length + 1, states), from S_0 on.
        actions: (n, length + 1, actions), the policy's in each.
        terminal: (n, length + 1), whether the state is terminal.
    """

    states: Array
    actions: Array
    terminal: NDArray[np.bool_]


class Environment(ABC):
    """A reward-free decision process with one fixed deterministic policy; every method works on rows.

    Methods are called from several threads at once, so they keep no state; cores are used well where
    the work is done in NumPy or another library that lets go of Python's lock.

    Attributes:
        state_names, action_names: the names of the columns of a state and of an action.
        bounds: the rectangle (x0, y0, x1, y1) that a picture of the first two state columns shows.
        walls: rectangles (x0, y0, x1, y1) that a picture draws.
        source, fidelity: where the definition comes from and how close it is.
        beginnings: where episodes under the policy can begin.
    """

    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    bounds: Rectangle
    walls: tuple[Rectangle, ...] = ()
    source: str
    fidelity: str
    beginnings: tuple[Beginning, ...] = ("coverage", "start")

    @abstractmethod
    def policy(self, state: Array) -> Array:
        """The action of the policy in each state, (n, states) -> (n, actions)."""

    @abstractmethod
    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """States of the start distribution, for evaluation."""

    @abstractmethod
    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """The rows of these numbers of a table to learn from.

        Arguments:
            rows: where in the table they stand.
            length: steps of an episode, where rows come from episodes that do not end by themselves.
        """

    @abstractmethod
    def episodes(self, beginning: Beginning, n: int, length: int, rng: np.random.Generator) -> Episodes:
        """Episodes under the policy, from one of the `beginnings`."""

    def available(self) -> int | None:
        """How many rows `transitions` has; None is as many as one asks for."""
        return None

    @abstractmethod
    def rewards(self, state: Array) -> dict[str, Array]:
        """Each reward function of the state alone, by name, shape (n,)."""

    def oracle(self) -> LinearGaussianMDP | None:
        """The closed-form truth, where there is one."""
        return None

    def exact_values(self, state: Array, action: Array, gamma: float) -> dict[str, Array]:
        r"""The exact $Q = \sum_{k \ge 0} \gamma^k E[r(S_{k+1})]$ of the rewards for which it is known."""
        return {}


class SimulatorSettings(plugins.Settings):
    """How a simulator's transitions are drawn."""

    behaviour: Literal["uniform", "random", "policy", "mixed"] = Field(
        "uniform",
        description="uniform: states and actions that cover the space; random: episodes from the start distribution "
        "under random actions; policy: episodes under the policy; mixed: half uniform, half states that the policy "
        "visits, near which all bootstrapping happens, under actions between its own and random ones",
    )


class Simulator(Environment):
    """An environment that can be set to any state and has no terminal states."""

    settings: SimulatorSettings

    @abstractmethod
    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """The next state of each row, independent of the other rows."""

    @abstractmethod
    def actions(self, rng: np.random.Generator, n: int) -> Array:
        """Random actions that cover what can be done."""

    @abstractmethod
    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """States and `actions` that cover the space, for learning off the policy."""

    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """Rows as the settings' `behaviour` says."""
        match self.settings.behaviour:
            case "uniform":
                return self._covering(rows, rng)
            case "mixed":
                middle = (rows.start + rows.stop + 1) // 2
                covering = self._covering(range(rows.start, middle), rng)
                visited = self._following(range(middle, rows.stop), length, "visited", rng)
                return Steps.join(covering, visited)
            case behaviour:
                return self._following(rows, length, behaviour, rng)

    def episodes(self, beginning: Beginning, n: int, length: int, rng: np.random.Generator) -> Episodes:
        """Rollouts from states that cover the space, or from the start distribution."""
        return self.follow(self.policy, beginning, n, length, rng)

    def follow(
        self,
        policy: Callable[[Array], Array],
        beginning: Beginning,
        n: int,
        length: int,
        rng: np.random.Generator,
    ) -> Episodes:
        """Episodes under any policy."""
        state = self.starts(rng, n) if beginning == "start" else self.coverage(rng, n)[0]
        states, actions = self._roll(state, length, policy, rng)
        actions = np.concatenate([actions, policy(states[:, -1])[:, None]], 1)
        return Episodes(states, actions, np.zeros(states.shape[:2], dtype=bool))

    def grid(self, size: int) -> Array:
        """States at rest in the middles of size x size cells that cover the bounds: the first two components are the
        position, the others are zero."""
        x0, y0, x1, y1 = self.bounds
        middle = (np.arange(size) + 0.5) / size
        position = np.stack(np.meshgrid(x0 + (x1 - x0) * middle, y0 + (y1 - y0) * middle), -1).reshape(-1, 2)
        return np.concatenate([position, np.zeros((len(position), len(self.state_names) - 2))], -1)

    def values(self, state: Array, reward: str, gamma: float, length: int, rng: np.random.Generator) -> Array:
        r"""The policy's $\sum_{k \ge 0} \gamma^k r(S_{k+1})$ from each state: in closed form where there is one,
        else of one rollout of that length, which is the value where nothing is random."""
        exact = self.exact_values(state, self.policy(state), gamma).get(reward)
        if exact is not None:
            return exact
        states, _ = self._roll(state, length, self.policy, rng)
        rewards = self.rewards(states[:, 1:].reshape(-1, state.shape[1]))[reward].reshape(len(state), length)
        value: Array = rewards @ gamma ** np.arange(length)
        return value

    def _covering(self, rows: range, rng: np.random.Generator) -> Steps:
        state, action = self.coverage(rng, len(rows))
        zero = np.zeros(len(rows), dtype=np.int64)
        return Steps(
            state,
            action,
            self.step(state, action, rng),
            zero.astype(bool),
            np.arange(rows.start, rows.stop),
            zero,
            np.full(len(rows), "coverage"),
        )

    def _following(
        self, rows: range, length: int, behaviour: Literal["random", "policy", "visited"], rng: np.random.Generator
    ) -> Steps:
        """Rows of episodes: under random actions from the start distribution; or under the policy, half from states
        that cover the space and half from the start distribution. In `visited` states other actions are tried, from
        the policy's own to random ones."""
        count = -(-len(rows) // length)
        state = self.starts(rng, count)
        if behaviour != "random":
            covered = -(-count // 2)
            state[:covered] = self.coverage(rng, covered)[0]
        act = self.policy if behaviour != "random" else lambda state: self.actions(rng, len(state))
        states, actions = self._roll(state, length, act, rng)
        now, then = (part.reshape(-1, state.shape[1])[: len(rows)] for part in (states[:, :-1], states[:, 1:]))
        action = actions.reshape(-1, actions.shape[2])[: len(rows)]
        if behaviour == "visited":
            share = rng.random((len(now), 1))
            action = (1 - share) * action + share * self.actions(rng, len(now))
            then = self.step(now, action, rng)
        row = np.arange(len(rows))
        return Steps(
            now,
            action,
            then,
            np.zeros(len(rows), dtype=bool),
            rows.start + row // length,
            row % length,
            np.full(len(rows), behaviour),
        )

    def _roll(
        self, state: Array, length: int, act: Callable[[Array], Array], rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """States (n, length + 1, states) from `state` on, and the actions (n, length, actions) that led on."""
        states, actions = [state], []
        for _ in range(length):
            actions.append(act(states[-1]))
            states.append(self.step(states[-1], actions[-1], rng))
        return np.stack(states, 1), np.stack(actions, 1)


def build(kind: str, settings: plugins.Settings) -> Environment:
    """Return the environment of a kind, the name of a file in this folder.

    Raises:
        UserError: There is no such file, or the environment cannot be made.
    """
    built: Environment = plugins.load(__name__, kind).build(settings)
    return built
