"""Environments: physics against its closed form, walls, policies at work, the spiral against its oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.base import plugins
from pipelines.environments import Array, Steps, linear_gaussian, maze

REACH = list(maze.GOALS)
TASKS = ["loop", "square", "fast_slow", *REACH, "reach_bottom_left_long"]
SOFTNESS = 2e-3  # m that MuJoCo's contacts and joint limits give way under the motors' full force


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make(task: Any = "loop", action_repeat: int = 5) -> maze.Maze:
    return maze.build(maze.Settings(task=task, action_repeat=action_repeat))


def follow(environment: maze.Maze, state: Array, steps: int) -> Array:
    """The states under the policy, (steps + 1, n, 4)."""
    states = [state]
    for _ in range(steps):
        states.append(environment.step(states[-1], environment.policy(states[-1]), rng()))
    return np.stack(states)


def free_grid(spacing: float = 0.04) -> Array:
    """Free states at rest on a grid, those in the passages included."""
    axis = np.append(np.arange(-0.28, 0.28, spacing), 0.28)
    position = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    position = position[maze.clearance(position) >= maze.RADIUS]
    return np.concatenate([position, np.zeros_like(position)], -1)


# ---- physics ----


@pytest.mark.parametrize("repeat", [1, 5, 10])
def test_free_motion_has_its_closed_form(repeat: int) -> None:
    """v' = (M v + h g u) / (M + h D), x' = x + h v' on each axis, as in td-flows.md 4.5."""
    draw = rng()
    environment = make(action_repeat=repeat)
    # Farther from wall and border than the ball moves in 0.2 s.
    position = 0.16 * draw.choice([-1, 1], (500, 2)) + draw.uniform(-0.07, 0.07, (500, 2))
    velocity, action = draw.uniform(-0.1, 0.1, (500, 2)), draw.uniform(-1, 1, (500, 2))
    result = environment.step(np.concatenate([position, velocity], -1), action, draw)
    for _ in range(repeat):
        velocity = 0.9375 * velocity + 0.00625 * action
        position = position + 0.02 * velocity
    np.testing.assert_allclose(result, np.concatenate([position, velocity], -1), rtol=0, atol=1e-12)


def test_a_step_is_that_many_steps_of_mujoco_from_rest_of_its_solver() -> None:
    import mujoco

    environment = make(action_repeat=5)
    state, action = environment.coverage(rng(), 300)
    result = environment.step(state, action, rng())
    data = mujoco.MjData(environment.model)
    for row in range(len(state)):
        mujoco.mj_resetData(environment.model, data)
        data.qpos[:], data.qvel[:], data.ctrl[:] = state[row, :2], state[row, 2:], action[row]
        mujoco.mj_step(environment.model, data, 5)
        np.testing.assert_array_equal(result[row], [*data.qpos, *data.qvel])


def test_five_repeats_are_five_transitions_of_one() -> None:
    state, action = make().coverage(rng(), 200)
    away = (maze.clearance(state[:, :2]) > 0.03) & (np.abs(state[:, :2]).max(-1) < 0.27)
    state, action, slow = state[away], action[away], make(action_repeat=1)
    expected = state
    for _ in range(5):
        expected = slow.step(expected, action, rng())
    np.testing.assert_allclose(make(action_repeat=5).step(state, action, rng()), expected, atol=1e-12)


def test_rows_do_not_depend_on_each_other() -> None:
    environment = make()
    state, action = environment.coverage(rng(), 400)
    order = rng(1).permutation(400)
    np.testing.assert_array_equal(
        environment.step(state[order], action[order], rng()), environment.step(state, action, rng())[order]
    )


def test_actions_are_clipped_to_the_motors_range() -> None:
    state = make().starts(rng(), 5)
    full, more = (make().step(state, np.full((5, 2), u), rng()) for u in (1.0, 7.0))
    np.testing.assert_array_equal(full, more)


def test_the_wall_stops_the_ball() -> None:
    """Pushed for 10 s against every side of the plus and every border, the ball stays where it may be."""
    environment = make(action_repeat=10)
    state = free_grid()
    for direction in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        pushed, action = state, np.tile(np.array(direction, dtype=float), (len(state), 1))
        for _ in range(50):
            pushed = environment.step(pushed, action, rng())
            assert maze.clearance(pushed[:, :2]).min() > maze.RADIUS - SOFTNESS
            assert np.abs(pushed[:, :2]).max() < maze.LIMIT + SOFTNESS
        axis = int(direction[1] != 0)
        blocked = np.abs(state[:, 1 - axis]) < maze.ARM  # the wall stands across their way
        behind = blocked & (np.sign(state[:, axis]) != sum(direction)) & (np.abs(state[:, axis]) > 0.03)
        assert behind.sum() > 20
        assert (np.sign(pushed[behind, axis]) == np.sign(state[behind, axis])).all()
        free_way = np.abs(state[:, 1 - axis]) > maze.ARM + maze.RADIUS + 1e-6
        np.testing.assert_allclose(pushed[free_way, axis], sum(direction) * maze.LIMIT, atol=SOFTNESS)


# ---- distributions ----


def test_coverage_is_uniform_over_free_space() -> None:
    environment = make()
    state, action = environment.coverage(rng(), 40_000)
    position = state[:, :2]
    assert maze.clearance(position).min() >= maze.RADIUS
    assert np.abs(position).max() <= maze.LIMIT
    # Expected share of each cell by a fine grid of the definition of free space.
    axis = np.linspace(-maze.LIMIT, maze.LIMIT, 1161)
    middle = (axis[1:] + axis[:-1]) / 2
    fine = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
    half = np.abs(fine)
    near_x = np.hypot(np.maximum(half[:, 0] - 0.18, 0), np.maximum(half[:, 1] - 0.02, 0))
    near_y = np.hypot(np.maximum(half[:, 0] - 0.02, 0), np.maximum(half[:, 1] - 0.18, 0))
    free = fine[np.minimum(near_x, near_y) >= 0.01]
    bounds = [[-maze.LIMIT, maze.LIMIT]] * 2
    for cells in (2, 12):
        counts, *_ = np.histogram2d(*position.T, bins=cells, range=bounds)
        share, *_ = np.histogram2d(*free.T, bins=cells, range=bounds)
        keep = share > 0
        assert counts[~keep].sum() == 0
        expected = share[keep] / share.sum() * len(position)
        assert stats.chisquare(counts[keep], expected).pvalue > 1e-4
    for column in state[:, 2:].T:
        assert stats.kstest(column, "uniform", (-0.1, 0.2)).pvalue > 1e-4
    for column in action.T:
        assert stats.kstest(column, "uniform", (-1, 2)).pvalue > 1e-4


def test_starts_are_those_of_the_paper() -> None:
    state = make().starts(rng(), 20_000)
    assert stats.kstest(state[:, 0], "uniform", (-0.29, 0.14)).pvalue > 1e-4
    assert stats.kstest(state[:, 1], "uniform", (0.15, 0.14)).pvalue > 1e-4
    assert (state[:, 2:] == 0).all()
    assert abs(np.corrcoef(state[:, :2].T)[0, 1]) < 0.03


def test_walls_for_pictures_are_the_physics_boxes_and_those_of_the_paper() -> None:
    model = make().model
    assert make().walls == ((-0.18, -0.02, 0.18, 0.02), (-0.02, -0.18, 0.02, 0.18))
    assert make().bounds == (-0.3, -0.3, 0.3, 0.3)
    np.testing.assert_allclose(model.jnt_range, [[-0.29, 0.29]] * 2)
    np.testing.assert_allclose(model.geom_size[model.geom("ball").id][0], 0.01)
    boxes = [i for i in range(model.ngeom) if model.geom(i).name.startswith("arm")]
    for rectangle, i in zip(make().walls, boxes, strict=True):
        x, y = model.geom_pos[i][:2]
        dx, dy = model.geom_size[i][:2]
        np.testing.assert_allclose(rectangle, (x - dx, y - dy, x + dx, y + dy))


# ---- rewards ----


def quarter_turn(vectors: Array) -> Array:
    """Rotates pairs of columns clockwise: (x, y) -> (y, -x), top left to top right."""
    pairs = vectors.reshape(len(vectors), -1, 2)
    return np.stack([pairs[..., 1], -pairs[..., 0]], -1).reshape(vectors.shape)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ((-0.12, 0.12, 0.08, 0.08), 1.0),  # top left: up and right, on the diamond
        ((0.12, 0.12, 0.08, -0.08), 1.0),
        ((0.12, -0.12, -0.08, -0.08), 1.0),
        ((-0.12, -0.12, -0.08, 0.08), 1.0),
        ((-0.12, 0.12, -0.08, -0.08), 1 / 3),  # the wrong way round
        ((-0.12, 0.12, 0.055, 0.105), 2 / 3),  # both velocities half a margin out
        ((-0.12, 0.12, 0.0, 0.2), 1 / 3),
        ((-0.12, 0.12 + 0.03 * 2**0.5, 0.08, 0.08), 2.5 / 3),  # .03 from the diamond: half a margin out
        ((-0.12, 0.12 - 0.05 * 2**0.5, 0.08, 0.08), 2 / 3),
    ],
)
def test_loop_reward(state: tuple[float, ...], expected: float) -> None:
    assert make().rewards(np.array([state]))["loop"][0] == pytest.approx(expected, abs=1e-12)


def test_loop_reward_does_not_change_under_a_quarter_turn() -> None:
    state, _ = make().coverage(rng(), 2000)
    near = state[np.abs(np.abs(state[:, :2]).sum(-1) - 0.24) < 0.05]
    value = make().rewards(near)["loop"]
    assert len(near) > 200
    assert np.ptp(value) > 0.5
    np.testing.assert_allclose(make().rewards(quarter_turn(near))["loop"], value, atol=1e-12)


@pytest.mark.parametrize("task", REACH)
def test_reach_reward_by_distance(task: str) -> None:
    goal = np.array({"left": -0.15, "right": 0.15}[task.split("_")[2]]), {"top": 0.15, "bottom": -0.15}
    centre = np.array([float(goal[0]), goal[1][task.split("_")[1]]])
    # 1 up to the target's radius; the margin of .09 later the Gaussian of dm_control's tolerance is .1.
    for distance, expected in ((0, 1), (0.015, 1), (0.06, 0.1**0.25), (0.105, 0.1), (0.195, 1e-4)):
        angle = rng().uniform(0, 7, 20)
        position = centre + distance * np.stack([np.cos(angle), np.sin(angle)], -1)
        state = np.concatenate([position, rng().uniform(-0.1, 0.1, (20, 2))], -1)
        np.testing.assert_allclose(make().rewards(state)[task], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("task", "state", "expected"),
    [
        # square: clockwise in |coordinate| > .2, ten times the speed up to .1
        ("square", (0.0, 0.24, 0.05, 0.03), 0.5),
        ("square", (0.0, 0.24, -0.05, 0.0), 0.0),
        ("square", (0.21, 0.1, 0.02, -0.12), 1.0),
        ("square", (-0.1, -0.28, -0.08, 0.0), 0.8),
        ("square", (-0.24, -0.19, 0.1, 0.03), 0.3),
        ("square", (0.24, 0.24, 0.1, -0.1), 0.0),  # a corner
        ("square", (0.1, 0.19, 0.1, 0.0), 0.0),  # inside
        # fast_slow: counter-clockwise in .2 < |coordinate| < .28, slow along x, fast along y
        ("fast_slow", (0.0, 0.24, -0.045, 0.0), 1.0),
        ("fast_slow", (0.0, 0.24, 0.045, 0.0), 0.0),
        ("fast_slow", (0.0, 0.24, -0.055, 0.0), 0.5),
        ("fast_slow", (0.0, 0.24, -0.095, 0.0), 0.0),  # too fast
        ("fast_slow", (0.0, -0.24, 0.035, 0.0), 0.5),
        ("fast_slow", (0.24, 0.1, 0.0, 0.095), 1.0),
        ("fast_slow", (0.24, 0.1, 0.0, 0.045), 0.0),  # too slow
        ("fast_slow", (-0.24, 0.1, 0.0, -0.095), 1.0),
        ("fast_slow", (-0.24, 0.24, 0.0, -0.095), 0.0),
        ("fast_slow", (0.0, 0.285, -0.045, 0.0), 0.0),
        ("fast_slow", (0.24, 0.285, 0.0, 0.095), 1.0),  # beyond the top's band, so no corner
        # the long way: five times the clockwise speed in |coordinate| > .15, a hundred times the other one's
        ("reach_bottom_left_long", (-0.15, -0.15, 0.0, 0.0), 1.0),
        ("reach_bottom_left_long", (-0.15, -0.15 + 0.105, 0.1, 0.1), 0.1),
        ("reach_bottom_left_long", (-0.15, -0.15 - 0.105, 0.1, 0.1), 0.1),
        ("reach_bottom_left_long", (0.1, 0.2, 0.08, 0.0), 0.4),
        ("reach_bottom_left_long", (0.1, 0.2, -0.08, 0.0), -8.0),
        ("reach_bottom_left_long", (0.2, 0.1, 0.0, -0.2), 0.5),
        ("reach_bottom_left_long", (0.2, -0.1, 0.0, 0.02), -2.0),
        ("reach_bottom_left_long", (0.1, -0.2, -0.06, 0.0), 0.3),
        ("reach_bottom_left_long", (-0.2, 0.1, 0.0, 0.03), 0.15),
        ("reach_bottom_left_long", (-0.2, 0.1, 0.0, -0.03), -3.0),
        ("reach_bottom_left_long", (0.2, 0.2, 0.1, -0.1), 0.0),
        ("reach_bottom_left_long", (0.1, 0.1, 0.1, 0.1), 0.0),
    ],
)
def test_rewards_of_the_loops_along_the_border(task: str, state: tuple[float, ...], expected: float) -> None:
    assert make().rewards(np.array([state]))[task][0] == pytest.approx(expected, abs=1e-9)


def test_every_task_has_its_reward() -> None:
    assert set(make().rewards(make().starts(rng(), 1))) == set(TASKS)


# ---- policies ----


@pytest.mark.parametrize("task", TASKS)
def test_policy_depends_on_the_row_alone_and_stays_in_range(task: str) -> None:
    environment = make(task)
    state, _ = environment.coverage(rng(), 3000)
    action = environment.policy(state)
    assert np.abs(action).max() <= 1
    np.testing.assert_array_equal(environment.policy(state[::-1])[::-1], action)
    np.testing.assert_array_equal(environment.policy(state[7:8]), action[7:8])


def test_policies_turn_with_the_maze() -> None:
    state, _ = make().coverage(rng(), 3000)
    turned = quarter_turn(state)
    np.testing.assert_allclose(make().policy(turned), quarter_turn(make().policy(state)), atol=1e-9)
    clockwise = ["top_left", "top_right", "bottom_right", "bottom_left"]
    for here, there in zip(clockwise, clockwise[1:] + clockwise[:1], strict=True):
        expected = quarter_turn(make(f"reach_{here}").policy(state))
        np.testing.assert_allclose(make(f"reach_{there}").policy(turned), expected, atol=1e-9)
    np.testing.assert_allclose(make("square").policy(turned), quarter_turn(make("square").policy(state)), atol=1e-9)
    half = quarter_turn(turned)  # its speeds differ along x and y
    expected = quarter_turn(quarter_turn(make("fast_slow").policy(state)))
    np.testing.assert_allclose(make("fast_slow").policy(half), expected, atol=1e-9)


# Long actions turn the corners late.
@pytest.mark.parametrize(("repeat", "reward"), [(1, 0.95), (5, 0.95), (10, 0.92)])
def test_loop_policy_goes_round_clockwise_and_earns_nearly_everything(repeat: int, reward: float) -> None:
    environment = make("loop", repeat)
    start = np.concatenate([environment.starts(rng(), 10), environment.coverage(rng(), 40)[0]])
    states = follow(environment, start, 1000 // repeat)
    angle = np.unwrap(np.arctan2(states[..., 1], states[..., 0]), axis=0)
    turns = (angle[-1] - angle[0]) / (2 * np.pi)
    # A lap at .07 m/s along each axis takes .96 / .07 / .02 = 690 physics steps.
    assert turns.max() < -1
    assert turns.min() > -1.7
    late = states[500 // repeat :].reshape(-1, 4)
    assert environment.rewards(late)["loop"].mean() > reward
    assert maze.clearance(late[:, :2]).min() > maze.RADIUS  # no rubbing along the wall


# A lap along the square takes 1.92 m / .1 m/s / .02 s = 960 physics steps, in fast_slow .96 / .045 + .96 / .095 = 1570.
@pytest.mark.parametrize(("task", "turns", "reward"), [("square", (-1.2, -0.7), 0.75), ("fast_slow", (0.5, 0.8), 0.75)])
@pytest.mark.parametrize("repeat", [1, 5, 10])
def test_border_policies_go_round_and_earn_what_corners_leave(
    task: str, turns: tuple[float, float], reward: float, repeat: int
) -> None:
    environment = make(task, repeat)
    start = np.concatenate([environment.starts(rng(), 5), environment.coverage(rng(), 20)[0]])
    states = follow(environment, start, 1500 // repeat)[500 // repeat :]
    angle = np.unwrap(np.arctan2(states[..., 1], states[..., 0]), axis=0)
    turned = (angle[-1] - angle[0]) / (2 * np.pi)
    assert turns[0] < turned.min() <= turned.max() < turns[1]
    position, value = states[..., :2], environment.rewards(states.reshape(-1, 4))[task].reshape(states.shape[:2])
    # Five sixths of a lap lie outside of the corners, which pay nothing.
    assert reward < value.mean() < 0.9
    assert maze.clearance(position.reshape(-1, 2)).min() > 0.05
    assert np.abs(np.abs(position).max(-1) - 0.24).max() < 0.04
    alone = (np.abs(position) > 0.2).sum(-1) == 1
    late = np.roll(alone, 2, 0) & np.roll(alone, 50 // repeat, 0) & alone
    assert np.median(value[late]) > 0.95


@pytest.mark.parametrize("repeat", [1, 5, 10])
def test_the_long_way_to_the_goal_is_clockwise_and_never_pays_the_penalty(repeat: int) -> None:
    task = "reach_bottom_left_long"
    environment = make(task, repeat)
    states = follow(environment, environment.starts(rng(), 20), 1300 // repeat)
    angle = np.unwrap(np.arctan2(states[..., 1], states[..., 0]), axis=0)
    assert ((angle[-1] - angle[0]) / (2 * np.pi) < -0.6).all()
    assert np.linalg.norm(states[-1, :, :2] - [-0.15, -0.15], axis=-1).max() < 0.001
    assert environment.rewards(states.reshape(-1, 4))[task].min() >= 0
    everywhere = follow(
        environment, np.concatenate([free_grid(0.08), environment.coverage(rng(), 40)[0]]), 1500 // repeat
    )
    assert np.linalg.norm(everywhere[-1, :, :2] - [-0.15, -0.15], axis=-1).max() < 0.001


@pytest.mark.parametrize("task", REACH)
@pytest.mark.parametrize("repeat", [1, 5, 10])
def test_reach_policy_arrives_from_everywhere_and_stays(task: str, repeat: int) -> None:
    environment, resting = make(task, repeat), free_grid(0.04 if repeat > 1 else 0.08)
    moving, _ = environment.coverage(rng(), 60)
    states = follow(environment, np.concatenate([resting, moving]), 900 // repeat)
    distance = np.linalg.norm(states[..., :2] - maze.GOALS[task], axis=-1)
    # The longest way, round half of the wall at .1 m/s, takes about 550 physics steps.
    assert distance[700 // repeat :].max() < 0.001
    assert np.abs(states[-1, :, 2:]).max() < 1e-6
    # From rest it never comes nearer to the wall than 2 cm, or than it was.
    path = states[:, : len(resting), :2]
    clearance = maze.clearance(path.reshape(-1, 2)).reshape(path.shape[:2])
    assert (clearance.min(0) > np.minimum(clearance[0], 0.02) - 1e-6).all()


# ---- the spiral ----


def test_spiral_transitions_have_the_oracles_moments() -> None:
    environment = linear_gaussian.build(linear_gaussian.Settings())
    mdp = environment.oracle()
    state, action = environment.coverage(rng(), 200_000)
    A, B, c, W = (t.numpy() for t in (mdp.A, mdp.B, mdp.c, mdp.W))
    noise = environment.step(state, action, rng(1)) - (state @ A.T + action @ B.T + c)
    deviation = 0.03
    np.testing.assert_allclose(noise.mean(0), 0, atol=4 * deviation / 200_000**0.5)
    np.testing.assert_allclose(np.cov(noise.T), W, atol=4 * 2**0.5 * deviation**2 / 200_000**0.5)
    assert stats.kstest(noise.ravel(), stats.norm(0, deviation).cdf).pvalue > 1e-4
    for column, scale in ((state, 1.0), (action, 0.15)):
        assert stats.kstest(column.ravel(), stats.norm(0, scale).cdf).pvalue > 1e-4
    assert np.abs(np.corrcoef(np.concatenate([state, action], -1).T) - np.eye(4)).max() < 0.02


def test_spiral_closed_loop_turns_and_contracts() -> None:
    """F = A + B K = .99 Rotation(.15), counter-clockwise."""
    environment = linear_gaussian.build(linear_gaussian.Settings())
    mdp = environment.oracle()
    rotation = np.array([[np.cos(0.15), -np.sin(0.15)], [np.sin(0.15), np.cos(0.15)]])
    np.testing.assert_allclose((mdp.A + mdp.B @ mdp.K).numpy(), 0.99 * rotation, atol=1e-15)
    state, _ = environment.coverage(rng(), 10)
    policy = state @ mdp.K.numpy().T + mdp.k.numpy()
    np.testing.assert_allclose(environment.policy(state), policy, atol=1e-15)


def test_spiral_values_are_those_of_its_rollouts() -> None:
    environment = linear_gaussian.build(linear_gaussian.Settings(goal=(0.6, 0.3), width=0.4))
    gamma, copies = 0.9, 20_000
    for state, action in (([0.8, 0.0], [0.1, -0.2]), ([-0.5, 0.7], [0.0, 0.3])):
        rows, row_action = np.tile(state, (copies, 1)), np.tile(action, (copies, 1))
        draw, value = rng(2), np.zeros(copies)
        for k in range(100):
            rows = environment.step(rows, row_action if k == 0 else environment.policy(rows), draw)
            value += gamma**k * environment.rewards(rows)["bump"]
        exact = environment.exact_values(np.array([state]), np.array([action]), gamma)["bump"]
        # gamma^100 / (1 - gamma) = 3e-4 is cut off.
        assert value.mean() == pytest.approx(exact[0], abs=4 * value.std() / copies**0.5 + 3e-4)


def test_bump_reward_by_distance() -> None:
    environment = linear_gaussian.build(linear_gaussian.Settings(goal=(1.0, -1.0), width=0.5))
    value = environment.rewards(np.array([[1.0, -1.0], [1.5, -1.0], [1.0, 0.0]]))["bump"]
    np.testing.assert_allclose(value, np.exp([0, -0.5, -2]), rtol=1e-12)


# ---- every member ----


SIMULATORS = ["linear_gaussian", "maze"]


def test_every_member_has_described_settings() -> None:
    for name in plugins.names("pipelines.environments"):
        settings = plugins.load("pipelines.environments", name).Settings
        assert all(field.description for field in settings.model_fields.values()), name


@pytest.mark.parametrize("name", SIMULATORS)
def test_simulators_keep_the_contract(name: str) -> None:
    module = plugins.load("pipelines.environments", name)
    environment = module.build(module.Settings())
    states, actions = len(environment.state_names), len(environment.action_names)
    for n in (1, 7):
        state, action = environment.coverage(rng(), n)
        assert state.shape == (n, states)
        assert action.shape == (n, actions)
        assert environment.actions(rng(), n).shape == (n, actions)
        assert environment.starts(rng(), n).shape == (n, states)
        assert environment.policy(state).shape == (n, actions)
        assert environment.step(state, action, rng()).shape == (n, states)
        assert all(value.shape == (n,) for value in environment.rewards(state).values())
    state, action = environment.coverage(rng(), 5)
    keep = state.copy(), action.copy()
    environment.step(state, action, rng()), environment.policy(state), environment.rewards(state)
    np.testing.assert_array_equal(state, keep[0])
    np.testing.assert_array_equal(action, keep[1])
    if environment.oracle() is None:
        assert environment.exact_values(state, action, 0.9) == {}
    with pytest.raises(ValueError, match="taks"):
        module.Settings(taks="loop")


# ---- behaviours ----


def behave(behaviour: Any, n: int = 6000, length: int = 40, first: int = 0, seed: int = 0) -> Steps:
    environment = maze.build(maze.Settings(behaviour=behaviour))
    return environment.transitions(range(first, first + n), length, rng(seed))


def in_a_row(rows: Steps) -> Any:
    """Which rows begin where the row before them ended."""
    same = (rows.state[1:] == rows.next_state[:-1]).all(-1)
    assert ((rows.step[1:] == rows.step[:-1] + 1) == (rows.episode[1:] == rows.episode[:-1])).all()
    return same


@pytest.mark.parametrize("behaviour", ["uniform", "random", "policy", "mixed"])
@pytest.mark.parametrize("name", SIMULATORS)
def test_every_behaviour_gives_numbered_steps(name: str, behaviour: str) -> None:
    module = plugins.load("pipelines.environments", name)
    environment = module.build(module.Settings(behaviour=behaviour))
    for first, n, length in ((0, 1, 5), (30, 7, 5), (20_000, 1001, 10), (0, 30, 100)):
        rows = environment.transitions(range(first, first + n), length, rng())
        assert {len(column) for column in vars(rows).values()} == {n}
        pairs = set(zip(rows.episode.tolist(), rows.step.tolist(), strict=True))
        assert len(pairs) == n
        assert rows.episode.min() == first
        assert rows.episode.max() < first + n
        assert 0 <= rows.step.min() <= rows.step.max() < length
        assert not rows.terminal.any()
        assert rows.terminal.dtype == bool
        if name == "maze":
            np.testing.assert_array_equal(rows.next_state, environment.step(rows.state, rows.action, rng()))


def test_random_episodes_begin_at_the_start_and_take_covering_actions() -> None:
    rows = behave("random")
    assert (rows.behaviour == "random").all()
    np.testing.assert_array_equal(in_a_row(rows), rows.step[1:] > 0)
    first = rows.state[rows.step == 0]
    assert len(first) == 150
    assert (first[:, 0] < -0.15).all() and (first[:, 1] > 0.15).all() and (first[:, 2:] == 0).all()
    for column in rows.action.T:
        assert stats.kstest(column, "uniform", (-1, 2)).pvalue > 1e-4


def test_policy_episodes_begin_everywhere_and_take_its_actions() -> None:
    rows = behave("policy")
    assert (rows.behaviour == "policy").all()
    np.testing.assert_array_equal(in_a_row(rows), rows.step[1:] > 0)
    np.testing.assert_array_equal(rows.action, make().policy(rows.state))
    first = rows.state[rows.step == 0]
    resting = (first[:, 2:] == 0).all(-1)
    assert resting.sum() == 75
    assert (first[resting, 1] > 0.15).all()
    assert (first[~resting, 1] < 0).mean() > 0.3


def test_mixed_is_half_coverage_and_half_visited_states_under_other_actions() -> None:
    rows = behave("mixed", n=6001)
    covering, visited = rows.behaviour == "coverage", rows.behaviour == "visited"
    assert (covering.sum(), visited.sum()) == (3001, 3000)
    assert set(rows.episode[covering]) & set(rows.episode[visited]) == set()
    uniform = behave("uniform", n=3001)
    np.testing.assert_array_equal(rows.state[covering], uniform.state)
    np.testing.assert_array_equal(rows.action[covering], uniform.action)
    state, action = rows.state[visited], rows.action[visited]
    # They are the policy's states: each but an episode's first is where the policy goes from the one before.
    led = make().step(state, make().policy(state), rng())
    follows = (led[:-1] == state[1:]).all(-1)
    np.testing.assert_array_equal(follows, rows.step[visited][1:] > 0)
    # Actions lie evenly between its own and a uniform one.
    own = make().policy(state)
    assert np.abs(action).max() <= 1
    assert (np.abs(action - own).max(-1) > 1e-3).mean() > 0.98
    change = ((action - own) * own).sum() / -(own**2).sum()
    assert change == pytest.approx(0.5, abs=0.03)
    spread = (action - 0.5 * own).var(0)  # of (share - 1/2)(random - own) + random / 2
    np.testing.assert_allclose(spread, (own**2).mean(0) / 12 + 1 / 9, rtol=0.1)


@pytest.mark.parametrize(
    ("module", "change"),
    [
        (maze, {"task": "reach_middle"}),
        (maze, {"behaviour": "offline"}),
        (maze, {"action_repeat": 0}),
        (maze, {"action_repeat": 11}),
        (linear_gaussian, {"contraction": 1.0}),
        (linear_gaussian, {"noise": 0.0}),
        (linear_gaussian, {"width": -1.0}),
    ],
)
def test_settings_refuse_values_out_of_range(module: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        module.Settings(**change)
