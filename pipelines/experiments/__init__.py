"""Experiments: one plugin file each, loaded by name (`plugins.load("pipelines.experiments", name)`).

A plugin defines `Settings`, `run(settings, *, generator) -> Outcome`, which computes on the generator's device, and
`figure(table) -> Figure`, which draws the outcome's table. It needs no data set and no trained model.
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
    """A statement, the measured number that decides it, and the expected range of that number.

    Attributes:
        name: Key in the metrics.
        sentence: The statement.
        measured: The number with its interval.
        at_least: Lower end of the expected range; None if there is none.
        at_most: Upper end of the expected range; None if there is none.
    """

    name: str
    sentence: str
    measured: Interval
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """Verdict from the position of the interval (see `Interval.verdict`).

        >>> from flowmatch_core.intervals import Interval
        >>> Finding("x", "x is positive", Interval(1.0, 0.5, 1.5, 3), at_least=0.0).verdict
        'holds'
        >>> Finding("x", "x is positive", Interval(1.0, -0.5, 2.5, 3), at_least=0.0).verdict
        'open'
        """
        return self.measured.verdict(self.at_least, self.at_most)

    def cell(self) -> dict[str, Any]:
        """Return the finding as it is stored in the metrics."""
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
    """The result of an experiment.

    Attributes:
        title: Heading on the report page.
        table: Every measured number, as rows.
        findings: The findings.
        notes: The setting of the experiment.
        caption: Caption of the figure.
    """

    title: str
    table: pd.DataFrame
    findings: tuple[Finding, ...]
    notes: str
    caption: str


def write(stage: Stage, experiment: str) -> None:
    """Run an experiment and write its table, figure and findings."""
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
        value, low, high = finding.measured[:3]
        stage.log(f"{finding.sentence}: {value:.3g} [{low:.3g}, {high:.3g}], {finding.verdict}")
