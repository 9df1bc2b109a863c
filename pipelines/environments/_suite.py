"""What domains of the DeepMind Control Suite (arXiv 1801.00690) share: physics, stored policies and data.

The suite's own MJCF files are simulated by `mujoco.rollout` on batches of rows. The state is the suite's flat
observation. That of a planar domain determines the physics up to the position along the track, on which nothing else
depends, so that the domain can be set to any state, and rewards of sampled states are exact.
"""

from __future__ import annotations

import os
import warnings
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
from pipelines.environments import (
    Array,
    Beginning,
    Behaviour,
    Environment,
    Episodes,
    Simulator,
    SimulatorSettings,
    Steps,
)
from pipelines.environments import _actor as actors
from pipelines.environments._actor import Actor

if TYPE_CHECKING:
    import mujoco

Policy = Callable[[Array], Array]

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


class Domain(Environment):
    """A domain of the suite with the stored policy of one task.

    Attributes:
        domain: Name of the suite's file.
        substeps: Physics steps of a control step.
        camera: Camera of the suite that follows the body.
        stored: Name of the stored policy.
    """

    domain: str
    substeps: int
    camera: str
    beginnings = ("start",)
    standardised = True
    fidelity = (
        "the suite's own physics, to rounding, and rewards; own policy and transitions; one rollout a start is the "
        "truth, which is exact, because policy and dynamics are deterministic"
    )
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stored = f"{self.domain}_{settings.task}"
        self.model = self.load()
        self.source = f"dm_control's {self.domain} (arXiv 1801.00690), stored policy {self.stored}"

    def load(self) -> mujoco.MjModel:
        """Return the model of the suite's file."""
        return load(self.domain)

    @abstractmethod
    def begin(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw starts: states (n, s), and what MuJoCo integrates in them, positions and velocities first."""

    @abstractmethod
    def move(self, physics: Array, action: Array) -> tuple[Array, Array]:
        """Return states and physics after `action_repeat` control steps under constant actions (n, a)."""

    def perform(self, act: Policy, n: int, length: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """Draw episodes from the start distribution.

        Args:
            act: Actions (n, a) in the states (n, s), the rows in the same order at every step.
            n: Number of episodes.
            length: Transitions of an episode.
            rng: Source of randomness.

        Returns:
            States (n, length + 1, s), the actions (n, length, a) between them, and the physics (n, length + 1, p).
        """
        state, now = self.begin(rng, n)
        states, actions, physics = [state], list[Array](), [now]
        for _ in range(length):
            actions.append(act(state))
            state, now = self.move(now, actions[-1])
            states.append(state)
            physics.append(now)
        return np.stack(states, 1), np.stack(actions, 1), np.stack(physics, 1)

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

    def actions(self, rng: np.random.Generator, n: int) -> Array:
        """Draw uniformly from the box of actions."""
        low, high = self.model.actuator_ctrlrange.T
        return rng.uniform(low, high, (n, self.model.nu))

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

        states, actions, _ = self.perform(act, count, length, rng)
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

    def episodes(self, beginning: Beginning, n: int, length: int, rng: np.random.Generator) -> Episodes:
        """Draw rollouts of the policy from the start distribution."""
        states, actions, _ = self.perform(self.policy, n, length, rng)
        actions = np.concatenate([actions, self.policy(states[:, -1])[:, None]], 1)
        return Episodes(states, actions, np.zeros(states.shape[:2], dtype=bool))

    def returns(self, policy: Policy, n: int, rng: np.random.Generator) -> Array:
        """Return a policy's sum of rewards over episodes of 1000 control steps, (n,).

        The reward of a transition is that of its last state, for each of its control steps.
        """
        states, *_ = self.perform(policy, n, EPISODE // self.settings.action_repeat, rng)
        rewards = self.rewards(states[:, 1:].reshape(-1, states.shape[2]))[self.settings.task]
        total: Array = self.settings.action_repeat * rewards.reshape(n, -1).sum(1)
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

        seconds = self.settings.action_repeat * self.substeps * self.model.opt.timestep
        apart = max(1, round(APART / seconds))
        *_, physics = self.perform(self.policy, 1, BEFORE + FRAMES * apart - 1, rng)
        if _film.strip(type(self).__module__, physics[0, BEFORE::apart], file):
            return None
        return f"no film of {self.stored}: MuJoCo renders neither by EGL nor by OSMesa here"


class Planar(Domain, Simulator):
    """A domain in the plane, whose observation determines the physics up to the position along the track."""

    positions = False
    camera = "side"
    settings: Settings

    @abstractmethod
    def physics(self, state: Array) -> Array:
        """Return positions and velocities (n, nq + nv) of observations, at position 0 along the track."""

    @abstractmethod
    def observe(self, physics: Array) -> Array:
        """Return the observations of positions and velocities."""

    def begin(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw starts."""
        state = self.starts(rng, n)
        return state, self.physics(state)

    def move(self, physics: Array, action: Array) -> tuple[Array, Array]:
        """Return states and physics after an action; the body moves on along the track."""
        following = advance(self.model, physics, action, self.settings.action_repeat * self.substeps)[0]
        return self.observe(following), following

    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """Return the state after `action_repeat` control steps under a constant action, clipped to [-1, 1]."""
        return self.move(self.physics(state), action)[0]

    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw starts, whose joints have any angle, and uniform actions."""
        return self.starts(rng, n), self.actions(rng, n)


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


def load(domain: str, change: Callable[[mujoco.MjSpec], None] = lambda spec: None) -> mujoco.MjModel:
    """Return the model of a domain of the suite, after a change of its file."""
    # Nothing is rendered, so MuJoCo does not need a display.
    os.environ.setdefault("MUJOCO_GL", "disabled")
    import mujoco

    spec = mujoco.MjSpec.from_file(str(folder() / f"{domain}.xml"))
    change(spec)
    with warnings.catch_warnings():  # the suite's cheetah sets its mass in the old way
        warnings.filterwarnings("ignore", "compiler attribute 'settotalmass'")
        return spec.compile()


def sources(domain: str, task: str) -> dict[str, Path]:
    """Return the suite's file of a domain, and the stored policy of a task with its provenance.

    Raises:
        UserError: dm_control is not installed, or there is no such policy.
    """
    return {path.name: path for path in (folder() / f"{domain}.xml", *actors.paths(f"{domain}_{task}"))}


def advance(model: mujoco.MjModel, physics: Array, action: Array, steps: int) -> tuple[Array, Array]:
    """Return physics (n, p) after physics steps under constant actions (n, nu), and the sensors of the last step."""
    from mujoco import MjData, rollout

    if not len(physics):  # MuJoCo crashes on zero rows
        return physics.copy(), np.empty((0, model.nsensordata))
    initial = np.concatenate([np.zeros((len(physics), 1)), physics], -1)  # MuJoCo's state begins with the time
    control = np.broadcast_to(action[:, None], (len(action), steps, action.shape[1]))
    trajectory, sensors = rollout.rollout(model, MjData(model), initial, control)
    return trajectory[:, -1, 1:], sensors[:, -1]


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
