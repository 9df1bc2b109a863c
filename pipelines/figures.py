"""The report's pictures, each a function of tables that returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from zlib import crc32

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipelines.names import label, split
from pipelines.summary import Cells, Score, over_floor, scores

TRUTH, MODEL, START, WALL = "#444444", "#1f77b4", "#d62728", "#bbbbbb"
COLOURS = {
    "cfm": "C0",
    "ot_cfm": "C1",
    "mc_cfm": "C5",
    "td_cfm": "C1",
    "td_cfm_coupled": "C2",
    "td2_cfm": "C0",
    "td_dd": "C6",
    "td2_dd": "C4",
    "gan": "C8",
    "vae": "C9",
    "oracle": TRUTH,
}
MARKERS, LINES = "os^Dv<>", ("-", "--", ":", "-.")
SHOWN_STARTS = 3
SHOWN_DIGITS = 24
ACROSS = 6  # methods beside the truth in a row of panels; more are wrapped

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110})


def style(method: str) -> dict[str, Any]:
    """Colour, marker and line of a method: a colour of its own, whoever else is drawn, shared by its variants."""
    base, variant = split(method)
    number = sum(variant.encode())
    colour = COLOURS.get(base) or f"C{crc32(base.encode()) % 10}"
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)]}


def _panels(
    rows: int, columns: int, size: float = 2.1, *, left: float = 0.05, aspect: float = 1.0, titles: bool = True
) -> tuple[Figure, np.ndarray]:
    """Panels with room for a title above each, or only above the first row; laid out by hand, since matplotlib takes
    seconds for many.

    Arguments:
        size, aspect: the width of a panel in inches, and its height in widths.
    """
    title, gap = 0.24, 0.06
    between, tall = title if titles else gap, size * aspect
    width, height = left + columns * (size + gap), title + rows * (tall + between) - between + gap
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - gap / width,
        bottom=gap / height,
        top=1 - title / height,
        wspace=gap / size,
        hspace=between / tall,
    )
    return figure, axes


def _name(axis: Axes, row: np.ndarray, axes: np.ndarray, left: str, top: str) -> None:
    """The name of a row beside its first panel, and of a column above its first one."""
    if axis is row[0]:
        axis.set_ylabel(left)
    if row[0] is axes[0, 0]:
        axis.set_title(top)


def _scatter(axes: Axes, table: pd.DataFrame, colour: str, limits: Sequence[float]) -> None:
    axes.scatter(table.iloc[:, 0], table.iloc[:, 1], s=2, alpha=0.35, color=colour, linewidths=0, rasterized=True)
    axes.set(xlim=limits[0::2], ylim=limits[1::2], xticks=[], yticks=[], aspect="equal")


def around(table: pd.DataFrame, margin: float = 0.1) -> list[float]:
    """x0, y0, x1, y1 around the first two columns."""
    low, high = table.iloc[:, :2].min().to_numpy(), table.iloc[:, :2].max().to_numpy()
    pad = margin * (high - low)
    return [*(low - pad), *(high + pad)]


def _blocks(methods: Sequence[str]) -> list[list[str]]:
    """Methods in rows of nearly equal length."""
    count = max(1, math.ceil(len(methods) / ACROSS))
    return [list(block) for block in np.array_split(np.array(methods, dtype=object), count)]


def outside(table: pd.DataFrame, limits: Sequence[float]) -> float:
    """The share of rows whose first two columns are outside of x0, y0, x1, y1, or are not finite.

    >>> outside(pd.DataFrame({"x": [0.0, 0.5, 2.0, 0.0], "y": [0.0, 1.0, 0.0, -3.0]}), [-1, -1, 1, 1])
    0.5
    """
    points = table.iloc[:, :2].to_numpy()
    return 1 - float(((points >= limits[:2]) & (points <= limits[2:])).all(1).mean()) if len(points) else 0.0


def _count_outside(axis: Axes, table: pd.DataFrame, limits: Sequence[float]) -> None:
    """Say in a panel how many of its points it cannot show."""
    share = outside(table, limits)
    if share:
        text = "<1 % outside" if share < 0.01 else f"{100 * share:.0f} % outside"
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axis.text(0.03, 0.03, text, transform=axis.transAxes, fontsize=7.5, color=START, bbox=box)


def _draw_walls(axis: Axes, walls: Sequence[Sequence[float]], colour: str = WALL) -> None:
    for x0, y0, x1, y1 in walls:
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color=colour))
    for side in axis.spines.values():
        side.set_visible(True)


def _title(axis: Axes, method: str, diverged: Collection[str]) -> None:
    """The name of a method, with a mark if it diverged."""
    name = "truth" if method == "truth" else label(method)
    axis.set_title(f"{name} (diverged)" if method in diverged else name, color=START if method in diverged else "black")


def densities(test: Mapping[str, pd.DataFrame], samples: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Test rows and the samples of every method, one row a 2-D data set."""
    methods = list(next(iter(samples.values())))
    figure, axes = _panels(len(test), 1 + len(methods))
    for row, (name, data) in zip(axes, test.items(), strict=True):
        limits = around(data)
        for axis, what, table in zip(
            row, ["data", *methods], [data, *(samples[name][m] for m in methods)], strict=True
        ):
            _scatter(axis, table.head(len(data)), TRUTH if what == "data" else MODEL, limits)
            axis.set_title(f"{name}: {what if what == 'data' else label(what)}")
    return figure


def digits(test: pd.DataFrame, samples: Mapping[str, pd.DataFrame]) -> Figure:
    """Images of 8 x 8 pixels, true and sampled."""
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
    """Where particles are at some times, one row a method.

    With `bounds` all panels show these and the noise of t = 0, and count what lies outside; else each row its own.
    """
    times = sorted({time for table in particles.values() for time in table["time"]})
    limits, aspect = None, 1.0
    if bounds is not None:
        first = next(iter(particles.values()))
        limits = _with_noise(first[first["time"] == times[0]], bounds)
        aspect = (limits[3] - limits[1]) / (limits[2] - limits[0])
    figure, axes = _panels(len(particles), len(times), 1.6, left=0.3, aspect=aspect, titles=False)
    for row, (method, table) in zip(axes, particles.items(), strict=True):
        shown = limits or around(table)
        for axis, time in zip(row, times, strict=True):
            now = table[table["time"] == time]
            _draw_walls(axis, walls)
            if walls and bounds is not None:
                x0, y0, x1, y1 = bounds
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=WALL))
            _scatter(axis, now, MODEL, shown)
            _count_outside(axis, now, shown)
            if start is not None:
                axis.plot(*start, marker="o", color=START, markersize=4)
            _name(axis, row, axes, label(method), f"t = {time:g}")
    return figure


def _with_noise(noise: pd.DataFrame, bounds: Sequence[float]) -> list[float]:
    """The bounds, widened to where all but the last percents of the noise are."""
    low, high = (noise.iloc[:, :2].quantile(q).to_numpy() for q in (0.01, 0.99))
    return [*np.minimum(low, bounds[:2]), *np.maximum(high, bounds[2:])]


def fields(velocities: Mapping[str, pd.DataFrame]) -> Figure:
    """The velocity field at some times, coloured by speed, one row a method."""
    times = sorted(next(iter(velocities.values()))["time"].unique())
    figure, axes = _panels(len(velocities), len(times), 1.9, left=0.3, titles=False)
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
            _name(axis, row, axes, label(method), f"t = {time:g}")
    return figure


def occupancy(
    truth: pd.DataFrame,
    samples: Mapping[str, pd.DataFrame],
    starts: pd.DataFrame,
    bounds: Sequence[float],
    walls: Sequence[Sequence[float]],
    diverged: Collection[str] = (),
) -> Figure:
    """Where the policy will be, from some start states (red): the truth and every method, with walls drawn.

    Many methods are wrapped, with the truth before each row of them. Each panel says what share it cannot show.
    """
    blocks = _blocks(list(samples))
    shown = min(SHOWN_STARTS if len(blocks) == 1 else SHOWN_STARTS - 1, len(starts))
    if not walls:  # an unbounded space: what is drawn decides
        bounds = around(truth[truth["start"] < shown])
    wrapped = len(blocks) > 1
    figure, axes = _panels(len(blocks) * shown, 1 + max(map(len, blocks)), 1.5 if wrapped else 1.9, titles=wrapped)
    for number, block in enumerate(blocks):
        for start, row in enumerate(axes[number * shown : (number + 1) * shown]):
            for axis, method in zip(row, ["truth", *block], strict=False):
                table = truth if method == "truth" else samples[method]
                table = table[table["start"] == start]
                _draw_walls(axis, walls)
                _scatter(axis, table, TRUTH if method == "truth" else MODEL, bounds)
                _count_outside(axis, table, bounds)
                axis.plot(*starts.iloc[start, :2], marker="o", color=START, markersize=4)
                if start == 0:
                    _title(axis, method, diverged)
            for axis in row[1 + len(block) :]:
                axis.axis("off")
    return figure


def value_maps(
    table: pd.DataFrame, bounds: Sequence[float], walls: Sequence[Sequence[float]], diverged: Collection[str] = ()
) -> Figure:
    """V(s, pi(s)) at rest by position, true and by every method, with the error of each below it.

    All values share the colours of the true ones' range; errors share theirs, which leaves out the largest.
    """
    truth = table[table["method"] == "truth"].set_index(["y", "x"])["value"]
    by_method = {str(m): rows.set_index(["y", "x"])["value"] for m, rows in table.groupby("method", sort=False)}
    methods = [m for m in by_method if m != "truth"]
    errors = {m: by_method[m] - truth for m in methods}
    low, high = float(truth.min()), float(truth.max())
    kept = [errors[m].abs() for m in methods if m not in diverged] or [pd.Series([1.0])]
    # one method that is far off should not hide the others' errors
    largest = min(float(pd.concat(kept).quantile(0.98)), high - low) or 1.0
    blocks = _blocks(methods)
    figure, axes = _panels(2 * len(blocks), 1 + max(map(len, blocks)), 1.7)
    for values, below, block in zip(axes[0::2], axes[1::2], blocks, strict=True):
        for axis, method in zip(values, ["truth", *block], strict=False):
            colours = _map(axis, by_method[method], bounds, walls, cmap="viridis", vmin=low, vmax=high)
            _title(axis, method, diverged)
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
    """Colours at the positions (y, x) of the index of a series, nothing where it has none."""
    cells = values.unstack()
    mesh = axis.pcolormesh(cells.columns, cells.index, cells.to_numpy(), shading="nearest", rasterized=True, **colours)
    _draw_walls(axis, walls, "#777777")
    axis.set(xlim=bounds[0::2], ylim=bounds[1::2], xticks=[], yticks=[], aspect="equal")
    return mesh


def curves(logs: Mapping[str, pd.DataFrame], terms: Mapping[str, str]) -> Figure:
    """Terms of the loss over training, one panel a term, one line a method.

    A panel is logarithmic if some line in it is positive; then what is not positive is not drawn.
    """
    figure, axes = plt.subplots(1, len(terms), figsize=(4.6 * len(terms) + 1.2, 2.9), squeeze=False)
    figure.subplots_adjust(left=0.7 / (4.6 * len(terms) + 1.2), right=1 - 1.4 / (4.6 * len(terms) + 1.2), bottom=0.17)
    lines = {}
    for axis, (term, name) in zip(axes[0], terms.items(), strict=True):
        positive = False
        for method, table in logs.items():
            if term in table and table[term].any():
                smooth = table[term].rolling(5, min_periods=1).mean()
                look = {key: value for key, value in style(method).items() if key != "marker"}
                lines[label(method)] = axis.plot(table["step"], smooth, linewidth=1.2, **look)[0]
                positive |= bool((smooth > 0).all())
        axis.set(xlabel="step", title=name, yscale="log" if positive else "linear")
        if positive:
            _plain_ticks(axis.yaxis)
    if lines:
        figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=8, loc="center right")
    return figure


def against_floor(metrics: Mapping[str, Cells]) -> Figure:
    """EMD of every method over the floor of its data, on a logarithmic axis: 1 is as good as true samples.

    Whiskers are the intervals; a cross at the right edge is a method that diverged.
    """
    found = {place: over_floor(cells) for place, cells in metrics.items()}
    methods = list(dict.fromkeys(method for rows in found.values() for method in rows))
    kept = [s for rows in found.values() for s in rows.values() if not s.diverged]
    edge = 2 * max((s.mean for s in kept), default=5.0)  # an interval of two seeds may be much longer
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
        xlim=(min([0.7, *(0.8 * s.mean for s in kept)]), 1.15 * edge),
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
    """Powers of ten and their double, triple and five-fold, as plain numbers, for a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


def _whisker(axis: Axes, y: float, method: str, score: Score, edge: float) -> Artist:
    look = style(method)
    if score.diverged:
        axis.plot(edge, y, marker="x", color=look["color"], markersize=7, markeredgewidth=2, linestyle="none")
    if score.low is not None and score.high is not None and not score.diverged:
        axis.plot([max(score.low, 1e-3), score.high], [y, y], color=look["color"], linewidth=1.3)
    drawn = math.nan if score.diverged else score.mean  # for the legend
    return axis.plot(drawn, y, marker=look["marker"], color=look["color"], markersize=4, linestyle="none")[0]


def horizons(cells: Mapping[float, Cells]) -> Figure:
    """MSE(V) and EMD over its floor against the effective horizon 1 / (1 - gamma), one line a method with two points.

    Arguments:
        cells: the metrics at each gamma.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    handles = {}
    panels = (
        ("MSE(V)", {gamma: scores(c, "mse_v") for gamma, c in cells.items()}),
        ("EMD / floor", {gamma: over_floor(c) for gamma, c in cells.items()}),
    )
    for axis, (name, found) in zip(axes, panels, strict=True):
        means = [s.mean for f in found.values() for s in f.values() if not s.diverged]
        top = 3 * max(means, default=1.0)
        for method in dict.fromkeys(method for f in found.values() for method in f):
            points = {1 / (1 - gamma): f[method] for gamma, f in found.items() if method in f}
            if len(points) > 1:
                handles[method] = _line(axis, points, method, top)
        if name == "MSE(V)":
            floor = [cells[gamma].get("floor", {}).get("mse_v", math.nan) for gamma in cells]
            axis.plot([1 / (1 - gamma) for gamma in cells], floor, color=TRUTH, linewidth=1, linestyle="--")
        else:
            axis.axhline(1, color=TRUTH, linewidth=1, linestyle="--")
        ticks = [1 / (1 - gamma) for gamma in cells]
        axis.set(xscale="log", yscale="log", xlabel="effective horizon 1 / (1 − γ), transitions", ylabel=name)
        _plain_ticks(axis.yaxis)
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    names = [label(m) for m in handles]
    axes[1].legend(handles.values(), names, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _line(axis: Axes, points: Mapping[float, Score], method: str, top: float) -> Artist:
    """A line through what did not diverge, its intervals as a band, and a cross at the top for the rest."""
    look = style(method)
    kept = {x: score for x, score in points.items() if not score.diverged}
    drawn = axis.plot(list(kept), [s.mean for s in kept.values()], markersize=4, linewidth=1.3, **look)[0]
    for x, s in kept.items():
        if s.low is not None and s.high is not None:
            low = s.low if s.low > 0 else s.mean / 10  # that of two seeds may reach below zero
            axis.plot([x, x], [low, min(s.high, top)], color=look["color"], linewidth=1, alpha=0.6)
    lost = [x for x, score in points.items() if score.diverged]
    axis.plot(lost, [top] * len(lost), marker="x", color=look["color"], markeredgewidth=2, linestyle="none")
    return drawn
