"""Write the tables of results as CSV and Markdown."""

from __future__ import annotations

from pipelines import members, store
from pipelines.stage import DATA, Stage, run
from pipelines.tables import ORDER


def main(stage: Stage) -> None:
    params = stage.params
    metrics, logs, provenance = {}, {}, {}
    for folder, names, methods in (
        ("prepared", params.datasets, params.density.methods),
        ("transitions", params.environments, params.successor.methods),
    ):
        for name in names:
            metrics[name] = store.read_json(DATA / "metrics" / f"{name}.json")
            logs[name] = {method: store.read_json(DATA / "logs" / name / f"{method}.json") for method in methods}
            provenance[name] = store.read_json(DATA / folder / name / "provenance.json")
    for name in params.experiments:
        metrics[f"experiments/{name}"] = store.read_json(DATA / "metrics" / "experiments" / f"{name}.json")
    with stage.output(DATA / "tables") as output:
        output.mkdir()
        for name in ORDER:
            table = members.load("pipelines.tables", name).build(params, metrics, logs, provenance)
            table.rows.to_csv(output / f"{name}.csv", index=False)
            (output / f"{name}.md").write_text(table.markdown())
            store.write_json(output / f"{name}.json", table.page())
            stage.record.artifact(DATA / "tables" / f"{name}.md")
            print(table.markdown())


if __name__ == "__main__":
    run(main)
