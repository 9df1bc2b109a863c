"""Learn where a policy will be in an environment of your own, from transitions that another policy collected.

The environment is a boat on a river: thrust moves it, the current carries it off in midstream. The behaviour policy
thrusts at random; the policy in question steers for a dock on the far bank. What TD²-CFM learns of it offline is
compared with Monte Carlo rollouts, which the learner never sees.

Run: python examples/own_environment.py [--out PICTURE.png]
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from _output import ACCENT, MODEL, TRUTH, picture_path, plt, report, save
from matplotlib.patches import Circle
from torch import Tensor

import flowmatch_core as fm

GAMMA = 0.9
DOCK, WIDTH = torch.tensor([0.8, 1.0]), 0.5
TIME_STEP, NOISE = 0.2, 0.15
TRANSITIONS = 50_000
STEPS, BATCH, LEARNING_RATE, TARGET_STEP = 2000, 256, 1e-2, 0.1


def current(position: Tensor) -> Tensor:
    """Return the velocity of the water: fastest in midstream, zero at the banks y = -1 and y = 1."""
    speed = 1.2 * (1 - position[..., 1] ** 2).clamp(min=0)
    return torch.stack([speed, torch.zeros_like(speed)], -1)


def step(position: Tensor, thrust: Tensor, generator: torch.Generator) -> Tensor:
    """Move every boat for one time step."""
    noise = NOISE * torch.randn(position.shape, generator=generator)
    return position + TIME_STEP * (thrust + current(position)) + noise


def policy(position: Tensor) -> Tensor:
    """Thrust towards the dock with speed 1, and slow down near it."""
    way = DOCK - position
    distance: Tensor = way.norm(dim=-1, keepdim=True)
    return way / distance.clamp(min=0.5)


def reward(position: Tensor) -> Tensor:
    """Return a Gaussian bump around the dock, 1 at its top."""
    return torch.exp(-(position - DOCK).square().sum(-1) / (2 * WIDTH**2))


def random_places(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions all over the river and thrusts of any direction."""
    position = torch.tensor([2.5, 1.4]) * (2 * torch.rand(n, 2, generator=generator) - 1)
    return position, 2.4 * torch.rand(n, 2, generator=generator) - 1.2


def collect(generator: torch.Generator) -> fm.Transitions:
    """Collect offline transitions; only the action that follows is the policy's, computed and not executed."""
    state, action = random_places(TRANSITIONS, generator)
    next_state = step(state, action, generator)
    return fm.Transitions(state, action, next_state, policy(next_state))


def rollouts(state: Tensor, action: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return `n` true samples of the successor measure for every row: a geometric number of steps of the policy."""
    horizon = fm.geometric(GAMMA, (n, len(state)), generator=generator)
    position = step(state.expand(n, -1, -1), action.expand(n, -1, -1), generator)
    for _ in range(int(horizon.max()) - 1):
        horizon -= 1
        position = torch.where(horizon[..., None] > 0, step(position, policy(position), generator), position)
    return position


def train(data: fm.Transitions, generator: torch.Generator) -> fm.MLPField:
    """Bootstrap the field from a slow copy of itself."""
    field = fm.MLPField(event_dim=2, hidden=(96, 96, 96), cond_dim=4, generator=generator)
    target = copy.deepcopy(field).requires_grad_(False)
    optimizer = torch.optim.Adam(field.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(TRANSITIONS, (BATCH,), generator=generator)
        loss = fm.td2_cfm_loss(field, target, data[rows], gamma=GAMMA, steps=3, generator=generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
        fm.polyak_update(target, field, TARGET_STEP)
    return target


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = fm.GeometricHorizonModel(train(collect(generator), generator), (2,), GAMMA, solver="midpoint", steps=10)

    state, action = random_places(64, generator)
    state[:3] = torch.tensor([[-1.6, -1.0], [0.4, -0.9], [1.8, 0.2]])  # the first three are drawn
    action[:3] = policy(state[:3])
    exact, more = (rollouts(state, action, 400, generator) for _ in range(2))
    samples = model.sample(state, action, 400, generator=generator)

    floor = torch.stack([fm.emd(exact[:, i], more[:, i]) for i in range(8)])
    distance = torch.stack([fm.emd(samples[:, i], exact[:, i]) for i in range(8)])
    ratio = float(distance.mean() / floor.mean())
    error = float((distance - ratio * floor).std() / floor.mean()) / len(floor) ** 0.5
    report("EMD to rollouts / EMD of two sets of rollouts", ratio, error)

    exact_value = reward(torch.cat([exact, more])).mean(0) / (1 - GAMMA)
    value = model.value(reward, state, action, 512, generator=generator)
    error_of_value = value - exact_value
    report("value: mean error", float(error_of_value.mean()), float(error_of_value.std()) / len(value) ** 0.5)
    squares = error_of_value.square() / exact_value.var()
    rms = float(squares.mean().sqrt())
    report(
        "value: rms error / standard deviation of the values", rms, float(squares.std()) / len(value) ** 0.5 / (2 * rms)
    )

    figure, axes = plt.subplots(1, 4, figsize=(11.5, 2.8), width_ratios=(1.2, 1.2, 1.2, 1))
    x, y = torch.meshgrid(torch.linspace(-2.2, 2.2, 9), torch.linspace(-0.8, 0.8, 5), indexing="xy")
    water = current(torch.stack([x, y], -1))
    for i, panel in enumerate(axes[:3]):
        panel.quiver(
            x.numpy(), y.numpy(), water[..., 0].numpy(), water[..., 1].numpy(), color="#cccccc", scale=22, width=0.005
        )
        for bank in (-1, 1):
            panel.axhline(bank, color="#bbbbbb", linewidth=1)
        panel.scatter(*exact[:, i].T.numpy(), s=4, color=TRUTH, alpha=0.5, linewidths=0, label="rollouts")
        panel.scatter(*samples[:, i].T.numpy(), s=4, color=MODEL, alpha=0.5, linewidths=0, label="TD²-CFM")
        panel.scatter(*state[i].numpy(), s=60, marker="*", color=ACCENT, zorder=3, label="start")
        panel.add_patch(Circle((float(DOCK[0]), float(DOCK[1])), WIDTH, fill=False, color=ACCENT, linewidth=0.8))
        panel.set(aspect="equal", xlim=(-2.3, 2.9), ylim=(-1.5, 1.6), xlabel="x (river widths / 2)")
        panel.set_title(f"start ({state[i, 0]:.1f}, {state[i, 1]:.1f})")
    axes[0].set_ylabel("y (river widths / 2)")
    axes[2].legend(loc="lower left", fontsize=7.5, markerscale=1.5, handletextpad=0.1)
    ends = [0.0, float(exact_value.max()) * 1.05]
    axes[3].plot(ends, ends, color=TRUTH, linewidth=1)
    axes[3].scatter(exact_value.numpy(), value.numpy(), s=10, color=MODEL, linewidths=0)
    axes[3].set(
        title="value of 64 states and actions", xlabel="value by rollouts", ylabel="value of the model", aspect="equal"
    )
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
