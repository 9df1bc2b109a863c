"""A normal distribution in the plane: the source of most flows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.datasets import Array, Dataset, GeneratedSettings, generated


class Settings(GeneratedSettings):
    """Sizes and standard deviation of the normal distribution."""

    deviation: float = Field(1.0, gt=0, le=100, description="standard deviation of each coordinate")


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    r"""Draw $X \sim N(0, \sigma^2 I)$.

    >>> build(Settings(train=5, val=1, test=1), rng=np.random.default_rng(0), mirror=None).train.shape
    (5, 2)
    """
    return generated(settings, lambda n: settings.deviation * rng.standard_normal((n, 2)), "normal", "")


def log_prob(settings: Settings, x: Array) -> Array:
    r"""Return the exact log-density of $N(0, \sigma^2 I)$, shape (n,).

    >>> float(log_prob(Settings(), np.zeros((1, 2)))[0] + np.log(2 * np.pi))
    0.0
    """
    variance = settings.deviation**2
    value: Array = -(x**2).sum(1) / (2 * variance) - np.log(2 * np.pi * variance)
    return value
