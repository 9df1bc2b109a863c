"""Compute log-likelihoods and say how far off they are: solver steps, trace probes, and the model itself.

The field is the exact velocity of a Gaussian mixture in eight dimensions, so every error is measured, not guessed.

Run: python examples/likelihood.py [--out PICTURE.png]
"""

from __future__ import annotations

from pathlib import Path

import torch
from _output import ACCENT, MODEL, OTHER, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

DIMS, COMPONENTS = 8, 6
TRAINING_STEPS, BATCH, LEARNING_RATE = 2000, 256, 1e-2


def mixture(generator: torch.Generator) -> fm.GaussianMixture:
    """Return a mixture with random means and full covariances."""
    means = torch.randn(COMPONENTS, DIMS, generator=generator)
    factors = 0.4 * torch.randn(COMPONENTS, DIMS, DIMS, generator=generator) / DIMS**0.5
    covariances = factors @ factors.mT + 0.1 * torch.eye(DIMS)
    return fm.GaussianMixture(torch.full((COMPONENTS,), 1 / COMPONENTS), means, covariances)


@torch.enable_grad()
def train(network: fm.FiLMField, truth: fm.GaussianMixture, generator: torch.Generator) -> None:
    """Regress the velocity on straight paths, on fresh samples of the truth."""
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        loss = fm.cfm_loss(network, fm.CondOT(), truth.sample(BATCH, generator=generator), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def rms(error: Tensor) -> float:
    """Return the root mean square."""
    return float(error.square().mean().sqrt())


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = mixture(generator)
    x = truth.sample(256, generator=generator)
    exact, field = truth.log_prob(x), truth.velocity_field()

    torch.set_grad_enabled(False)  # from here on nothing is trained but in `train`

    # 1. The error of the solver: `estimate` halves the steps and reports the change.
    curves: dict[str, list[tuple[int, float, float]]] = {"midpoint": [], "rk4": [], "adams": []}
    for solver, points in curves.items():
        for steps in (4, 8, 16, 32):
            grid = fm.Warped() if solver == "adams" else fm.Uniform()
            estimate = fm.ContinuousFlow(field, (DIMS,), solver, steps, "exact", grid=grid).estimate(x)
            points.append((estimate.nfe, rms(estimate.log_prob - exact), rms(estimate.solver_error)))
    _, error, claimed = curves["rk4"][2]
    report("rk4, 32 steps: rms error in nats (its own estimate after ±)", error, claimed)

    # 2. The error of the trace: Hutchinson's probes cost less per step than the exact divergence, and add noise.
    probes = (2, 4, 8, 16, 32)
    noise = []
    for n in probes:
        flow = fm.ContinuousFlow(field, (DIMS,), "rk4", 16, "hutchinson", probes=n)
        estimate = flow.estimate(x, generator=generator)
        noise.append((rms(estimate.log_prob - exact), rms(estimate.standard_error)))
    report("hutchinson, 32 probes: rms error in nats (its own estimate after ±)", *noise[-1])
    ratio = noise[0][0] / noise[-1][0]
    report("rms error with 2 probes / with 32 (theory: 4)", ratio, ratio / len(x) ** 0.5)

    # 3. The error of the model: for a trained network it is far larger than what solver and trace add.
    network = fm.FiLMField(DIMS, (128, 128), generator=generator)
    train(network, truth, generator)
    learned = fm.ContinuousFlow(network.requires_grad_(False), (DIMS,), "rk4", 16).estimate(x)
    gap = exact - learned.log_prob
    report("trained network: KL(truth, model) in nats", float(gap.mean()), float(gap.std()) / len(gap) ** 0.5)
    report(
        "trained network: mean log p in nats (solver error after ±)",
        float(learned.log_prob.mean()),
        rms(learned.solver_error),
    )

    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2))
    for (name, points), colour in zip(curves.items(), (OTHER, MODEL, ACCENT), strict=True):
        evaluations, errors, estimates = zip(*points, strict=True)
        axes[0].plot(
            evaluations,
            errors,
            "o-",
            color=colour,
            markersize=4,
            label="adams, warped grid" if name == "adams" else name,
        )
        axes[0].plot(evaluations, estimates, "--", color=colour, linewidth=1)
    axes[0].plot([], [], "--", color=TRUTH, linewidth=1, label="its estimate")
    axes[0].set(title="exact field, exact trace", xlabel="evaluations of the field", ylabel="rms error of log p (nats)")
    axes[1].plot(probes, [error for error, _ in noise], "o-", color=MODEL, markersize=4, label="rms error")
    axes[1].plot(probes, [error for _, error in noise], "--", color=MODEL, linewidth=1, label="its estimate")
    axes[1].plot(probes, [noise[0][0] * (probes[0] / n) ** 0.5 for n in probes], ":", color=TRUTH, label="slope -1/2")
    axes[1].set(title="exact field, Hutchinson's trace", xlabel="probes", ylabel="rms error of log p (nats)")
    for panel, ticks in ((axes[0], (25, 50, 100, 200, 400)), (axes[1], probes)):
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.legend()
    axes[1].set_yticks([0.3, 0.5, 1], ["0.3", "0.5", "1"])
    low, high = float(exact.min()), float(exact.max())
    axes[2].scatter(exact.numpy(), learned.log_prob.numpy(), s=6, linewidths=0, color=MODEL, alpha=0.7)
    axes[2].plot([low, high], [low, high], color=TRUTH, linewidth=1)
    axes[2].set(
        title="trained network", xlabel="exact log p (nats)", ylabel="log p of the model (nats)", aspect="equal"
    )
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
