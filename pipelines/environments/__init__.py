"""Environments: one plugin file each, loaded by name (`plugins.load("pipelines.environments", name)`).

A plugin defines `Settings` and `build(settings) -> Process`; `pipelines.data.collect` makes tables of it. It may define
`DEFAULTS` of the keys that every environment has (see `EnvironmentEntry`).
A plugin that reads files or a user's module also defines `sources(settings, mirror)` (see `pipelines.runs.sources`).

An environment that can be set to any state is a `Simulator`, for which a plugin defines little more than one step. A
process that is known by recorded episodes alone is a `Log`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base import plugins
from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from flowmatch_core.oracles import LinearGaussianMDP

Array = NDArray[np.float64]
Rectangle = tuple[float, float, float, float]
Beginning = Literal["coverage", "start"]
Behaviour = Literal["coverage", "random", "policy", "visited", "recorded"]
Truth = Literal["simulator", "held-out episodes", "no reference"]

DRAWN = 10_000  # w's of which the units of a family are estimated
RENEWED = 10  # transitions after which an episode that covers the states of a family's policies takes another w


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


class Family(ABC):
    r"""Deterministic policies $\pi_w$ of an environment, one for each vector w.

    Attributes:
        names: Names of the components of w.
        low: Lower bounds of the components, shape (dw,).
        high: Upper bounds of the components, shape (dw,).
        source: Origin of the policies.
    """

    names: tuple[str, ...]
    low: Array
    high: Array
    source: str

    @abstractmethod
    def act(self, state: Array, w: Array) -> Array:
        r"""Return the action of $\pi_w$ in each row's state, (n, states) and (n, dw) -> (n, actions)."""

    @abstractmethod
    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n vectors w from the law of the training, (n, dw)."""

    def nearest(self, w: Array) -> Array:
        """Return the nearest vectors within the law, (n, dw) -> (n, dw)."""
        return np.clip(w, self.low, self.high)

    def check(self, w: Array) -> None:
        """Raise an error if a vector is outside the law.

        Raises:
            UserError: It is; the message has the first such vector and the bounds.
        """
        inside = np.isclose(self.nearest(w), w, rtol=0, atol=1e-9).all(-1)  # false where w is not a number
        if not inside.all():
            bounds = (f"{name} in [{a:g}, {b:g}]" for name, a, b in zip(self.names, self.low, self.high, strict=True))
            raise UserError(
                f"w is {np.round(w[inside.argmin()], 4).tolist()}, outside the law of {self.source}; expected "
                f"{', '.join(bounds)}{self._hole}."
            )

    _hole: str = ""
    """What the law leaves out between its bounds, in words."""

    @cached_property
    def units(self) -> tuple[Array, Array]:
        r"""Location and scale of w for networks, (dw,) each, with which $E|w|^2 = 1$.

        So w weighs as much as one component of the state, however many components it has.
        """
        drawn = self.draw(DRAWN, np.random.default_rng(0))
        return drawn.mean(0), drawn.std(0) * np.sqrt(len(self.names))


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
        family: Policies in place of the one policy, or None; then models are conditioned on w, too.
        thread_safe: Whether several threads may call the methods at once.
    """

    truth: Truth = "simulator"
    bounds: Rectangle
    walls: tuple[Rectangle, ...] = ()
    beginnings: tuple[Beginning, ...] = ("coverage", "start")
    family: Family | None = None
    thread_safe: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what models are conditioned on beside the state: components of the action, then those of w."""
        return self.action_names + (() if self.family is None else self.family.names)

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

    def acted(self, act: Callable[[Array], Array], n: int, length: int, rng: np.random.Generator) -> Array:
        """Return the states of episodes from the start distribution, (n, length + 1, states).

        Args:
            act: Policy of all episodes together, called once a step, (n, states) -> (n, actions); it may keep state.
            n: Number of episodes.
            length: Number of steps.
            rng: Source of randomness; the start states come first from it, so that they do not depend on the policy.

        Raises:
            UserError: The environment is one in which nobody can act, which is the default.
        """
        raise UserError(f"nobody can act in {self.source}; expected a simulator, or one of gymnasium.")

    def expert(self, reward: str) -> Callable[[Array], Array] | None:
        """Return a policy that is known to be good for a reward, or None if there is none."""
        return None

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
        """Draw rollouts from states that cover the space, or from the start distribution.

        With a family, each follows the policy of a w of its own, whose components stand behind those of its actions.
        """
        family = self.family
        if family is None:
            return self.follow(self.policy, beginning, n, length, rng)
        w = family.draw(n, rng)
        drawn = self.follow(lambda state: family.act(state, w), beginning, n, length, rng)
        kept = np.broadcast_to(w[:, None], (n, length + 1, w.shape[1]))
        return replace(drawn, actions=np.concatenate([drawn.actions, kept], -1))

    def acted(self, act: Callable[[Array], Array], n: int, length: int, rng: np.random.Generator) -> Array:
        """Return the states of episodes from the start distribution under a policy that may keep state."""
        return self.roll(self.starts(rng, n), length, act, rng)[0]

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
        states, actions = self.roll(state, length, policy, rng)
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
        states, _ = self.roll(state, length, self.policy, rng)
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
        that cover the space, half from the start distribution; with a family, policies that change along an episode,
        all from states that cover the space. `visited`: the states of `policy`, with actions interpolated between the
        policy's and random ones.
        """
        episodes = -(-len(rows) // length)
        state = self.starts(rng, episodes)
        if behaviour != "random":
            covered = -(-episodes // 2) if self.family is None else episodes
            state[:covered] = self.coverage(rng, covered)[0]
        followed = self.policy if self.family is None else _changing(self.family, rng)
        act = followed if behaviour != "random" else lambda state: self.actions(rng, len(state))
        states, actions = self.roll(state, length, act, rng)
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

    def roll(
        self, state: Array, length: int, act: Callable[[Array], Array], rng: np.random.Generator
    ) -> tuple[Array, Array]:
        """Return states (n, length + 1, states) from `state` on, and the actions (n, length, actions) between them."""
        states, actions = [state], []
        for _ in range(length):
            actions.append(act(states[-1]))
            states.append(self.step(states[-1], actions[-1], rng))
        return np.stack(states, 1), np.stack(actions, 1)


def _changing(family: Family, rng: np.random.Generator) -> Callable[[Array], Array]:
    """Return the actions along episodes in which every row takes another w after `RENEWED` steps."""
    steps, w = count(), np.empty((0, len(family.names)))

    def act(state: Array) -> Array:
        nonlocal w
        if next(steps) % RENEWED == 0:
            w = family.draw(len(state), rng)
        return family.act(state, w)

    return act


def build(kind: str, settings: plugins.Settings) -> Process:
    """Return the environment or the log of a kind, the name of a file in this folder.

    Raises:
        UserError: There is no such file, or the environment cannot be created.
    """
    built: Process = plugins.load(__name__, kind).build(settings)
    return built


def restore(described: Mapping[str, Any]) -> Environment:
    """Return the environment that a provenance, or a model of a family, describes by `kind` and `settings`.

    Raises:
        UserError: It cannot be created.
    """
    kind = described["kind"]
    built = build(kind, plugins.load(__name__, kind).Settings.model_validate_json(json.dumps(described["settings"])))
    assert isinstance(built, Environment), kind
    return built
