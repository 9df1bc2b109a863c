"""Train density models: a path, a coupling and an objective on the rows of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from pipelines.base import files, layout
from pipelines.config.params import DensityMethod
from pipelines.models import build, density
from pipelines.runs.context import Stage
from pipelines.training.fit import Job, Task, fit_seeds


def train(stage: Stage, dataset: str, method: str) -> None:
    """Train a density model of a data set, one network per seed."""
    params = stage.params.density
    fit = params.fit_for(stage.params.datasets[dataset])
    fit_seeds(stage, DensityJob(dataset, method, fit, params.methods[method]), params.seeds)


@final
@dataclass(frozen=True)
class DensityJob(Job):
    """The training job of a density model.

    Attributes:
        choice: Path, coupling and objective of the method.
    """

    choice: DensityMethod

    def config(self) -> dict[str, Any]:
        """Return the data set and the method."""
        return {"dataset": self.data, "method": self.choice.model_dump(mode="json")}

    def inputs(self) -> list[Path]:
        """Return the training rows and their provenance."""
        folder = layout.prepared(self.data)
        return [layout.part(folder, "train"), layout.provenance(folder)]

    def task(self, device: torch.device) -> Task:
        """Create the training task of one seed."""
        train, description = self.inputs()
        provenance = files.read_json(description)
        columns = provenance["columns"]
        table = files.read_table(train, columns)
        loc, scale = (torch.tensor(provenance[name], device=device) for name in ("loc", "scale"))
        rows = (torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device) - loc) / scale
        weight = torch.tensor(table["weight"].to_numpy(), device=device) if "weight" in table else None
        path, loss, batch = build.path(self.choice.path), density.objective(self.choice), self.fit.batch

        def terms(
            network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
        ) -> Mapping[str, Tensor]:
            if weight is None:
                index = torch.randint(len(rows), (batch,), generator=generator, device=device)
            else:
                index = torch.multinomial(weight, batch, replacement=True, generator=generator)
            return {"loss": loss(network, path, rows[index], generator=generator)}

        config = build.network_config(self.fit.network, len(columns), 0)
        meta = {
            "network": config,
            "path": self.choice.path.model_dump(),
            "prediction": self.choice.prediction,
            "columns": columns,
        }
        return Task(build.network(config).to(device), terms, loc, scale, meta)
