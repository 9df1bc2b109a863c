"""Write the parts of a data set and its provenance."""

from __future__ import annotations

import pandas as pd

from pipelines import datasets
from pipelines.base import files, layout, metric_keys
from pipelines.data.moments import moments
from pipelines.runs.context import Stage


def write(stage: Stage, dataset: str) -> None:
    """Build a data set and write its parts and its provenance."""
    entry = stage.params.datasets[dataset]
    rng = stage.rng("prepare", dataset)
    data = datasets.build(entry.kind, entry.settings(), rng=rng, mirror=stage.params.mirror)
    weight = None if data.weight is None else metric_keys.free("weight", data.columns)
    rows = {part: len(getattr(data, part)) for part in layout.PARTS}
    with stage.output(layout.prepared(dataset)) as folder:
        for part in layout.PARTS:
            table = pd.DataFrame(getattr(data, part), columns=data.columns)
            if part == "train" and weight is not None:
                table[weight] = data.weight
            files.write_table(layout.part(folder, part), table)
        files.write_json(
            layout.provenance(folder),
            {
                "kind": entry.kind,
                "settings": entry.settings().model_dump(mode="json"),
                "source": data.source,
                "licence": data.licence,
                "fidelity": data.fidelity,
                "notes": data.notes,
                "discrete_bins": data.discrete_bins,
                "columns": data.columns,
                "conditions": [],
                "weight": weight,
                "types": dict.fromkeys(data.columns, "float"),
                "discrete": {},
                "constants": {},
                "files": {},
                "missing": 0,
                "messages": [],
                "rows": rows,
                # Models standardise with these moments and report in the units of the data.
                **moments(pd.DataFrame(data.train, columns=data.columns), dataset),
            },
        )
    stage.metrics({f"{part}_rows": number for part, number in rows.items()})
    stage.log(f"{rows['train']} train rows of {len(data.columns)} columns, {data.fidelity}: {data.source}")
