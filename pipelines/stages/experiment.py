"""Run an experiment: every number as a table, its picture, and its findings beside what is expected."""

from __future__ import annotations

from pipelines import members, store
from pipelines.stage import DATA, Stage, run


def main(stage: Stage, experiment: str) -> None:
    from pipelines import training

    entry = stage.params.experiments[experiment]
    member = members.load("pipelines.experiments", entry.kind)
    generator = stage.generator("experiment", experiment, device=training.use(stage.params))
    outcome = member.run(entry.settings(), generator=generator)
    with stage.output(DATA / "experiments" / experiment) as folder:
        store.write_table(folder / "results.parquet", outcome.table)
        member.figure(outcome.table).savefig(folder / "figure.png", metadata={"Software": None})
        store.write_json(
            folder / "summary.json", {"title": outcome.title, "notes": outcome.notes, "caption": outcome.caption}
        )
    with stage.output(DATA / "metrics" / "experiments" / f"{experiment}.json") as temporary:
        store.write_json(temporary, {finding.name: finding.cell() for finding in outcome.findings})
    stage.metrics({finding.name: finding.measured.mean for finding in outcome.findings})
    stage.record.artifact(DATA / "experiments" / experiment / "figure.png")
    for finding in outcome.findings:
        value, low, high, _ = finding.measured
        stage.log(f"{finding.sentence}: {value:.3g} [{low:.3g}, {high:.3g}], {finding.verdict}")


if __name__ == "__main__":
    run(main)
