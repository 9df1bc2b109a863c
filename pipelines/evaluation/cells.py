"""The cells of a stage that samples or scores models: a method and a seed each, worked on side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pipelines.base import workers
from pipelines.runs.context import Stage

if TYPE_CHECKING:
    import torch

R = TypeVar("R")

ALONE_SECONDS = 10.0
"""Time after which other processes are started, which costs two seconds each at worst: a small stage stays in one."""


class Cell(NamedTuple):
    """A method and one of its seeds."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method} seed {self.seed}"


def each(
    stage: Stage, work: Callable[[Cell, Callable[[str], None]], R], cells: Sequence[Cell], device: torch.device
) -> dict[Cell, R]:
    """Return the result of every cell; on the CPU they are worked on in parallel processes.

    Args:
        stage: The stage, whose log receives the lines that cells send.
        work: Picklable function of a cell and of a function that sends a line. Its result depends on nothing else.
        cells: The cells.
        device: Device of the models; one that is no CPU is used by this process alone.
    """
    threads = stage.params.threads
    results = workers.side_by_side(
        work,
        cells,
        lambda cell, line: stage.log(line),
        processes=workers.limit(threads) if device.type == "cpu" else 1,
        threads=threads,
        alone_seconds=ALONE_SECONDS,
    )
    return dict(zip(cells, results, strict=True))
