"""An S of two arcs with Gaussian noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.datasets import Array, Dataset, GeneratedSettings, generated, scaled


class Settings(GeneratedSettings):
    """Sizes, noise and scale of the S."""

    noise: float = Field(0.05, ge=0, le=1, description="standard deviation of the noise, in radii of an arc")
    scale: float = Field(1.5, gt=0, le=100, description="radius of an arc after scaling")
    deviation: float | None = Field(
        None, gt=0, le=100, description="centre the rows and give all coordinates together this standard deviation"
    )


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    r"""Draw the first and the last coordinate of scikit-learn's `make_s_curve`.

    $$ X = s\,(c + N(0, \sigma^2 I)), \quad \theta \sim U(-\tfrac32 \pi, \tfrac32 \pi), \quad
       c = (\sin\theta, \operatorname{sign}(\theta) (\cos\theta - 1)) $$

    With scale 1.5 and noise .05 this is the data set of torchcfm's runner; with deviation 7 and noise .1 that of the
    diffusion Schrödinger bridge of De Bortoli et al. (2021).

    >>> build(Settings(train=5, val=1, test=1), rng=np.random.default_rng(0), mirror=None).train.shape
    (5, 2)
    """

    def draw(n: int) -> Array:
        angle = rng.uniform(-1.5 * np.pi, 1.5 * np.pi, n)
        curve = np.stack([np.sin(angle), np.sign(angle) * (np.cos(angle) - 1)], -1)
        curve = settings.scale * (curve + settings.noise * rng.standard_normal((n, 2)))
        return scaled(curve, settings.deviation)

    return generated(settings, draw, "s_curve", "make_s_curve of scikit-learn without its second coordinate.")
