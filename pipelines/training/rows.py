"""The rows of a prepared data set as training sees them: standardised targets, encoded conditions and weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmatch_core.guidance import drop_condition
from flowmatch_core.marginals import Marginals
from flowmatch_core.whitening import partial_whitening
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.data import streaming
from pipelines.data.streaming import Memory, Rows, Stream
from pipelines.models import saved
from pipelines.models.conditions import Conditions

if TYPE_CHECKING:
    import pandas as pd


_AT_ONCE = 2**22  # numbers that are transformed at once

WHITENING_ROWS = 2**18
"""Maximum number of training rows from which a whitening is computed."""


class Whitening(NamedTuple):
    """A linear map of standardised rows, `matrix @ (x - mean)`; see `flowmatch_core.whitening`."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images of rows."""
        return (x - self.mean.to(x)) @ self.matrix.to(x).T


class Batch(NamedTuple):
    """Rows of a data set.

    Attributes:
        x: Standardised targets, `(rows, columns)`, whitened if the data set is.
        cond: Encoded conditions, `(rows, size)`, or None without conditions.
        weight: Importance weights of the rows, `(rows,)`, or None for equal ones.
    """

    x: Tensor
    cond: Tensor | None
    weight: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Return the rows on a device in another precision."""
        return self._each(lambda part: part.to(device, dtype))

    def at(self, index: Tensor) -> Batch:
        """Return some of the rows."""
        return self._each(lambda part: part[index])

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        cond, weight = (None if part is None else function(part) for part in (self.cond, self.weight))
        return Batch(function(self.x), cond, weight)


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: Folder of the data set in `data/prepared`.
        strength: Strength of the whitening of the standardised targets, 0 for none.
    """

    folder: Path
    strength: float = 0.0

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Description of the data set."""
        described: dict[str, Any] = files.read_json(layout.provenance(self.folder))
        return described

    @cached_property
    def columns(self) -> list[str]:
        """Names of the targets."""
        return list(self.provenance["columns"])

    @cached_property
    def conditions(self) -> Conditions:
        """Conditions of the density."""
        return Conditions(tuple(self.provenance["conditions"]))

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of targets and of entries of the condition vector."""
        return len(self.columns), self.conditions.size

    @cached_property
    def loc(self) -> Tensor:
        """Mean of the targets, `(columns,)`, float64."""
        return torch.tensor(self.provenance["loc"], dtype=torch.float64)

    @cached_property
    def scale(self) -> Tensor:
        """Standard deviation of the targets, `(columns,)`, float64."""
        return torch.tensor(self.provenance["scale"], dtype=torch.float64)

    @cached_property
    def whitening(self) -> Whitening | None:
        """Whitening of the standardised targets by the weighted training rows, if there is one.

        Raises:
            UserError: The targets are linearly dependent.
        """
        if self.strength == 0:
            return None
        train = self._standardised("train", WHITENING_ROWS)
        try:
            return Whitening(*partial_whitening(train.x, train.weight, strength=self.strength))
        except ValueError as error:
            raise UserError(
                f"params.yaml: the training has a whitening of {self.strength:g}, but the training rows of "
                f"{self.folder.name!r} have none ({str(error).removesuffix('.')}); set whitening to 0 for them."
            ) from None

    @property
    def units(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Location and scale of the targets, and the matrix that the standardised targets are multiplied by."""
        if self.whitening is None:
            return self.loc, self.scale, None
        return self.loc + self.scale * self.whitening.mean, self.scale, self.whitening.matrix

    @cached_property
    def marginals(self) -> Marginals | None:
        """Transforms of the columns before the standardisation, if there are any."""
        if not self.provenance.get("marginals"):
            return None
        tensors, meta = files.read_tensors(layout.marginals(self.folder))
        return saved.read_marginals(meta["marginals"], tensors)

    @cached_property
    def image(self) -> tuple[int, int, int] | None:
        """Channels, height and width of an image where the targets are its pixels, else None.

        The table then holds whole numbers, to which uniform noise is added: anew for each batch in training.
        """
        sizes = self.provenance.get("image")
        return None if sizes is None else (sizes["channels"], sizes["height"], sizes["width"])

    @cached_property
    def redrawn(self) -> list[int]:
        """Places of the targets that are integers plus uniform noise, which training draws anew for each batch.

        Under transforms of the columns the noise stays that of the table.
        """
        if self.marginals is not None:
            return []
        uniform = {name for name, described in self.provenance["discrete"].items() if described["how"] == "uniform"}
        return [i for i, name in enumerate(self.columns) if name in uniform]

    def rows(self, part: str, limit: int) -> Batch:
        """Return the rows of a part in double precision, at most `limit` of them, evenly spaced.

        Raises:
            UserError: The table is missing or damaged, lacks a column, or contains a number that is not finite.
        """
        return self.whitened(self._standardised(part, limit))

    def whitened(self, batch: Batch) -> Batch:
        """Return standardised rows as the network sees them."""
        return batch if self.whitening is None else batch._replace(x=self.whitening(batch.x))

    def _standardised(self, part: str, limit: int) -> Batch:
        """Return rows as `rows` does, without the whitening."""
        weighted = self._weighted(part)
        table = files.read_table(layout.part(self.folder, part), self._read(weighted))
        if len(table) > limit:
            table = table.iloc[np.linspace(0, len(table) - 1, limit).round().astype(int)]
        return self.split(torch.from_numpy(self._encode(table, weighted)))

    def training(
        self, batch: int, limit: int, device: torch.device, noise: float = 0.0, dropout: float = 0.0
    ) -> TrainingRows:
        """Return the source of the batches of a training.

        Args:
            batch: Rows per batch.
            limit: Maximum number of rows in memory; a longer table is streamed.
            device: Device of the batches.
            noise: Standard deviation of the noise that is added to the standardised targets.
            dropout: Probability with which the conditions of a row become zeros.

        Raises:
            UserError: The table is missing or damaged, lacks a column, or contains a number that is not finite.
        """
        weighted = self._weighted("train")
        read = streaming.read(
            layout.part(self.folder, "train"),
            self._read(weighted),
            lambda table: self._encode(table, weighted, codes=True).astype(np.float32),
            batch=batch,
            limit=limit,
            seed=torch.initial_seed(),
            device=device,
        )
        return TrainingRows(self, read.by_weight() if weighted and isinstance(read, Memory) else read, noise, dropout)

    def split(self, rows: Tensor) -> Batch:
        """Return encoded rows as targets, conditions and weights."""
        columns, size = self.sizes
        x, cond, weight = rows.tensor_split((columns, columns + size), 1)
        return Batch(x, cond if size else None, weight[:, 0] if weight.shape[1] else None)

    def _weighted(self, part: str) -> bool:
        """Return whether the rows of a part have importance weights."""
        weight = self.provenance["weight"]
        return weight is not None and weight in files.open_table(layout.part(self.folder, part), []).schema_arrow.names

    def _read(self, weighted: bool) -> list[str]:
        return [*self.columns, *self.conditions.names, *([self.provenance["weight"]] if weighted else [])]

    def _encode(self, table: pd.DataFrame, weighted: bool, codes: bool = False) -> NDArray[np.float64]:
        """Return the standardised targets, the encoded conditions and the weight of rows side by side.

        Args:
            table: Rows of the data set.
            weighted: Whether they have a weight.
            codes: Whether to leave out the noise that training draws anew; pixels are then not standardised either.
        """
        x = table[self.columns].to_numpy(float, copy=True)
        if codes:
            x[:, self.redrawn] = np.floor(x[:, self.redrawn])
        if self.image is None or not codes:
            x = self._units(x)
        parts = [x, self.conditions.encode(table)]
        if weighted:
            parts.append(table[[self.provenance["weight"]]].to_numpy(float))
        return np.concatenate(parts, 1)

    def _units(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return targets in standardised units, some at a time as the transforms need memory."""
        if self.image is not None:
            x += np.random.default_rng(torch.initial_seed()).random(x.shape)
        if self.marginals is not None:
            size = max(1, _AT_ONCE // x.shape[1])
            for first in range(0, len(x), size):
                rows = slice(first, first + size)
                x[rows] = self.marginals(torch.from_numpy(x[rows]))[0].numpy()
        standardised: NDArray[np.float64] = (x - self.loc.numpy()) / self.scale.numpy()
        return standardised


@dataclass(frozen=True)
class TrainingRows:
    """The source of the batches of a training.

    Attributes:
        prepared: Data set.
        read: Encoded rows.
        noise: Standard deviation of the noise that is added to the standardised targets.
        dropout: Probability with which the conditions of a row become zeros.
    """

    prepared: Prepared
    read: Rows
    noise: float
    dropout: float = 0.0

    @cached_property
    def _pixels(self) -> tuple[Marginals, Tensor, Tensor]:
        """Transforms of pixels, and `loc` and `scale` of the results, on the device of the batches."""
        assert self.prepared.marginals is not None  # pixels have some
        device = self.read.device
        return (
            deepcopy(self.prepared.marginals).to(device),
            self.prepared.loc.to(device),
            self.prepared.scale.to(device),
        )

    @property
    def streamed(self) -> bool:
        """Whether the rows are read from the file during training; the weights then multiply the loss."""
        return isinstance(self.read, Stream)

    def draw(self, generator: torch.Generator) -> Batch:
        """Return the next batch."""
        batch = self.prepared.whitened(self._redrawn(self.prepared.split(self.read.draw(generator)), generator))
        if self.dropout > 0:
            batch = batch._replace(cond=drop_condition(batch.cond, self.dropout, generator=generator).nan_to_num(0.0))
        if self.noise == 0:
            return batch
        x = batch.x
        drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return batch._replace(x=x + self.noise * drawn)

    def _redrawn(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch with new noise in the columns that are integers plus uniform noise."""
        places, device = self.prepared.redrawn, batch.x.device
        if self.prepared.image is not None:
            x = batch.x.double()
            x += torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device)
            marginals, loc, scale = self._pixels
            return batch._replace(x=((marginals(x)[0] - loc) / scale).float())
        if not places:
            return batch
        noise = torch.rand(len(batch.x), len(places), generator=generator, device=device)
        noise /= self.prepared.scale[places].to(device, torch.float32)
        return batch._replace(x=batch.x.index_add(1, torch.tensor(places, device=device), noise))
