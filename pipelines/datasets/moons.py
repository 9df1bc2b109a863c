"""Two interleaved half circles with Gaussian noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.datasets import Array, Dataset, GeneratedSettings, generated, scaled


class Settings(GeneratedSettings):
    """Sizes and noise of the moons."""

    noise: float = Field(0.05, ge=0, le=1, description="standard deviation of the noise, in radii of a moon")
    scale: float = Field(2.0, gt=0, le=100, description="radius of a moon after scaling")
    deviation: float | None = Field(
        None, gt=0, le=100, description="centre the rows and give all coordinates together this standard deviation"
    )


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    r"""Draw the moons of scikit-learn's `make_moons`, with independent angles and moons.

    $$ X = s\,(c + N(0, \sigma^2 I)) - (s/2, 0), \quad \theta \sim U(0, \pi), \quad
       c = (\cos\theta, \sin\theta) \text{ or } (1 - \cos\theta, \tfrac12 - \sin\theta) $$

    With scale 2 and noise .05 this is the data set of torchcfm's runner, except that torchcfm uses a grid of angles.
    With deviation 7 and noise .1 it is that of the diffusion Schrödinger bridge of De Bortoli et al. (2021).

    >>> build(Settings(train=5, val=1, test=1), rng=np.random.default_rng(0), mirror=None).train.shape
    (5, 2)
    """

    def draw(n: int) -> Array:
        angle = rng.uniform(0, np.pi, n)
        lower = rng.random(n) < 0.5
        upper_moon = np.stack([np.cos(angle), np.sin(angle)], -1)
        lower_moon = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], -1)
        moons: Array = np.where(lower[:, None], lower_moon, upper_moon) + settings.noise * rng.standard_normal((n, 2))
        moons *= settings.scale
        moons -= np.array([settings.scale / 2, 0.0])
        return scaled(moons, settings.deviation)

    return generated(settings, draw, "moons", "make_moons of scikit-learn with random instead of gridded angles.")
