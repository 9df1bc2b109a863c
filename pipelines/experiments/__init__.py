"""Measured experiments: one file each, found by its name (`plugins.load("pipelines.experiments", name)`).

A member holds `Settings`, `run(settings, *, generator) -> Outcome`, which computes on the generator's device, and
`figure(table) -> Figure`, the picture of the outcome's table. It needs no data set and no trained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.base import device, files, layout, plugins
from pipelines.runs.context import Stage

if TYPE_CHECKING:
    import pandas as pd

    from flowmatch_core.intervals import Interval


@dataclass(frozen=True)
class Finding:
    """A sentence, the number that decides it, and the range where that number should lie."""

    name: str
    sentence: str
    measured: Interval
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """Where the interval lies (see `Interval.verdict`).

        >>> from flowmatch_core.intervals import Interval
        >>> Finding("x", "x is positive", Interval(1.0, 0.5, 1.5, 3), at_least=0.0).verdict
        'holds'
        >>> Finding("x", "x is positive", Interval(1.0, -0.5, 2.5, 3), at_least=0.0).verdict
        'open'
        """
        return self.measured.verdict(self.at_least, self.at_most)

    def cell(self) -> dict[str, Any]:
        """The finding as it is stored."""
        return {
            "sentence": self.sentence,
            "value": self.measured.mean,
            "value_low": self.measured.low,
            "value_high": self.measured.high,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Outcome:
    """What an experiment found: every number as rows, the findings, and what a reader must know of the setting."""

    title: str
    table: pd.DataFrame
    findings: tuple[Finding, ...]
    notes: str
    caption: str


def write(stage: Stage, experiment: str) -> None:
    """Run an experiment and write its table, its picture and its findings."""
    entry = stage.params.experiments[experiment]
    plugin = plugins.load(__name__, entry.kind)
    chosen = device.use(stage.params.device, stage.params.threads)
    outcome: Outcome = plugin.run(entry.settings(), generator=stage.generator("experiment", experiment, device=chosen))
    with stage.output(layout.experiment(experiment)) as folder:
        files.write_table(layout.results(folder), outcome.table)
        plugin.figure(outcome.table).savefig(layout.figure(folder), metadata={"Software": None})
        files.write_json(
            layout.summary(folder), {"title": outcome.title, "notes": outcome.notes, "caption": outcome.caption}
        )
    with stage.output(layout.findings(experiment)) as temporary:
        files.write_json(temporary, {finding.name: finding.cell() for finding in outcome.findings})
    stage.metrics({finding.name: finding.measured.mean for finding in outcome.findings})
    stage.record.artifact(layout.figure(layout.experiment(experiment)))
    for finding in outcome.findings:
        value, low, high, _ = finding.measured
        stage.log(f"{finding.sentence}: {value:.3g} [{low:.3g}, {high:.3g}], {finding.verdict}")
