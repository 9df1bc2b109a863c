"""Figures of curves: losses, distances over floors, and errors against horizon."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipelines.reporting.figures.style import TRUTH, style
from pipelines.reporting.labels import label
from pipelines.reporting.ranking import EnvironmentCells, Score, over_floor, scores

FAR = 1e3
"""Floors beyond which a distance is drawn at the edge of the figure: a few samples decide it."""


def losses(
    logs: Mapping[str, pd.DataFrame], terms: Mapping[str, str], chosen: Mapping[str, float | None] | None = None
) -> Figure:
    """Plot the terms of the loss over training, one panel per term and one line per method.

    A panel is logarithmic if a line in it is positive; lines that are not positive are then incomplete.

    Args:
        logs: Loss curves by method; one of a single row is not drawn.
        terms: Names of the terms by column.
        chosen: Steps whose networks were kept by method, which are marked.
    """
    figure, axes = plt.subplots(1, len(terms), figsize=(4.6 * len(terms) + 1.2, 2.9), squeeze=False)
    figure.subplots_adjust(left=0.7 / (4.6 * len(terms) + 1.2), right=1 - 1.4 / (4.6 * len(terms) + 1.2), bottom=0.17)
    lines = {}
    for axis, (term, name) in zip(axes[0], terms.items(), strict=True):
        positive = False
        for method, table in logs.items():
            curve = table.set_index("step")[term].dropna() if term in table else table.iloc[:0]
            if len(curve) > 1 and curve.any():
                smooth = curve.rolling(5, min_periods=1).mean()
                look = {key: value for key, value in style(method).items() if key != "marker"}
                lines[label(method)] = axis.plot(smooth.index, smooth, linewidth=1.2, **look)[0]
                positive |= bool((smooth > 0).all())
                step = (chosen or {}).get(method)
                if step is not None and curve.index[0] <= step <= curve.index[-1]:
                    height = np.interp(step, smooth.index, smooth)
                    axis.plot(step, height, marker="o", color=look["color"], markersize=5, markeredgecolor="black")
        axis.set(xlabel="step", title=name, yscale="log" if positive else "linear")
        if positive:
            _plain_ticks(axis.yaxis)
    if lines:
        figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, loc="center right")
    return figure


def against_floor(metrics: Mapping[str, EnvironmentCells]) -> Figure:
    """Plot EMD over floor of every method, on a logarithmic axis on which 1 is as good as true samples.

    Whiskers are intervals; a cross at the right edge marks a method that diverged, or is more than `FAR` floors away.
    """
    found = {place: over_floor(cells) for place, cells in metrics.items()}
    methods = list(dict.fromkeys(method for rows in found.values() for method in rows))
    finite = [s for rows in found.values() for s in rows.values() if not _is_off(s)]
    edge = 2 * max((s.mean for s in finite), default=5.0)  # intervals are cut, as those of two seeds are very long
    heights = {place: 0.14 + 0.055 * max(2, len(rows)) for place, rows in found.items()}
    height = max(sum(heights.values()) + 0.75, 0.2 * len(methods) + 0.2)  # as tall as the legend
    figure, axis = plt.subplots(figsize=(8.5, height), layout="constrained")
    handles, middles, y = {}, [], 0.0
    for place, rows in found.items():
        middles.append(y + heights[place] / 2)
        axis.axhspan(y, y + heights[place], color="#f4f4f4" if len(middles) % 2 else "white", zorder=0)
        for row, (method, score) in enumerate(rows.items()):
            handles[method] = _whisker(axis, y + heights[place] * (row + 1) / (len(rows) + 1), method, score, edge)
        y += heights[place]
    axis.axvline(1, color=TRUTH, linewidth=1, linestyle="--")
    axis.set(
        yticks=middles,
        yticklabels=list(found),
        ylim=(y, 0),
        xscale="log",
        xlim=(min([0.7, *(0.8 * s.mean for s in finite)]), 1.15 * edge),
        xlabel="EMD / floor (1 = as good as true samples)",
    )
    _plain_ticks(axis.xaxis)
    axis.tick_params(axis="y", length=0)
    axis.legend(
        [handles[m] for m in methods],
        [label(m) for m in methods],
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: powers of ten and 2, 3 and 5 times them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


def _is_off(score: Score) -> bool:
    """Return whether a score has no place on the axis."""
    return score.diverged or score.mean > FAR


def _whisker(axis: Axes, y: float, method: str, score: Score, edge: float) -> Artist:
    look = style(method)
    if _is_off(score):
        axis.plot(edge, y, marker="x", color=look["color"], markersize=7, markeredgewidth=2, linestyle="none")
    if score.low is not None and score.high is not None and not _is_off(score):
        axis.plot([max(score.low, 1e-3), score.high], [y, y], color=look["color"], linewidth=1.3)
    drawn = math.nan if _is_off(score) else score.mean  # for the legend
    return axis.plot(drawn, y, marker=look["marker"], color=look["color"], markersize=4, linestyle="none")[0]


def horizons(cells: Mapping[float, EnvironmentCells], physics_steps: int) -> Figure:
    """Plot the error of the mean reward, MSE(V) (1 - gamma)², and EMD over floor against the horizon in physics steps.

    A method has a line if it has at least two points.

    Args:
        cells: Metrics by gamma.
        physics_steps: Physics steps of a transition.
    """
    horizon = {gamma: physics_steps / (1 - gamma) for gamma in cells}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    handles = {}
    panels = (
        ("MSE(V) (1 − γ)²", {gamma: scores(c, "mse_v", (1 - gamma) ** -2) for gamma, c in cells.items()}),
        ("EMD / floor", {gamma: over_floor(c) for gamma, c in cells.items()}),
    )
    for axis, (name, found) in zip(axes, panels, strict=True):
        means = [s.mean for f in found.values() for s in f.values() if not s.diverged]
        top = 3 * max(means, default=1.0)
        for method in dict.fromkeys(method for f in found.values() for method in f):
            points = {horizon[gamma]: f[method] for gamma, f in found.items() if method in f}
            if len(points) > 1:
                handles[method] = _line(axis, points, method, top)
        if name.startswith("MSE(V)"):
            floor = [(1 - gamma) ** 2 * c.get("floor", {}).get("mse_v", math.nan) for gamma, c in cells.items()]
            axis.plot(list(horizon.values()), floor, color=TRUTH, linewidth=1, linestyle="--")
        else:
            axis.axhline(1, color=TRUTH, linewidth=1, linestyle="--")
        ticks = list(horizon.values())
        axis.set(xscale="log", yscale="log", xlabel="effective horizon, physics steps", ylabel=name)
        _plain_ticks(axis.yaxis)
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    names = [label(m) for m in handles]
    axes[1].legend(handles.values(), names, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _line(axis: Axes, points: Mapping[float, Score], method: str, top: float) -> Artist:
    """Draw a line through the finite points, with their intervals, and crosses at the top for those that diverged."""
    look = style(method)
    finite = {x: score for x, score in points.items() if not score.diverged}
    drawn = axis.plot(list(finite), [s.mean for s in finite.values()], markersize=4, linewidth=1.3, **look)[0]
    for x, s in finite.items():
        if s.low is not None and s.high is not None:
            low = s.low if s.low > 0 else s.mean / 10  # an interval of two seeds may extend below zero
            axis.plot([x, x], [low, min(s.high, top)], color=look["color"], linewidth=1, alpha=0.6)
    lost = [x for x, score in points.items() if score.diverged]
    axis.plot(lost, [top] * len(lost), marker="x", color=look["color"], markeredgewidth=2, linestyle="none")
    return drawn
