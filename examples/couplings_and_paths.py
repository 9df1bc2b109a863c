"""Compare couplings and paths: how much a flow's trajectories bend, and how many solver steps that costs.

Optimal-transport couplings straighten the trajectories; the path sets how fast they are travelled. The energy of a
flow, E ∫ |v|² dt, is at least the squared Wasserstein distance of its two ends, and equal to it for straight lines that
do not cross. For an independent coupling the exact energy of the path is known.

Run: python examples/couplings_and_paths.py [--out PICTURE.png]
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from _output import ACCENT, MODEL, OTHER, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

STEPS, BATCH, LEARNING_RATE = 600, 128, 1e-2
CHOICES: dict[str, tuple[fm.AffinePath, fm.Coupling]] = {
    "CondOT, independent": (fm.CondOT(), fm.Independent()),
    "CondOT, Sinkhorn": (fm.CondOT(), fm.Sinkhorn(reg=2.0)),
    "CondOT, minibatch OT": (fm.CondOT(), fm.MinibatchOT()),
    "Cosine, independent": (fm.Cosine(), fm.Independent()),
    "VP, independent": (fm.VP(), fm.Independent()),
}
EULER_STEPS = (2, 4, 8, 16, 32)


def eight_gaussians() -> fm.GaussianMixture:
    """Return eight narrow Gaussians on a circle of radius 2."""
    angle = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return fm.GaussianMixture(torch.full((8,), 1 / 8), means, 0.04 * torch.eye(2).repeat(8, 1, 1))


def train(truth: fm.GaussianMixture, path: fm.AffinePath, coupling: fm.Coupling, seed: int) -> fm.MLPField:
    """Train one field; every field starts from the same weights and sees the same data."""
    generator = torch.Generator().manual_seed(seed)
    network = fm.MLPField(event_dim=2, hidden=(64, 64, 64), generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = truth.sample(BATCH, generator=generator)
        loss = fm.cfm_loss(network, path, batch, coupling=coupling, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def energy(field: fm.VelocityField, starts: Tensor) -> tuple[float, float]:
    """Return the path energy and its standard error over ten groups of starts."""
    values = torch.stack([fm.path_energy(field, some, steps=20) for some in starts.chunk(10)])
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = eight_gaussians()
    starts = torch.randn(600, 2, generator=generator)

    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.8))
    euler = axes[1, 2]
    for (name, (path, coupling)), panel, colour in zip(
        CHOICES.items(), axes.flat, (MODEL, "#74add1", TRUTH, OTHER, ACCENT), strict=False
    ):
        field = train(truth, path, coupling, seed=1)
        spent, error = energy(field, starts)
        least = float(fm.wasserstein2(starts, fm.solve(field, starts, solver="rk4", steps=20).x)) ** 2
        report(f"{name}: path energy / squared W2", spent / least, error / least)
        if name == "CondOT, independent":
            exact, _ = energy(truth.velocity_field(path), starts)
            report(f"{name}: path energy / that of the exact field", spent / exact, error / exact)

        fine = fm.solve(field, starts[:300], solver="rk4", steps=50, save=True)
        distances = [
            float((fm.solve(field, starts[:300], solver="euler", steps=n).x - fine.x).square().sum(1).mean().sqrt())
            for n in EULER_STEPS
        ]
        euler.plot(EULER_STEPS, distances, "o-", markersize=4, color=colour, label=name)

        assert fine.path is not None  # as it was saved
        panel.plot(*fine.path[:, :60].permute(2, 0, 1).numpy(), color=colour, linewidth=0.5, alpha=0.6)
        panel.scatter(*starts[:60].T.numpy(), s=4, color="#999999", linewidths=0, label="noise")
        panel.scatter(*fine.x[:60].T.numpy(), s=6, color="#222222", linewidths=0, zorder=3, label="data")
        panel.set(
            title=name,
            aspect="equal",
            xlim=(-3.2, 3.2),
            ylim=(-3.2, 3.2),
            xlabel="$x_1$ (units)",
            ylabel="$x_2$ (units)",
        )
    axes[0, 0].legend(loc="upper left", handletextpad=0, borderpad=0)
    euler.set(title="error of Euler's method", xlabel="steps", ylabel="rms distance to the exact end (units)")
    euler.set(xscale="log", yscale="log", ylim=(0.004, 8))
    euler.set_xticks(EULER_STEPS, [str(n) for n in EULER_STEPS])
    euler.minorticks_off()
    euler.legend(fontsize=7.5, loc="upper right")
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
