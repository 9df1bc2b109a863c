"""The page that maps the seeds to the library names nothing that does not exist."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "lecture-notes.md").read_text()
SECTIONS = {match[1]: match[2] for match in re.finditer(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)}
REFERENCE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows(seed: int) -> Iterator[tuple[str, str, str]]:
    """Every equation of a seed with the cell of its names and that of its tests."""
    (text,) = (text for title, text in SECTIONS.items() if title.startswith(f"Notes {seed}:"))
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| equation", "| ---")):
            equation, names, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            yield equation, names, tests


@cache
def defined_in(path: str) -> frozenset[str]:
    file = ROOT / path if path.startswith("tests/") else ROOT / "tests" / "core" / path
    tree = ast.parse(file.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def found(name: str) -> object:
    """What a dotted name stands for, its module imported."""
    parts = name.split(".") if name.startswith("pipelines.") else ["flowmatch_core", *name.split(".")]
    value: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:i]))
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_equation_has_names_and_tests(seed: int) -> None:
    count = 0
    for equation, names, tests in rows(seed):
        listed = re.findall(r"`([\w.]+)`", names)
        assert names == ", ".join(f"`{name}`" for name in listed) != "", equation
        assert all(found(name) is not None for name in listed)
        references = REFERENCE.findall(tests)
        assert tests == ", ".join(f"`{path}::{test}`" for path, test in references) != "", equation
        count += 1
    assert count > 10


def test_every_test_that_the_page_names_exists() -> None:
    references = REFERENCE.findall(PAGE)
    missing = sorted({f"{path}::{test}" for path, test in references if test not in defined_in(path)})
    assert missing == []
    assert all(test.startswith("test_") for _, test in references)
