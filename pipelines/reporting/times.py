"""How long networks were trained: results hold no times, so that they can be repeated bit for bit, but records do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.base.metric_keys import by_seed
from pipelines.runs import records
from pipelines.runs.records import CellKey

_SECONDS, _LOSS = "train/seconds", "train/final_loss"


class Times:
    """The times of all trainings on this machine that have records.

    A training is known by its final loss, so that a network that DVC restored has the time of its own training.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[CellKey, float], float] = {}
        for found in records.by_invocation(records.home()).values():
            for cell in (cell for record in found for cell in record.cells if cell.trained):
                loss, seconds = cell.metrics.get(_LOSS), cell.metrics.get(_SECONDS)
                if loss is not None and seconds is not None:
                    self._seconds[cell.key, loss] = seconds

    def mean(self, data: str, method: str, seeds: Iterable[int], final: Mapping[str, Any]) -> float | None:
        """Return the mean time over seeds in seconds, or None if one of them is not known.

        Args:
            data: Data set.
            method: Method.
            seeds: Its seeds.
            final: Losses at the end of its training, by seed.
        """
        losses = by_seed(final, _LOSS.removeprefix("train/"))
        known = [self._seconds.get((CellKey(data, method, seed), losses.get(seed, float("nan")))) for seed in seeds]
        times = [seconds for seconds in known if seconds is not None]
        return sum(times) / len(times) if times and len(times) == len(known) else None
