"""Figures of density models: samples, digits, trajectories and velocity fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipelines.reporting.figures.style import (
    MODEL,
    START,
    TRUTH,
    WALL,
    around,
    count_not_shown,
    draw_walls,
    name_panel,
    panels,
    scatter,
)
from pipelines.reporting.labels import label

SHOWN_DIGITS = 24


def densities(test: Mapping[str, pd.DataFrame], samples: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Plot test rows and the samples of every method, one row per 2-D data set."""
    methods = list(next(iter(samples.values())))
    figure, axes = panels(len(test), 1 + len(methods))
    for row, (name, data) in zip(axes, test.items(), strict=True):
        limits = around(data)
        for axis, what, table in zip(
            row, ["data", *methods], [data, *(samples[name][m] for m in methods)], strict=True
        ):
            scatter(axis, table.head(len(data)), TRUTH if what == "data" else MODEL, limits)
            axis.set_title(f"{name}: {what if what == 'data' else label(what)}")
    return figure


def digits(test: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw images of 8 x 8 pixels, true and sampled."""
    rows = {"data": test, **samples}
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.85 * len(rows)), squeeze=False, layout="constrained")
    for axis, (what, table) in zip(axes[:, 0], rows.items(), strict=True):
        images = table.iloc[:SHOWN_DIGITS, :64].to_numpy().reshape(-1, 8, 8)
        axis.imshow(
            np.hstack([np.pad(image, 1, constant_values=1) for image in images]),
            cmap="gray_r",
            vmin=0,
            vmax=1,
        )
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label(what), rotation=0, ha="right", va="center")
    return figure


def paths(
    particles: Mapping[str, pd.DataFrame],
    *,
    walls: Sequence[Sequence[float]] = (),
    bounds: Sequence[float] | None = None,
    start: Sequence[float] | None = None,
) -> Figure:
    """Plot the states of particles at some times, one row per method.

    With `bounds`, all panels show these bounds and the noise of t = 0, and count the points beyond them; otherwise each
    row has its own limits.
    """
    times = sorted({time for table in particles.values() for time in table["time"]})
    limits, aspect = None, 1.0
    if bounds is not None:
        first = next(iter(particles.values()))
        limits = _with_noise(first[first["time"] == times[0]], bounds)
        aspect = (limits[3] - limits[1]) / (limits[2] - limits[0])
    figure, axes = panels(len(particles), len(times), 1.6, left=0.3, aspect=aspect, titles=False)
    for row, (method, table) in zip(axes, particles.items(), strict=True):
        shown = limits or around(table)
        for axis, time in zip(row, times, strict=True):
            now = table[table["time"] == time]
            draw_walls(axis, walls)
            if walls and bounds is not None:
                x0, y0, x1, y1 = bounds
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=WALL))
            scatter(axis, now, MODEL, shown)
            count_not_shown(axis, now, shown)
            if start is not None:
                axis.plot(*start, marker="o", color=START, markersize=4)
            name_panel(axis, row, axes, label(method), f"t = {time:g}")
    return figure


def _with_noise(noise: pd.DataFrame, bounds: Sequence[float]) -> list[float]:
    """Return the bounds, extended to the 1st to 99th percentiles of the noise."""
    low, high = (noise.iloc[:, :2].quantile(q).to_numpy() for q in (0.01, 0.99))
    return [*np.minimum(low, bounds[:2]), *np.maximum(high, bounds[2:])]


def fields(velocities: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot the velocity field at some times, coloured by speed, one row per method."""
    times = sorted(next(iter(velocities.values()))["time"].unique())
    figure, axes = panels(len(velocities), len(times), 1.9, left=0.3, titles=False)
    for row, (method, table) in zip(axes, velocities.items(), strict=True):
        speed = float(np.quantile(np.hypot(table["velocity_x"], table["velocity_y"]), 0.95))
        for axis, time in zip(row, times, strict=True):
            x, y, u, v = (
                table.loc[table["time"] == time, name].to_numpy() for name in ("x", "y", "velocity_x", "velocity_y")
            )
            norm = np.hypot(u, v)
            unit = np.maximum(norm, 1e-12)  # arrows have equal length; colour shows the speed
            axis.quiver(x, y, u / unit, v / unit, norm, cmap="viridis", clim=(0, speed), scale=25, width=0.007)
            axis.set(xticks=[], yticks=[], aspect="equal")
            name_panel(axis, row, axes, label(method), f"t = {time:g}")
    return figure
