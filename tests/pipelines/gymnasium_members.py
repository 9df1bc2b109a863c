"""What a user of the gymnasium environments writes: small environments, policies and a reward."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Corridor(gymnasium.Env[Any, Any]):
    """A walk on a line with a noisy first step; beyond 1 it terminates, and it cannot cut itself off.

    The observation is (place, steps since reset / 100), written into one array over and over.
    """

    def __init__(self, noise: float = 0.01, own_limit: int = 10**9, bounded: bool = True) -> None:
        self.noise, self.own_limit = noise, own_limit
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        edge = 1.0 if bounded else np.inf
        self.action_space = spaces.Box(-edge, edge, (1,), np.float64)
        self.seen = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seen[:] = self.np_random.uniform(-1, 0), 0
        return self.seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.seen += 0.2 * float(action[0]) + self.noise * self.np_random.standard_normal(), 0.01
        return self.seen, 0.0, bool(self.seen[0] > 1), bool(self.seen[1] > 0.01 * self.own_limit - 1e-9), {}


class Grid(gymnasium.Env[Any, Any]):
    """An environment that flow matching has no use for."""

    observation_space = spaces.Discrete(3)
    action_space = spaces.Box(-1, 1, (1,))


class Shared(Corridor):
    """A corridor whose place is one array for all instances, as in environments that wrap a global simulator."""

    place = np.zeros(2)

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(noise)
        self.seen = Shared.place


class Furnished(Corridor):
    """A corridor between two components that say what it is and never change."""

    def __init__(self, noise: float = 0.01) -> None:
        super().__init__(noise)
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = spaces.Box(np.array([-1.0, 7.0]), np.array([1.0, 7.0]), dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seen, info = super().reset(seed=seed, options=options)
        return furnished(seen), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen, *rest = super().step(action)
        return furnished(seen), *rest  # type: ignore[return-value]


def furnished(seen: np.ndarray) -> np.ndarray:
    """The observation of a furnished corridor."""
    return np.array([0.1, seen[0], 1e8, seen[1]])


class Unseeded(Corridor):
    """A corridor that ignores the seed of a reset."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(options=options)


gymnasium.register("Corridor-v0", Corridor, max_episode_steps=30)
gymnasium.register("Shared-v0", Shared, max_episode_steps=30)
gymnasium.register("Unseeded-v0", Unseeded, max_episode_steps=30)
gymnasium.register("Furnished-v0", Furnished, max_episode_steps=30)
gymnasium.register("Grid-v0", Grid)


def right(observation: np.ndarray) -> np.ndarray:
    """At half speed to the end of the corridor."""
    return np.full((len(observation), 1), 0.5)


def right_in_a_furnished_corridor(observation: np.ndarray) -> np.ndarray:
    """At half speed to the end, for observations with all components."""
    assert np.array_equal(observation[:, [0, 2]], np.broadcast_to([0.1, 1e8], (len(observation), 2)))
    return np.tile([0.5, 7.0], (len(observation), 1))


def pushing(observation: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The action w, whatever is seen."""
    return w


def swing(observation: np.ndarray) -> np.ndarray:
    """Torque against the pendulum's speed."""
    return np.clip(-observation[:, 2:], -2, 2)


def flat(observation: np.ndarray) -> np.ndarray:
    """An answer of the wrong shape."""
    return np.zeros(len(observation))


def progress(observation: np.ndarray) -> np.ndarray:
    """A reward."""
    return np.maximum(observation[:, 0], 0)


def left(observation: np.ndarray) -> np.ndarray:
    """Never to the end of the corridor."""
    return np.full((len(observation), 1), -0.5)


def nan(observation: np.ndarray) -> np.ndarray:
    """A broken policy."""
    return np.full((len(observation), 1), np.nan)


def words(observation: np.ndarray) -> list[list[str]]:
    """A policy that answers with names."""
    return [["right"]] * len(observation)
