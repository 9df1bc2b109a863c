"""Prepare a data set: train, val and test as parquet, and where they come from."""

from __future__ import annotations

from pipelines import members, store
from pipelines.stage import DATA, Stage, run


def main(stage: Stage, dataset: str) -> None:
    import pandas as pd

    entry = stage.params.datasets[dataset]
    data = members.load("pipelines.datasets", entry.kind).build(
        entry.settings(), rng=stage.rng("prepare", dataset), mirror=stage.params.mirror
    )
    with stage.output(DATA / "prepared" / dataset) as folder:
        for part in ("train", "val", "test"):
            table = pd.DataFrame(getattr(data, part), columns=data.columns)
            if part == "train" and data.weight is not None:
                table["weight"] = data.weight
            store.write_table(folder / f"{part}.parquet", table)
        store.write_json(
            folder / "provenance.json",
            {
                "kind": entry.kind,
                "settings": entry.settings().model_dump(mode="json"),
                "source": data.source,
                "licence": data.licence,
                "fidelity": data.fidelity,
                "notes": data.notes,
                "discrete_bins": data.discrete_bins,
                "columns": data.columns,
                "rows": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
                # Models standardise with these and report in the units of the data.
                **store.moments(pd.DataFrame(data.train, columns=data.columns), dataset),
            },
        )
    stage.metrics({f"{part}_rows": len(getattr(data, part)) for part in ("train", "val", "test")})
    stage.log(f"{len(data.train)} train rows of {len(data.columns)} columns, {data.fidelity}: {data.source}")


if __name__ == "__main__":
    run(main)
