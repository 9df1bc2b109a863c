"""Sample one velocity field by its ODE and by the SDE with the same marginals, and compare their errors.

Both end in the same distribution. At few evaluations of an exact field the ODE is closer; an error of the field in a
short window of time is forgotten by the SDE if it comes early and doubled if it comes late. For Gaussian data both
effects have a closed form: with s² the variance of the data and V(t) = t² s² + (1 - t)², a push e of the velocity at
time u moves the mean of the samples by e s / V(u)^(1/2) under the ODE and by 2 e u s² / V(u) under the SDE.

Run: python examples/sde_vs_ode.py [--out PICTURE.png]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from _output import MODEL, OTHER, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

SPREAD = 0.5  # standard deviation s of the Gaussian data
PUSH, WIDTH = 1.0, 0.1  # size of the error of the velocity and length of its window of time
WINDOWS = torch.arange(10)[:, None] / 10  # where the windows begin, one row each
EVALUATIONS = (4, 8, 16, 32, 64, 128)
REPEATS, ROWS = 8, 4000


def shift_of_ode(u: Tensor) -> Tensor:
    """Return how far the mean ends per unit of push at time u, for the ODE."""
    return SPREAD / (u**2 * SPREAD**2 + (1 - u) ** 2).sqrt()


def shift_of_sde(u: Tensor) -> Tensor:
    """Return the same for the memoryless SDE."""
    return 2 * u * SPREAD**2 / (u**2 * SPREAD**2 + (1 - u) ** 2)


def pushed(field: fm.VelocityField) -> fm.VelocityField:
    """Return the field with a constant error, in each row within its own window of time."""

    def wrong(t: fm.Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        since = t + 1e-6 - WINDOWS  # the first step of a window counts, the one at its end does not
        return field(t, x, cond) + PUSH * ((since >= 0) & (since < WIDTH))

    return wrong


def sample(equation: str, field: fm.VelocityField, start: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Solve the ODE or the SDE with first-order steps, one evaluation of the field each."""
    if equation == "ODE":
        return fm.solve(field, start, solver="euler", steps=steps).x
    return fm.solve_sde(field, start, path=fm.CondOT(), steps=steps, generator=generator).x


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), width_ratios=(1, 1, 1, 1.1))

    # 1. Same marginals, different trajectories: a mixture of three Gaussians on the line.
    mixture = fm.GaussianMixture(
        torch.tensor([0.3, 0.45, 0.25]), torch.tensor([[-1.6], [0.3], [1.8]]), 0.04 * torch.ones(3, 1, 1)
    )
    field, start = mixture.velocity_field(), torch.randn(16, 1, generator=generator)
    times, height = torch.linspace(0, 1, 101), torch.linspace(-3, 3, 121)
    marginal = torch.stack([mixture.marginal_log_prob(float(t), height[:, None]).exp() for t in times], 1)
    ways = {
        "ODE": fm.solve(field, start, solver="midpoint", steps=100, save=True),
        "SDE": fm.solve_sde(field, start, path=fm.CondOT(), steps=100, generator=generator, save=True),
    }
    for panel, (equation, way), colour in zip(axes, ways.items(), (MODEL, OTHER), strict=False):
        assert way.path is not None  # as it was saved
        panel.pcolormesh(times.numpy(), height.numpy(), marginal.numpy(), cmap="Greys", vmax=0.9, rasterized=True)
        panel.plot(times.numpy(), way.path[:, :, 0].numpy(), color=colour, linewidth=0.7)
        panel.set(title=f"{equation}: trajectories", xlabel="flow time t", ylabel="x (units)", ylim=(-3, 3))

    # 2. The exact field: distance to the data against evaluations. On the line every projection is the line itself.
    noise, data = (
        torch.randn(REPEATS * ROWS, 1, generator=generator),
        mixture.sample(REPEATS * ROWS, generator=generator),
    )
    metric = partial(fm.sliced_wasserstein, projections=1)
    floor = fm.sampling_floor(metric, mixture.sample(40 * ROWS, generator=generator), n=ROWS, generator=generator)
    for equation, colour in (("ODE", MODEL), ("SDE", OTHER)):
        means, errors = [], []
        for n in EVALUATIONS:
            pairs = zip(sample(equation, field, noise, n, generator).chunk(REPEATS), data.chunk(REPEATS), strict=True)
            distances = torch.stack([metric(x, y) for x, y in pairs])
            means.append(float(distances.mean()))
            errors.append(float(distances.std()) / REPEATS**0.5)
        axes[2].errorbar(EVALUATIONS, means, errors, fmt="o-", markersize=4, capsize=2, color=colour, label=equation)
        for i in (1, -1):
            label = f"{equation}, {EVALUATIONS[i]} evaluations: W2 to the data / W2 of true samples"
            report(label, means[i] / floor.mean, errors[i] / floor.mean)
    axes[2].axhline(floor.mean, color=TRUTH, linewidth=0.8, label="true samples")
    axes[2].set(title="exact field", xlabel="evaluations of the field", ylabel="W2 to the data (units)")
    axes[2].set(xscale="log", yscale="log")
    axes[2].set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    axes[2].set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes[2].minorticks_off()
    axes[2].legend()

    # 3. A push at time u. Gaussian data make the equations linear: with equal noise there is no sampling error.
    gaussian = fm.GaussianMixture(torch.ones(1), torch.zeros(1, 1), SPREAD**2 * torch.ones(1, 1, 1)).velocity_field()
    start, inside = torch.zeros(len(WINDOWS), 1), (torch.arange(100) + 0.5) / 100 * WIDTH
    for equation, theory, colour in (("ODE", shift_of_ode, MODEL), ("SDE", shift_of_sde, OTHER)):
        coarse, fine = (
            (
                sample(equation, pushed(gaussian), start, steps, torch.Generator().manual_seed(1))
                - sample(equation, gaussian, start, steps, torch.Generator().manual_seed(1))
            )[:, 0]
            / (PUSH * WIDTH)
            for steps in (500, 1000)
        )
        deviation = (fine - theory(WINDOWS + inside).mean(1)).abs().max()
        report(
            f"{equation}: largest deviation of a shift from theory",
            float(deviation),
            float((fine - coarse).abs().max()),
        )
        u = torch.linspace(0, 1, 101)
        axes[3].plot(u.numpy(), theory(u).numpy(), color=colour, linewidth=1.2, label=f"{equation}, theory")
        axes[3].plot(
            (WINDOWS + WIDTH / 2).numpy(), fine.numpy(), "o", color=colour, markersize=4, label=f"{equation}, simulated"
        )
    axes[3].set(
        title="an error of the field at time u", xlabel="time u of the error", ylabel="shift of the mean / error"
    )
    axes[3].legend()
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
