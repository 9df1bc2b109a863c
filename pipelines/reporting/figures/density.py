"""Figures of density models: samples in the plane, pairs of columns, histograms, digits, trajectories and fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

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
    style,
)
from pipelines.reporting.labels import label

SHOWN_DIGITS = 24
SHOWN_DOWN, SHOWN_ACROSS = 8, 10
SHOWN_GROUPS, SHOWN_COLUMNS, SHOWN_PAIRED = 6, 12, 4


def groups(condition: Mapping[str, Any], test: pd.DataFrame) -> Callable[[pd.DataFrame], pd.Series[Any]]:
    """Return a function that gives the group of each row by a condition, as categories in the order of the panels.

    Words are groups, the `SHOWN_GROUPS` most frequent ones of the test rows; other rows have none. Numbers make three
    groups of about as many test rows, or fewer where they repeat.

    Args:
        condition: Description of the condition.
        test: Test rows.
    """
    name = condition["name"]
    if condition["kind"] == "words":
        words = test[name].astype(str).value_counts().index[:SHOWN_GROUPS]
        kinds = {word: f"{name} = {word}" for word in words}
        return lambda table: pd.Series(
            pd.Categorical(table[name].astype(str).map(kinds), [*kinds.values()]), table.index
        )
    cuts = sorted(set(test[name].quantile([1 / 3, 2 / 3])) - {test[name].min()})
    ends = [f"{name} < {cuts[0]:.4g}", f"{name} ≥ {cuts[-1]:.4g}"] if cuts else [name]
    bands = [ends[0], *(f"{name} {low:.4g} to {high:.4g}" for low, high in pairwise(cuts)), *ends[1:]]
    return lambda table: pd.Series(pd.Categorical(np.array(bands)[np.digitize(table[name], cuts)], bands), table.index)


def planes(tables: Mapping[str, pd.DataFrame], group: Mapping[str, pd.Series[Any]] | None = None) -> Figure:
    """Plot the first two columns of the data and of the samples of every method, one row per group.

    Args:
        tables: Rows by method; those of `data` come first.
        group: Group of each row by method; all rows are one group by default.
    """
    data = tables["data"]
    found = [""] if group is None else list(group["data"].cat.categories)
    left = 0.5 if group is None else 0.7
    figure, axes = panels(len(found), len(tables), 1.9, left=left, bottom=0.36, titles=False)
    limits = around(data)
    for row, name in zip(axes, found, strict=True):
        for axis, (what, table) in zip(row, tables.items(), strict=True):
            shown = table if group is None else table[group[what] == name]
            shown = shown.head(len(data) if group is None else int((group["data"] == name).sum()))
            scatter(axis, shown, TRUTH if what == "data" else MODEL, limits)
            count_not_shown(axis, shown, limits)
            name_panel(axis, row, axes, shorten(name), label(what))
            axis.xaxis.set_major_locator(MaxNLocator(3))
            axis.tick_params(labelsize=7)
            axis.xaxis.get_offset_text().set_fontsize(7)
        row[0].yaxis.set_major_locator(MaxNLocator(3))
    return figure


def pairs(
    tables: Mapping[str, pd.DataFrame], names: Sequence[str], group: Mapping[str, pd.Series[Any]] | None = None
) -> Figure:
    """Plot pairs of columns of the data and of the samples of every method, one row each, coloured by group.

    Args:
        tables: Rows by method; those of `data` come first.
        names: Columns.
        group: Group of each row by method.
    """
    data, across = tables["data"], list(combinations(names, 2))
    found = [] if group is None else list(group["data"].cat.categories)
    right = 0.06 if group is None else 0.2 + 0.075 * max(map(len, map(shorten, found)))
    figure, axes = panels(len(tables), len(across), 1.6, left=0.3, right=right, titles=False, lines=2)
    for row, (what, table) in zip(axes, tables.items(), strict=True):
        shown = table.head(len(data))
        colour = TRUTH if what == "data" else MODEL
        for axis, (x, y) in zip(row, across, strict=True):
            limits = around(data[[x, y]])
            parts = {"": colour} if group is None else {name: f"C{i}" for i, name in enumerate(found)}
            for name, drawn in parts.items():
                part = shown if group is None else shown[group[what].head(len(data)) == name]
                scatter(axis, part[[x, y]], drawn, limits)
            axis.set_aspect("auto")
            count_not_shown(axis, shown[[x, y]], limits)
            name_panel(axis, row, axes, label(what), f"{shorten(y, 18)}\nover {shorten(x, 18)}")
    for axis in axes[0]:
        axis.title.set_fontsize(8)
    if group is not None:
        handles = [Line2D([], [], color=f"C{i}", marker="o", linestyle="none", markersize=4) for i in range(len(found))]
        figure.legend(handles, [shorten(name) for name in found], frameon=False, fontsize=8, loc="center right")
    return figure


def histograms(shown: Mapping[str, Mapping[str, pd.Series[float]]]) -> Figure:
    """Plot the distribution of columns: the data as an area, the samples of every method as a line.

    Args:
        shown: Values by panel, then by method; those of `data` come first.
    """
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure, axes = panels(down, across, 2.5, left=0.1, right=1.7, bottom=0.3, aspect=0.55)
    lines: dict[str, Any] = {}
    for axis, (name, values) in zip(axes.flat, shown.items(), strict=False):
        low, high = values["data"].min(), values["data"].max()
        pad = 0.1 * (high - low) if high > low else 1.0
        bins = np.linspace(low - pad, high + pad, int(np.clip(2 * len(values["data"]) ** 0.5, 8, 40)) + 1)
        for what, column in values.items():
            inside = np.histogram(column, bins)[0] / max(1, len(column))  # the share beyond the panel is missing
            if what == "data":
                lines["data"] = axis.stairs(inside, bins, fill=True, color="#cccccc")
            else:
                look = {key: value for key, value in style(what).items() if key != "marker"}
                lines[label(what)] = axis.stairs(inside, bins, linewidth=1.2, **look)
        axis.set(title=shorten(name), yticks=[], xlim=(bins[0], bins[-1]))
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.ticklabel_format(useOffset=True)
        axis.spines["left"].set_visible(False)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, loc="center right")
    return figure


def shorten(name: str, limit: int = 24) -> str:
    """Return a name that fits a panel.

    >>> shorten("age"), shorten("the share of people that moved house")
    ('age', 'the share of pe…ed house')
    """
    keep = limit - 1 - limit // 3
    return name if len(name) <= limit else f"{name[:keep]}…{name[-(limit // 3) :]}"


def digits(test: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw images of 8 x 8 pixels in [0, 1], true and sampled."""
    return _strips({what: table.to_numpy() for what, table in {"data": test, **samples}.items()}, 0, 1)


def patches(test: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw patches of 8 x 8 pixels of mean 0, true and sampled, whose last pixel the others determine."""
    whole = {
        what: np.column_stack([table.to_numpy(), -table.sum(axis=1)])
        for what, table in {"data": test, **samples}.items()
    }
    edge = 2.5 * float(whole["data"].std())
    return _strips(whole, -edge, edge)


def _strips(rows: Mapping[str, NDArray[np.float64]], low: float, high: float) -> Figure:
    """Draw rows of 64 pixels as images side by side."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.85 * len(rows)), squeeze=False, layout="constrained")
    for axis, (what, pixels) in zip(axes[:, 0], rows.items(), strict=True):
        images = pixels[:SHOWN_DIGITS, :64].reshape(-1, 8, 8)
        axis.imshow(
            np.hstack([np.pad(image, 1, constant_values=high) for image in images]),
            cmap="gray_r",
            vmin=low,
            vmax=high,
        )
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label(what), rotation=0, ha="right", va="center")
    return figure


def images(
    tables: Mapping[str, pd.DataFrame],
    columns: Sequence[str],
    sizes: Mapping[str, int],
    words: Mapping[str, pd.Series[Any]] | None = None,
) -> Figure:
    """Draw images of the data and of every method, one panel each, with one row of images per word.

    Args:
        tables: Rows by method.
        columns: Pixels, channel by channel and row by row.
        sizes: Numbers of `channels`, `height`, `width` and `levels`.
        words: Word of each row by method; all rows are of one kind by default.
    """
    shape = sizes["channels"], sizes["height"], sizes["width"]
    known = [""] if words is None else sorted({word for series in words.values() for word in series})
    down = SHOWN_DOWN if words is None else len(known)
    figure, axes = plt.subplots(
        1, len(tables), figsize=(3.2 * len(tables), 0.3 * down + 0.4), squeeze=False, layout="constrained"
    )
    for axis, (what, table) in zip(axes[0], tables.items(), strict=True):
        sheet = np.ones((down, SHOWN_ACROSS, shape[1] + 1, shape[2] + 1, shape[0]))
        for i in range(down):
            rows = table if words is None else table[words[what] == known[i]]
            start = i * SHOWN_ACROSS if words is None else 0
            pixels = rows[list(columns)].iloc[start : start + SHOWN_ACROSS].to_numpy(float) / sizes["levels"]
            drawn = pixels.reshape(-1, *shape).transpose(0, 2, 3, 1).clip(0, 1)
            sheet[i, : len(drawn), :-1, :-1] = 1 - drawn if shape[0] == 1 else drawn
        whole = sheet.transpose(0, 2, 1, 3, 4).reshape(down * (shape[1] + 1), SHOWN_ACROSS * (shape[2] + 1), shape[0])
        axis.imshow(whole.repeat(3, 2) if shape[0] == 1 else whole)
        places = (np.arange(down) + 0.5) * (shape[1] + 1)
        axis.set(xticks=[], yticks=[] if words is None else places, title=label(what))
        if words is not None:
            axis.set_yticklabels(map(shorten, known))
        axis.tick_params(length=0, labelsize=7)
    return figure


def paths(
    particles: Mapping[str, pd.DataFrame],
    *,
    clock: str = "time",
    walls: Sequence[Sequence[float]] = (),
    bounds: Sequence[float] | None = None,
    start: Sequence[float] | None = None,
) -> Figure:
    """Plot the states of particles at some times, one row per method.

    With `bounds`, all panels show these bounds and the noise of t = 0, and count the points beyond them; otherwise each
    row has its own limits. `clock` is the column of the time.
    """
    times = sorted({time for table in particles.values() for time in table[clock]})
    limits, aspect = None, 1.0
    if bounds is not None:
        first = next(iter(particles.values()))
        limits = _with_noise(first[first[clock] == times[0]], bounds)
        aspect = (limits[3] - limits[1]) / (limits[2] - limits[0])
    figure, axes = panels(len(particles), len(times), 1.6, left=0.3, aspect=aspect, titles=False)
    for row, (method, table) in zip(axes, particles.items(), strict=True):
        shown = limits or around(table)
        for axis, time in zip(row, times, strict=True):
            now = table[table[clock] == time]
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
