"""Transforms of the columns of a prepared data set to normal distributions, fitted to its training rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from flowmatch_core.marginals import Marginals
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.data.moments import Moments

if TYPE_CHECKING:
    from pipelines.datasets import Parts


def write(folder: Path, parts: Parts, dataset: str) -> dict[str, list[float]]:
    """Fit the transforms of a prepared data set, write them, and return `loc` and `scale` of the transformed rows.

    They are fitted to the first row group of the training rows, which are in random order.

    Args:
        folder: Folder of the prepared data set.
        parts: Its description: columns with steps get steps, the others a mixture where all columns are transformed.
        dataset: Its name, for messages.

    Raises:
        UserError: A column is constant on the training rows.
    """
    names = [*parts.columns, *(() if parts.weight is None else (parts.weight,))]
    first = next(_chunks(layout.part(folder, "train"), names))
    rows, weight = first[:, : len(parts.columns)], first[:, -1] if parts.weight is not None else None
    other = "mixture" if parts.marginals else "identity"
    stepped = {name for name, discrete in parts.discrete.items() if discrete.how == "steps"}
    kinds = ["steps" if name in stepped else other for name in parts.columns]
    try:
        marginals = Marginals.fit(torch.from_numpy(rows), None if weight is None else torch.from_numpy(weight), kinds)
    except ValueError as error:
        raise UserError(f"the columns of {dataset} cannot be transformed: {error}") from None
    meta = {"columns": parts.columns, "marginals": marginals.description}
    files.write_tensors(layout.marginals(folder), marginals.state_dict(), meta)
    moments = Moments(parts.columns)
    for chunk in _chunks(layout.part(folder, "train"), parts.columns):
        moments.add(marginals(torch.from_numpy(chunk))[0].numpy())
    found = moments.result()
    return {"loc": found["loc"], "scale": found["scale"]}


def _chunks(path: Path, names: list[str]) -> Iterator[NDArray[np.float64]]:
    """Yield columns of a table, a few row groups at a time."""
    file = files.open_table(path, names)
    for group in range(file.metadata.num_row_groups):
        table = files.read_group(path, file, group, names)
        yield np.stack([table.column(name).to_numpy() for name in names], 1)
