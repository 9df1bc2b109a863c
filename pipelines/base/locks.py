"""Locks between processes. A lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.base import files
from pipelines.base.errors import UserError

FOLDER = Path(".flowmatch") / "locks"
"""Where a folder that stages run in has its locks."""


class Busy(UserError):
    """The error for a lock that another process holds."""


@contextmanager
def held(path: Path, what: str, seconds: float) -> Iterator[None]:
    """Hold a lock while the block runs.

    Args:
        path: File that is locked; it contains the id of the process that holds it.
        what: Name of what the lock protects, for the error.
        seconds: How long to wait for another process.

    Raises:
        Busy: Another process holds the lock.
    """
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by child processes
    try:
        until = time.monotonic() + seconds
        while not _taken(descriptor):
            if time.monotonic() > until:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace")
                raise Busy(
                    f"{what} is in use by process {holder}; wait until it ends or stop it, "
                    "then run the same command again."
                )
            time.sleep(0.1)
        with files.writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
