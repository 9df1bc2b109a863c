"""How the cost of an exact log-density grows with dimension, batch, width and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.peers import flow_matching_log_prob
from benchmarks.results import Cell, Result
from benchmarks.timing import side_by_side
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField

__all__ = ["benchmark_growth", "draw_growth"]


@dataclass(frozen=True)
class Setting:
    """The size of a problem."""

    dimension: int = 32
    batch: int = 64
    width: int = 256
    steps: int = 4


AXES: dict[str, tuple[int, ...]] = {
    "dimension": (2, 8, 32, 128),
    "batch": (4, 16, 64, 256),
    "width": (64, 256, 1024),
    "steps": (2, 4, 8, 16),
}
"""What is varied, one at a time, around the default setting."""


def benchmark_growth(quick: bool) -> Result:
    """Time four ways to an exact log-density, and one to an estimate, over sizes of the problem."""
    rows: list[dict[str, Cell]] = []
    for axis, values in AXES.items():
        for value in values[:2] if quick else values:
            setting = replace(Setting(), **{axis: value})
            calls = _calls(setting)
            with torch.no_grad():
                timings = side_by_side(calls, rounds=5, budget=1.5)
            row: dict[str, Cell] = {"varied": axis, "value": value}
            row |= {f"{name}, ms": 1e3 * timings.median(name) for name in calls}
            row |= {"flow_matching / closed form": str(timings.ratio("flow_matching, exact", "closed form"))}
            rows.append(row)
    notes = [
        "The wall time of one call with RK4 on a network of two hidden layers, not the time at equal error. Where "
        "nothing is varied: " + ", ".join(f"{name} {value}" for name, value in vars(Setting()).items()) + "."
    ]
    return Result("How the cost grows", rows, notes=notes)


def _calls(setting: Setting) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    field = MLPField(setting.dimension, (setting.width,) * 2, generator=generator).requires_grad_(False)
    x = torch.randn(setting.batch, setting.dimension, generator=generator)
    shape = (setting.dimension,)
    closed, exact, probe = (
        ContinuousFlow(field, shape, "rk4", setting.steps, method) for method in ("auto", "exact", "hutchinson")
    )
    return {
        "closed form": lambda: closed.log_prob(x),
        "differentiation": lambda: exact.log_prob(x),
        "one probe": lambda: probe.log_prob(x, generator=generator),
        "flow_matching, exact": lambda: flow_matching_log_prob(field, x, "rk4", steps=setting.steps),
        "flow_matching, one probe": lambda: flow_matching_log_prob(field, x, "rk4", steps=setting.steps, exact=False),
    }


def draw_growth(result: Result, path: Path) -> None:
    """Draw the rows of `benchmark_growth`, one panel for what is varied."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        rows = [row for row in result.rows if row["varied"] == axis]
        for name in (name for name in rows[0] if name.endswith(", ms")):
            panel.loglog([row["value"] for row in rows], [row[name] for row in rows], marker="o", label=name[:-4])
        panel.set_xlabel(axis)
    panels[0].set_ylabel("milliseconds a call")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
