"""Memory and threads of a stage's process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAULTS = """
import resource
import numpy as np
from pipelines.base import memory
{keep}
def work():
    x = np.ones((4, 1_000_000))
    for _ in range(20):
        x = x * 1.0 + (x - x)     # three intermediate arrays of 32 MB
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

THREADS = """
from pipelines.base import device
device.limit_threads({threads})
import numpy.linalg, torch
from threadpoolctl import threadpool_info
import scipy.linalg
print(sorted({{found["num_threads"] for found in threadpool_info()}}), torch.get_num_threads())
"""


def output(code: str) -> str:
    """What a new process prints, in which nothing else sets a number of threads."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return finished.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the C library of Linux")
def test_freed_memory_is_not_returned_to_the_system() -> None:
    returned, kept = (int(output(FAULTS.format(keep=keep))) for keep in ("", "memory.keep()"))
    assert kept < returned / 20


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_bind_libraries_that_are_loaded_later(threads: int) -> None:
    assert output(THREADS.format(threads=threads)) == f"[{threads}] {threads}"
