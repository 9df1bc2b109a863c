"""The order of the files: two workers end together only if the longest ones do not come last."""

from __future__ import annotations

import pytest

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
