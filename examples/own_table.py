"""Fit a density to a CSV table of your own and compare it, in the units of the table, with a Gaussian.

The script writes a table of weather readings in °C, Pa and m/s, whose columns differ by five orders of magnitude and
whose exact density is known, and then reads it as it would read yours. It needs NumPy, torch and flowmatch_core only.

Run: python examples/own_table.py [--out PICTURE.png]
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from _output import MODEL, OTHER, TRUTH, picture_path, plt, report, save
from torch import Tensor

import flowmatch_core as fm

COLUMNS = ("temperature (°C)", "pressure (Pa)", "wind (m/s)")
ROWS, HELD_OUT = 12_000, 2000
STEPS, BATCH, LEARNING_RATE = 1500, 256, 1e-2

# Three kinds of weather, each Gaussian in (temperature, pressure, log wind).
MEANS = torch.tensor([[24.0, 102_100.0, 0.6], [11.0, 100_300.0, 2.1], [2.0, 102_600.0, 0.2]], dtype=torch.float64)
SPREADS = torch.tensor([[3.0, 350.0, 0.45], [2.5, 500.0, 0.3], [3.0, 300.0, 0.6]], dtype=torch.float64)
CORRELATION = torch.tensor([[1.0, 0.7, -0.5], [0.7, 1.0, -0.6], [-0.5, -0.6, 1.0]], dtype=torch.float64)
WEATHER = fm.GaussianMixture(
    torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64), MEANS, SPREADS[:, :, None] * CORRELATION * SPREADS[:, None, :]
)


def write_table(path: Path, generator: torch.Generator) -> None:
    """Write the rows with a header, as a logger would."""
    rows = WEATHER.sample(ROWS, generator=generator)
    rows[:, 2] = rows[:, 2].exp()
    np.savetxt(path, rows.numpy(), fmt="%.6g", delimiter=",", header=",".join(COLUMNS), comments="", encoding="utf-8")


def exact_log_prob(rows: Tensor) -> Tensor:
    """Return the exact log-density of rows of the table, with the change of variables of the logarithm."""
    log_wind = rows[:, 2:].double().log()
    return WEATHER.log_prob(torch.cat([rows[:, :2].double(), log_wind], 1)) - log_wind[:, 0]


def train(network: fm.FiLMField, data: Tensor, generator: torch.Generator) -> None:
    """Regress the velocity on straight paths from noise to standardised data."""
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
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weather.csv"  # name your own file here, and leave out the next line
        write_table(path, generator)
        rows = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, encoding="utf-8")).float()
    rows = rows[torch.randperm(len(rows), generator=generator)]
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]

    # Statistics of the training rows only. With `loc` and `scale` the flow takes and gives rows in their own units.
    loc, scale = rows.mean(0), rows.std(0)
    network = fm.FiLMField(event_dim=rows.shape[1], hidden=(128, 128), generator=generator)
    train(network, (rows - loc) / scale, generator)
    flow = fm.ContinuousFlow(network.requires_grad_(False), loc.shape, solver="rk4", steps=16, loc=loc, scale=scale)
    gaussian = fm.GaussianMixture(torch.ones(1).double(), loc.double()[None], rows.double().T.cov()[None])

    estimate = flow.estimate(held_out)
    report(
        "solver error of log p in nats, rms and largest",
        float(estimate.solver_error.square().mean().sqrt()),
        float(estimate.solver_error.max()),
    )
    of_flow, of_gaussian, exact = estimate.log_prob, gaussian.log_prob(held_out.double()), exact_log_prob(held_out)
    for label, difference in (
        ("log p of the flow per held-out row in nats", of_flow),
        ("gain over the Gaussian in nats", of_flow - of_gaussian),
        ("KL(truth, flow) in nats", exact - of_flow),
    ):
        report(label, float(difference.mean()), float(difference.std()) / len(difference) ** 0.5)

    shown = (
        ("held-out rows", held_out, TRUTH),
        ("samples of the flow", flow.sample((HELD_OUT,), generator=generator), MODEL),
        ("samples of the Gaussian", gaussian.sample(HELD_OUT, generator=generator), OTHER),
    )
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey="row")
    for column, (title, points, colour) in enumerate(shown):
        for row, (y, unit) in enumerate(((1, 1000.0), (2, 1.0))):
            panel = axes[row, column]
            panel.scatter(
                points[:, 0].numpy(), (points[:, y] / unit).numpy(), s=3, alpha=0.5, linewidths=0, color=colour
            )
        axes[0, column].set(title=title)
        axes[1, column].set(xlabel=COLUMNS[0])
    axes[0, 0].set(ylabel="pressure (kPa)", xlim=(-10, 36))
    axes[1, 0].set(ylabel=COLUMNS[2], ylim=(-6, 20))
    save(figure, out)


if __name__ == "__main__":
    main(picture_path(__file__, __doc__))
