"""The 8x8 handwritten digits that scikit-learn ships, dequantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.base import plugins
from pipelines.datasets import Array, Dataset

LEVELS = 17  # a pixel counts the dark ones among 16 finer pixels: 0..16
SPLIT_SEED = 0  # the table is ordered by writer, so the split shuffles it, with a fixed seed


class Settings(plugins.Settings):
    """Sizes of the validation and test parts; the remaining rows of 1,797 are for training."""

    val: int = Field(180, ge=1, le=800, description="validation rows")
    test: int = Field(360, ge=1, le=800, description="test rows")


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    r"""Dequantise integer pixels $k \in \{0..16\}$ uniformly to $[0, 1)$.

    $$ x = (k + u) / 17, \quad u \sim U[0, 1), \qquad
       \text{bits/dim} = \frac{-\log p(x)}{64 \ln 2} + \log_2 17 $$

    which is an upper bound on the bits of the discrete image (Theis et al. 2016, arXiv 1511.01844).
    The split is fixed; `rng` only draws the noise $u$.

    >>> data = build(Settings(), rng=np.random.default_rng(0), mirror=None)
    >>> data.train.shape, data.val.shape, data.test.shape
    ((1257, 64), (180, 64), (360, 64))
    """
    from sklearn.datasets import load_digits

    pixels: Array = np.asarray(load_digits().data, dtype=np.float64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
    rows = (pixels[order] + rng.random(pixels.shape)) / LEVELS
    test, val, train = np.split(rows, [settings.test, settings.test + settings.val])
    return Dataset(
        train=train,
        val=val,
        test=test,
        columns=[f"pixel_{row}{column}" for row in range(8) for column in range(8)],
        source="scikit-learn load_digits (UCI 80, the test part of optdigits: E. Alpaydin, C. Kaynak)",
        licence="CC BY 4.0",
        fidelity="subset",
        notes="1,797 of the 5,620 images of UCI 80, uniformly dequantised from 17 levels; own fixed split.",
        discrete_bins=float(LEVELS),
    )
