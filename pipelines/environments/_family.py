"""Families of policies that a user names: `policy` with a second argument w, the bounds of w, and its law."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self, final

import numpy as np
from pydantic import Field, model_validator

from pipelines.base import plugins
from pipelines.environments import Array, Family, SimulatorSettings
from pipelines.environments import _entry_point as entry_points
from pipelines.environments._entry_point import EntryPoint

Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class LawSettings(plugins.Settings):
    """The vectors w of a family of policies of the user's."""

    w: dict[Name, tuple[float, float]] = Field(
        {}, description="bounds of each component of w, by name: {gx: [-0.27, 0.27], gy: [-0.27, 0.27]}"
    )
    draw: EntryPoint | None = Field(
        None,
        description="package.module:function of a number n and a NumPy generator to w (n, dw) for training, within the "
        "bounds; null: uniform",
    )

    @model_validator(mode="after")
    def _whole_law(self) -> Self:
        if self.draw is not None and not self.w:
            raise ValueError("draw is given without w; expected the bounds of each component of w, or neither")
        empty = [name for name, (low, high) in self.w.items() if not low < high]
        if empty:
            raise ValueError(f"w.{empty[0]} is {list(self.w[empty[0]])}; expected a lower bound below the upper one")
        return self


class FamilySettings(LawSettings, SimulatorSettings):
    """The behaviour of a simulator, and policies of the user's in place of its own."""

    policy: EntryPoint | None = Field(
        None,
        description="package.module:function from states (n, d) and w (n, dw) to actions (n, a): deterministic, row by "
        "row, called from several threads; null: the environment's own policy",
    )

    @model_validator(mode="after")
    def _whole_family(self) -> Self:
        if (self.policy is None) != (not self.w):
            given = "w" if self.policy is None else "policy"
            raise ValueError(f"a family of policies needs policy and w, found {given} alone; expected both or none")
        return self


@final
class Named(Family):
    """The family of a user's functions.

    Args:
        policy: Entry point of the policies.
        bounds: Bounds of the components of w by name.
        draw: Entry point of the law of w; None is uniform.
        actions: Number of components of an action.

    Raises:
        UserError: A function does not exist; or, when called, it answers with a wrong shape, with numbers that are not
            finite, or, drawing, with a w outside the bounds.
    """

    def __init__(
        self, policy: EntryPoint, bounds: dict[str, tuple[float, float]], draw: EntryPoint | None, actions: int
    ) -> None:
        self.names = tuple(bounds)
        self.low, self.high = np.array(list(bounds.values())).T
        self.source = policy
        self._act = entry_points.load(policy, (actions,))
        self._law = draw
        self._draw = None if draw is None else entry_points.find(draw)

    def act(self, state: Array, w: Array) -> Array:
        """Return the actions of the user's function."""
        return self._act(state, w)

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """Draw by the user's function, or uniformly."""
        if self._draw is None or self._law is None:
            return rng.uniform(self.low, self.high, (n, len(self.names)))
        w = entry_points.numbers(self._law, self._draw(n, rng), (n, len(self.names)), "draws")
        self.check(w)
        return w


def own(settings: FamilySettings, actions: int) -> Named | None:
    """Return the family that a user's settings name, if they do."""
    if settings.policy is None:
        return None
    return Named(settings.policy, settings.w, settings.draw, actions)


def sources(settings: FamilySettings, mirror: Path | None) -> dict[str, Path]:
    """Return the files of the modules of the user's functions.

    Raises:
        UserError: A module does not exist.
    """
    return entry_points.sources(*(name for name in (settings.policy, settings.draw) if name is not None))
