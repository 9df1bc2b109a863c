"""Data sets of images, as tables of whole numbers, one column per pixel and channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base import plugins
from pipelines.datasets import Discrete, Image, Parts, Type

if TYPE_CHECKING:
    import pandas as pd

_CHUNK_BYTES = 1 << 23

Bytes = NDArray[np.uint8]
Labelled = tuple[Bytes, Bytes]
"""Pixels `(rows, pixels)`, channel by channel and row by row, and labels `(rows,)`."""


class Settings(plugins.Settings):
    """What is modelled, and how much of it."""

    condition: tuple[Literal["label"], ...] = Field(
        (), max_length=1, description="[label]: models are of the images of a class, p(pixels | label)"
    )
    rows: int | None = Field(
        None, ge=2, description="maximum number of rows of each part, its first ones; null: the official parts"
    )


def parts(
    settings: Settings,
    tables: Mapping[str, Labelled],
    *,
    image: Image,
    columns: Sequence[str],
    words: Sequence[str],
    source: str,
    licence: str,
    files: Mapping[str, str],
) -> Parts:
    """Return the parts of a data set of images.

    Args:
        settings: Settings of the data set.
        tables: Pixels and labels by part.
        image: Sizes of an image.
        columns: Names of the pixels.
        words: Names of the labels, in the order of their numbers.
        source: Origin of the images.
        licence: Their licence.
        files: SHA-256 of each file that was read.
    """
    kept = {part: tuple(one[: settings.rows] for one in both) for part, both in tables.items()}
    whole = all(len(kept[part][1]) == len(labels) for part, (_, labels) in tables.items())

    def chunks(part: str) -> Iterator[pd.DataFrame]:
        import pandas as pd

        pixels, labels = kept[part]
        size = max(1, _CHUNK_BYTES // len(columns))
        for first in range(0, len(pixels), size):
            table = pd.DataFrame(pixels[first : first + size], columns=list(columns))
            if settings.condition:
                table["label"] = np.array(words, dtype=object)[labels[first : first + size]]
            yield table

    types: dict[str, Type] = {**dict.fromkeys(columns, "integer"), **dict.fromkeys(settings.condition, "text")}
    return Parts(
        rows={part: len(labels) for part, (_, labels) in kept.items()},
        chunks=chunks,
        columns=list(columns),
        types=types,
        source=source,
        licence=licence,
        fidelity="official" if whole else "subset",
        notes=f"{image.levels} levels, uniformly dequantised, with new noise in each training batch. Each pixel is "
        "transformed to a normal one by the frequencies of its levels, which the published models had not.",
        discrete_bins=1.0,  # a level is 1 wide
        conditions={"label": list(words)} if settings.condition else {},
        discrete={name: Discrete("steps", 0) for name in columns},
        image=image,
        files=files,
    )
