"""Tables of results: one file each, with a function `build(params, metrics, logs, provenance) -> Table`.

A table lists what `params.yaml` asks for: a missing number is a hole with its reason, and the table is never shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""`metrics[data set or environment][method][name]`, as `data/metrics/<name>.json` holds them; `logs` alike.

`metrics["experiments/<name>"][finding][name]` are those of an experiment.
"""

ORDER = ("claims", "successor", "density", "experiments")
"""The tables, as readers meet them."""

HOLE = "–"


@dataclass(frozen=True)
class Table:
    """Numbers with a title, and what a reader must know to read them."""

    name: str
    title: str
    rows: pd.DataFrame
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """The rows as a Markdown table, with the notes below it."""
        lines = [" | ".join(self.rows.columns), " | ".join("---" for _ in self.rows.columns)]
        lines += [" | ".join(map(text, row)) for row in self.rows.itertuples(index=False)]
        table = "\n".join(f"| {line} |" for line in lines)
        return f"**{self.title}**\n\n{table}\n\n" + "\n".join(f"- {note}" for note in self.notes) + "\n"

    def page(self) -> dict[str, Any]:
        """The cells as texts, the places of the columns that hold words, and the notes."""
        words = [
            i for i, name in enumerate(self.rows.columns) if self.rows[name].map(lambda v: isinstance(v, str)).all()
        ]
        rows = [list(map(text, row)) for row in self.rows.itertuples(index=False)]
        return {
            "title": self.title,
            "columns": list(self.rows.columns),
            "words": words,
            "rows": rows,
            "notes": self.notes,
        }


def text(value: object) -> str:
    """A cell as people read it: three significant digits, a hole for what is not there.

    >>> text(0.05581), text(None), text(1234.5), text("loop")
    ('0.0558', '–', '1234', 'loop')
    """
    if value is None or value != value:
        return HOLE
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(cell: Mapping[str, Any], name: str) -> str | None:
    """`mean [low, high]` of a metric that has an interval."""
    if cell.get(name) is None:
        return None
    if cell.get(f"{name}_low") is None:
        return text(cell[name])
    return f"{text(cell[name])} [{text(cell[f'{name}_low'])}, {text(cell[f'{name}_high'])}]"
