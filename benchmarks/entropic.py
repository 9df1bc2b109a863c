"""Entropic transport plans against the exact plan of the same batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.results import Cell, Claim, Result
from benchmarks.timing import side_by_side
from flowmatch_core.transport import entropic_plan, optimal_permutation, optimal_plan

__all__ = ["benchmark_entropic"]

ROWS, SIGMAS = 512, (1.0, 0.5, 0.2, 0.1, 0.05, 0.005)


def benchmark_entropic(quick: bool) -> Result:
    """Measure the time and the error of entropic plans between moons and noise."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.pi * torch.rand(ROWS // 2, generator=generator, dtype=torch.float64)
    x, y = angle.cos(), angle.sin()
    data = torch.stack([torch.cat([x, 1 - x]), torch.cat([y, 0.5 - y])], 1)
    data = data + 0.1 * torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    cost = torch.cdist(data, noise).square().numpy()

    entropic = {sigma: partial(entropic_plan, cost, 2 * sigma**2) for sigma in SIGMAS}
    runs = {f"entropic, sigma {sigma:g}": run for sigma, run in entropic.items()}
    exact: dict[str, Callable[[], object]] = {
        "exact plan": partial(optimal_plan, cost),
        "exact permutation": partial(optimal_permutation, cost),
    }
    timings = side_by_side({**exact, **runs}, rounds=11, budget=10 if quick else 30)
    error = {
        label: float(np.abs(run().sum(0) - 1).mean())  # those of the rows are exact
        for label, run in runs.items()
    }
    rows: list[dict[str, Cell]] = [
        {
            "plan": label,
            "ms": 1000 * timings.median(label),
            "time, exact plan = 1": str(timings.ratio(label, "exact plan")),
            "mean error of the columns": error.get(label, 0.0),
        }
        for label in [*exact, *runs]
    ]
    claim = Claim(
        f"time of an entropic plan at sigma 0.1 over the exact plan, {ROWS} rows",
        timings.ratio("entropic, sigma 0.1", "exact plan"),
        wanted=3,
        bound="at most",
        suspects={"entropic": entropic[0.1]},
    )
    return Result("Entropic transport plans", rows, [claim], [f"{ROWS} rows of two moons and of noise, float64."])
