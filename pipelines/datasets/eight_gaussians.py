"""Eight Gaussians on a circle: a mixture with a known density."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field
from scipy.special import logsumexp

from pipelines.datasets import Array, Dataset, GeneratedSettings, generated


class Settings(GeneratedSettings):
    """Sizes, radius and noise of the eight Gaussians."""

    radius: float = Field(5.0, gt=0, le=100, description="distance of the centres from the origin")
    # torchcfm passes sqrt(.1) as the variance, so this is the standard deviation of the points in its figures.
    noise: float = Field(0.1**0.25, gt=0, le=10, description="standard deviation of each Gaussian")


def centres(settings: Settings) -> Array:
    """Return the eight centres, shape (8, 2)."""
    angle = np.arange(8) * np.pi / 4
    return settings.radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    r"""Draw $X = \mu_K + \sigma N(0, I)$ with $K$ uniform on the eight centres.

    >>> build(Settings(train=5, val=1, test=1), rng=np.random.default_rng(0), mirror=None).train.shape
    (5, 2)
    """

    def draw(n: int) -> Array:
        return centres(settings)[rng.integers(0, 8, n)] + settings.noise * rng.standard_normal((n, 2))

    return generated(settings, draw, "eight_gaussians", "Radius 5 and noise .1^(1/4) are torchcfm's eight Gaussians.")


def log_prob(settings: Settings, x: Array) -> Array:
    r"""Return the exact log-density $\log \tfrac18 \sum_k N(x; \mu_k, \sigma^2 I)$, shape (n,).

    >>> x = centres(Settings())
    >>> bool(np.ptp(log_prob(Settings(), x)) < 1e-12)  # equal by symmetry
    True
    """
    squared = ((x[:, None, :] - centres(settings)) ** 2).sum(-1) / settings.noise**2
    value: Array = logsumexp(-squared / 2, axis=1) - np.log(8 * 2 * np.pi * settings.noise**2)
    return value
