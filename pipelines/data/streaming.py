"""Rows of a parquet table for training: in memory where they fit, streamed through a shuffle buffer where they do not.

Either way a batch costs the same however long the table is.
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
    """Batches of the rows of some columns, standardised, `(batch, columns)` in single precision."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """The next batch."""

    def seek(self, step: int) -> None:  # noqa: B027 - most sources have no place
        """Go to the place where the batch of a step is the next one."""


@final
class Memory(Rows):
    """Rows drawn with replacement by the generator of the training."""

    def __init__(self, rows: Tensor, batch: int) -> None:
        self.rows, self.batch = rows, batch

    def draw(self, generator: torch.Generator) -> Tensor:
        return self.rows[torch.randint(len(self.rows), (self.batch,), generator=generator, device=self.rows.device)]


@final
class Stream(Rows):
    """Rows of a file, each once an epoch, in an order that a seed decides.

    An epoch visits the row groups in random order. As many as fill half of the buffer are read together and their rows
    shuffled, in the background, while batches are cut from those that were read before. So rows that stand together in
    the file, as those of an episode do, meet rows of all parts of it. A step's batch depends on seed and step alone: to
    resume costs the reading of one block.

    Arguments:
        file: the table.
        columns: those to read.
        batch: rows a draw.
        buffer: rows in memory, of at least two row groups whatever is asked for.
        seed: what the order depends on.
        loc, scale: `(columns,)`, on the device where the rows are wanted.
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
        self._blocks = ahead(self._from(step * self.batch))
        self._rest = self.loc.new_empty(0, len(self.columns))

    def draw(self, generator: torch.Generator) -> Tensor:
        parts = [self._rest[: self.batch]]
        while (missing := self.batch - sum(map(len, parts))) > 0:
            self._rest = next(self._blocks)
            parts.append(self._rest[:missing])
        self._rest = self._rest[len(parts[-1]) :]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _from(self, row: int) -> Iterator[Tensor]:
        """All rows from one on, block by block, without end."""
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
        """The row groups of an epoch's blocks."""
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
        for group in groups:  # one at a time, so that what pyarrow needs does not grow with the buffer
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
    """The rows of a table: in memory where there are at most `limit`, otherwise streamed with so many in memory.

    Arguments:
        columns: numbers and truth values, which become 0 and 1.
        batch: rows a draw.
        seed: what the order of a stream depends on.
        loc, scale: `(columns,)`, on the device where the rows are wanted; a row is `(row - loc) / scale`.

    Raises:
        UserError: the file is missing or damaged, lacks a column, or holds a number that is not finite.
    """
    file = files.open_table(path, columns)
    if file.metadata.num_rows > limit:
        return Stream(path, file, columns, batch=batch, buffer=limit, seed=seed, loc=loc, scale=scale)
    table = files.read_table(path, columns)
    rows = torch.tensor(table[list(columns)].to_numpy(dtype=np.float64), dtype=torch.float32, device=loc.device)
    return Memory((rows - loc) / scale, batch)


def any_true(path: Path, column: str) -> bool:
    """Whether a table has a column of truth values that is true somewhere, or may be, by the file's own statistics."""
    metadata: Any = files.open_table(path, []).metadata
    names = [metadata.schema.column(i).name for i in range(metadata.num_columns)]
    if column not in names:
        return False
    statistics = [metadata.row_group(i).column(names.index(column)).statistics for i in range(metadata.num_row_groups)]
    return any(s is None or not s.has_min_max or s.max for s in statistics)
