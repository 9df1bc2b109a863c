"""The seeds of a stage, trained side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

from pipelines.errors import UserError

R = TypeVar("R")

_queue: SimpleQueue[Any]


def side_by_side(
    work: Callable[[int, Callable[[Any], None]], R],
    seeds: Sequence[int],
    report: Callable[[int, Any], None],
    processes: int | None = None,
    threads: int = 1,
) -> list[R]:
    """Call `work(seed, tell)` for every seed and return the results in order.

    Arguments:
        work: a picklable function; what it passes to `tell` arrives at `report(seed, ...)` in this process.
        processes: at most so many at a time; None is as many as the cores have room for, 1 is this process.
        threads: torch's threads in each process.

    Raises:
        UserError: what `work` raised, or that a process was killed from outside.
    """
    import torch

    processes = min(len(seeds), processes or max(1, (os.cpu_count() or 1) // threads))
    if processes == 1:
        torch.set_num_threads(threads)
        return [work(seed, lambda row, seed=seed: report(seed, row)) for seed in seeds]  # type: ignore[misc]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(queue, report), daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(processes, context, _begin, (queue, threads)) as pool:
            try:
                futures = [pool.submit(_work, work, seed) for seed in seeds]
                for future in as_completed(futures):
                    future.result()  # the first failure ends all, in whatever order they were asked for
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} training processes was killed from outside, most often for lack of memory; "
            "expected each to have about 0.5 GiB: close other programs or list fewer seeds in params.yaml."
        ) from None
    # Only after a success: a worker that was terminated may have died with the queue's lock.
    queue.put(None)
    listener.join()
    return [future.result() for future in futures]


def _listen(queue: SimpleQueue[Any], report: Callable[[int, Any], None]) -> None:
    while (item := queue.get()) is not None:
        report(*item)


def _begin(queue: SimpleQueue[Any], threads: int) -> None:
    """A worker leaves Ctrl-C to its parent and does not outlive it."""
    import torch

    global _queue
    _queue = queue
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[[int, Callable[[Any], None]], R], seed: int) -> R:
    return work(seed, lambda row: _queue.put((seed, row)))
