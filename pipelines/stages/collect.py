"""Collect an environment's tables: offline transitions, on-policy rollouts, and the rollouts of the evaluation."""

from __future__ import annotations

from pipelines import collection, members, store
from pipelines.stage import DATA, Stage, run


def main(stage: Stage, environment: str) -> None:
    entry = stage.params.environments[environment]
    built = members.load("pipelines.environments", entry.kind).build(entry.settings())
    tables = collection.collect(
        entry.kind,
        entry.settings(),
        transitions=entry.transitions,
        rollouts=entry.rollouts,
        length=entry.length,
        starts=entry.starts,
        seed=stage.seed("collect", environment),
    )
    next_state = tables.transitions[[f"next_state_{name}" for name in built.state_names]]
    with stage.output(DATA / "transitions" / environment) as folder:
        for name in ("transitions", "rollouts", "evaluation"):
            store.write_table(folder / f"{name}.parquet", getattr(tables, name))
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
                # Models standardise with these and report in the units of the environment.
                **store.moments(next_state, environment),
            },
        )
    stage.metrics({f"{name}_rows": len(getattr(tables, name)) for name in ("transitions", "rollouts", "evaluation")})
    stage.log(f"{entry.transitions} transitions, {entry.rollouts} rollouts, {entry.starts} starts: {built.source}")


if __name__ == "__main__":
    run(main)
