"""Seeds side by side: results in order, reports arrive, failures end everything and leave no process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.base import workers
from pipelines.base.errors import UserError
from pipelines.base.workers import side_by_side


def square(seed: int, tell: Callable[[Any], None]) -> tuple[int, int, int]:
    for row in range(3):
        tell(row)
    return seed * seed, os.getpid(), torch.get_num_threads()


def fail(seed: int, tell: Callable[[Any], None], *, how: str, done: Path) -> int:
    if seed == 1:
        if how == "mistake":
            raise UserError("the sentence.")
        if how == "defect":
            raise ZeroDivisionError("here")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    done.touch()
    return seed


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_reports_arrive(processes: int) -> None:
    rows: list[tuple[int, Any]] = []
    results = side_by_side(square, (3, 1, 2), lambda seed, row: rows.append((seed, row)), processes=processes)
    assert [result[0] for result in results] == [9, 1, 4]
    assert sorted(rows) == [(seed, row) for seed in (1, 2, 3) for row in range(3)]
    pids = {result[1] for result in results}
    assert (pids == {os.getpid()}) == (processes == 1)
    assert {result[2] for result in results} == {1}


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("mistake", UserError, "the sentence."),
        ("killed", UserError, "seed 1 was killed .* lack of memory"),
        ("defect", RuntimeError, "ZeroDivisionError: here"),
    ],
)
def test_a_failure_ends_the_others(tmp_path: Path, how: str, kind: type[Exception], words: str) -> None:
    done = tmp_path / "done"
    with pytest.raises(kind, match=words):
        side_by_side(partial(fail, how=how, done=done), (0, 1), processes=2, label="seed {}")
    assert not done.exists()
    assert multiprocessing.active_children() == []


def test_more_seeds_than_processes_take_turns() -> None:
    results = side_by_side(square, (1, 2, 3), processes=2)
    assert [result[0] for result in results] == [1, 4, 9]
    assert os.getpid() not in {result[1] for result in results}


def test_what_is_done_at_once_starts_no_process() -> None:
    assert {result[1] for result in side_by_side(square, (1, 2), processes=2, alone_seconds=60)} == {os.getpid()}


def test_what_takes_longer_goes_on_in_processes() -> None:
    results = side_by_side(slow_first, ("a", "b", "c"), processes=2, alone_seconds=0.01)
    assert [name for name, _ in results] == ["a", "b", "c"]
    assert [pid == os.getpid() for _, pid in results] == [True, False, False]


def slow_first(name: str, tell: Callable[[Any], None]) -> tuple[str, int]:
    time.sleep(0.02)
    return name, os.getpid()


def test_the_cores_are_those_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workers.CORES, "6")
    assert workers.cores() == 6
    assert [workers.limit(threads) for threads in (1, 2, 4, 8)] == [6, 3, 1, 1]


@pytest.mark.parametrize("value", ["", "0", "-1", "2.5", "all"])
def test_a_number_of_cores_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(workers.CORES, value)
    with pytest.raises(UserError, match=f"FLOWMATCH_CORES is '{value}'; expected a number of cores, at least 1"):
        workers.cores()


def test_the_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workers.CORES, raising=False)
    monkeypatch.setattr(workers, "_quotas", list)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert workers.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert workers.cores() == len(before)


@pytest.mark.parametrize(
    ("texts", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, [2]),
        ({"cpu.max": "max 100000\n"}, []),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [4]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ({}, []),
    ],
)
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, texts: dict[str, str], quota: list[int]) -> None:
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(workers._quotas(tmp_path)) == quota
