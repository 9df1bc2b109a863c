"""Run the parts of a stage in parallel processes, on as many cores as the stage may use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from pipelines.base import device, memory
from pipelines.base.errors import UserError

P = TypeVar("P")
R = TypeVar("R")
Send = Callable[[Any], None]
Work = Callable[[P, Send], R]

_SLOW_IMPORTS = ("ot", "pandas", "pyarrow.parquet", "safetensors.torch", "scipy.stats", "torch._dynamo")

CORES = "FLOWMATCH_CORES"
"""Environment variable with the number of cores of a stage, which an orchestrator of parallel stages sets."""


def cores() -> int:
    """Return how many cores this process may use: `$FLOWMATCH_CORES`, else those that the system allows it.

    Raises:
        UserError: The variable is not a positive number.
    """
    given = os.environ.get(CORES)
    if given is None:
        return min([_affinity(), *_quotas()])
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{CORES} is {given!r}; expected a number of cores, at least 1: set it to one, or unset it.")
    return int(given)


def limit(threads: int) -> int:
    """Return how many processes with so many threads each fit the cores, at least one."""
    return max(1, cores() // threads)


def side_by_side(
    work: Work[P, R],
    parts: Sequence[P],
    report: Callable[[P, Any], None] = lambda part, row: None,
    *,
    processes: int,
    threads: int = 1,
    alone_seconds: float = 0.0,
    label: str = "{}",
) -> list[R]:
    """Call `work(part, send)` for every part and return the results in order.

    Args:
        work: Picklable function; what it passes to `send` is passed to `report(part, ...)` in this process.
        parts: The parts, picklable and hashable.
        report: Receives the progress of a part.
        processes: Maximum number of processes; 1 uses this process.
        threads: Torch threads per process.
        alone_seconds: Time during which parts are worked on in this process, before others are started, which takes
            about two seconds. It does not change results.
        label: What an error calls a part.

    Raises:
        UserError: `work` raised it, or a process was killed from outside; the other processes are ended.
    """
    device.limit_threads(threads)
    began, results = time.monotonic(), list[R]()
    for part in parts:
        left = len(parts) - len(results)
        if min(processes, left) > 1 and time.monotonic() - began >= alone_seconds:
            break
        results.append(work(part, lambda row, part=part: report(part, row)))  # type: ignore[misc]
    rest = parts[len(results) :]
    return [*results, *_in_processes(work, rest, report, processes, threads, label)]


def _in_processes(
    work: Work[P, R],
    parts: Sequence[P],
    report: Callable[[P, Any], None],
    processes: int,
    threads: int,
    label: str,
) -> Iterable[R]:
    context = multiprocessing.get_context("forkserver")  # fork is not safe after torch has started its threads
    # What takes seconds to import is imported once, not once per process.
    used = [name for name in _SLOW_IMPORTS if name in sys.modules]
    context.set_forkserver_preload(["torch", *used, getattr(work, "func", work).__module__])
    waiting, results = list(parts), dict[P, R]()
    running: dict[Connection, tuple[P, ForkServerProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(sender, work, waiting[0], threads), daemon=True)
                process.start()
                sender.close()  # the pipe ends with the process only if no other copy is open
                running[receiver] = waiting.pop(0), process
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                part, process = running[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise UserError(
                        f"the process of {label.format(part)} was killed from outside, most often for lack of "
                        f"memory; each needs about 0.5 GiB: close other programs, or set {CORES}=1 for one at a time."
                    ) from None
                if kind == "error":
                    raise value
                if kind == "row":
                    report(part, value)
                else:
                    results[part] = value
                    process.join()
                    del running[pipe]
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return (results[part] for part in parts)


def _run(pipe: Connection, work: Work[P, Any], part: P, threads: int) -> None:
    """Worker entry point: ignores SIGINT and exits with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    device.limit_threads(threads)
    memory.keep()
    try:
        result = work(part, lambda row: pipe.send(("row", row)))
    except UserError as error:
        pipe.send(("error", error))
    except Exception as error:
        defect = RuntimeError(f"{type(error).__name__}: {error}")  # the error itself may not be picklable
        defect.add_note(traceback.format_exc())
        pipe.send(("error", defect))
    else:
        pipe.send(("done", result))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path = Path("/sys/fs/cgroup")) -> Iterable[int]:
    """Yield the limits of the control groups of a container, rounded up to whole cores (versions 2 and 1)."""
    for texts in ((root / "cpu.max",), (root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (int(word) for text in texts for word in text.read_text(encoding="utf-8").split())
            if quota > 0:
                yield -(-quota // period)
