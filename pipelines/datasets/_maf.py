"""What the preprocessing of Papamakarios et al. 2017 (arXiv 1705.07057) does to several data sets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base import layout, plugins
from pipelines.base.errors import UserError, first_line
from pipelines.datasets import Array

NO_MARGINALS = "The published models had no transforms of single columns."
"""What the notes say where the settings ask for some."""


class Settings(plugins.Settings):
    """Whether columns are transformed first."""

    transform: Literal["none", "marginals"] = Field(
        default="none", description="marginals: each column to a normal distribution by its own"
    )

    @property
    def marginals(self) -> bool:
        """Whether columns are transformed."""
        return self.transform == "marginals"


def load(file: IO[bytes], source: str) -> Array:
    """Return the array of a `.npy` file inside an archive.

    Raises:
        UserError: It is no array of numbers.
    """
    try:
        return np.asarray(np.load(io.BytesIO(file.read()), allow_pickle=False), dtype=np.float64)
    except ValueError as error:
        raise UserError(
            f"{source} cannot be read ({first_line(error)}), expected a NumPy array; replace the archive."
        ) from None


def last_tenth(rows: Array) -> tuple[Array, Array]:
    """Return the rows before the last tenth, and the last tenth.

    >>> [len(part) for part in last_tenth(np.zeros((36488, 1)))]
    [32840, 3648]
    """
    before, last = np.split(rows, [len(rows) - int(0.1 * len(rows))])
    return before, last


def varies(rows: Array) -> NDArray[np.bool_]:
    """Return which columns look continuous: their smallest value occurs at most 5 times.

    >>> varies(np.array([[0.0, i] for i in range(6)])).tolist()
    [False, True]
    """
    found: NDArray[np.bool_] = (rows == rows.min(0)).sum(0) <= 5
    return found


def check_shapes(parts: Sequence[Array], rows: Sequence[int], columns: int, source: str) -> None:
    """Check the numbers of rows of the training, validation and test part, and of columns.

    Raises:
        UserError: One differs.
    """
    found = [part.shape for part in parts]
    wanted = [(number, columns) for number in rows]
    if found != wanted:
        listed = [", ".join(map(str, shapes)) for shapes in (found, wanted)]
        raise UserError(
            f"the {', '.join(layout.PARTS)} rows of {source} have the shapes {listed[0]}, expected {listed[1]}; its "
            "rows or columns have changed, so replace it by the original."
        )


def check_columns(found: int, expected: int, source: str) -> None:
    """Check the number of columns of a source.

    Raises:
        UserError: It differs.
    """
    if found != expected:
        raise UserError(f"{source} has {found} columns, expected {expected}; replace it by the original.")


def check_finite(rows: Array, source: str) -> None:
    """Check that a source has no missing and no infinite numbers.

    Raises:
        UserError: It has.
    """
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise UserError(
            f"{source} has NaN or infinity in {int(bad.sum())} of {len(rows)} rows, first in row "
            f"{int(bad.argmax())}, expected finite numbers; replace it by the original."
        )
