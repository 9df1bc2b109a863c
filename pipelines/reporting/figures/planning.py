"""Figures of planners: the paths of their episodes, coloured by the policy that is followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.reporting.figures.style import START, draw_walls, panels, set_title


def paths(
    tables: Mapping[str, pd.DataFrame],
    bounds: Sequence[float],
    walls: Sequence[Sequence[float]],
    low: Sequence[float],
    high: Sequence[float],
) -> Figure:
    """Plot the first two components of the state along episodes, one panel a method, with the starts in red.

    The hue is the direction of w from the middle of its bounds, the saturation its distance; where w has as many
    components as a point of the plane, each w that is followed is also a dot at its own place.

    Args:
        tables: Rows with `episode`, `step`, the state and then the components of w, by method.
        bounds: Rectangle x0, y0, x1, y1 of a panel.
        walls: Rectangles x0, y0, x1, y1.
        low: Lower bounds of w.
        high: Upper bounds of w.
    """
    figure, axes = panels(1, len(tables), 2.3)
    for axis, (method, table) in zip(axes[0], tables.items(), strict=True):
        draw_walls(axis, walls)
        state, w = (table.filter(regex=f"^{part}_").to_numpy() for part in ("state", "w"))
        shades, episode = colours(w, low, high), table["episode"].to_numpy()
        for number in np.unique(episode):
            here = episode == number
            points, shade = state[here, :2], shades[here]
            lines = np.stack([points[:-1], points[1:]], 1)
            axis.add_collection(LineCollection(list(lines), colors=shade[:-1], linewidths=1.1))
            axis.plot(*points[0], marker="o", color=START, markersize=4)
        if w.shape[1] == 2:
            axis.scatter(*w.T, c=shades, s=9, marker="x", linewidths=0.8)
        axis.set(xlim=bounds[0::2], ylim=bounds[1::2], xticks=[], yticks=[], aspect="equal")
        set_title(axis, method, ())
    return figure


def colours(w: NDArray[np.float64], low: Sequence[float], high: Sequence[float]) -> NDArray[np.float64]:
    """Return a colour for each w, (n, dw) -> (n, 3): its first two components as angle and distance.

    >>> colours(np.array([[0.0, 0.0], [1.0, 0.0]]), [-1.0, -1.0], [1.0, 1.0]).round(2)
    array([[0.85, 0.85, 0.85],
           [0.85, 0.  , 0.  ]])
    """
    middle, half = (np.add(low, high) / 2)[:2], (np.subtract(high, low) / 2)[:2]
    place = (w[:, :2] - middle) / half
    if place.shape[1] == 1:  # on a line there are two directions
        place = np.concatenate([place, np.zeros_like(place)], 1)
    angle, distance = np.arctan2(place[:, 1], place[:, 0]) / (2 * np.pi) % 1, np.hypot(*place.T).clip(0, 1)
    shade: NDArray[np.float64] = hsv_to_rgb(np.stack([angle, distance, np.full(len(w), 0.85)], 1))
    return shade
