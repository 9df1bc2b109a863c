"""Environments: one file each, found by its name (`pipelines.members.load("pipelines.environments", name)`).

A member holds `Settings` and `build(settings) -> Environment`; `pipelines.collection` draws tables from one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from flowmatch_core.oracles import LinearGaussianMDP

Array = NDArray[np.float64]
Rectangle = tuple[float, float, float, float]


class Environment(ABC):
    """A reward-free decision process with one fixed deterministic policy; every method works on rows.

    Methods are called from several threads at once, so they keep no state; cores are used well where
    the work is done in NumPy or another library that lets go of Python's lock.

    Attributes:
        state_names, action_names: the names of the columns of a state and of an action.
        bounds: the rectangle (x0, y0, x1, y1) that a picture of the first two state columns shows.
        walls: rectangles (x0, y0, x1, y1) that a picture draws.
        source, fidelity: where the definition comes from and how close it is.
    """

    state_names: ClassVar[tuple[str, ...]]
    action_names: ClassVar[tuple[str, ...]]
    bounds: ClassVar[Rectangle]
    walls: ClassVar[tuple[Rectangle, ...]] = ()
    source: ClassVar[str]
    fidelity: ClassVar[str]

    @abstractmethod
    def policy(self, state: Array) -> Array:
        """The action of the policy in each state, (n, states) -> (n, actions)."""

    @abstractmethod
    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """The next state of each row, independent of the other rows."""

    @abstractmethod
    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """States and actions that cover the space, for learning off the policy."""

    @abstractmethod
    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """States of the start distribution, for evaluation."""

    @abstractmethod
    def rewards(self, state: Array) -> dict[str, Array]:
        """Each reward function of the state alone, by name, shape (n,)."""

    def oracle(self) -> LinearGaussianMDP | None:
        """The closed-form truth, where there is one."""
        return None

    def exact_values(self, state: Array, action: Array, gamma: float) -> dict[str, Array]:
        r"""The exact $Q = \sum_{k \ge 0} \gamma^k E[r(S_{k+1})]$ of the rewards for which it is known."""
        return {}
