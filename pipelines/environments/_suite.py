"""What the planar domains of the DeepMind Control Suite (arXiv 1801.00690) share: physics, data and rewards.

The suite's own MJCF files are simulated by `mujoco.rollout` on batches of rows. The state is the suite's flat
observation. It determines the physics up to the horizontal position, on which nothing depends, so that a domain can be
set to any state, and rewards of sampled states are exact.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.environments import Array, Behaviour, Simulator, SimulatorSettings, Steps
from pipelines.environments import _actor as actors
from pipelines.environments._actor import Actor

if TYPE_CHECKING:
    import mujoco

EPISODE = 1000  # control steps of the suite's episodes
ODDS = (0.0, 0.25, 0.5, 1.0)  # of a random action, in one episode after the other of mixed behaviour
LABELS: tuple[Behaviour, ...] = ("policy", "visited", "visited", "random")
BEFORE, FRAMES, APART = 100, 8, 0.1  # transitions before a film, its frames, and the seconds between them
KEPT = 0.9  # share of its recorded return that a stored policy must reach


class Settings(SimulatorSettings):
    """The policy, the duration of an action, and the behaviour that generates transitions."""

    task: str = Field(description="the stored policy, which is trained for the reward of this name")
    action_repeat: int = Field(2, ge=1, le=10, description="control steps of the suite that one transition lasts")
    behaviour: Literal["random", "policy", "mixed"] = Field(
        "mixed",
        description="random: episodes under uniformly random actions; policy: episodes under the policy; mixed: in one "
        "episode after the other each action is random with odds 0, 1/4, 1/2 and 1, else the policy's",
    )


class Domain(Simulator):
    """A planar domain of the suite with the stored policy of one task.

    Attributes:
        domain: Name of the suite's file.
        substeps: Physics steps of a control step.
        stored: Name of the stored policy.
    """

    domain: str
    substeps: int
    beginnings = ("start",)
    positions = False
    standardised = True
    fidelity = (
        "the suite's own physics, to rounding, and rewards; own policy and transitions; one rollout a start is the "
        "truth, which is exact, because policy and dynamics are deterministic"
    )
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stored = f"{self.domain}_{settings.task}"
        self.model = load(self.domain)
        self.source = f"dm_control's {self.domain} (arXiv 1801.00690), stored policy {self.stored}"

    @abstractmethod
    def physics(self, state: Array) -> Array:
        """Return positions and velocities (n, nq + nv) of observations, at horizontal position 0."""

    @abstractmethod
    def observe(self, physics: Array) -> Array:
        """Return the observations of positions and velocities."""

    @cached_property
    def actor(self) -> Actor:
        """Stored policy of the task.

        Raises:
            UserError: There is none.
        """
        return actors.read(self.stored)

    def policy(self, state: Array) -> Array:
        """Return the actions of the stored policy."""
        return self.actor(state)

    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """Return the state after `action_repeat` control steps under a constant action, clipped to [-1, 1]."""
        steps = self.settings.action_repeat * self.substeps
        return self.observe(advance(self.model, self.physics(state), action, steps))

    def actions(self, rng: np.random.Generator, n: int) -> Array:
        """Draw uniformly from the box of actions."""
        return rng.uniform(-1, 1, (n, len(self.action_names)))

    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw starts, whose joints have any angle, and uniform actions."""
        return self.starts(rng, n), self.actions(rng, n)

    def transitions(self, rows: range, length: int, rng: np.random.Generator) -> Steps:
        """Return rows of episodes of `length` steps from the start distribution, with the behaviour of the settings."""
        count = -(-len(rows) // length)
        row = np.arange(len(rows))
        kind = {"policy": 0, "random": len(ODDS) - 1}.get(self.settings.behaviour)
        kinds = (np.arange(count) if kind is None else np.full(count, kind)) % len(ODDS)
        odds = np.array(ODDS)[kinds]

        def act(state: Array) -> Array:
            random = rng.random(len(state)) < odds
            return np.where(random[:, None], self.actions(rng, len(state)), self.policy(state))

        states, actions = self._roll(self.starts(rng, count), length, act, rng)
        now, then = (part.reshape(-1, states.shape[2])[: len(rows)] for part in (states[:, :-1], states[:, 1:]))
        return Steps(
            now,
            actions.reshape(-1, actions.shape[2])[: len(rows)],
            then,
            np.zeros(len(rows), dtype=bool),
            rows.start + row // length,
            row % length,
            np.array(LABELS)[kinds][row // length],
        )

    def returns(self, policy: Callable[[Array], Array], n: int, rng: np.random.Generator) -> Array:
        """Return a policy's sum of rewards over episodes of 1000 control steps, (n,).

        The reward of a transition is that of its last state, for each of its control steps.
        """
        length = EPISODE // self.settings.action_repeat
        states, _ = self._roll(self.starts(rng, n), length, policy, rng)
        rewards = self.rewards(states[:, 1:].reshape(-1, states.shape[2]))[self.settings.task]
        total: Array = self.settings.action_repeat * rewards.reshape(n, length).sum(1)
        return total

    def checks(self, rng: np.random.Generator) -> list[str]:
        """Compare the return of the stored policy with its provenance, over the same episodes.

        Raises:
            UserError: It is less than nine tenths of it.
        """
        import mujoco

        known = files.read_json(layout.actor_provenance(self.stored))
        changed = {"action_repeat": known["action_repeat"]}
        there = type(self)(self.settings.model_copy(update=changed))
        here = float(there.returns(self.policy, known["episodes"], np.random.default_rng(known["seed"])).mean())
        found = f"the stored policy {self.stored} has a return of {here:.0f} on mujoco {mujoco.__version__}"
        if here < KEPT * known["return"]:
            versions = known["versions"]
            raise UserError(
                f"{found}, and had {known['return']:.0f} on mujoco {versions['mujoco']}; expected at least "
                f"{KEPT:.0%} of it: `pip install mujoco=={versions['mujoco']}`, or train it again by "
                f"`{known['command']}`."
            )
        return [f"{found} and had {known['return']:.0f} where it was trained"]

    def film(self, file: Path, rng: np.random.Generator) -> str | None:
        """Write frames of an episode a tenth of a second apart, or return a sentence why there are none."""
        from pipelines.environments import _film  # which imports this module

        steps = self.settings.action_repeat * self.substeps
        apart = max(1, round(APART / (steps * self.model.opt.timestep)))
        physics, states = self.physics(self.starts(rng, 1)), list[Array]()
        for _ in range(BEFORE + FRAMES * apart):  # the position along the track goes on, so that the floor moves
            physics = advance(self.model, physics, self.policy(self.observe(physics)), steps)
            states.append(physics[0])
        shown = np.stack(states[BEFORE::apart])
        if _film.strip(self.domain, shown, file):
            return None
        return f"no film of {self.stored}: MuJoCo renders neither by EGL nor by OSMesa here"


def folder() -> Path:
    """Return the folder of the suite's MJCF files, without importing the suite.

    Raises:
        UserError: dm_control is not installed.
    """
    spec = find_spec("dm_control")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "environments of the DeepMind Control Suite need the package dm_control, which is not installed; "
            "run `pip install -e '.[dmc]'`."
        )
    return Path(spec.submodule_search_locations[0]) / "suite"


def load(domain: str) -> mujoco.MjModel:
    """Return the model of a domain of the suite."""
    # Nothing is rendered, so MuJoCo does not need a display.
    os.environ.setdefault("MUJOCO_GL", "disabled")
    import mujoco

    # The suite's cheetah sets its mass by an attribute that MuJoCo warns of, in a log file in the working directory.
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        return mujoco.MjModel.from_xml_path(str(folder() / f"{domain}.xml"))
    finally:
        mujoco.set_mju_user_warning(handler)


def sources(domain: str, task: str) -> dict[str, Path]:
    """Return the suite's file of a domain, and the stored policy of a task with its provenance."""
    stored = f"{domain}_{task}"
    paths = (folder() / f"{domain}.xml", layout.actor(stored), layout.actor_provenance(stored))
    return {path.name: path for path in paths}


def advance(model: mujoco.MjModel, physics: Array, action: Array, steps: int) -> Array:
    """Return positions and velocities (n, nq + nv) after physics steps under constant actions (n, nu)."""
    from mujoco import MjData, rollout

    if not len(physics):  # MuJoCo crashes on zero rows
        return physics.copy()
    initial = np.concatenate([np.zeros((len(physics), 1)), physics], -1)  # MuJoCo's state begins with the time
    control = np.broadcast_to(action[:, None], (len(action), steps, action.shape[1]))
    trajectory, _ = rollout.rollout(model, MjData(model), initial, control)
    following: Array = trajectory[:, -1, 1:]
    return following


def limited_joints(model: mujoco.MjModel, rng: np.random.Generator, n: int) -> Array:
    """Draw positions (n, nq) with every limited joint uniformly within its limits and the others at 0."""
    limited = model.jnt_limited.astype(bool)
    lower, upper = model.jnt_range[limited].T
    position = np.zeros((n, model.nq))
    position[:, model.jnt_qposadr[limited]] = rng.uniform(lower, upper, (n, int(limited.sum())))
    return position


def speed(model: mujoco.MjModel, physics: Array) -> Array:
    """Return the horizontal velocity in m/s of the centre of mass of the body `torso` and what hangs on it, (n,)."""
    import mujoco

    data, torso, found = mujoco.MjData(model), model.body("torso").id, np.empty(len(physics))
    for row, number in zip(physics, range(len(physics)), strict=True):
        data.qpos[:], data.qvel[:] = row[: model.nq], row[model.nq :]
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_comVel(model, data)
        mujoco.mj_subtreeVel(model, data)
        found[number] = data.subtree_linvel[torso, 0]
    return found


def tolerance(x: Array, lower: float, margin: float, value_at_margin: float) -> Array:
    r"""Return 1 from a bound on, and below it a line through the value at the margin, never less than 0.

    The suite's `tolerance` with the sigmoid `linear`: $\max(0, 1 - (1 - v)\,d / m)$ at the distance d below the bound.
    It is 0 at $m / (1 - v)$, at two margins for v = 1/2.

    >>> tolerance(np.array([2.0, 1.0, 0.5, 0.0]), 1.0, 0.5, 0.5)
    array([1. , 1. , 0.5, 0. ])
    """
    beyond = np.maximum(lower - x, 0) / margin
    value: Array = np.maximum(1 - (1 - value_at_margin) * beyond, 0)
    return value


def wrapped(angle: Array) -> Array:
    """Return angles in [-pi, pi).

    >>> wrapped(np.array([0.0, 1.5 * np.pi])) / np.pi
    array([ 0. , -0.5])
    """
    turned: Array = (angle + np.pi) % (2 * np.pi) - np.pi
    return turned
