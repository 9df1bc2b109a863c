"""The likelihood of a Gaussian of full covariance: a check of prepared rows against what the literature states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.base import files, layout
from pipelines.base.errors import UserError

if TYPE_CHECKING:
    from pipelines.datasets import Parts

Array = NDArray[np.float64]


def check(folder: Path, parts: Parts, dataset: str) -> float:
    """Return the negative log-likelihood per test row in nats, if it is the published one.

    Args:
        folder: Folder of the prepared data set.
        parts: Its description, with the published value.
        dataset: Its name, for messages.

    Raises:
        UserError: It differs from the published value by more than its error.
    """
    assert parts.gaussian is not None
    published, error = parts.gaussian
    mean, covariance = moments(folder, parts.columns)
    found = negative_log_likelihood(folder, parts.columns, mean, covariance)
    if not abs(found - published) <= error:
        raise UserError(
            f"a Gaussian of full covariance has the test NLL {found:.3f} on {dataset}, expected the published "
            f"{published:g} ± {error:g}; these are not the rows of the literature, so replace the source of {dataset} "
            f"({parts.source})."
        )
    return found


def moments(folder: Path, columns: list[str]) -> tuple[Array, Array]:
    """Return the mean and the covariance of the training rows."""
    count, total, products = 0, np.zeros(len(columns)), np.zeros((len(columns), len(columns)))
    shift: Array | None = None
    for rows in files.row_groups(layout.part(folder, "train"), columns):
        shift = rows.mean(0) if shift is None else shift  # so that the products do not cancel
        rows = rows - shift
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
    assert shift is not None
    return shift + total / count, products / count - np.outer(total, total) / count**2


def negative_log_likelihood(folder: Path, columns: list[str], mean: Array, covariance: Array) -> float:
    """Return the mean over the test rows, in nats."""
    factor = np.linalg.cholesky(covariance)
    constant = len(columns) / 2 * math.log(2 * math.pi) + float(np.log(np.diag(factor)).sum())
    count, total = 0, 0.0
    for rows in files.row_groups(layout.part(folder, "test"), columns):
        count, total = count + len(rows), total + float((np.linalg.solve(factor, (rows - mean).T) ** 2).sum() / 2)
    return constant + total / count
