"""Learn a two-dimensional density from samples, draw new samples, and evaluate the learned density on a grid.

The data are two moons, built as a Gaussian mixture along two half circles, so the exact density is known.

Run: python examples/density_2d.py [--out PICTURE.png]
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from _output import MODEL, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

COMPONENTS, NOISE = 60, 0.1  # Gaussians along each moon and their standard deviation
STEPS, BATCH, LEARNING_RATE = 2000, 256, 1e-2
SIDE = 121  # points along each side of the grid


def two_moons() -> fm.GaussianMixture:
    """Return the mixture of narrow Gaussians along two interlocking half circles of radius 1."""
    angle = torch.linspace(0, math.pi, COMPONENTS)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    n = 2 * COMPONENTS
    return fm.GaussianMixture(
        torch.full((n,), 1 / n), torch.cat([upper, lower]), NOISE**2 * torch.eye(2).repeat(n, 1, 1)
    )


def train(network: fm.FiLMField, data: Tensor, generator: torch.Generator) -> None:
    """Regress the velocity on straight paths from noise to data."""
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        loss = fm.cfm_loss(network, fm.CondOT(), batch, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = two_moons()
    data, held_out = truth.sample(50_000, generator=generator), truth.sample(2000, generator=generator)

    # The network is trained on standardised data; `loc` and `scale` give the flow the units of the data.
    loc, scale = data.mean(0), data.std(0)
    network = fm.FiLMField(event_dim=2, hidden=(128, 128), generator=generator)
    train(network, (data - loc) / scale, generator)
    flow = fm.ContinuousFlow(network.requires_grad_(False), (2,), solver="rk4", steps=16, loc=loc, scale=scale)

    # The mean of log p - log q over samples of p is the Kullback-Leibler divergence of the model q.
    ratio = truth.log_prob(held_out) - flow.log_prob(held_out)
    report("KL(truth, model) in nats", float(ratio.mean()), float(ratio.std()) / len(ratio) ** 0.5)

    samples = flow.sample((2000,), generator=generator)
    floor = fm.sampling_floor(fm.emd, truth.sample(8000, generator=generator), n=1000, generator=generator)
    distance = torch.stack([fm.emd(samples[i::2], held_out[i::2]) for i in range(2)]) / floor.mean
    report("EMD to held-out data / EMD of two true samples", float(distance.mean()), floor.standard_error / floor.mean)

    x, y = torch.linspace(-2, 3, SIDE), torch.linspace(-1.5, 2, SIDE)
    grid = torch.cartesian_prod(x, y)
    exact, learned = (p.exp().reshape(SIDE, SIDE).T for p in (truth.log_prob(grid), flow.log_prob(grid)))
    cell = float((x[1] - x[0]) * (y[1] - y[0]))
    mass, coarse = float(learned.sum()) * cell, 4 * float(learned[::2, ::2].sum()) * cell
    report("probability of the model on the grid", mass, abs(mass - coarse))

    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.2), sharex=True, sharey=True)
    for panel, points, colour, title in (
        (axes[0, 0], held_out, TRUTH, "data (held out)"),
        (axes[0, 1], samples, MODEL, "samples of the model"),
    ):
        panel.scatter(*points.T.numpy(), s=3, alpha=0.6, linewidths=0, color=colour, rasterized=True)
        panel.set_title(title)
    for panel, density, title in ((axes[1, 0], exact, "exact density"), (axes[1, 1], learned, "learned density")):
        mesh = panel.pcolormesh(x.numpy(), y.numpy(), density.numpy(), vmin=0, vmax=float(exact.max()), rasterized=True)
        panel.set(title=title, xlabel="$x_1$ (units)")
    figure.colorbar(mesh, ax=axes[1], label="density (1 / unit²)")
    for panel in axes[:, 0]:
        panel.set(ylabel="$x_2$ (units)")
    for panel in axes.flat:
        panel.set(aspect="equal", xlim=(-2, 3), ylim=(-1.5, 2))
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
