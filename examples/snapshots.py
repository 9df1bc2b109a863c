"""Learn the dynamics of a population from unpaired snapshots, and predict a snapshot that was left out.

Every measurement destroys its cells, as in single-cell sequencing: there are samples at five times, but no trajectory.
Chains of optimal-transport pairs and a spline through each of them give the velocities. The flow is compared with the
snapshot that it has not seen, and with straight interpolation between the two snapshots beside it.

Run: python examples/snapshots.py [--out PICTURE.png]
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from _output import ACCENT, MODEL, OTHER, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

TIMES, LEFT_OUT = (0.0, 1.0, 2.0, 3.0, 4.0), 2
CUBIC = "flow along cubic splines"
STEPS, BATCH, LEARNING_RATE = 600, 128, 1e-2


def population(time: float, n: int, generator: torch.Generator) -> Tensor:
    """Return cells that move along an arc and spread out across it."""
    noise = torch.randn(n, 2, generator=generator)
    radius = 3 + (0.15 + 0.12 * time) * noise[:, 0]
    angle = time * math.pi / 5 + 0.08 * noise[:, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def train(snapshots: dict[float, Tensor], degree: int) -> fm.MLPField:
    """Train a field on some of the snapshots; its time is that of the population."""
    generator = torch.Generator().manual_seed(1)
    network = fm.MLPField(event_dim=2, hidden=(64, 64, 64), generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batches = fm.draw_snapshots(list(snapshots.values()), BATCH, generator)
        loss = fm.snapshot_cfm_loss(network, batches, list(snapshots), degree=degree, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def straight(before: Tensor, after: Tensor) -> Tensor:
    """Return the points halfway between the optimal pairs of two snapshots."""
    paired, after, _ = fm.MinibatchOT()(before, after)
    return (paired + after) / 2


def distance(guess: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the mean EMD to samples of the truth of 400 rows each, and its standard error."""
    values = torch.stack([fm.emd(guess, part) for part in truth.split(400)])
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    snapshots = {time: population(time, 400 + 20 * k, generator) for k, time in enumerate(TIMES)}
    missing = TIMES[LEFT_OUT]
    before, after = TIMES[LEFT_OUT - 1], TIMES[LEFT_OUT + 1]
    seen = {time: x for time, x in snapshots.items() if time != missing}
    truth = population(missing, 4000, generator)
    starts, ends = snapshots[before][:400], snapshots[after][:400]

    fields = {degree: train(seen, degree) for degree in (1, 3)}
    guesses = {"straight interpolation": straight(starts, ends)}
    for name, degree in (("flow along straight pieces", 1), (CUBIC, 3)):
        guesses[name] = fm.solve(fields[degree], starts, t0=before, t1=missing).x
    floor = fm.sampling_floor(fm.emd, truth, 400, generator).mean
    for name, guess in guesses.items():
        mean, error = distance(guess, truth)
        report(f"{name}: EMD to the snapshot left out / floor", mean / floor, error / floor)

    first = population(TIMES[0], 4000, generator)
    floor = fm.sampling_floor(fm.emd, first, 400, generator).mean
    back = fm.solve(fields[3], snapshots[TIMES[-1]][:400], t0=TIMES[-1], t1=TIMES[0], steps=40).x
    mean, error = distance(back, first)
    report("from the last snapshot back to the first: EMD / floor", mean / floor, error / floor)

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharex=True, sharey=True)
    for panel, name, colour in zip(axes, (CUBIC, "straight interpolation"), (MODEL, OTHER), strict=True):
        panel.scatter(*torch.cat(list(seen.values())).T.numpy(), s=3, color=TRUTH, linewidths=0, label="snapshots")
        panel.scatter(*truth[:400].T.numpy(), s=4, color=ACCENT, linewidths=0, label="left out")
        panel.scatter(*guesses[name].T.numpy(), s=4, color=colour, linewidths=0, label="predicted")
        panel.set(title=name, aspect="equal", xlabel="$x_1$ (units)", ylabel="$x_2$ (units)")
        panel.legend(markerscale=3, handletextpad=0, loc="lower left")
    path = fm.solve(fields[3], snapshots[0.0][:40], t0=TIMES[0], t1=TIMES[-1], steps=60, save=True).path
    assert path is not None  # as it was saved
    axes[0].plot(*path.permute(2, 0, 1).numpy(), color=MODEL, linewidth=0.4, alpha=0.6)
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
