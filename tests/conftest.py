"""The order of the files, the home of runs of each test, and one process for a compilation.

Two workers end together only if the longest files do not come last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Inductor compiles in a pool of processes of its own, whose answer once never came; these few kernels need no pool.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

HOME = "FLOWMATCH_HOME"

LONGEST = (
    "test_end_to_end.py",
    "test_try.py",
    "test_docs.py",
    "test_prefect.py",
    "test_gpu_command.py",
    "test_promotion.py",
    "test_readme.py",
    "test_stages.py",
    "test_workspace.py",
    "test_faults.py",
    "test_stores.py",
    "test_tracking.py",
    "test_results.py",
    "test_checks.py",
    "test_packaging.py",
    "test_examples.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the others keep their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def home_of_runs() -> Iterator[None]:
    """Put the home of runs back, which a command sets for its process."""
    before = os.environ.get(HOME)
    yield
    os.environ.pop(HOME, None)
    if before is not None:
        os.environ[HOME] = before
