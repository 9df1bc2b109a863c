"""Text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of words as text with aligned columns.

    >>> print(aligned([["model", "seeds"], ["moons.cfm", "2"]]))
    model      seeds
    moons.cfm  2
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
