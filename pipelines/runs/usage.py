"""Processor and memory use of a stage with its worker processes, sampled while it runs."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

from pipelines.runs.records import RunRecord

_MIB = 2.0**20
_EVERY_SECONDS = 1.0


class Usage:
    """A context that samples the processor time and the resident memory of this process and its descendants.

    When it ends, with or without an error, it adds means and maxima to the record of the stage; 100 % is one core.
    """

    def __init__(self, record: RunRecord, every: float = _EVERY_SECONDS) -> None:
        self._record, self._every = record, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)
        self._memory: list[float] = []
        self._cpu: list[float] = []

    def __enter__(self) -> Usage:
        self._start = self._last = time.monotonic()
        self._busy_start = self._busy = _sample()[0]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._add()
        self._record.metrics(
            {
                "system/cpu_percent_mean": _percent(self._busy - self._busy_start, self._last - self._start),
                "system/cpu_percent_max": max(self._cpu),
                "system/memory_mib_mean": sum(self._memory) / len(self._memory),
                "system/memory_mib_max": max(self._memory),
            }
        )

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._add()

    def _add(self) -> None:
        now, (busy, memory) = time.monotonic(), _sample()
        busy = max(busy, self._busy)  # the time of a process that nobody waited for is lost when it ends
        self._cpu.append(_percent(busy - self._busy, now - self._last))
        self._memory.append(memory)
        self._last, self._busy = now, busy


def _percent(busy: float, elapsed: float) -> float:
    return 100 * busy / max(elapsed, 1e-9)


def _sample() -> tuple[float, float]:
    """Return the processor seconds so far and the resident memory in MiB."""
    me = psutil.Process()
    busy = memory = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
            memory += process.memory_info().rss / _MIB
        except psutil.Error:  # it has ended meanwhile
            continue
        # The time of ended children is that of their parent; other systems than Linux do not report it.
        busy += times.user + times.system + getattr(times, "children_user", 0) + getattr(times, "children_system", 0)
    return busy, memory
