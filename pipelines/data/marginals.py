"""Transforms of the columns of a prepared data set to normal distributions, fitted to its training rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowmatch_core.marginals import Identity, Marginal, Marginals, Mixture, Steps
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.data.moments import Moments
from pipelines.datasets import Image, Transform

if TYPE_CHECKING:
    from pipelines.datasets import Parts

MIXTURE_ROWS = 65_536
POOLED, EVERY = 3.0, 0.02
"""Added to the count of a pixel's level: the share of the level among all pixels times the first, and the second."""


def write(folder: Path, parts: Parts, dataset: str) -> dict[str, list[float]]:
    """Fit the transforms of a prepared data set, write them, and return `loc` and `scale` of the transformed rows.

    They are fitted to the first row group of the training rows, which are in random order; a mixture to at most
    about `MIXTURE_ROWS` of it. Those of pixels are fitted to all rows.

    Args:
        folder: Folder of the prepared data set.
        parts: Its description, with the transforms.
        dataset: Its name, for messages.

    Raises:
        UserError: A column is constant on the training rows.
    """
    marginals = _pixels(folder, parts, parts.image) if parts.image is not None else _columns(folder, parts, dataset)
    meta = {"columns": parts.columns, "marginals": marginals.description}
    files.write_tensors(layout.marginals(folder), marginals.state_dict(), meta)
    moments, generator = Moments(parts.columns), torch.Generator().manual_seed(0)
    for chunk in files.row_groups(layout.part(folder, "train"), parts.columns):
        for start in range(0, len(chunk), MIXTURE_ROWS):  # a mixture needs memory for each of its components
            x = torch.from_numpy(chunk[start : start + MIXTURE_ROWS]).double()
            if parts.image is not None:
                x += torch.rand(x.shape, generator=generator, dtype=x.dtype)
            moments.add(marginals(x)[0].numpy())
    found = moments.result()
    return {"loc": found["loc"], "scale": found["scale"]}


def _columns(folder: Path, parts: Parts, dataset: str) -> Marginals:
    """Return the transforms of the columns of a table."""
    names = [*parts.columns, *(() if parts.weight is None else (parts.weight,))]
    first = next(files.row_groups(layout.part(folder, "train"), names))
    weight = torch.from_numpy(first[:, -1]) if parts.weight is not None else None
    columns = torch.from_numpy(first).unbind(1)[: len(parts.columns)]
    try:
        fitted = [_fit(*one, weight=weight) for one in zip(_transforms(parts), columns, parts.columns, strict=True)]
    except ValueError as error:
        raise UserError(f"the columns of {dataset} cannot be transformed: {error}") from None
    return Marginals(fitted)


def _pixels(folder: Path, parts: Parts, image: Image) -> Marginals:
    """Return the steps of each pixel, whose levels are smoothed by their shares among all pixels."""
    counts = torch.zeros(len(parts.columns) * image.levels, dtype=torch.float64)
    first = torch.arange(len(parts.columns)) * image.levels
    for chunk in files.row_groups(layout.part(folder, "train"), parts.columns):
        counts += torch.bincount((torch.from_numpy(chunk).long() + first).flatten(), minlength=len(counts))
    counts = counts.reshape(-1, image.levels)
    pooled = counts.sum(0) / counts.sum()
    outside = torch.full((len(counts), 1), EVERY, dtype=torch.float64)
    mass = torch.cat([outside, counts + POOLED * pooled + EVERY, outside], 1)
    return Marginals([Steps(one, low=0) for one in mass])


def _transforms(parts: Parts) -> list[Transform]:
    """Return the transform of each column."""
    if isinstance(parts.marginals, Mapping):
        return [parts.marginals.get(name, Transform("identity")) for name in parts.columns]
    other = Transform("mixture" if parts.marginals else "identity")
    stepped = {name for name, discrete in parts.discrete.items() if discrete.how == "steps"}
    return [Transform("steps") if name in stepped else other for name in parts.columns]


def _fit(transform: Transform, x: Tensor, column: str, *, weight: Tensor | None) -> Marginal:
    """Return the transform of a column of training rows."""
    name = f"the column {column!r}"
    if transform.kind == "steps":
        return Steps.fit(x, weight, start=transform.start, width=transform.width, name=name)
    if transform.kind == "uniform":
        return Steps(x.new_tensor([0.5, len(x), 0.5]), 0, transform.start, transform.width)
    if transform.kind == "identity":
        return Identity()
    every = max(1, len(x) // MIXTURE_ROWS)
    power = None if weight is None else weight[::every] ** transform.weight_power
    return Mixture.fit(x[::every], power, components=transform.components, floor=transform.floor, name=name)
