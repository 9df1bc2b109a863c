"""The point-mass maze of Temporal Difference Flows (arXiv 2503.09817) on MuJoCo, with scripted policies.

A ball slides in a square arena of 0.6 m, in which a plus-shaped wall separates four rooms that are connected by
passages along the border. State (x, y, vx, vy) in m and m/s; action (ux, uy) in [-1, 1], the motor force along each
axis.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, Self, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipelines.environments import Array, Family, Simulator, _family
from pipelines.environments._family import FamilySettings

ARENA = 0.3  # half width between the border planes
LIMIT = 0.29  # range of the ball's centre
RADIUS = 0.01
ARM, THICKNESS = 0.18, 0.02  # half lengths of the two boxes that form the plus
MASS, DAMPING, GEAR, TIMESTEP = 0.3, 1.0, 0.1, 0.02
TERMINAL_SPEED = GEAR / DAMPING

# The ball is at half the height of the boxes, so all contacts are horizontal; there is no floor, so no friction.
MJCF = f"""
<mujoco model="point mass maze">
  <option timestep="{TIMESTEP}" integrator="Euler"/>
  <worldbody>
    <geom name="arm_x" type="box" size="{ARM} {THICKNESS} {RADIUS}" pos="0 0 {RADIUS}"/>
    <geom name="arm_y" type="box" size="{THICKNESS} {ARM} {RADIUS}" pos="0 0 {RADIUS}"/>
    <geom name="left" type="plane" size="1 1 1" pos="-{ARENA} 0 0" zaxis="1 0 0"/>
    <geom name="right" type="plane" size="1 1 1" pos="{ARENA} 0 0" zaxis="-1 0 0"/>
    <geom name="bottom" type="plane" size="1 1 1" pos="0 -{ARENA} 0" zaxis="0 1 0"/>
    <geom name="top" type="plane" size="1 1 1" pos="0 {ARENA} 0" zaxis="0 -1 0"/>
    <body name="ball" pos="0 0 {RADIUS}">
      <joint name="x" type="slide" axis="1 0 0" limited="true" range="-{LIMIT} {LIMIT}" damping="{DAMPING}"/>
      <joint name="y" type="slide" axis="0 1 0" limited="true" range="-{LIMIT} {LIMIT}" damping="{DAMPING}"/>
      <geom name="ball" type="sphere" size="{RADIUS}" mass="{MASS}"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="{GEAR}" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="y" gear="{GEAR}" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""

ROOMS = {
    "top_left": (-1, 1),
    "top_right": (1, 1),
    "bottom_right": (1, -1),
    "bottom_left": (-1, -1),
}  # clockwise
GOALS = {f"reach_{name}": 0.15 * np.array(signs, dtype=float) for name, signs in ROOMS.items()}
LONG = "reach_bottom_left_long"  # the goal in the room next to the start, reached through all other rooms
GOAL_RADIUS, GOAL_MARGIN = 0.015, 6 * 0.015
GOAL_RANGE = (0.03, 0.27)  # m from an axis, within which each coordinate of a goal of the family is
DIAMOND = 0.24  # the loop runs along |x| + |y| = DIAMOND, and crosses a passage at this coordinate
BAND = 0.2  # square and fast_slow reward motion where exactly one coordinate is larger
SLOW, FAST = 0.045, 0.095  # m/s along x and along y in fast_slow


class Settings(FamilySettings):
    """The policy, or the family of policies, and the duration of an action."""

    task: Literal[
        "loop",
        "square",
        "fast_slow",
        "reach_top_left",
        "reach_top_right",
        "reach_bottom_left",
        "reach_bottom_right",
        "reach_bottom_left_long",
    ] = Field("loop", description="the scripted policy")
    action_repeat: int = Field(5, ge=1, le=10, description="physics steps of 0.02 s that one transition lasts")
    family: Literal["goals"] | None = Field(
        None, description="goals: scripted policies to every goal of a room, in place of the policy of the task"
    )

    @model_validator(mode="after")
    def _one_family(self) -> Self:
        if self.family is not None and self.policy is not None:
            raise ValueError(f"family is {self.family} and policy {self.policy}; expected one of them")
        return self


def clearance(position: Array) -> Array:
    """Return the distance in m of points to the wall, 0 inside; the ball is free if it is at least the radius.

    >>> clearance(np.array([[0.1, 0.05], [0.0, 0.0]]))
    array([0.03, 0.  ])
    """
    outside_x = np.maximum(np.abs(position) - [ARM, THICKNESS], 0)
    outside_y = np.maximum(np.abs(position) - [THICKNESS, ARM], 0)
    distance: Array = np.minimum(np.hypot(*outside_x.T), np.hypot(*outside_y.T))
    return distance


def room_signs(position: Array) -> Array:
    """Return the sign of each coordinate, (n, 2); zero is assigned as in the paper's rewards."""
    return np.stack([np.where(position[:, 0] > 0, 1.0, -1.0), np.where(position[:, 1] >= 0, 1.0, -1.0)], -1)


def linear_tolerance(x: Array, lower: float, upper: float, margin: float) -> Array:
    """Return 1 between the bounds, falling linearly to 0 at the margin beyond them.

    >>> linear_tolerance(np.array([0.0, 1.5, 3.0]), -1.0, 1.0, 1.0)
    array([1. , 0.5, 0. ])
    """
    beyond = np.maximum(np.maximum(lower - x, x - upper), 0)
    return np.maximum(1 - beyond / margin, 0)


def loop_reward(state: Array) -> Array:
    """Return the mean of three terms: each velocity clockwise at .06 to .1 m/s, and at most .02 m from the diamond."""
    position, velocity = state[:, :2], state[:, 2:]
    signs = room_signs(position)
    along = velocity * clockwise(signs)
    distance = np.abs(np.abs(position).sum(-1) - DIAMOND) / np.sqrt(2)
    terms = [linear_tolerance(along[:, axis], 0.06, 0.1, 0.01) for axis in (0, 1)]
    return (terms[0] + terms[1] + linear_tolerance(distance, 0.0, 0.02, 0.02)) / 3


def reach_reward(state: Array, goal: Array) -> Array:
    """Return 1 within .015 m of the goal, then a Gaussian that is .1 at .09 m beyond; without the control factor."""
    beyond = np.maximum(np.hypot(*(state[:, :2] - goal).T) - GOAL_RADIUS, 0)
    value: Array = 0.1 ** ((beyond / GOAL_MARGIN) ** 2)
    return value


def sides(position: Array, inner: float, outer: float = np.inf) -> NDArray[np.bool_]:
    """Return whether points are in the band on exactly one side: top, right, bottom, left, (4, n)."""
    x, y = position.T
    outward = np.stack([y, x, -y, -x])
    bands = (outward > inner) & (outward < outer)
    alone: NDArray[np.bool_] = bands & (bands.sum(0) == 1)
    return alone


def square_reward(state: Array) -> Array:
    """Return the clockwise speed in the outer band in units of .1 m/s, at most 1; 0 in the corners."""
    top, right, bottom, left = sides(state[:, :2], BAND)
    vx, vy = state[:, 2:].T
    value: Array = np.clip(10 * (top * vx - right * vy - bottom * vx + left * vy), 0, 1)
    return value


def fast_slow_reward(state: Array) -> Array:
    """Return the reward of counter-clockwise motion in the outer band: .04 to .05 m/s along x, .09 to .1 along y."""
    top, right, bottom, left = sides(state[:, :2], BAND, 0.28)
    vx, vy = state[:, 2:].T
    slow = linear_tolerance((bottom.astype(float) - top) * vx, 0.04, 0.05, 0.01) * (top | bottom)
    value: Array = slow + linear_tolerance((right.astype(float) - left) * vy, 0.09, 0.1, 0.01) * (right | left)
    return value


def long_way_reward(state: Array) -> Array:
    """Return the reach reward where it is at least .01, otherwise 5 v for the clockwise speed v, or 100 v if v < 0."""
    near = reach_reward(state, GOALS["reach_bottom_left"])
    top, right, bottom, left = sides(state[:, :2], 0.15)
    vx, vy = np.clip(state[:, 2:], -TERMINAL_SPEED, TERMINAL_SPEED).T
    along = top * vx - right * vy - bottom * vx + left * vy
    value: Array = np.where(near < 0.01, np.where(along >= 0, 5, 100) * along, near)
    return value


def clockwise(signs: Array) -> Array:
    """Return the signs of a clockwise velocity: top left (+, +), top right (+, -), ..."""
    return np.stack([signs[:, 1], -signs[:, 0]], -1)


def drive(wanted: Array, velocity: Array) -> Array:
    """Return the action that brings the ball to a velocity: the force that sustains it, plus a correction."""
    wanted = np.clip(wanted, -TERMINAL_SPEED, TERMINAL_SPEED)
    action: Array = np.clip(wanted / TERMINAL_SPEED + 10 * (wanted - velocity), -1, 1)
    return action


def loop_velocity(position: Array, velocity: Array) -> Array:
    """Return a clockwise velocity along the diamond, with corners anticipated by 0.2 s and a correction towards it."""
    outside = (np.abs(position).sum(-1, keepdims=True) - DIAMOND) / np.sqrt(2)
    along = clockwise(room_signs(position + 0.2 * velocity))
    pull = np.clip(3 * outside, -0.05, 0.05)  # a slow approach, because models blur abrupt changes first
    wanted: Array = 0.07 * along - pull * room_signs(position)
    return wanted


def band_velocity(position: Array, velocity: Array, along_x: float, along_y: float) -> Array:
    """Return a velocity around the square |x|, |y| <= .24, clockwise at positive speeds; inside, straight out to it."""
    ahead = position + 0.2 * velocity
    on_x = np.abs(ahead[:, 1]) >= np.abs(ahead[:, 0])  # top and bottom, where the ball moves along x
    size = np.abs(position)
    out = np.where(on_x, size[:, 1], size[:, 0])
    # Closer to the centre than the tips of the wall, the wall blocks motion along the square.
    moving = np.clip((out - ARM - RADIUS) / 0.03, 0, 1)
    pull = np.clip(3 * (DIAMOND - out), -0.05, 0.05)
    signs = room_signs(ahead)
    along = clockwise(signs) * [along_x, along_y] * moving[:, None]
    outward = pull[:, None] * signs
    return np.where(np.stack([on_x, ~on_x], -1), along, outward)


def reach_target(position: Array, goal: Array, long_way: bool = False) -> Array:
    """Return the point to head for, (n, 2): the goal in its own room, otherwise the next passage around the wall.

    There is one goal, (2,), or one for each position, (n, 2). The route is the shorter one, clockwise from the opposite
    room, or with `long_way` always clockwise. A ball that has not passed the tip of an arm moves along the arm before
    it crosses.
    """
    signs = room_signs(position)
    order = np.array(list(ROOMS.values()))
    room, goals_room = ((corner[..., None, :] == order).all(-1).argmax(-1) for corner in (signs, np.sign(goal)))
    rooms_ahead = (goals_room - room) % 4
    # Clockwise, rooms are left alternately along x and along y; counter-clockwise along the other axis.
    cross_x = (room % 2 == 0) == (long_way | (rooms_ahead < 3))
    size = np.abs(position)
    cleared = np.where(cross_x, size[:, 1], size[:, 0]) > ARM + 2.5 * RADIUS
    crossing = np.where(cleared, -0.1, np.where(cross_x, size[:, 0], size[:, 1]))
    along = np.full(len(position), DIAMOND)
    passage = np.where(cross_x[:, None], np.stack([crossing, along], -1), np.stack([along, crossing], -1))

    # In the goal's room, a ball between tip and border leaves the passage in a straight line before it turns.
    in_passage = (size < 0.05) & (size[:, ::-1] > ARM - RADIUS)
    leaving = np.where(in_passage, 0.1, DIAMOND)
    home = np.where(in_passage.any(-1, keepdims=True), signs * leaving, goal)
    return np.where((rooms_ahead == 0)[:, None], home, signs * passage)


@final
class Goals(Family):
    r"""The scripted policies $\pi_g$ to a goal g = (gx, gy) in one of the rooms, in place of Forward-Backward's.

    $$ \pi_g(s) = \mathrm{drive}(4\, (\mathrm{target}(x, g) - x), v), \qquad |g_x|, |g_y| \sim U[0.03, 0.27] $$
    """

    names = ("gx", "gy")
    low, high = np.full(2, -GOAL_RANGE[1]), np.full(2, GOAL_RANGE[1])
    source = "the scripted policies to goals, in place of Forward-Backward"
    _hole = f" without the {2 * GOAL_RANGE[0]:g} m around the axes"

    def act(self, state: Array, w: Array) -> Array:
        """Return the action towards each row's goal."""
        return drive(4 * (reach_target(state[:, :2], w) - state[:, :2]), state[:, 2:])

    def draw(self, n: int, rng: np.random.Generator) -> Array:
        """Draw goals uniformly from the four squares of the law."""
        goal: Array = rng.choice([-1.0, 1.0], (n, 2)) * rng.uniform(*GOAL_RANGE, (n, 2))
        return goal

    def nearest(self, w: Array) -> Array:
        """Return the nearest goals in the squares; a coordinate of zero counts as positive."""
        goal: Array = np.where(w < 0, -1.0, 1.0) * np.clip(np.abs(w), *GOAL_RANGE)
        return goal


def scripted(task: str, state: Array) -> Array:
    """Return the scripted action of a task: around the diamond or the square, or to the goal."""
    position, velocity = state[:, :2], state[:, 2:]
    match task:
        case "loop":
            wanted = loop_velocity(position, velocity)
        case "square":
            wanted = band_velocity(position, velocity, TERMINAL_SPEED, TERMINAL_SPEED)
        case "fast_slow":
            wanted = band_velocity(position, velocity, -SLOW, -FAST)
        case "reach_bottom_left_long":
            wanted = 4 * (reach_target(position, GOALS["reach_bottom_left"], long_way=True) - position)
        case reach:
            wanted = 4 * (reach_target(position, GOALS[reach]) - position)
    return drive(wanted, velocity)


@final
class Maze(Simulator):
    """The maze with the policy of one task, or with the policies to goals."""

    state_names = ("x", "y", "vx", "vy")
    action_names = ("ux", "uy")
    bounds = (-ARENA, -ARENA, ARENA, ARENA)
    walls = ((-ARM, -THICKNESS, ARM, THICKNESS), (-THICKNESS, -ARM, THICKNESS, ARM))
    source = "point_mass_maze of ExORL and controllable_agent, tasks and rewards of offline_rl; own MuJoCo model"
    fidelity = "same dynamics and rewards (without the control factor of reach); scripted policies, own transitions"
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        # Nothing is rendered, so MuJoCo does not need a display.
        os.environ.setdefault("MUJOCO_GL", "disabled")
        import mujoco

        self.settings = settings
        self.family = Goals() if settings.family == "goals" else _family.own(settings, len(self.action_names))
        self.model = mujoco.MjModel.from_xml_string(MJCF)

    def policy(self, state: Array) -> Array:
        """Return the scripted action of the task."""
        return scripted(self.settings.task, state)

    def expert(self, reward: str) -> Callable[[Array], Array]:
        """Return the scripted policy of the task of that name."""
        return partial(scripted, reward)

    def step(self, state: Array, action: Array, rng: np.random.Generator) -> Array:
        """Return the state after `action_repeat` physics steps under a constant action, for each row independently."""
        from mujoco import MjData, rollout

        if not len(state):  # MuJoCo crashes on zero rows
            return state.copy()
        initial = np.concatenate([np.zeros((len(state), 1)), state], -1)  # MuJoCo's state begins with the time
        control = np.broadcast_to(action[:, None], (len(action), self.settings.action_repeat, 2))
        trajectory, _ = rollout.rollout(self.model, MjData(self.model), initial, control)
        following: Array = trajectory[:, -1, 1:]
        return following

    def actions(self, rng: np.random.Generator, n: int) -> Array:
        """Draw uniformly from [-1, 1]^2."""
        return rng.uniform(-1, 1, (n, 2))

    def coverage(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Draw uniformly: positions in free space, velocities in [-.1, .1]^2, actions in [-1, 1]^2."""
        free = np.empty((0, 2))
        while len(free) < n:
            drawn = rng.uniform(-LIMIT, LIMIT, (2 * n, 2))
            free = np.concatenate([free, drawn[clearance(drawn) >= RADIUS]])
        velocity = rng.uniform(-TERMINAL_SPEED, TERMINAL_SPEED, (n, 2))
        return np.concatenate([free[:n], velocity], -1), self.actions(rng, n)

    def starts(self, rng: np.random.Generator, n: int) -> Array:
        """Draw positions at rest in the outer corner of the top left room."""
        x, y = rng.uniform(-LIMIT, -0.15, n), rng.uniform(0.15, LIMIT, n)
        return np.stack([x, y, np.zeros(n), np.zeros(n)], -1)

    def grid(self, size: int) -> Array:
        """Return the states at rest of a grid at which the ball does not touch the wall."""
        state = super().grid(size)
        free: Array = state[(clearance(state[:, :2]) >= RADIUS) & (np.abs(state[:, :2]) <= LIMIT).all(-1)]
        return free

    def rewards(self, state: Array) -> dict[str, Array]:
        """Return the rewards of all tasks, whichever policy moves the ball."""
        reach = {name: reach_reward(state, goal) for name, goal in GOALS.items()}
        loops = {"square": square_reward(state), "fast_slow": fast_slow_reward(state)}
        return {"loop": loop_reward(state), **reach, **loops, LONG: long_way_reward(state)}


def build(settings: Settings) -> Maze:
    """Return the maze for the given settings.

    >>> maze = build(Settings(task="reach_top_right"))
    >>> state = maze.starts(np.random.default_rng(0), 3)
    >>> maze.step(state, maze.policy(state), np.random.default_rng(0)).shape
    (3, 4)
    """
    return Maze(settings)


sources = _family.sources
