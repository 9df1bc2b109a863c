"""Cheetah of the DeepMind Control Suite (arXiv 1801.00690): a planar animal with two legs of three joints.

State (17): height and pitch of the torso and the six joint angles, then the nine velocities, that along the track
first; m, rad, m/s and rad/s. Action (6): torques in [-1, 1] of their largest. A control step lasts 0.01 s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, final

import numpy as np
from pydantic import Field

from pipelines.environments import Array, _suite

FULL_SPEED = 10.0  # m/s
SETTLING = 200  # physics steps without torques before an episode
JOINTS = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")


class Settings(_suite.Settings):
    """The policy, the duration of an action, and the behaviour that generates transitions."""

    task: Literal["run"] = Field("run", description="the stored policy, which is trained for the reward of this name")


@final
class Cheetah(_suite.Planar):
    """Cheetah with the stored policy of a task."""

    domain = "cheetah"
    substeps = 1
    state_names = ("z", "pitch", *JOINTS, "vx", "vz", "vpitch", *(f"v{joint}" for joint in JOINTS))
    action_names = JOINTS
    bounds = (-0.7, -3.2, 0.7, 3.2)

    def physics(self, state: Array) -> Array:
        """Return positions and velocities (n, 18) of observations (n, 17)."""
        return np.concatenate([np.zeros((len(state), 1)), state], -1)

    def observe(self, physics: Array) -> Array:
        """Return what is seen of positions and velocities: all but the position along the track."""
        return physics[:, 1:].copy()

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw joint angles uniformly within their limits, and let the animal fall for 200 physics steps."""
        position = _suite.limited_joints(self.model, rng, n)
        physics = np.concatenate([position, np.zeros((n, self.model.nv))], -1)
        return self.observe(_suite.advance(self.model, physics, np.zeros((n, self.model.nu)), SETTLING)[0])

    def rewards(self, state: Array) -> dict[str, Array]:
        """Return the suite's `run`: the speed of the centre of mass in units of 10 m/s, between 0 and 1."""
        return {"run": _suite.tolerance(_suite.speed(self.model, self.physics(state)), FULL_SPEED, FULL_SPEED, 0.0)}


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the suite's file, and the stored policy.

    Raises:
        UserError: dm_control is not installed, or there is no such policy.
    """
    return _suite.sources(Cheetah.domain, settings.task)


def build(settings: Settings) -> Cheetah:
    """Return the domain.

    Raises:
        UserError: dm_control is not installed.
    """
    return Cheetah(settings)
