"""Quadruped of the DeepMind Control Suite (arXiv 1801.00690): four legs of four joints that three actuators move.

State (78): angles and velocities of the 16 joints, activations of the 12 actuators, velocity of the torso in its own
frame, cosine of its tilt, its acceleration and rotation, and forces and torques at the toes as inverse hyperbolic
sines. It does not determine the physics, so that the environment cannot be set to a state and its data come from
episodes. Action (12): targets of the actuators. A control step lasts 0.02 s.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import numpy as np
from pydantic import Field

from pipelines.environments import Array, _suite
from pipelines.environments._suite import tolerance

if TYPE_CHECKING:
    import mujoco

SPEEDS = {"walk": 0.5, "run": 5.0}  # m/s
LEGS = ("front_left", "front_right", "back_right", "back_left")
JOINTS = tuple(f"{joint}_{leg}" for leg in LEGS for joint in ("yaw", "pitch", "knee", "ankle"))
ACTUATORS = tuple(f"{actuator}_{leg}" for leg in LEGS for actuator in ("yaw", "lift", "extend"))
RAISE = 0.01  # m by which a start is raised until nothing touches the floor
FORWARD, UPRIGHT = 44, 47  # places of the forward velocity and of the torso's axis in a state


class Settings(_suite.Settings):
    """The policy, the duration of an action, and the behaviour that generates transitions."""

    task: Literal["walk"] = Field("walk", description="the stored policy, which is trained for the reward of this name")


@final
class Quadruped(_suite.Domain):
    """Quadruped with the stored policy of a task."""

    domain = "quadruped"
    substeps = 4
    camera = "y"
    state_names = (
        *JOINTS,
        *(f"v{joint}" for joint in JOINTS),
        *(f"act_{actuator}" for actuator in ACTUATORS),
        *("vx", "vy", "vz", "upright", "ax", "ay", "az", "wx", "wy", "wz"),
        *(f"{kind}_{leg}_{axis}" for kind in ("force", "torque") for leg in LEGS for axis in "xyz"),
    )
    action_names = ACTUATORS
    bounds = (-1.0, -0.4, 1.0, 1.1)

    def load(self) -> mujoco.MjModel:
        """Return the suite's model on a flat floor, as its tasks walk and run have it."""
        return _suite.load(self.domain, _on_a_flat_floor)

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw orientations uniformly, at rest, as low as nothing touches the floor."""
        return self.begin(rng, n)[0]

    def begin(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw starts."""
        import mujoco

        orientation = rng.standard_normal((n, 4))
        orientation /= np.linalg.norm(orientation, axis=-1, keepdims=True)
        model = copy(self.model)
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION  # there are no actions yet
        data, physics, sensors = mujoco.MjData(model), list[Array](), list[Array]()
        for quaternion in orientation:
            mujoco.mj_resetData(model, data)
            data.qpos[:3], data.qpos[3:7] = 0, quaternion
            mujoco.mj_fwdPosition(model, data)
            while data.ncon:
                data.qpos[2] += RAISE
                mujoco.mj_fwdPosition(model, data)
            mujoco.mj_forward(model, data)
            physics.append(np.concatenate([data.qpos, data.qvel, data.act]))
            sensors.append(data.sensordata.copy())
        return self._observe(np.array(physics), np.array(sensors)), np.array(physics)

    def move(self, physics: Array, action: Array) -> tuple[Array, Array]:
        """Return states, and positions, velocities and activations (n, 57), after an action."""
        steps = self.settings.action_repeat * self.substeps
        following, sensors = _suite.advance(self.model, physics, action, steps)
        return self._observe(following, sensors), following

    def rewards(self, state: Array) -> dict[str, Array]:
        r"""Return the suite's `walk` and `run`.

        They are $u f$ with the uprightness $u = (1 + z) / 2$ and the tolerance f of the forward velocity, a line that
        is 1/2 at rest and 1 from 0.5 or 5 m/s on.
        """
        upright = tolerance(state[:, UPRIGHT], 1.0, 2.0, 0.0)
        return {task: upright * tolerance(state[:, FORWARD], v, v, 0.5) for task, v in SPEEDS.items()}

    def _observe(self, physics: Array, sensors: Array) -> Array:
        """Return observations of physics and of what MuJoCo's sensors said in the last physics step.

        The suite takes accelerations and forces from the beginning of that step, and velocities from its end.
        """
        import mujoco

        model, seen = self.model, np.empty((len(physics), 7))
        data, site, torso = mujoco.MjData(model), model.site("torso").id, model.body("torso").id
        for row, out in zip(physics, seen, strict=True):
            data.qpos[:], data.qvel[:] = row[: model.nq], row[model.nq : model.nq + model.nv]
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_comVel(model, data)
            mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_SITE, site, out[:6], 1)
            out[6] = data.xmat[torso, 8]
        rotation, velocity, upright = seen[:, :3], seen[:, 3:6], seen[:, 6:]
        egocentric = physics[:, 7 : model.nq], physics[:, model.nq + 6 :]
        return np.concatenate(
            [*egocentric, velocity, upright, sensors[:, :3], rotation, np.arcsinh(sensors[:, 9:33])], -1
        )


def _on_a_flat_floor(spec: mujoco.MjSpec) -> None:
    """Take out what other tasks need: walls, ball, target, terrain and range finders."""
    import mujoco

    named = [spec.geom(name) for name in ("wall_px", "wall_py", "wall_nx", "wall_ny", "terrain")]
    ranges = [sensor for sensor in spec.sensors if sensor.type == mujoco.mjtSensor.mjSENS_RANGEFINDER]
    for part in (*named, spec.body("ball"), spec.site("target"), *ranges):
        spec.delete(part)


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the suite's file, and the stored policy.

    Raises:
        UserError: dm_control is not installed, or there is no such policy.
    """
    return _suite.sources(Quadruped.domain, settings.task)


def build(settings: Settings) -> Quadruped:
    """Return the domain.

    Raises:
        UserError: dm_control is not installed.
    """
    return Quadruped(settings)
