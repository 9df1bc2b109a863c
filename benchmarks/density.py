"""Exact log-densities per second at equal error, and the cost of a divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.fields import DIM, NETWORKS, double, trained_tabular
from benchmarks.ladders import OURS, Ladder, Rung, fastest, race
from benchmarks.peers import flow_matching_log_prob, zuko_flow
from benchmarks.results import Cell, Claim, Result
from benchmarks.timing import side_by_side
from flowmatch_core.divergence import divergence
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.solvers import TimeGrid, Uniform, Warped

__all__ = ["benchmark_density", "benchmark_divergence"]

Settings = Iterator[tuple[str, Callable[[], Tensor]]]

WITH_OUR_GRID, PEERS = "flow_matching, our grid", ("flow_matching", "zuko")
GRIDS: dict[str, TimeGrid] = {"uniform": Uniform()} | {f"Warped({p})": Warped(p) for p in (0.3, 0.5, 0.6, 0.7)}
STEPS = range(16, 130, 2)
TOLERANCES = (3e-5, 1e-5, 3e-6, 2e-6, 1e-6, 5e-7, 3e-7)


def benchmark_density(quick: bool) -> Result:
    """Compare exact log-densities of the same trained fields at equal error."""
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    count = 32 if quick else 128
    for network in list(NETWORKS)[: 1 if quick else None]:
        field, x = trained_tabular(network, quick)
        ladders = _ladders(field, x[:count], quick)
        for target in (1e-3,) if quick else (1e-3, 1e-4):
            rungs = {library: rung for library in ladders if (rung := fastest(ladders[library], target)) is not None}
            more_rows, claim = _compare(rungs, count, network, target)
            rows += more_rows
            claims.append(claim)
    notes = [
        f"A {DIM}-512-512-{DIM} network trained by flow matching; {count} rows that it did not see, at once: the exact "
        "divergence of the peers is as many backward passes as there are dimensions, which fill the processor with few "
        "rows, and the ratio is smaller for fewer rows. The error is the root mean square over the rows, against 320 "
        "steps in float64. Each setting is the fastest that reaches the "
        "error on these rows, ours and theirs chosen alike.",
        "flow_matching: `compute_likelihood(exact_divergence=True)` with the better of rk4 and dopri5 (its Euler and "
        "midpoint need several times the evaluations at these errors); `our grid`: rk4 on our time grid, handed to it "
        "as `time_grid`. zuko: `NormalizingFlow(FreeFormJacobianTransform(exact=True), …)`, what its CNF is made of.",
    ]
    return Result("Exact log-density at equal error", rows, claims, notes)


def _compare(rungs: dict[str, Rung], count: int, network: str, target: float) -> tuple[list[dict[str, Cell]], Claim]:
    timings, rows = race(rungs, network, target, count, "log-densities", rounds=5, budget=15)
    best = min((peer for peer in PEERS if peer in rungs), key=timings.median)
    claim = Claim(
        f"exact log-densities/s of {network} at {target:g} nats, over the best peer ({best})",
        timings.ratio(best, OURS),
        wanted=45,
        suspects={"ours": rungs[OURS].call},
    )
    return rows, claim


def _ladders(field: nn.Module, x: Tensor, quick: bool) -> dict[str, list[Ladder]]:
    with torch.no_grad():
        flow = ContinuousFlow(double(field), (DIM,), solver="adams", steps=320, grid=Warped(0.5))
        truth = flow.log_prob(x.double())

    def error(log_prob: Tensor) -> float:
        return (log_prob.double() - truth).square().mean().sqrt().item()

    ladders = {
        OURS: [Ladder(OURS, _ours(field, x, grid), error) for grid in GRIDS],
        "flow_matching": [Ladder("flow_matching", _flow_matching_rk4(field, x), error)],
        "zuko": [Ladder("zuko", _zuko(field, x), error)],
    }
    if not quick:
        ladders["flow_matching"].append(Ladder("flow_matching", _flow_matching_dopri5(field, x), error))
        ladders[WITH_OUR_GRID] = [Ladder(WITH_OUR_GRID, _flow_matching_with_our_grid(field, x), error)]
    return ladders


def _ours(field: nn.Module, x: Tensor, grid: str) -> Settings:
    for steps in STEPS:
        flow = ContinuousFlow(field, (DIM,), solver="adams", steps=steps, grid=GRIDS[grid])
        yield f"adams, {steps} steps, {grid}", torch.no_grad()(partial(flow.log_prob, x))


def _flow_matching_rk4(field: nn.Module, x: Tensor) -> Settings:
    for steps in STEPS[2::2]:
        yield f"rk4, {steps} steps", partial(flow_matching_log_prob, field, x, "rk4", steps=steps)


def _flow_matching_with_our_grid(field: nn.Module, x: Tensor) -> Settings:
    for steps in STEPS[::4]:
        times = torch.tensor(Warped(0.5).nodes(steps)).flip(0)
        yield f"rk4, {steps} steps, Warped(0.5)", partial(flow_matching_log_prob, field, x, "rk4", times=times)


def _flow_matching_dopri5(field: nn.Module, x: Tensor) -> Settings:
    for tolerance in TOLERANCES:
        yield f"dopri5, {tolerance:g}", partial(flow_matching_log_prob, field, x, "dopri5", tolerance=tolerance)


def _zuko(field: nn.Module, x: Tensor) -> Settings:
    for tolerance in TOLERANCES:
        flow = zuko_flow(field, DIM, atol=tolerance, rtol=tolerance)
        yield f"dopri5, {tolerance:g}", torch.no_grad()(partial(flow.log_prob, x))


def benchmark_divergence(quick: bool) -> Result:
    """Compare the exact divergence in closed form with one Hutchinson probe of the same field."""
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    generator = torch.Generator().manual_seed(0)
    for network, make in NETWORKS.items():
        field = make(generator).requires_grad_(False)
        for batch in (256,) if quick else (64, 256, 1024):
            x, t = torch.randn(batch, DIM, generator=generator), 0.5
            probe = partial(divergence, method="hutchinson", generator=generator)
            calls: dict[str, Callable[[], object]] = {
                "velocity": partial(field, t, x),
                "velocity, exact divergence": partial(divergence, field, t, x),
                "velocity, one Hutchinson probe": partial(probe, field, t, x),
            }
            with torch.no_grad():
                timings = side_by_side(calls, rounds=31, budget=3)
            row: dict[str, Cell] = {"field": network, "batch": batch}
            rows.append(row | {f"{name}, ms": 1e3 * timings.median(name) for name in calls})
            claims.append(
                Claim(
                    f"time of the exact divergence of {network}, batch {batch}, over that of one Hutchinson probe",
                    timings.ratio("velocity, exact divergence", "velocity, one Hutchinson probe"),
                    wanted=1.1,
                    bound="at most",
                    suspects={"exact": calls["velocity, exact divergence"]},
                )
            )
    notes = ["All with the velocity and without a graph; the probe is a forward and a backward pass, and is noisy."]
    return Result("Exact divergence", rows, claims, notes)
