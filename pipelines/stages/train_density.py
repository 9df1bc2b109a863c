"""Train a density model by a regression along a path, one network a seed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import store
from pipelines.params import DensityMethod, Fit
from pipelines.stage import DATA, Stage, run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipelines.fitting import Task


def main(stage: Stage, dataset: str, method: str) -> None:
    from pipelines.fitting import fit_seeds

    density, prepared = stage.params.density, DATA / "prepared" / dataset
    fit, choice = density.fit_for(stage.params.datasets[dataset]), density.methods[method]
    fit_seeds(
        stage,
        dataset,
        method,
        partial(job, prepared=prepared, choice=choice, fit=fit),
        fit,
        density.seeds,
        config={"dataset": dataset, "method": choice.model_dump(mode="json")},
        inputs=[prepared / "train.parquet", prepared / "provenance.json"],
    )


def job(device: torch.device, *, prepared: Path, choice: DensityMethod, fit: Fit) -> Task:
    """Regress what the network is to predict on the path from noise to the standardised rows, drawn by weight."""
    import torch

    from pipelines import models
    from pipelines.fitting import Task

    provenance = store.read_json(prepared / "provenance.json")
    columns = provenance["columns"]
    table = store.read_table(prepared / "train.parquet", columns)
    loc, scale = (torch.tensor(provenance[name], device=device) for name in ("loc", "scale"))
    rows = (torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device) - loc) / scale
    weight = torch.tensor(table["weight"].to_numpy(), device=device) if "weight" in table else None
    path, loss = models.path(choice.path), models.density_loss(choice)

    def terms(
        network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        if weight is None:
            index = torch.randint(len(rows), (fit.batch,), generator=generator, device=device)
        else:
            index = torch.multinomial(weight, fit.batch, replacement=True, generator=generator)
        return {"loss": loss(network, path, rows[index], generator=generator)}

    config = models.network_config(fit.network, len(columns), 0)
    meta = {"network": config, "path": choice.path.model_dump(), "prediction": choice.prediction}
    return Task(models.network(config).to(device), terms, loc, scale, meta)


if __name__ == "__main__":
    run(main)
