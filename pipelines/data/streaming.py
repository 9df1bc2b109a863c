"""Rows of a parquet table for training, in memory if they fit, otherwise streamed through a shuffle buffer.

The cost of a batch does not depend on the length of the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from flowmatch_core.prefetch import ahead
from pipelines.base import files
from pipelines.base.seeding import derived_seed

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


class Rows(ABC):
    """A source of batches of some columns, standardised, `(batch, columns)` in single precision."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the next batch."""

    def seek(self, step: int) -> None:  # noqa: B027 - sources without an order have nothing to do
        """Move to the position at which the batch of `step` is the next one."""


@final
class Memory(Rows):
    """Rows in memory, drawn with replacement by the generator of the training."""

    def __init__(self, rows: Tensor, batch: int) -> None:
        self.rows, self.batch = rows, batch

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return rows drawn with replacement."""
        return self.rows[torch.randint(len(self.rows), (self.batch,), generator=generator, device=self.rows.device)]


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
        batch: Rows per batch.
        buffer: Rows in memory; at least two row groups are held, even if they are larger.
        seed: Seed of the order.
        loc: Subtracted from the rows, `(columns,)`, on the device of the batches.
        scale: Divides the rows, `(columns,)`, on the same device.
    """

    def __init__(
        self,
        path: Path,
        file: ParquetFile,
        columns: Sequence[str],
        *,
        batch: int,
        buffer: int,
        seed: int,
        loc: Tensor,
        scale: Tensor,
    ) -> None:
        self.path, self.file, self.columns = path, file, list(columns)
        self.batch, self.buffer, self.seed = batch, buffer, seed
        self.loc, self.scale = loc, scale
        self.sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self.seek(0)

    def seek(self, step: int) -> None:
        """Move to the position at which the batch of `step` is the next one."""
        self._blocks = ahead(self._from(step * self.batch))
        self._rest = self.loc.new_empty(0, len(self.columns))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the next rows in the order of the seed; the generator is not used."""
        parts = [self._rest[: self.batch]]
        while (missing := self.batch - sum(map(len, parts))) > 0:
            self._rest = next(self._blocks)
            parts.append(self._rest[:missing])
        self._rest = self._rest[len(parts[-1]) :]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _from(self, row: int) -> Iterator[Tensor]:
        """Yield the rows from a row number on, block by block, without end."""
        epoch, skip = divmod(row, sum(self.sizes))
        while True:
            for number, groups in enumerate(self._epoch(epoch)):
                size = sum(self.sizes[group] for group in groups)
                if skip < size:
                    order = torch.randperm(size, generator=self._generator(epoch, number))
                    yield ((self._read(groups)[order].to(self.loc.device) - self.loc) / self.scale)[skip:]
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
        values = np.empty((sum(self.sizes[group] for group in groups), len(self.columns)), np.float32)
        end = 0
        for group in groups:  # one at a time, so that pyarrow's memory does not grow with the buffer
            start, end = end, end + self.sizes[group]
            table = files.read_group(self.path, self.file, group, self.columns)
            for i, name in enumerate(self.columns):
                values[start:end, i] = table.column(name).to_numpy()
            files.check_finite(self.path, self.columns, values[start:end], sum(self.sizes[:group]))
        return torch.from_numpy(values)


def read(
    path: Path,
    columns: Sequence[str],
    *,
    batch: int,
    limit: int,
    seed: int,
    loc: Tensor,
    scale: Tensor,
) -> Rows:
    """Return the rows of a table: in memory if there are at most `limit`, otherwise streamed.

    Args:
        path: File to read.
        columns: Numeric or Boolean columns; Booleans become 0 and 1.
        batch: Rows per batch.
        limit: Maximum number of rows in memory.
        seed: Seed of the order of a stream.
        loc: `(columns,)`, on the device of the batches; a row is `(row - loc) / scale`.
        scale: `(columns,)`, on the same device.

    Raises:
        UserError: The file is missing or damaged, lacks a column, or contains a number that is not finite.
    """
    file = files.open_table(path, columns)
    if file.metadata.num_rows > limit:
        return Stream(path, file, columns, batch=batch, buffer=limit, seed=seed, loc=loc, scale=scale)
    table = files.read_table(path, columns)
    rows = torch.tensor(table[list(columns)].to_numpy(dtype=np.float64), dtype=torch.float32, device=loc.device)
    return Memory((rows - loc) / scale, batch)


def any_true(path: Path, column: str) -> bool:
    """Return whether a Boolean column exists and may contain true, by the statistics in the file."""
    metadata: Any = files.open_table(path, []).metadata
    names = [metadata.schema.column(i).name for i in range(metadata.num_columns)]
    if column not in names:
        return False
    statistics = [metadata.row_group(i).column(names.index(column)).statistics for i in range(metadata.num_row_groups)]
    return any(s is None or not s.has_min_max or s.max for s in statistics)
