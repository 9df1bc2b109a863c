"""Log-densities of rows under a trained density model, with the error of the solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowmatch_core.components import ComponentFlow
from flowmatch_core.flow import ContinuousFlow, Flow, LogDensity
from flowmatch_core.solvers import SolverError
from pipelines.base import seeding
from pipelines.config.params import DensityEvaluation
from pipelines.evaluation.rows import Array, Rows
from pipelines.models import build, density

PROBED = 64  # rows of so many columns that their divergence is estimated, at once
BLOCK = 8192  # rows between two chances to tell how far a likelihood is
LINE_SECONDS = 10.0


class Likelihood(NamedTuple):
    """The log-densities of rows under one model.

    Attributes:
        log_prob: Log-density of each row in nats, (n,); NaN if the solver failed.
        error: Estimate of each one's solver error, (n,).
        warning: Sentence, where the error is too large or the solver failed.
        nfe: Evaluations of the network for each row, with those of the estimate of the error.
    """

    log_prob: Array
    error: Array
    warning: str | None = None
    nfe: int = 0


def likelihoods(
    file: Path,
    parts: Mapping[str, Rows],
    settings: DensityEvaluation,
    chosen: torch.device,
    label: str = "",
    send: Callable[[str], None] = lambda line: None,
) -> dict[str, Likelihood]:
    """Return the log-densities of the rows of each part; the solver's error is estimated on the test rows.

    Args:
        file: Model.
        parts: Rows by part.
        settings: Solver, its steps and their grid.
        chosen: Device.
        label: Beginning of the lines about progress.
        send: Receives them.
    """
    grid, found = build.grid(settings.grid), {}
    rough, fine = (
        density.load(file, chosen, settings.solver, steps, grid=grid, divergence=settings.divergence)
        for steps in (settings.steps // 2, settings.steps)
    )
    probes = seeding.generator(0, "probes", device=chosen)
    block = BLOCK if settings.divergence != "hutchinson" else PROBED
    for part, rows in parts.items():
        # `estimate` takes twice the steps of its flow, so that every number is one of `settings.steps`
        estimate = (
            partial(rough.estimate, generator=probes)
            if part == "test" and isinstance(rough, ContinuousFlow | ComponentFlow)
            else partial(_exact, fine, probes)
        )
        try:
            found[part] = _likelihood(estimate, rows, chosen, f"{label}{part} rows", send, block)
        except SolverError as failure:  # the model has diverged
            nothing = np.full(len(rows), np.nan)
            found[part] = Likelihood(nothing, nothing, f"the likelihood has no value: {failure}")
    return found


def mixture(file: Path, rows: Rows, chosen: torch.device) -> tuple[Array, float] | None:
    """Return what the mixture of a model with a flow in each component says of rows without its flow.

    Args:
        file: Model.
        rows: Rows.
        chosen: Device.

    Returns:
        The log-density of each row in nats, and the mean share of it in the components that the model sums over; None
        for another kind of model.
    """
    flow = density.load(file, chosen, "euler", 1)
    if not isinstance(flow, ComponentFlow):
        return None
    found, covered = list[Tensor](), list[Tensor]()
    for first in range(0, len(rows), BLOCK):
        x, cond = (torch.from_numpy(values[first : first + BLOCK]).to(chosen) for values in (rows.x, rows.cond))
        given = cond if cond.shape[1] else None
        found.append(flow.mixture_log_prob(x, given))
        covered.append(flow.covered(x, given))
    return torch.cat(found).cpu().numpy(), float(torch.cat(covered).mean())


def _exact(flow: Flow, generator: torch.Generator, x: Tensor, cond: Tensor | None) -> LogDensity:
    """Return log-densities whose error is not estimated."""
    value = flow.log_prob(x, cond, generator=generator)
    return LogDensity(value, torch.zeros_like(value), torch.zeros_like(value), 1)


def _likelihood(
    estimate: Callable[[Tensor, Tensor | None], LogDensity],
    rows: Rows,
    chosen: torch.device,
    label: str,
    send: Callable[[str], None],
    block: int,
) -> Likelihood:
    told, found = time.monotonic(), list[LogDensity]()
    for first in range(0, len(rows), block):
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            send(f"{label}: likelihood of {first} of {len(rows)}")
        x, cond = (torch.from_numpy(values[first : first + block]).to(chosen) for values in (rows.x, rows.cond))
        with torch.no_grad():
            found.append(estimate(x, cond if cond.shape[1] else None))
    log_prob, error, spread = (
        torch.cat([getattr(one, name) for one in found]).double().cpu()
        for name in ("log_prob", "solver_error", "standard_error")
    )
    warning = LogDensity(log_prob, error, spread, 0).warning() if len(rows) > 1 else None
    return Likelihood(log_prob.numpy(), error.numpy(), warning, found[0].nfe)
