"""Rows of numbers on disk: written in their order, divided into parts, and read again in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int8]

BUCKET = 1 << 24  # bytes of a part that are shuffled in memory
ROWS = 65_536  # rows that are yielded at once
_READ = 1 << 22  # bytes that are read at once


@final
class Rows:
    """Rows of float64 in a file, which may exceed memory.

    Args:
        path: File that is written.
        width: Numbers per row.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width, self.count = path, width, 0
        path.touch()

    def add(self, rows: Array) -> None:
        """Append rows `(n, width)`."""
        with self.path.open("ab") as file:
            np.ascontiguousarray(rows, dtype=np.float64).tofile(file)
        self.count += len(rows)

    def chunks(self) -> Iterator[Array]:
        """Yield the rows in their order."""
        size = max(1, _READ // (8 * self.width)) * self.width
        with self.path.open("rb") as file:
            while len(values := np.fromfile(file, np.float64, size)):
                yield values.reshape(-1, self.width)

    def column(self, index: int) -> Array:
        """Return one column of all rows."""
        return np.concatenate([np.empty(0), *(rows[:, index].copy() for rows in self.chunks())])

    def shuffled(self, rng: np.random.Generator) -> Iterator[Array]:
        """Yield all rows in random order, at most `ROWS` at once, and remove the file.

        Every order has the same probability: each row goes to a file drawn at random, and each of these is shuffled in
        memory. The order depends on the generator alone and not on the sizes of chunks.
        """
        pieces = max(1, -(-self.count * self.width * 8 // BUCKET))
        buckets = [Rows(self.path.with_suffix(f".{piece}"), self.width) for piece in range(pieces)]
        for rows in self.chunks():
            chosen = (rng.random(len(rows)) * pieces).astype(np.int64)
            for piece, bucket in enumerate(buckets):
                bucket.add(rows[chosen == piece])
        self.path.unlink()
        for bucket in buckets:
            rows = np.fromfile(bucket.path, np.float64).reshape(-1, self.width)
            bucket.path.unlink()
            order = rng.permutation(len(rows))
            for first in range(0, len(rows), ROWS):
                yield rows[order[first : first + ROWS]]


def sizes(count: int, val: float, test: float) -> list[int]:
    """Return the numbers of training, validation and test rows.

    >>> sizes(333, 0.15, 0.1)
    [250, 50, 33]
    """
    held_out = [round(count * val), round(count * test)]
    return [count - sum(held_out), *held_out]


def at_random(parts: Sequence[int], rng: np.random.Generator) -> Labels:
    """Return the number of each row's part, drawn at random with exact sizes; one byte per row."""
    labels = np.repeat(np.arange(len(parts), dtype=np.int8), parts)
    rng.shuffle(labels)
    return labels


def by_time(times: Array, parts: Sequence[int]) -> Labels:
    """Return the number of each row's part: the earliest rows are in the first; equal times keep their order.

    >>> by_time(np.array([3.0, 1.0, 2.0, 2.0]), [2, 1, 1]).tolist()
    [2, 0, 0, 1]
    """
    labels = np.empty(len(times), np.int8)
    labels[np.argsort(times, kind="stable")] = np.repeat(np.arange(len(parts), dtype=np.int8), parts)
    return labels
