"""Figures of successor models: occupancy and maps of values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from pipelines.reporting.figures.style import (
    MODEL,
    START,
    TRUTH,
    around,
    count_not_shown,
    draw_walls,
    in_rows,
    panels,
    scatter,
    set_title,
)

SHOWN_STARTS = 3


def occupancy(
    truth: pd.DataFrame | None,
    samples: Mapping[str, pd.DataFrame],
    starts: pd.DataFrame,
    bounds: Sequence[float],
    walls: Sequence[Sequence[float]],
    diverged: Collection[str] = (),
) -> Figure:
    """Plot future states of the policy from some start states (red): the truth, if there is one, and every method.

    Many methods are split into several rows, each with the truth first. Each panel states the share not shown.
    """
    first = {} if truth is None else {"truth": truth}
    blocks = in_rows(list(samples))
    shown = min(SHOWN_STARTS if len(blocks) == 1 else SHOWN_STARTS - 1, len(starts))
    if not walls and truth is not None:  # an unbounded space: the truth determines the limits
        bounds = around(truth[truth["start"] < shown])
    several = len(blocks) > 1
    figure, axes = panels(
        len(blocks) * shown, len(first) + max(map(len, blocks)), 1.5 if several else 1.9, titles=several
    )
    for number, block in enumerate(blocks):
        for start, row in enumerate(axes[number * shown : (number + 1) * shown]):
            for axis, method in zip(row, [*first, *block], strict=False):
                table = (first | dict(samples))[method]
                table = table[table["start"] == start]
                draw_walls(axis, walls)
                scatter(axis, table, TRUTH if method == "truth" else MODEL, bounds)
                count_not_shown(axis, table, bounds)
                axis.plot(*starts.iloc[start, :2], marker="o", color=START, markersize=4)
                if start == 0:
                    set_title(axis, method, diverged)
            for axis in row[len(first) + len(block) :]:
                axis.axis("off")
    return figure


def value_maps(
    table: pd.DataFrame, bounds: Sequence[float], walls: Sequence[Sequence[float]], diverged: Collection[str] = ()
) -> Figure:
    """Plot V(s, pi(s)) at rest by position, true and by every method, with its error below.

    All values use the colour range of the true ones. All errors use one range, which cuts off the largest 2 %.
    """
    truth = table[table["method"] == "truth"].set_index(["y", "x"])["value"]
    by_method = {str(m): rows.set_index(["y", "x"])["value"] for m, rows in table.groupby("method", sort=False)}
    methods = [m for m in by_method if m != "truth"]
    errors = {m: by_method[m] - truth for m in methods}
    low, high = float(truth.min()), float(truth.max())
    sizes = [errors[m].abs() for m in methods if m not in diverged] or [pd.Series([1.0])]
    # the large errors of one method should not hide those of the others
    largest = min(float(pd.concat(sizes).quantile(0.98)), high - low) or 1.0
    blocks = in_rows(methods)
    figure, axes = panels(2 * len(blocks), 1 + max(map(len, blocks)), 1.7)
    for values, below, block in zip(axes[0::2], axes[1::2], blocks, strict=True):
        for axis, method in zip(values, ["truth", *block], strict=False):
            colours = _map(axis, by_method[method], bounds, walls, cmap="viridis", vmin=low, vmax=high)
            set_title(axis, method, diverged)
        for axis, method in zip(below[1:], block, strict=False):
            shades = _map(axis, errors[method], bounds, walls, cmap="RdBu_r", vmin=-largest, vmax=largest)
            axis.set_title(f"error, rms {float(np.sqrt((errors[method] ** 2).mean())):.3g}", fontsize=8)
        for place, mappable, name in ((0.68, colours, "V"), (0.25, shades, "error")):
            bar = below[0].inset_axes((0.1, place, 0.8, 0.07))
            figure.colorbar(mappable, cax=bar, orientation="horizontal", extend="both").set_label(name, labelpad=1)
            bar.tick_params(labelsize=7)
        for axis in (below[0], *values[1 + len(block) :], *below[1 + len(block) :]):
            axis.axis("off")
    return figure


def _map(
    axis: Axes, values: pd.Series, bounds: Sequence[float], walls: Sequence[Sequence[float]], **colours: Any
) -> QuadMesh:
    """Draw colours at the positions (y, x) in the index of a series; other positions stay empty."""
    cells = values.unstack()
    mesh = axis.pcolormesh(cells.columns, cells.index, cells.to_numpy(), shading="nearest", rasterized=True, **colours)
    draw_walls(axis, walls, "#777777")
    axis.set(xlim=bounds[0::2], ylim=bounds[1::2], xticks=[], yticks=[], aspect="equal")
    return mesh
