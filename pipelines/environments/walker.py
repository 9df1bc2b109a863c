"""Planar walker of the DeepMind Control Suite (arXiv 1801.00690): a torso on two legs of three joints.

State (24): cosine and sine of the orientation of the seven bodies, the height of the torso in m, and the nine
velocities of the joints. Action (6): torques in [-1, 1] of their largest. A control step lasts 0.025 s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, final

import numpy as np
from pydantic import Field

from pipelines.environments import Array, _suite
from pipelines.environments._suite import tolerance, wrapped

HEIGHT = 1.3  # m, of the torso where its joint is at 0
STANDING = 1.2  # m
SPEEDS = {"walk": 1.0, "run": 8.0}  # m/s
JOINTS = tuple(f"{side}_{joint}" for side in ("right", "left") for joint in ("hip", "knee", "ankle"))
BODIES = ("torso", *(f"{side}_{body}" for side in ("right", "left") for body in ("thigh", "leg", "foot")))
PARENTS = (0, 1, 2, 0, 4, 5)  # the body on which each joint hangs the next one


class Settings(_suite.Settings):
    """The policy, the duration of an action, and the behaviour that generates transitions."""

    task: Literal["walk"] = Field("walk", description="the stored policy, which is trained for the reward of this name")


@final
class Walker(_suite.Planar):
    """Walker with the stored policy of a task."""

    domain = "walker"
    substeps = 10
    state_names = (
        *(f"{part}_{body}" for body in BODIES for part in ("cos", "sin")),
        *("height", "vz", "vx", "vpitch"),
        *(f"v{joint}" for joint in JOINTS),
    )
    action_names = JOINTS
    bounds = (-1.1, -1.1, 1.1, 1.1)

    def physics(self, state: Array) -> Array:
        r"""Return positions and velocities (n, 18) of observations (n, 24).

        A body is turned by $\theta = \mathrm{atan2}(\sin\theta, \cos\theta)$, whether or not the pair lies on the
        circle, and a joint, whose axis points against that of the torso, by the angle of the body above it less that of
        the body below it.
        """
        angle = np.arctan2(state[:, 1:14:2], state[:, 0:14:2])
        joints = wrapped(angle[:, PARENTS] - angle[:, 1:])
        zero = np.zeros((len(state), 1))
        return np.concatenate([state[:, 14:15] - HEIGHT, zero, angle[:, :1], joints, state[:, 15:]], -1)

    def observe(self, physics: Array) -> Array:
        """Return orientations, height and velocities."""
        angle = [physics[:, 2]]
        for parent, joint in zip(PARENTS, physics[:, 3:9].T, strict=True):
            angle.append(angle[parent] - joint)
        turned = np.stack(angle, -1)
        orientation = np.stack([np.cos(turned), np.sin(turned)], -1).reshape(len(physics), 2 * len(BODIES))
        return np.concatenate([orientation, physics[:, :1] + HEIGHT, physics[:, 9:]], -1)

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw joint angles uniformly within their limits and any pitch, at rest, with the torso at its height."""
        position = _suite.limited_joints(self.model, rng, n)
        position[:, 2] = rng.uniform(-np.pi, np.pi, n)
        return self.observe(np.concatenate([position, np.zeros((n, self.model.nv))], -1))

    def rewards(self, state: Array) -> dict[str, Array]:
        r"""Return the suite's `stand`, `walk` and `run`.

        `stand` is $(3 h + u) / 4$ with the tolerance h of the height, a Gaussian that is .1 at .6 m below 1.2 m, and
        the uprightness $u = (1 + \cos\theta) / 2$ of the torso. The others are stand × $(5 f + 1) / 6$ with the
        tolerance f of the speed, a line that is 1/2 at half of 1 or 8 m/s, and 0 at rest.
        """
        physics = self.physics(state)
        below = np.maximum(STANDING - state[:, 14], 0) / (STANDING / 2)
        stand = (3 * 0.1 ** (below**2) + (1 + np.cos(physics[:, 2])) / 2) / 4
        speed = _suite.speed(self.model, physics)
        moving = {task: tolerance(speed, fast, fast / 2, 0.5) for task, fast in SPEEDS.items()}
        return {"stand": stand} | {task: stand * (5 * moved + 1) / 6 for task, moved in moving.items()}


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the suite's file, and the stored policy.

    Raises:
        UserError: dm_control is not installed, or there is no such policy.
    """
    return _suite.sources(Walker.domain, settings.task)


def build(settings: Settings) -> Walker:
    """Return the domain.

    Raises:
        UserError: dm_control is not installed.
    """
    return Walker(settings)
