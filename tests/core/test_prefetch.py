"""Laws of computing ahead: the same items, the same order, and nothing left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flowmatch_core import prefetch
from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.prefetch import ahead

Workers = Callable[[], list[threading.Thread]]
PATIENCE = 30.0  # seconds until a wait that should never last counts as a failure


@pytest.fixture
def workers() -> Workers:
    """The threads that this test has started and that still live: those of other tests in this process are theirs."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t.name.startswith("ahead") and t not in before]


def pairs(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x0, x1 = torch.randn(2, 32, 2, generator=generator, dtype=torch.float64)
        yield MinibatchOT()(x0, x1)[:2]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_and_order_are_those_of_the_plain_loop(depth: int) -> None:
    plain, early = list(pairs(5)), list(ahead(pairs(5), depth=depth))
    assert len(plain) == len(early)
    for (a0, a1), (b0, b1) in zip(plain, early, strict=True):
        assert torch.equal(a0, b0) and torch.equal(a1, b1)
    assert list(ahead([None, 0, False], depth=depth)) == [None, 0, False]
    assert list(ahead([], depth=depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_exactly_the_next_items_are_computed_while_the_consumer_works(depth: int) -> None:
    computed = [threading.Event() for _ in range(10)]

    def source() -> Iterator[int]:
        for i, event in enumerate(computed):
            event.set()
            yield i

    items = ahead(source(), depth=depth)
    assert next(items) == 0
    assert all(event.wait(PATIENCE) for event in computed[: depth + 1])  # without asking for them
    assert not any(event.is_set() for event in computed[depth + 1 :])
    assert next(items) == 1
    assert computed[depth + 1].wait(PATIENCE)
    assert list(items) == list(range(2, 10))


def test_items_are_computed_in_one_other_thread() -> None:
    threads = set(ahead(threading.get_ident() for _ in range(20)))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_an_exception_reaches_the_consumer_in_its_place(workers: Workers) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("no third")

    items = ahead(source(), depth=3)
    assert (next(items), next(items)) == (1, 2)
    with pytest.raises(LookupError, match="no third"):
        next(items)
    assert next(items, None) is None
    assert not workers()


def test_leaving_early_ends_the_thread_with_the_item_it_is_at(
    monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    begun, done, finish = [], [], threading.Event()

    class Executor(ThreadPoolExecutor):
        """Lets the item end only when the consumer is already leaving."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            finish.set()
            super().shutdown(wait=wait)

    def source() -> Iterator[int]:
        for i in range(1000):
            begun.append(i)
            if i == 1:
                finish.wait(PATIENCE)
            done.append(i)
            yield i

    monkeypatch.setattr(prefetch, "ThreadPoolExecutor", Executor)
    items = ahead(source(), depth=4)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert begun == done and done[-1] <= 1 and not workers()


def test_a_forgotten_iterator_leaves_no_thread(workers: Workers) -> None:
    for i in ahead(range(1000), depth=2):
        if i == 3:
            break
    gc.collect()
    assert not workers()


def test_a_finished_iterator_leaves_no_thread_and_an_unused_one_starts_none(workers: Workers) -> None:
    unused = ahead(range(3))
    assert not workers()
    assert list(ahead(range(3))) == [0, 1, 2] and not workers()
    assert next(unused) == 0


def test_the_gradient_mode_is_that_of_the_caller() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert all(x.requires_grad for x in ahead(weight * i for i in range(3)))
    with torch.no_grad():
        assert not any(x.requires_grad for x in ahead(weight * i for i in range(3)))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="depth is 0, but should be at least 1"):
        ahead([1], depth=0)
    with pytest.raises(TypeError):
        ahead(3)  # type: ignore[arg-type]
