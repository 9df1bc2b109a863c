"""Environments: one plugin file each, loaded by name (`plugins.load("pipelines.environments", name)`).

A plugin defines `Settings` and `build(settings) -> Process`; `pipelines.data.collect` makes tables of it. It may define
`DEFAULTS` of the keys that every environment has (see `EnvironmentEntry`).
A plugin that reads files or a user's module also defines `sources(settings, mirror)` (see `pipelines.runs.sources`).

An environment that can be set to any state is a `Simulator`, for which a plugin defines little more than one step. A
process that is known by recorded episodes alone is a `Log`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
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
Truth = Literal["simulator", "held-out episodes", "no reference"]


@dataclass(frozen=True)
class Steps:
    """Rows of one step each.

    Attributes:
        state: States, shape (n, states).
        action: Actions, shape (n, actions).
        next_state: Next states, shape (n, states).
        terminal: Whether the next state is terminal, shape (n,). A time limit does not make a state terminal.
        episode: Number of the row's episode, shape (n,); unique within a table, but not always consecutive.
        step: Number of the row within its episode, shape (n,).
        behaviour: How the row was generated, shape (n,).
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
        """Return the rows of all parts."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, rows: slice) -> Steps:
        return Steps(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Episodes:
    """Episodes of equal length under the policy. A terminal state is absorbing: it repeats until the end.

    Attributes:
        states: States from S_0 on, shape (n, length + 1, states).
        actions: Actions of the policy in each state, shape (n, length + 1, actions).
        terminal: Whether the state is terminal, shape (n, length + 1).
    """

    states: Array
    actions: Array
    terminal: NDArray[np.bool_]


class Process(ABC):
    """A reward-free decision process with one fixed policy, as figures and evaluations know it.

    Attributes:
        state_names: Names of the state columns.
        action_names: Names of the action columns.
        source: Origin of the definition.
        fidelity: How close the environment is to its origin.
        truth: What models are compared with.
        standardised: Whether distances are also reported in standard deviations of the data, because the components of
            a state differ much in size.
    """

    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    source: str
    fidelity: str
    truth: Truth
    standardised: bool = False

    @abstractmethod
    def rewards(self, state: Array) -> dict[str, Array]:
        """Return every reward function of the state by name, each of shape (n,)."""

    @abstractmethod
    def reward_names(self) -> tuple[str, ...]:
        """Return the names of the rewards whose value can be compared."""

    def oracle(self) -> LinearGaussianMDP | None:
        """Return the closed-form process, or None if there is none."""
        return None

    def exact_values(self, state: Array, action: Array, gamma: float) -> dict[str, Array]:
        r"""Return the exact $Q = \sum_{k \ge 0} \gamma^k E[r(S_{k+1})]$ of every reward for which it is known."""
        return {}


class Environment(Process):
    """A process from which episodes can be drawn, with a deterministic policy; every method works on batches of rows.

    Methods must not keep state. They are called concurrently from several threads, unless `thread_safe` is false.
    Threads run in parallel where the work is done by NumPy or another library that releases the global interpreter
    lock.

    Attributes:
        bounds: Rectangle (x0, y0, x1, y1) of the first two state columns that figures show.
        walls: Rectangles (x0, y0, x1, y1) that figures draw.
        beginnings: Available distributions of the first state of an episode.
        thread_safe: Whether several threads may call the methods at once.
    """

    truth: Truth = "simulator"
    bounds: Rectangle
    walls: tuple[Rectangle, ...] = ()
    beginnings: tuple[Beginning, ...] = ("coverage", "start")
    thread_safe: bool = True

    def checks(self, rng: np.random.Generator) -> list[str]:
        """Try the environment before its tables are drawn, and return sentences on what was found."""
        return []

    @abstractmethod
    def policy(self, state: Array) -> Array:
        """Return the policy's action in each state, (n, states) -> (n, actions)."""

    @abstractmethod
    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw n states from the start distribution, for evaluation."""

    @abstractmethod
    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """Return rows of the table of offline transitions.

        Args:
            rows: Numbers of the rows in the table.
            length: Steps per episode, for rows of episodes that do not end by themselves.
            rng: Source of randomness.
        """

    @abstractmethod
    def episodes(self, beginning: Beginning, n: int, length: int, rng: np.random.Generator) -> Episodes:
        """Draw n episodes under the policy, from one of the `beginnings`."""

    def film(self, file: Path, rng: np.random.Generator) -> str | None:
        """Write frames of an episode under the policy as PNG, or return a sentence why there are none.

        An environment that nothing can be seen of returns None and writes nothing.
        """
        return None

    def available(self) -> int | None:
        """Return the number of rows that `transitions` has, or None if it is unlimited."""
        return None

    def reward_names(self) -> tuple[str, ...]:
        """Return the names of the rewards, by those of one start state."""
        return tuple(self.rewards(self.starts(np.random.default_rng(0), 1)))


@dataclass(frozen=True)
class Logged:
    """A recorded episode.

    Attributes:
        name: Its name in the log.
        states: States S_0, ..., S_T, shape (T + 1, states).
        actions: Actions A_0, ..., A_{T-1}, shape (T, actions), or (T + 1, actions) where that in S_T is known, too.
        rewards: Rewards of the T steps, shape (T,), or None.
        terminal: Whether S_T is terminal. A time limit does not make a state terminal.
    """

    name: str
    states: Array
    actions: Array
    rewards: Array | None
    terminal: bool


class Log(Process):
    """A process that is known by recorded episodes alone.

    Attributes:
        act: Deterministic policy of the models, (n, states) -> (n, actions); None for the policy that made the log.
        reward: Name of a logged reward, or None.
    """

    act: Callable[[Array], Array] | None
    reward: str | None

    @abstractmethod
    def episodes(self) -> Iterator[Logged]:
        """Yield the episodes in the order of the log, one at a time in memory.

        Raises:
            UserError: An episode cannot be read.
        """


class SimulatorSettings(plugins.Settings):
    """The behaviour that generates a simulator's transitions."""

    behaviour: Literal["uniform", "random", "policy", "mixed"] = Field(
        "uniform",
        description="uniform: states and actions that cover the space; random: episodes from the start distribution "
        "under random actions; policy: episodes under the policy; mixed: half uniform, half states that the policy "
        "visits, where bootstrapping happens, with actions between the policy's and random ones",
    )


class Simulator(Environment):
    """An environment that can be set to any state and has no terminal states.

    Attributes:
        positions: Whether the first two components of the state are a position, over which values can be mapped.
    """

    positions: bool = True
    settings: SimulatorSettings

    @abstractmethod
    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """Return the next state of each row, independently of the other rows."""

    @abstractmethod
    def actions(self, rng: np.random.Generator, n: int) -> Array:
        """Draw n random actions that cover the action space."""

    @abstractmethod
    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw n states and `actions` that cover the space, for off-policy learning."""

    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """Return rows that the `behaviour` of the settings generates."""
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
        """Draw rollouts from states that cover the space, or from the start distribution."""
        return self.follow(self.policy, beginning, n, length, rng)

    def follow(
        self,
        policy: Callable[[Array], Array],
        beginning: Beginning,
        n: int,
        length: int,
        rng: np.random.Generator,
    ) -> Episodes:
        """Draw episodes under any policy."""
        state = self.starts(rng, n) if beginning == "start" else self.coverage(rng, n)[0]
        states, actions = self._roll(state, length, policy, rng)
        actions = np.concatenate([actions, policy(states[:, -1])[:, None]], 1)
        return Episodes(states, actions, np.zeros(states.shape[:2], dtype=bool))

    def grid(self, size: int) -> Array:
        """Return states at rest at the centres of size x size cells that cover the bounds.

        The first two components are the position; the others are zero.
        """
        x0, y0, x1, y1 = self.bounds
        middle = (np.arange(size) + 0.5) / size
        position = np.stack(np.meshgrid(x0 + (x1 - x0) * middle, y0 + (y1 - y0) * middle), -1).reshape(-1, 2)
        return np.concatenate([position, np.zeros((len(position), len(self.state_names) - 2))], -1)

    def values(self, state: Array, reward: str, gamma: float, length: int, rng: np.random.Generator) -> Array:
        r"""Return the policy's $\sum_{k \ge 0} \gamma^k r(S_{k+1})$ from each state.

        It is exact where there is a closed form, otherwise the sum along one rollout of `length` steps, which is the
        value if the dynamics are deterministic.
        """
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
        """Return rows of episodes with a behaviour.

        `random`: random actions from the start distribution. `policy`: the policy, half of the episodes from states
        that cover the space, half from the start distribution. `visited`: the states of `policy`, with actions
        interpolated between the policy's and random ones.
        """
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
        """Return states (n, length + 1, states) from `state` on, and the actions (n, length, actions) between them."""
        states, actions = [state], []
        for _ in range(length):
            actions.append(act(states[-1]))
            states.append(self.step(states[-1], actions[-1], rng))
        return np.stack(states, 1), np.stack(actions, 1)


def build(kind: str, settings: plugins.Settings) -> Process:
    """Return the environment or the log of a kind, the name of a file in this folder.

    Raises:
        UserError: There is no such file, or the environment cannot be created.
    """
    built: Process = plugins.load(__name__, kind).build(settings)
    return built
