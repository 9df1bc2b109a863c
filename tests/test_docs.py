"""The documentation is true: its code runs and prints what the pages show, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))

_FENCE = re.compile(
    r"^```(?P<language>python|text)\n(?P<code>.*?)^```|^<!-- within (?P<tolerance>[\d.]+)(?P<percent> %)? -->$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
_MARK = "=== end of block ==="


def blocks(page: str) -> list[tuple[str, str | None, float, float]]:
    """Every Python block of a page with the output shown below it, None without one, and its tolerances.

    Returns:
        For every block its code, the output, the absolute and the relative tolerance.
    """
    found: list[tuple[str, str | None, float, float]] = []
    absolute, relative = 0.0, 0.0
    for match in _FENCE.finditer(page):
        if match["tolerance"]:
            value = float(match["tolerance"])
            absolute, relative = (0.0, value / 100) if match["percent"] else (value, 0.0)
        elif match["language"] == "python":
            found.append((match["code"], None, 0.0, 0.0))
        else:
            found[-1] = (found[-1][0], match["code"], absolute, relative)
            absolute, relative = 0.0, 0.0
    return found


def run_page(page: str) -> list[str]:
    """Run the Python blocks of a page in order in one process with one thread; what each of them prints."""
    code = f"\nprint({_MARK!r})\n".join(block for block, *_ in blocks(page))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split(f"{_MARK}\n")
