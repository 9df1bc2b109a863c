"""Shared parts of figures: colours and markers of methods, panels and axes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipelines.reporting.labels import label, split

TRUTH, MODEL, START, WALL = "#444444", "#1f77b4", "#d62728", "#bbbbbb"
COLOURS = {
    "cfm": "C0",
    "ot_cfm": "C1",
    "mc_cfm": "C5",
    "td_cfm": "C1",
    "td_cfm_coupled": "C2",
    "td2_cfm": "C0",
    "vp_cfm": "C6",
    "cfm_tuned": "C9",
    "component_cfm": "C6",
    "ffjord": "C5",
    "gaussian": "C7",
    "gaussian_mixture": "C3",
    "kernel_density": "C8",
    "maf": "C2",
    "nsf": "C4",
    "td_dd": "C6",
    "td2_dd": "C4",
    "gan": "C8",
    "vae": "C9",
    "ensemble": "C3",
    "oracle": TRUTH,
}
MARKERS, LINES = "os^Dv<>", ("-", "--", ":", "-.")
ACROSS = 6  # maximum number of methods next to the truth in a row of panels

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110})


def style(method: str) -> dict[str, Any]:
    """Return the colour, marker and line style of a method.

    The colour does not depend on the other methods in a figure and is shared by a method's variants.
    """
    base, variant = split(method)
    number = sum(variant.encode())
    colour = COLOURS.get(base) or f"C{crc32(base.encode()) % 10}"
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)]}


def panels(
    rows: int,
    columns: int,
    size: float = 2.1,
    *,
    left: float = 0.05,
    right: float = 0.06,
    bottom: float = 0.06,
    aspect: float = 1.0,
    titles: bool = True,
    lines: int = 1,
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its panels, with room for a title above each or only above the first row.

    The layout is computed here, because matplotlib's layout engine takes seconds for many panels.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        size: Width of a panel in inches.
        left: Left margin in inches.
        right: Right margin in inches, for a legend.
        bottom: Room below each panel in inches, for the ticks of its axis.
        aspect: Height of a panel divided by its width.
        titles: Whether every panel has a title.
        lines: Lines of a title.
    """
    title, gap = 0.24 + 0.17 * (lines - 1), 0.06
    between, tall = (title if titles else gap) + bottom - 0.06, size * aspect
    width, height = left + columns * (size + gap) - gap + right, title + rows * (tall + between) - between + bottom
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - title / height,
        wspace=gap / size,
        hspace=between / tall,
    )
    return figure, axes


def name_panel(axis: Axes, row: np.ndarray, axes: np.ndarray, left: str, top: str) -> None:
    """Write the name of a row next to its first panel, and the name of a column above its first one."""
    if axis is row[0]:
        axis.set_ylabel(left)
    if row[0] is axes[0, 0]:
        axis.set_title(top)


def scatter(axes: Axes, table: pd.DataFrame, colour: str, limits: Sequence[float]) -> None:
    """Plot the first two columns of a table as points, in equal units unless one axis is much longer than the other."""
    size = min(max(2000 / max(1, len(table)), 2), 10)
    axes.scatter(table.iloc[:, 0], table.iloc[:, 1], s=size, alpha=0.35, color=colour, linewidths=0, rasterized=True)
    width, height = limits[2] - limits[0], limits[3] - limits[1]
    aspect = "equal" if max(width, height) < 2.2 * min(width, height) else "auto"
    axes.set(xlim=limits[0::2], ylim=limits[1::2], xticks=[], yticks=[], aspect=aspect)


def around(table: pd.DataFrame, margin: float = 0.1) -> list[float]:
    """Return limits x0, y0, x1, y1 around the first two columns, with a margin."""
    low, high = table.iloc[:, :2].min().to_numpy(), table.iloc[:, :2].max().to_numpy()
    pad = np.where(high > low, margin * (high - low), 1.0)
    return [*(low - pad), *(high + pad)]


def in_rows(methods: Sequence[str]) -> list[list[str]]:
    """Split methods into rows of nearly equal length."""
    count = max(1, math.ceil(len(methods) / ACROSS))
    return [list(block) for block in np.array_split(np.array(methods, dtype=object), count)]


def share_not_shown(table: pd.DataFrame, limits: Sequence[float]) -> float:
    """Return the share of rows that a panel of limits x0, y0, x1, y1 does not show, those that are not finite included.

    >>> share_not_shown(pd.DataFrame({"x": [0.0, 0.5, 2.0, 0.0], "y": [0.0, 1.0, 0.0, -3.0]}), [-1, -1, 1, 1])
    0.5
    """
    points = table.iloc[:, :2].to_numpy()
    return 1 - float(((points >= limits[:2]) & (points <= limits[2:])).all(1).mean()) if len(points) else 0.0


def count_not_shown(axis: Axes, table: pd.DataFrame, limits: Sequence[float]) -> None:
    """Write into a panel which share of its points is beyond its limits."""
    share = share_not_shown(table, limits)
    if share:
        text = "<1 % not shown" if share < 0.01 else f"{100 * share:.0f} % not shown"
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axis.text(0.03, 0.03, text, transform=axis.transAxes, fontsize=7.5, color=START, bbox=box)


def draw_walls(axis: Axes, walls: Sequence[Sequence[float]], colour: str = WALL) -> None:
    """Draw walls as rectangles, and a frame around the panel."""
    for x0, y0, x1, y1 in walls:
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color=colour))
    for side in axis.spines.values():
        side.set_visible(True)


def set_title(axis: Axes, method: str, diverged: Collection[str]) -> None:
    """Set the title to the display name of a method, marked if it diverged."""
    name = "truth" if method == "truth" else label(method)
    axis.set_title(f"{name} (diverged)" if method in diverged else name, color=START if method in diverged else "black")
