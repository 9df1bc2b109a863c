"""The report's pictures, each a function of tables that returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TRUTH, MODEL, START, WALL = "#444444", "#1f77b4", "#d62728", "#bbbbbb"
SHOWN_STARTS = 3
SHOWN_DIGITS = 24

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110})


def _panels(rows: int, columns: int, size: float = 2.1) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, size * rows + 0.2), squeeze=False, layout="constrained"
    )
    return figure, axes


def _scatter(axes: Axes, table: pd.DataFrame, colour: str, limits: Sequence[float]) -> None:
    axes.scatter(table.iloc[:, 0], table.iloc[:, 1], s=2, alpha=0.35, color=colour, linewidths=0, rasterized=True)
    axes.set(xlim=limits[0::2], ylim=limits[1::2], xticks=[], yticks=[], aspect="equal")


def _limits(table: pd.DataFrame, margin: float = 0.1) -> list[float]:
    """x0, y0, x1, y1 around the first two columns."""
    low, high = table.iloc[:, :2].min().to_numpy(), table.iloc[:, :2].max().to_numpy()
    pad = margin * (high - low)
    return [*(low - pad), *(high + pad)]


def densities(test: Mapping[str, pd.DataFrame], samples: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Test rows and the samples of every method, one row a 2-D data set."""
    methods = list(next(iter(samples.values())))
    figure, axes = _panels(len(test), 1 + len(methods))
    for row, (name, data) in zip(axes, test.items(), strict=True):
        limits = _limits(data)
        for axis, label, table in zip(
            row, ["data", *methods], [data, *(samples[name][m] for m in methods)], strict=True
        ):
            _scatter(axis, table.head(len(data)), TRUTH if label == "data" else MODEL, limits)
            axis.set_title(f"{name}: {label}")
    return figure


def digits(test: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Images of 8 x 8 pixels, true and sampled."""
    rows = {"data": test, **samples}
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.85 * len(rows)), squeeze=False, layout="constrained")
    for axis, (label, table) in zip(axes[:, 0], rows.items(), strict=True):
        images = table.iloc[:SHOWN_DIGITS, :64].to_numpy().reshape(-1, 8, 8)
        axis.imshow(
            np.hstack([np.pad(image, 1, constant_values=1) for image in images]),
            cmap="gray_r",
            vmin=0,
            vmax=1,
        )
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def paths(particles: Mapping[str, pd.DataFrame]) -> Figure:
    """Where particles are at some times, one row a method."""
    times = sorted(next(iter(particles.values()))["time"].unique())
    figure, axes = _panels(len(particles), len(times), 1.9)
    for row, (method, table) in zip(axes, particles.items(), strict=True):
        limits = _limits(table)
        for axis, time in zip(row, times, strict=True):
            _scatter(axis, table[table["time"] == time], MODEL, limits)
            axis.set_title(f"{method}, t = {time:g}")
    return figure


def fields(velocities: Mapping[str, pd.DataFrame]) -> Figure:
    """The velocity field at some times, coloured by speed, one row a method."""
    times = sorted(next(iter(velocities.values()))["time"].unique())
    figure, axes = _panels(len(velocities), len(times), 1.9)
    for row, (method, table) in zip(axes, velocities.items(), strict=True):
        speed = float(np.quantile(np.hypot(table["velocity_x"], table["velocity_y"]), 0.95))
        for axis, time in zip(row, times, strict=True):
            x, y, u, v = (
                table.loc[table["time"] == time, name].to_numpy() for name in ("x", "y", "velocity_x", "velocity_y")
            )
            norm = np.hypot(u, v)
            unit = np.maximum(norm, 1e-12)  # arrows of one length: the colour shows the speed
            axis.quiver(x, y, u / unit, v / unit, norm, cmap="viridis", clim=(0, speed), scale=25, width=0.007)
            axis.set(xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{method}, t = {time:g}")
    return figure


def occupancy(
    truth: pd.DataFrame,
    samples: Mapping[str, pd.DataFrame],
    starts: pd.DataFrame,
    bounds: Sequence[float],
    walls: Sequence[Sequence[float]],
) -> Figure:
    """Where the policy will be, from some start states (red): the truth and every method, with walls drawn."""
    columns = {"truth": truth, **samples}
    if not walls:  # an unbounded space: what is drawn decides
        shown = truth[truth["start"] < SHOWN_STARTS]
        bounds = _limits(shown)
    figure, axes = _panels(min(SHOWN_STARTS, len(starts)), len(columns))
    for start, row in enumerate(axes):
        for axis, (label, table) in zip(row, columns.items(), strict=True):
            for x0, y0, x1, y1 in walls:
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color=WALL))
            _scatter(axis, table[table["start"] == start], TRUTH if label == "truth" else MODEL, bounds)
            axis.plot(*starts.iloc[start, :2], marker="o", color=START, markersize=4)
            for side in axis.spines.values():
                side.set_visible(True)
            if start == 0:
                axis.set_title(label)
    return figure


def curves(logs: Mapping[str, pd.DataFrame], term: str, label: str) -> Figure:
    """A term of the loss over training, one line a method."""
    figure, axis = plt.subplots(figsize=(5.2, 2.8), layout="constrained")
    positive = True
    for index, (method, table) in enumerate(logs.items()):  # a method has one colour, whoever else is drawn
        if term in table and (table[term] > 0).any():
            smooth = table[term].rolling(5, min_periods=1).mean()
            axis.plot(table["step"], smooth, label=method, linewidth=1.2, color=f"C{index}")
            positive &= bool((smooth > 0).all())
    axis.set(xlabel="step", ylabel=label, yscale="log" if positive else "linear")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    return figure


def against_floor(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """EMD of every method over the floor of its data, on a logarithmic axis: 1 is as good as true samples."""
    rows = [
        (name, method, cell["emd"] / methods["floor"]["emd"])
        for name, methods in metrics.items()
        for method, cell in methods.items()
        if method != "floor" and cell.get("emd") is not None
    ]
    names = list(dict.fromkeys(method for _, method, _ in rows))
    places = list(metrics)
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(places) + 1.2), layout="constrained")
    for index, method in enumerate(names):
        points = [(ratio, places.index(name)) for name, m, ratio in rows if m == method]
        x, y = zip(*points, strict=True)
        offset = 0.5 * (index / max(1, len(names) - 1) - 0.5)
        axis.scatter(x, np.array(y) + offset, label=method, s=28)
    axis.axvline(1, color=TRUTH, linewidth=1, linestyle="--")
    axis.set(
        yticks=range(len(places)),
        yticklabels=places,
        xscale="log",
        xlabel="EMD / floor (1 = as good as true samples)",
    )
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
