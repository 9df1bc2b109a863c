"""What a benchmark hands on: rows of a table, and claims about ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.timing import Ratio

__all__ = ["Claim", "Result", "markdown_table"]

Cell = str | float | int | None


@dataclass(frozen=True)
class Claim:
    """A ratio that should be at least, or at most, something.

    Arguments:
        text: What is compared.
        ratio: The measured ratio.
        wanted: The bound.
        bound: Whether it bounds from below or from above.
        suspects: What to profile should the ratio miss its bound.
    """

    text: str
    ratio: Ratio
    wanted: float
    bound: Literal["at least", "at most"] = "at least"
    suspects: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the median is within the bound.

        >>> Claim("a", Ratio(2.0, 1.0, 3.0), wanted=1.5).met
        True
        """
        if self.bound == "at least":
            return self.ratio.median >= self.wanted
        return self.ratio.median <= self.wanted

    def row(self) -> dict[str, Cell]:
        return {
            "claim": self.text,
            "ratio [interval]": str(self.ratio),
            "wanted": f"{self.bound} {self.wanted:g}",
            "verdict": "met" if self.met else "missed",
        }

    def json(self) -> dict[str, Any]:
        given = {"text": self.text, "wanted": self.wanted, "bound": self.bound}
        return given | {"ratio": asdict(self.ratio), "met": self.met}


@dataclass(frozen=True)
class Result:
    """The outcome of one benchmark."""

    title: str
    rows: list[dict[str, Cell]]
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"## {self.title}\n\n{markdown_table(self.rows)}\n{notes}"

    def json(self) -> dict[str, Any]:
        return {"rows": self.rows, "claims": [claim.json() for claim in self.claims], "notes": self.notes}


def markdown_table(rows: list[dict[str, Cell]]) -> str:
    """Return rows with the same keys as a table.

    >>> print(markdown_table([{"a": 1.0, "b": None}]), end="")
    | a | b |
    | --- | --- |
    | 1 | – |
    """
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_text(row[name]) for name in head] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
