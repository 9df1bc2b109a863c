"""Compute the next batch while the model trains on the current one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["ahead"]

T = TypeVar("T")

_END = object()


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """Iterate over items in their order, each computed in a background thread before it is requested.

    While the consumer works on an item, one thread computes the next ones: an optimal transport that takes less than
    a training step adds no time. A thread suffices, because POT's exact solver, SciPy's assignment solver and
    PyTorch's operators release the interpreter lock.

    The items must not share state with the consumer: with a random generator of their own, the results are those of
    the plain loop. An exception reaches the consumer in place of its item. If the consumer stops early, the thread
    ends after its current item.

    Args:
        items: The batches, usually a generator that draws and couples rows.
        depth: The maximum number of computed items that wait.

    Examples:
        >>> import torch
        >>> from flowmatch_core.couplings import MinibatchOT
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = (torch.randn(4, 1, generator=generator) for _ in range(3))
        >>> pairs = (MinibatchOT()(x0, torch.ones(4, 1)) for x0 in noise)
        >>> [tuple(x0.shape) for x0, x1, cond in ahead(pairs)]
        [(4, 1), (4, 1), (4, 1)]
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, but should be at least 1.")
    return _ahead(iter(items), depth, torch.is_grad_enabled())


def _ahead(iterator: Iterator[T], depth: int, grad: bool) -> Iterator[T]:
    def compute() -> object:
        with torch.set_grad_enabled(grad):  # grad mode is per thread: a new thread would build graphs
            return next(iterator, _END)

    # one worker, so the items are computed one after another, in order
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
    try:
        waiting: deque[Future[object]] = deque(worker.submit(compute) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(worker.submit(compute))
            yield item  # type: ignore[misc]
    finally:
        worker.shutdown(cancel_futures=True)
