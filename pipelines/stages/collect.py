"""Collect an environment's tables: offline transitions, on-policy rollouts, and the rollouts of the evaluation."""

from __future__ import annotations

from pipelines import collection, store
from pipelines.stage import DATA, Stage, run


def main(stage: Stage, environment: str) -> None:
    entry = stage.params.environments[environment]
    collector = collection.Collector(entry.kind, entry.settings(), stage.seed("collect", environment))
    built = collector.environment
    with stage.output(DATA / "transitions" / environment) as folder:
        # Models standardise with these and report in the units of the environment; far outside of the range from
        # `low` to `high` no sample makes sense.
        moments = collection.write(
            folder / "transitions.parquet",
            collector.transitions(entry.transitions, entry.length),
            store.columns("next_state", built.state_names),
        )
        rollouts = collector.rollouts(entry.rollouts, entry.length)
        store.write_table(folder / "rollouts.parquet", rollouts)
        evaluation = collector.evaluation(entry.starts, entry.length)
        store.write_table(folder / "evaluation.parquet", evaluation)
        exchanged = collector.counterfactuals(evaluation, entry.length)
        if exchanged is not None:
            store.write_table(folder / "counterfactual.parquet", exchanged)
        store.write_json(
            folder / "provenance.json",
            {
                "kind": entry.kind,
                "settings": entry.settings().model_dump(mode="json"),
                "source": built.source,
                "fidelity": built.fidelity,
                "state_names": list(built.state_names),
                "action_names": list(built.action_names),
                "bounds": list(built.bounds),
                "walls": [list(wall) for wall in built.walls],
                "closed_form": built.oracle() is not None,
                "cut_off_mass": entry.gamma**entry.length,
                **moments,
            },
        )
    rows = {"transitions": entry.transitions, "rollouts": len(rollouts), "evaluation": len(evaluation)}
    stage.metrics({f"{name}_rows": number for name, number in rows.items()})
    stage.log(f"{entry.transitions} transitions, {entry.rollouts} rollouts, {entry.starts} starts: {built.source}")


if __name__ == "__main__":
    run(main)
