"""Rows of a parquet table for training, in memory if they fit, otherwise streamed through a shuffle buffer.

The cost of a batch does not depend on the length of the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmatch_core.prefetch import ahead
from pipelines.base import files
from pipelines.base.seeding import derived_seed

if TYPE_CHECKING:
    import pandas as pd
    from pyarrow.parquet import ParquetFile

Encode = Callable[["pd.DataFrame"], NDArray[np.float32]]
"""`rows of a table -> (rows, width)`: what training sees of them, in single precision."""


class Rows(ABC):
    """A source of batches of encoded rows, `(batch, width)` in single precision, on a device."""

    device: torch.device

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the next batch."""

    def seek(self, step: int) -> None:  # noqa: B027 - sources without an order have nothing to do
        """Move to the position at which the batch of `step` is the next one."""


@final
class Memory(Rows):
    """Rows in memory, drawn with replacement by the generator of the training.

    Args:
        rows: Encoded rows.
        batch: Rows per batch.
        weight: Draws are in proportion to it, `(rows,)`; None: all rows are equally likely.
    """

    def __init__(self, rows: Tensor, batch: int, weight: Tensor | None = None) -> None:
        self.rows, self.batch, self.device = rows, batch, rows.device
        self._upper = None if weight is None else weight.double().cumsum(0)

    def by_weight(self) -> Memory:
        """Return the rows without their last entry, drawn in proportion to it."""
        return Memory(self.rows[:, :-1].contiguous(), self.batch, self.rows[:, -1])

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return rows drawn with replacement."""
        device = self.rows.device
        if self._upper is None:
            return self.rows[torch.randint(len(self.rows), (self.batch,), generator=generator, device=device)]
        at = torch.rand(self.batch, generator=generator, device=device, dtype=torch.float64) * self._upper[-1]
        return self.rows[torch.searchsorted(self._upper, at, right=True).clamp_(max=len(self.rows) - 1)]


@final
class Stream(Rows):
    """Rows of a file, each once per epoch, in an order that depends on a seed.

    An epoch visits the row groups in random order. Row groups that fill half of the buffer form a block, whose rows are
    read and shuffled in the background while batches are taken from the previous block. Neighbouring rows of the file,
    such as those of an episode, are therefore mixed with rows of other parts. The batch of a step depends only on the
    seed and the step, so resuming costs the reading of one block.

    Args:
        path: File of the table, for messages.
        file: The open table.
        columns: Columns to read.
        encode: What training sees of the rows, applied to a row group at a time.
        batch: Rows per batch.
        buffer: Rows in memory; at least two row groups are held, even if they are larger.
        seed: Seed of the order.
        device: Device of the batches.
    """

    def __init__(
        self,
        path: Path,
        file: ParquetFile,
        columns: Sequence[str],
        encode: Encode,
        *,
        batch: int,
        buffer: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.path, self.file, self.columns, self.encode = path, file, list(columns), encode
        self.batch, self.buffer, self.seed, self.device = batch, buffer, seed, device
        self.sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self.seek(0)

    def seek(self, step: int) -> None:
        """Move to the position at which the batch of `step` is the next one."""
        self._blocks = ahead(self._from(step * self.batch))
        self._rest: Tensor | None = None

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the next rows in the order of the seed; the generator is not used."""
        parts = list[Tensor]()
        while (missing := self.batch - sum(map(len, parts))) > 0:
            if self._rest is None or not len(self._rest):
                self._rest = next(self._blocks)
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _from(self, row: int) -> Iterator[Tensor]:
        """Yield the rows from a row number on, block by block, without end."""
        epoch, skip = divmod(row, sum(self.sizes))
        while True:
            for number, groups in enumerate(self._epoch(epoch)):
                size = sum(self.sizes[group] for group in groups)
                if skip < size:
                    order = torch.randperm(size, generator=self._generator(epoch, number))
                    yield self._read(groups)[order][skip:].to(self.device)
                skip = max(0, skip - size)
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        """Yield the row groups of each block of an epoch."""
        block = list[int]()
        for group in torch.randperm(len(self.sizes), generator=self._generator(epoch)).tolist():
            if block and sum(self.sizes[i] for i in block) + self.sizes[group] > self.buffer // 2:
                yield block
                block = []
            block.append(group)
        yield block

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, "stream", *key))

    def _read(self, groups: list[int]) -> Tensor:
        rows, end = None, 0
        for group in groups:  # one at a time, so that the memory for reading does not grow with the buffer
            frame = files.read_group(self.path, self.file, group, self.columns).to_pandas()
            numbers = frame.select_dtypes(["number", "bool"])
            files.check_finite(self.path, list(map(str, numbers)), numbers.to_numpy(float), sum(self.sizes[:group]))
            encoded = self.encode(frame)
            if rows is None:
                rows = np.empty((sum(self.sizes[group] for group in groups), encoded.shape[1]), np.float32)
            rows[end : end + len(encoded)] = encoded
            end += len(encoded)
        assert rows is not None  # a block has a row group
        return torch.from_numpy(rows)


def read(
    path: Path, columns: Sequence[str], encode: Encode, *, batch: int, limit: int, seed: int, device: torch.device
) -> Rows:
    """Return the rows of a table: in memory if there are at most `limit`, otherwise streamed.

    Args:
        path: File to read.
        columns: Columns to read.
        encode: What training sees of some rows; see `standardised`.
        batch: Rows per batch.
        limit: Maximum number of rows in memory.
        seed: Seed of the order of a stream.
        device: Device of the batches.

    Raises:
        UserError: The file is missing or damaged, lacks a column, or contains a number that is not finite.
    """
    file = files.open_table(path, columns)
    if file.metadata.num_rows > limit:
        return Stream(path, file, columns, encode, batch=batch, buffer=limit, seed=seed, device=device)
    return Memory(torch.from_numpy(encode(files.read_table(path, columns)[list(columns)])).to(device), batch)


def standardised(columns: Sequence[str], loc: Tensor, scale: Tensor) -> Encode:
    """Return an encoding of numeric or Boolean columns as `(row - loc) / scale`; Booleans become 0 and 1.

    It is computed in double precision and then rounded, so that columns far from zero keep their digits.

    Args:
        columns: Columns to take.
        loc: `(columns,)`.
        scale: `(columns,)`.
    """
    center, spread = (units.double().cpu().numpy() for units in (loc, scale))

    def encode(rows: pd.DataFrame) -> NDArray[np.float32]:
        encoded: NDArray[np.float32] = ((rows[list(columns)].to_numpy(float) - center) / spread).astype(np.float32)
        return encoded

    return encode


def any_true(path: Path, column: str) -> bool:
    """Return whether a Boolean column exists and may contain true, by the statistics in the file."""
    metadata: Any = files.open_table(path, []).metadata
    names = [metadata.schema.column(i).name for i in range(metadata.num_columns)]
    if column not in names:
        return False
    statistics = [metadata.row_group(i).column(names.index(column)).statistics for i in range(metadata.num_row_groups)]
    return any(s is None or not s.has_min_max or s.max for s in statistics)
