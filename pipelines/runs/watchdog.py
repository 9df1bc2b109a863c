"""End a stage when the processes that started it are gone, or when its time limit is over."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator

import psutil

from pipelines.base.errors import UserError
from pipelines.runs import records
from pipelines.runs.records import RunRecord, Status

TIMEOUT = "FLOWMATCH_TIMEOUT"
"""The variable with the time limit of a stage in seconds; the orchestrator sets it."""

_EVERY_SECONDS = 1.0
_GRACE_SECONDS = 10.0  # time for the main thread to stop its child processes and close the record


class Watchdog(threading.Thread):
    """The thread that watches; `stop` it when the work is done.

    Attributes:
        reason: Status and message of the stage, once the watchdog has decided to end it.
    """

    def __init__(self, record: RunRecord) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.reason: tuple[Status, str] | None = None
        self._record = record
        self._starters = list(_starters(record.invocation))
        self._limit = _limit()
        self._done = threading.Event()

    def run(self) -> None:
        """Watch until the work is done; interrupt the main thread if it has to end, and the process if that hangs."""
        until = time.monotonic() + self._limit
        while not self._done.wait(min(_EVERY_SECONDS, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                self.reason = "FAILED", f"took longer than its limit of {self._limit:g} s ({TIMEOUT})."
            elif not all(records.is_alive(*starter) for starter in self._starters):
                self.reason = "KILLED", "the run that started it is gone; run the same command to continue."
            if self.reason:
                os.kill(os.getpid(), signal.SIGTERM)
                break
        if self.reason and not self._done.wait(_GRACE_SECONDS):
            for child in psutil.Process().children(recursive=True):
                child.kill()
            self._record.finish(*self.reason)
            os._exit(1)

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()


def _starters(invocation: str) -> Iterator[tuple[int, float]]:
    """Yield the id and start time of the processes without which nobody waits for this stage.

    These are the shell and the DVC that run it, and the orchestrator, unless that is on another machine.
    """
    if "DVC_STAGE" in os.environ:
        parents = psutil.Process().parents()
        dvc = records.nearest_dvc_run(parents)
        yield from ((each.pid, each.create_time()) for each in (parents[:1] + ([dvc] if dvc else [])))
    owner = records.owner_of(invocation)
    if records.is_alive(*owner):
        yield owner


def _limit() -> float:
    given = os.environ.get(TIMEOUT) or "inf"
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise UserError(f"{TIMEOUT} is {given!r}; expected a number of seconds above 0.")
    return seconds
