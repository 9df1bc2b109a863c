"""Learn where a policy will be, and what that is worth, from single transitions: TD²-CFM on the spiral.

The process is linear with Gaussian noise: an action moves the state, the dynamics pull it in, and the policy turns it
round the origin. Its successor measure, the law of the state a geometric number of steps ahead, and its values are
known in closed form. The transitions come from random states and actions, not from the policy.

Run: python examples/td_flow_spiral.py [--out PICTURE.png]
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from _output import ACCENT, MODEL, TRUTH, picture_path, plt, report, save
from matplotlib.patches import Circle
from torch import Tensor

import flowmatch_core as fm

GAMMA = 0.95
PULL, ANGLE, NOISE = 0.99, 0.15, 0.03
GOAL, WIDTH = torch.tensor([1.0, 0.0]), 0.5
STEPS, BATCH, LEARNING_RATE, TARGET_STEP = 1500, 256, 1e-2, 0.1

IDENTITY = torch.eye(2)
TURN = torch.tensor([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]])
SPIRAL = fm.LinearGaussianMDP(  # s' = A s + B a + c + N(0, W), a = K s + k
    A=PULL * IDENTITY, B=PULL * IDENTITY, c=torch.zeros(2), W=NOISE**2 * IDENTITY, K=TURN - IDENTITY, k=torch.zeros(2)
)


def reward(state: Tensor) -> Tensor:
    """Return a Gaussian bump around the goal, 1 at its top."""
    return torch.exp(-(state - GOAL).square().sum(-1) / (2 * WIDTH**2))


def transitions(n: int, generator: torch.Generator) -> fm.Transitions:
    """Draw states and actions at random, step once, and add what the policy would do next."""
    state = torch.randn(n, 2, generator=generator)
    action = 0.15 * torch.randn(n, 2, generator=generator)
    next_state = SPIRAL.step(state, action, generator=generator)
    return fm.Transitions(state, action, next_state, SPIRAL.policy(next_state))


def train(generator: torch.Generator) -> fm.MLPField:
    """Bootstrap the field from a slow copy of itself: every batch is of single transitions."""
    field = fm.MLPField(event_dim=2, hidden=(96, 96, 96), cond_dim=4, generator=generator)
    target = copy.deepcopy(field).requires_grad_(False)
    optimizer = torch.optim.Adam(field.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = transitions(BATCH, generator)
        loss = fm.td2_cfm_loss(field, target, batch, gamma=GAMMA, steps=3, generator=generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
        fm.polyak_update(target, field, TARGET_STEP)
    return target


def relative_rms(error: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the rms error in standard deviations of the exact values, and its standard error."""
    squares = error.square() / exact.var()
    rms = float(squares.mean().sqrt())
    return rms, float(squares.std()) / len(squares) ** 0.5 / (2 * rms)


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = fm.GeometricHorizonModel(train(generator), event_shape=(2,), gamma=GAMMA, solver="midpoint", steps=10)

    state = torch.randn(64, 2, generator=generator)
    action = 0.15 * torch.randn(64, 2, generator=generator)
    state[:3] = torch.tensor([[1.2, 0.6], [-1.2, 0.2], [0.0, -0.6]])  # the first three are drawn
    action[:3] = torch.tensor([[0.0, 0.0], [0.0, 0.3], [-0.3, 0.0]])
    truth = SPIRAL.successor(state, action, GAMMA)

    samples = model.sample(state, action, 400, generator=generator)
    exact, more = (truth.sample(400, generator=generator) for _ in range(2))
    rows = range(8)  # exact transport takes a while, so a few starts
    floor = torch.stack([fm.emd(exact[:, i], more[:, i]) for i in rows])
    distance = torch.stack([fm.emd(samples[:, i], exact[:, i]) for i in rows])
    ratio = distance.mean() / floor.mean()
    spread = float((distance - ratio * floor).std()) / len(floor) ** 0.5 / float(floor.mean())
    report("EMD to the exact successor measure / EMD of two exact samples", float(ratio), spread)

    points = truth.sample(8, generator=generator)
    with torch.no_grad():
        log_prob = model.log_prob(points.flatten(0, 1), state.repeat(8, 1), action.repeat(8, 1))
    excess = (truth.log_prob(points) - log_prob.reshape(8, -1)).mean(0)
    report("KL(exact, model) in nats, mean over starts", float(excess.mean()), float(excess.std()) / len(excess) ** 0.5)

    value = model.value(reward, state, action, 512, generator=generator)
    exact_value = SPIRAL.value_bump(state, action, GAMMA, goal=GOAL, spread=WIDTH**2 * IDENTITY)
    error = value - exact_value
    report("value: mean error", float(error.mean()), float(error.std()) / len(error) ** 0.5)
    report("value: rms error / standard deviation of the exact values", *relative_rms(error, exact_value))

    figure, axes = plt.subplots(1, 4, figsize=(11, 3), width_ratios=(1, 1, 1, 1.1))
    for i, panel in enumerate(axes[:3]):
        panel.scatter(*exact[:, i].T.numpy(), s=4, color=TRUTH, alpha=0.5, linewidths=0, label="exact")
        panel.scatter(*samples[:, i].T.numpy(), s=4, color=MODEL, alpha=0.5, linewidths=0, label="TD²-CFM")
        panel.scatter(*state[i].numpy(), s=60, marker="*", color=ACCENT, zorder=3, label="start")
        panel.add_patch(Circle((float(GOAL[0]), float(GOAL[1])), WIDTH, fill=False, color=ACCENT, linewidth=0.8))
        panel.set(aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xlabel="x (units)")
        panel.set_title(
            f"start ({state[i, 0]:.1f}, {state[i, 1]:.1f}), action ({action[i, 0]:.1f}, {action[i, 1]:.1f})"
        )
    axes[0].set_ylabel("y (units)")
    axes[0].legend(loc="lower left", fontsize=7.5, markerscale=1.5, handletextpad=0.1)
    ends = [0.0, float(exact_value.max()) * 1.05]
    axes[3].plot(ends, ends, color=TRUTH, linewidth=1)
    axes[3].scatter(exact_value.numpy(), value.numpy(), s=10, color=MODEL, linewidths=0)
    axes[3].set(
        title="value of 64 states and actions", xlabel="exact value", ylabel="value of the model", aspect="equal"
    )
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
