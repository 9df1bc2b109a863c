"""Train the seeds of a stage in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

from pipelines.base.errors import UserError

R = TypeVar("R")
Work = Callable[[int, Callable[[Any], None]], R]


def side_by_side(
    work: Work[R],
    seeds: Sequence[int],
    report: Callable[[int, Any], None],
    processes: int | None = None,
    threads: int = 1,
) -> list[R]:
    """Call `work(seed, send)` for every seed and return the results in order.

    Args:
        work: Picklable function; what it passes to `send` is passed to `report(seed, ...)` in this process.
        seeds: Seeds.
        report: Receives the progress of a seed.
        processes: Maximum number of processes; None uses all cores, 1 uses this process.
        threads: Torch threads per process.

    Raises:
        UserError: `work` raised it, or a process was killed from outside; the other processes are ended.
    """
    import torch

    processes = min(len(seeds), processes or max(1, (os.cpu_count() or 1) // threads))
    if processes == 1:
        torch.set_num_threads(threads)
        return [work(seed, lambda row, seed=seed: report(seed, row)) for seed in seeds]  # type: ignore[misc]
    context = multiprocessing.get_context("forkserver")  # fork is not safe after torch has started its threads
    context.set_forkserver_preload(["pipelines.training.fit"])  # torch is imported once, not once per seed
    waiting, results = list(seeds), dict[int, R]()
    running: dict[Connection, tuple[int, ForkServerProcess]] = {}
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
                seed, process = running[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise UserError(
                        f"the training process of seed {seed} was killed from outside, most often for lack of memory; "
                        "each needs about 0.5 GiB: close other programs or list fewer seeds in params.yaml."
                    ) from None
                if kind == "error":
                    raise value
                if kind == "row":
                    report(seed, value)
                else:
                    results[seed] = value
                    process.join()
                    del running[pipe]
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return [results[seed] for seed in seeds]


def _run(pipe: Connection, work: Work[Any], seed: int, threads: int) -> None:
    """Worker entry point: ignores SIGINT and exits with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        result = work(seed, lambda row: pipe.send(("row", row)))
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
