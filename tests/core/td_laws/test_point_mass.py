"""The point mass of the maze in free space is linear: the closed form against MuJoCo, td-flows 4.5."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch

from flowmatch_core.oracles import LinearGaussianMDP
from tests.support.random import tensor

H, MASS, DAMPING, GEAR = 0.02, 0.3, 1.0, 0.1
MODEL = f"""
<mujoco>
  <option timestep="{H}" gravity="0 0 0" integrator="Euler"/>
  <worldbody>
    <body>
      <joint name="x" type="slide" axis="1 0 0" damping="{DAMPING}"/>
      <joint name="y" type="slide" axis="0 1 0" damping="{DAMPING}"/>
      <geom type="sphere" size="0.01" mass="{MASS}"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="{GEAR}" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="y" gear="{GEAR}" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>
"""


def free_mass(gain: float = 4.0, drag: float = 2.0, goal: tuple[float, float] = (0.1, -0.05)) -> LinearGaussianMDP:
    """v' = alpha v + beta u, x' = x + h v', under u = -gain (x - goal) - drag v: never saturated near the goal."""
    alpha, beta = MASS / (MASS + H * DAMPING), H * GEAR / (MASS + H * DAMPING)
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    A = torch.cat([torch.cat([eye, H * alpha * eye], 1), torch.cat([zero, alpha * eye], 1)])
    B = torch.cat([H * beta * eye, beta * eye])
    K = torch.cat([-gain * eye, -drag * eye], 1)
    return LinearGaussianMDP(A=A, B=B, c=tensor(0, 0, 0, 0).double(), W=0 * A, K=K, k=gain * tensor(*goal))


def test_one_step_is_that_of_mujoco() -> None:
    mdp, model = free_mass(), mujoco.MjModel.from_xml_string(MODEL)
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    for _ in range(20):
        state, action = rng.uniform(-0.2, 0.2, 4), rng.uniform(-1, 1, 2)
        data.qpos[:], data.qvel[:], data.ctrl[:] = state[:2], state[2:], action
        mujoco.mj_step(model, data)
        expected = mdp.step(tensor(state.tolist()), tensor(action.tolist()))[0]
        torch.testing.assert_close(tensor(*data.qpos, *data.qvel), expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_mean_and_second_moment_of_its_future_are_those_of_the_rollout(gamma: float) -> None:
    """E[X] and E[X X^T] as sums over one deterministic rollout of 2000 steps, the first of them the next state."""
    mdp, model = free_mass(), mujoco.MjModel.from_xml_string(MODEL)
    data, start, action = mujoco.MjData(model), np.array([-0.05, 0.08, 0.02, -0.03]), np.array([0.5, -0.7])
    data.qpos[:], data.qvel[:], control = start[:2], start[2:], action
    mean, second = np.zeros(4), np.zeros((4, 4))
    for n in range(2000):
        assert np.abs(control).max() < 1
        data.ctrl[:] = control
        mujoco.mj_step(model, data)
        state = np.concatenate([data.qpos, data.qvel])
        weight = (1 - gamma) * gamma**n
        mean, second = mean + weight * state, second + weight * np.outer(state, state)
        control = mdp.policy(torch.from_numpy(state)).numpy()
    m = mdp.successor(tensor(start.tolist()), tensor(action.tolist()), gamma)
    torch.testing.assert_close(m.mean[0], torch.from_numpy(mean), atol=1e-9, rtol=0)
    torch.testing.assert_close(m.second_moment[0], torch.from_numpy(second), atol=1e-9, rtol=0)
    value = mdp.value_quadratic(tensor(start.tolist()), tensor(action.tolist()), gamma, matrix=torch.eye(4).double())
    assert float(value) == pytest.approx(np.trace(second) / (1 - gamma), abs=1e-8)


def test_it_coasts_at_a_tenth_of_a_metre_a_second() -> None:
    """Full throttle: terminal speed g / D = 0.1, with a time constant of about 15.5 steps."""
    mdp = free_mass()
    state, push = torch.zeros(1, 4, dtype=torch.float64), tensor([1.0, 0.0])
    speeds = []
    for _ in range(400):
        state = mdp.step(state, push)
        speeds.append(float(state[0, 2]))
    assert speeds[-1] == pytest.approx(GEAR / DAMPING, rel=1e-6)
    assert sum(speed < 0.1 * (1 - np.exp(-1)) for speed in speeds) == 15
