"""A checkerboard: uniform on every other square, with a known density."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.datasets import Array, Dataset, GeneratedSettings, generated


class Settings(GeneratedSettings):
    """Sizes and shape of the checkerboard."""

    squares: int = Field(4, ge=2, le=64, multiple_of=2, description="squares along a side, even")
    half_width: float = Field(4.0, gt=0, le=100, description="the board is [-half_width, half_width]^2")


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    """Draw uniformly from the squares whose column and row are both even or both odd.

    Four squares a side on [-4, 4]^2 is the checkerboard of FFJORD and of the flow matching papers.

    >>> build(Settings(train=5, val=1, test=1), rng=np.random.default_rng(0), mirror=None).train.shape
    (5, 2)
    """

    def draw(n: int) -> Array:
        column = rng.integers(0, settings.squares, n)
        row = 2 * rng.integers(0, settings.squares // 2, n) + column % 2
        inside = np.stack([column, row], -1) + rng.random((n, 2))
        return settings.half_width * (2 * inside / settings.squares - 1)

    return generated(settings, draw, "checkerboard", "Uniform on half of the squares; entropy = log of their area.")


def log_prob(settings: Settings, x: Array) -> Array:
    """Return the exact log-density, shape (n,): minus the log of the covered area on its squares, -inf elsewhere.

    >>> log_prob(Settings(), np.array([[1.0, 1.0], [1.0, -1.0]])).round(3)
    array([-3.466,   -inf])
    """
    cell = np.floor((x / settings.half_width + 1) / 2 * settings.squares)
    on_board = ((cell >= 0) & (cell < settings.squares)).all(-1)
    covered = on_board & (cell.sum(-1) % 2 == 0)
    return np.where(covered, -np.log(2 * settings.half_width**2), -np.inf)
