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

from pipelines.base.errors import UserError
from pipelines.training.workers import side_by_side


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
    results = side_by_side(square, (3, 1, 2), lambda seed, row: rows.append((seed, row)), processes)
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
        side_by_side(partial(fail, how=how, done=done), (0, 1), lambda seed, row: None, 2)
    assert not done.exists()
    assert multiprocessing.active_children() == []


def test_more_seeds_than_processes_take_turns() -> None:
    results = side_by_side(square, (1, 2, 3), lambda seed, row: None, 2)
    assert [result[0] for result in results] == [1, 4, 9]
    assert os.getpid() not in {result[1] for result in results}
