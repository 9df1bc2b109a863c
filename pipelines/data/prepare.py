"""Write the parts of a data set and its provenance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from pipelines import datasets
from pipelines.base import files, layout
from pipelines.data import gaussian
from pipelines.data.moments import Moments
from pipelines.datasets import Parts
from pipelines.runs.context import Stage

_COUNTED = 1000  # different values of a column that are counted


def write(stage: Stage, dataset: str) -> None:
    """Read a data set and write its parts and its provenance."""
    entry = stage.params.datasets[dataset]
    settings, rng = entry.settings(), stage.rng("prepare", dataset)
    datasets.fetch(entry.kind, settings, stage.params.mirror, stage.log)
    with stage.output(layout.prepared(dataset)) as folder:
        folder.mkdir()
        with TemporaryDirectory(dir=folder) as scratch:
            parts = datasets.build(entry.kind, settings, rng=rng, mirror=stage.params.mirror, scratch=Path(scratch))
            training = Training(parts)
            for part in layout.PARTS:
                seen = training.see(parts.chunks(part)) if part == "train" else parts.chunks(part)
                files.write_chunks(layout.part(folder, part), seen)
        transformed = bool(parts.marginals) or any(one.how == "steps" for one in parts.discrete.values())
        description = {
            "kind": entry.kind,
            "settings": settings.model_dump(mode="json"),
            "source": parts.source,
            "licence": parts.licence,
            "fidelity": parts.fidelity,
            "notes": parts.notes,
            "discrete_bins": parts.discrete_bins,
            "columns": parts.columns,
            "weight": parts.weight,
            "weight_power": parts.weight_power,
            "types": parts.types,
            "discrete": {name: asdict(one) for name, one in parts.discrete.items()},
            "constants": parts.constants,
            "files": parts.files,
            "missing": parts.missing,
            "rows": parts.rows,
            "marginals": transformed,
            "image": None if parts.image is None else asdict(parts.image),
            **training.describe(dataset),
        }
        if parts.gaussian is not None:
            found = gaussian.check(folder, parts, dataset)
            stage.log(f"a Gaussian of full covariance has the test NLL {found:.3f}, published {parts.gaussian[0]:g}")
            description["gaussian"] = found
        if transformed:
            from pipelines.data import marginals

            description |= marginals.write(folder, parts, dataset)
        files.write_json(layout.provenance(folder), description)
    stage.metrics({f"{part}_rows": number for part, number in parts.rows.items()})
    for message in description["messages"]:
        stage.log(message)
    stage.log(f"{parts.rows['train']} train rows of {len(parts.columns)} columns, {parts.fidelity}: {parts.source}")


class Training:
    """What the description of a data set says of its training rows: moments, ranges and columns of few values.

    Args:
        parts: The data set.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.numbers = [*parts.columns, *(name for name, words in parts.conditions.items() if words is None)]
        self.moments = Moments(self.numbers)
        self.values = {name: np.empty(0) for name in parts.columns if name not in parts.discrete}

    def see(self, chunks: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        """Yield the same chunks."""
        for chunk in self.moments.including(chunks):
            for name, values in self.values.items():
                if len(values) <= _COUNTED:
                    self.values[name] = np.union1d(values, chunk[name].to_numpy())
            yield chunk

    def describe(self, dataset: str) -> dict[str, Any]:
        """Return `loc` and `scale` of the columns, the conditions, and the messages of the data set.

        Raises:
            UserError: A column is constant on the training rows.
        """
        if self.parts.image is None:  # a pixel may be constant, as the noise on it is not
            self.moments.check_varying(f"the training rows of {dataset}")
        found = self.moments.result()
        moments = {
            name: dict(zip(found, values, strict=True))
            for name, *values in zip(self.numbers, *found.values(), strict=True)
        }
        conditions = [
            {"name": name, "kind": "words", "levels": words}
            if words is not None
            else {"name": name, "kind": "number", **moments[name]}
            for name, words in self.parts.conditions.items()
        ]
        return {
            "loc": [moments[name]["loc"] for name in self.parts.columns],
            "scale": [moments[name]["scale"] for name in self.parts.columns],
            "conditions": conditions,
            "messages": [*self.parts.messages, *self._few()],
        }

    def _few(self) -> list[str]:
        """Return sentences on columns whose values repeat, so that they are not those of a continuous distribution."""
        rows = self.moments.count
        integers, rounded = list[str](), list[str]()
        for name, values in self.values.items():
            whole = bool((values == np.floor(values)).all())
            if len(values) <= min(_COUNTED, rows / 2 if whole else rows / 10):
                (integers if whole else rounded).append(f"{name!r} ({len(values)} values)")
        found = []
        if integers:
            found.append(
                f"integers that repeat in {rows} training rows: {', '.join(integers)}; a density that rises at each of "
                "them has no limit, so its NLL says little unless they are dequantised, as `discrete` of `kind: table` "
                "does."
            )
        if rounded:
            found.append(
                f"rounded numbers that repeat in {rows} training rows: {', '.join(rounded)}; a density that rises at "
                "each of them has no limit, so a low NLL may be that of the rounding."
            )
        return found
