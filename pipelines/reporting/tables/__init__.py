"""Tables of results: one plugin file each, with a function `build(params, metrics, logs, provenance) -> Table`.

A table has all rows that `params.yaml` asks for: a missing number is a hole with its reason, and no row is omitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files, layout, metric_keys, plugins
from pipelines.reporting.times import Times

if TYPE_CHECKING:
    import pandas as pd

    from flowmatch_core.intervals import Interval
    from pipelines.config.params import EnvironmentEntry, Params, Section, Trained
    from pipelines.runs.context import Stage

Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""`metrics[data set or environment][method][name]`, as in `data/metrics/<name>.json`; `logs` in the same form.

`metrics["experiments/<name>"][finding][name]` belong to an experiment, `metrics["plans/<name>"][reward][method][name]`
to the planners of an environment. The logs of data sets also have `seconds`.
"""

ORDER = (
    "comparisons",
    "claims",
    "planning_claims",
    "planning",
    "maze",
    "domains",
    "successor",
    "horizons",
    "paths",
    "ode_steps",
    "literature",
    "literature_rows",
    "aims",
    "density",
    "two_d",
    "experiments",
)
"""The tables in the order of the page."""

HOLE = "–"
RIVAL = "td2_cfm"  # the method with which the others are compared


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        name: Name of its files.
        title: Heading.
        rows: Cells.
        notes: Remarks that are needed to read the numbers.
    """

    name: str
    title: str
    rows: pd.DataFrame
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Return the rows as a Markdown table, with the notes below; empty if there are no rows."""
        if self.rows.empty:
            return ""
        lines = [" | ".join(self.rows.columns), " | ".join("---" for _ in self.rows.columns)]
        lines += [" | ".join(map(text, row)) for row in self.rows.itertuples(index=False)]
        table = "\n".join(f"| {line} |" for line in lines)
        return f"**{self.title}**\n\n{table}\n\n" + "\n".join(f"- {note}" for note in self.notes) + "\n"

    def latex(self) -> str:
        """Return the rows as a LaTeX table for the package booktabs, with title and notes as comments above it."""
        if self.rows.empty:
            return ""
        words = self.page()["words"]
        form = "".join("l" if i in words else "r" for i in range(len(self.rows.columns)))
        lines: list[Iterable[object]] = [self.rows.columns, *self.rows.itertuples(index=False)]
        head, *body = (" & ".join(map(_escaped, line)) + r" \\" for line in lines)
        table = [
            rf"\begin{{tabular}}{{{form}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join([*(f"% {line}" for line in (self.title, *self.notes)), *table]) + "\n"

    def page(self) -> dict[str, Any]:
        """Return the cells as texts, the indices of text columns, and the notes."""
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
    """Return a cell as text: three significant digits, or a hole for a missing number.

    >>> text(0.05581), text(None), text(1234.5), text("loop")
    ('0.0558', '–', '1234', 'loop')
    """
    if value is None or value != value:
        return HOLE
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_LATEX = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "×": r"$\times$",
    "γ": r"$\gamma$",
    "²": "$^2$",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}
"""What characters become in LaTeX."""


def _escaped(value: object) -> str:
    r"""Return a cell as text for LaTeX.

    >>> print(_escaped("TD²-CFM & 5 % ± 2"))
    TD$^2$-CFM \& 5 \% $\pm$ 2
    """
    return "".join(_LATEX.get(sign, sign) for sign in text(value))


def interval(cell: Mapping[str, Any], name: str) -> str | None:
    """Return a metric as `mean [low, high]`; the mean alone if there is no interval."""
    return between(*(cell.get(key) for key in (name, f"{name}_low", f"{name}_high")))


def between(mean: float | None, low: float | None, high: float | None) -> str | None:
    """Return `mean [low, high]`; the mean alone if there is no interval.

    >>> between(0.5, 0.4, 0.6), between(0.5, float("nan"), float("nan"))
    ('0.5 [0.4, 0.6]', '0.5')
    """
    if mean is None or mean != mean:
        return None
    if low is None or high is None or low != low:
        return text(mean)
    return f"{text(mean)} [{text(low)}, {text(high)}]"


def limits(at_least: float | None, at_most: float | None) -> str | None:
    """Return a range as text; it may be open at one end.

    >>> limits(0.5, 2.0), limits(1.3, None), limits(None, 2.0)
    ('0.5 to 2', '≥ 1.3', '≤ 2')
    """
    if at_least is None or at_most is None:
        return f"≥ {at_least:g}" if at_least is not None else f"≤ {at_most:g}" if at_most is not None else None
    return f"{at_least:g} to {at_most:g}"


def numbers_of(
    params: Params, entry: EnvironmentEntry, method: str, cell: Mapping[str, Any], name: str
) -> dict[int, float]:
    """Return a metric of a method, or of the floor, by seed; empty if one of its seeds is missing."""
    successor, found = params.successor, metric_keys.by_seed(cell, name)
    seeds = successor.seeds_for(entry, method) if method in successor.methods else successor.seeds_in(entry)
    return {seed: found[seed] for seed in seeds} if set(seeds) <= found.keys() else {}


def compared(
    over: Callable[[Mapping[int, float], Mapping[int, float]], Interval],
    a: Mapping[int, float],
    b: Mapping[int, float],
) -> Interval | None:
    """Return a statistic of two methods by seed, or None if one of them lacks a seed."""
    return over(a, b) if a and b else None


def said(found: Interval | None) -> str | None:
    """Return a comparison as `mean [low, high], method`; the mean alone if there is no interval.

    >>> from flowmatch_core.intervals import Interval
    >>> nan = float("nan")
    >>> said(Interval(0.5, 0.4, 0.6, 3, "welch")), said(Interval(0.5, nan, nan, 1, "paired"))
    ('0.5 [0.4, 0.6], welch', '0.5')
    """
    if found is None or found.n < 2:
        return None if found is None else between(*found[:3])
    return f"{between(*found[:3])}, {found.method}"


def seeds_note(section: Section, entries: Mapping[str, Trained]) -> str:
    """Return which seeds were trained: one list, or one per entry with the methods that have others."""
    lists = dict[str, str]()
    for name, entry in entries.items():
        own = {method: section.seeds_for(entry, method) for method in section.methods_for(entry)}
        most = Counter(own.values()).most_common(1)[0][0]
        others = ", ".join(f"{method} {list(seeds)}" for method, seeds in own.items() if seeds != most)
        lists[name] = f"{list(most)}" + (f" ({others})" if others else "")
    if len(set(lists.values())) == 1:
        return f"Seeds: {next(iter(lists.values()))}."
    return f"Seeds: {'; '.join(f'{name} {seeds}' for name, seeds in lists.items())}."


def physics_steps(entry: EnvironmentEntry) -> int:
    """Return the physics steps of one transition."""
    return int(entry.own.get("action_repeat", 5)) if entry.kind == "maze" else 1


def has_family(entry: EnvironmentEntry) -> bool:
    """Return whether the models of a simulator are those of a family of policies."""
    return bool(entry.own.get("family") or (entry.own.get("policy") and entry.own.get("w")))


def papers_task(entry: EnvironmentEntry) -> str:
    """Return the task of a maze whose horizon is about 100 physics steps, as in the paper, or an empty text.

    A maze with a family of policies has none.
    """
    if entry.kind != "maze" or has_family(entry):
        return ""
    horizon = 1 / (1 - entry.gamma ** (1 / physics_steps(entry)))
    return str(entry.own.get("task", "loop")) if 70 <= horizon <= 140 else ""


def tasks_of(params: Params) -> dict[str, str]:
    """Return the first environment of each task of the paper's Maze, with the paper's horizon and uniform rows."""
    tasks: dict[str, str] = {}
    for name, entry in params.environments.items():
        if (task := papers_task(entry)) and entry.own.get("behaviour", "uniform") == "uniform":
            tasks.setdefault(task, name)
    return tasks


def write(stage: Stage) -> None:
    """Write every table and print it."""
    with stage.output(layout.TABLES) as folder:
        for table in save(stage.params, folder):
            stage.record.artifact(layout.table(layout.TABLES, table.name, "md"))
            print(table.markdown())


def save(params: Params, folder: Path) -> list[Table]:
    """Build every table from the results and write it as CSV, Markdown, LaTeX and JSON into a new folder."""
    metrics: dict[str, Any] = {}
    logs: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    for place, names in ((layout.prepared, params.datasets), (layout.collected, params.environments)):
        for name in names:
            metrics[name] = files.read_json(layout.metrics(name))
            provenance[name] = files.read_json(layout.provenance(place(name)))
    trained: Sequence[tuple[Section, Mapping[str, Trained]]]
    trained = ((params.density, params.datasets), (params.successor, params.environments))
    for section, entries in trained:
        for name, entry in entries.items():
            run = section.methods_for(entry)
            logs[name] = {method: files.read_json(layout.final_losses(name, method)) for method in run}
    times = Times()
    for name, entry in params.datasets.items():
        for method, final in logs[name].items():
            final["seconds"] = times.mean(name, method, params.density.seeds_for(entry, method), final)
    for name in params.experiments:
        metrics[f"experiments/{name}"] = files.read_json(layout.findings(name))
    for name in params.plans:
        metrics[f"plans/{name}"] = files.read_json(layout.planned(name))
    folder.mkdir(parents=True)
    tables = [plugins.load(__name__, name).build(params, metrics, logs, provenance) for name in ORDER]
    for table in tables:
        table.rows.to_csv(layout.table(folder, table.name, "csv"), index=False, encoding="utf-8")
        layout.table(folder, table.name, "md").write_text(table.markdown(), encoding="utf-8")
        layout.table(folder, table.name, "tex").write_text(table.latex(), encoding="utf-8")
        files.write_json(layout.table(folder, table.name, "json"), table.page())
    return tables
