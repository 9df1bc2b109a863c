"""Score every density model of a data set on its test rows, each distance beside its sampling floor."""

from __future__ import annotations

from pipelines import members, store
from pipelines.stage import DATA, Stage, run


def main(stage: Stage, dataset: str) -> None:
    import numpy as np
    import pandas as pd
    import torch

    from flowmatch_core import metrics
    from pipelines import models, training

    density, settings = stage.params.density, stage.params.density.evaluate
    device = training.use(stage.params)
    prepared = DATA / "prepared" / dataset
    provenance = store.read_json(prepared / "provenance.json")
    columns = provenance["columns"]

    def tensor(table: pd.DataFrame) -> torch.Tensor:
        return torch.tensor(table[columns].to_numpy(), dtype=torch.float32, device=device)

    test = tensor(store.read_table(prepared / "test.parquet", columns))
    other = tensor(store.read_table(prepared / "val.parquet", columns))
    size = min(settings.rows, density.sample.samples, len(test), len(other))
    scored = test[: settings.likelihood_rows]

    def distances(x: torch.Tensor) -> dict[str, float]:
        generator = stage.generator("evaluate", dataset, device=device)
        x, y = x[:size], test[:size]
        sliced = metrics.sliced_wasserstein(x, y, projections=settings.projections, generator=generator)
        return {"emd": float(metrics.emd(x, y)), "sliced_wasserstein": float(sliced)}

    rows = []
    for method in density.methods:
        samples = store.read_table(DATA / "samples" / dataset / f"{method}.parquet", [*columns, "seed"])
        for seed in density.seeds:
            file = DATA / "models" / dataset / method / f"seed{seed}.safetensors"
            with torch.no_grad():
                fine, coarse = (
                    models.load_density(file, device, settings.solver, steps).log_prob(scored).double()
                    for steps in (settings.steps, max(1, settings.steps // 2))
                )
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "nll": float(-fine.mean()),
                    "nll_standard_error": float(fine.std() / len(fine) ** 0.5),
                    # Step doubling: what changes when the steps are twice as long bounds what is left.
                    "nll_solver_error": float((fine - coarse).square().mean().sqrt()),
                    **distances(tensor(samples[samples["seed"] == seed])),
                }
            )
            stage.log("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    cells = pd.DataFrame(rows)
    with stage.output(DATA / "evaluations" / dataset) as folder:
        store.write_table(folder / "cells.parquet", cells)

    bins = provenance["discrete_bins"]
    summary: dict[str, dict[str, float | None]] = {}
    for method in density.methods:
        group = cells[cells["method"] == method]
        means = {name: float(group[name].mean()) for name in group.columns if name not in ("method", "seed")}
        spread = {f"{name}_std": float(group[name].std()) for name in ("nll", "emd", "sliced_wasserstein")}
        summary[method] = {**means, **(spread if len(group) > 1 else {})}
        if bins is not None:
            log_prob = torch.tensor(-means["nll"])
            summary[method]["bits_per_dim"] = float(metrics.bits_per_dim(log_prob, len(columns), 1 / bins))
    member = members.load("pipelines.datasets", provenance["kind"])
    truth: dict[str, float | None] = dict(distances(other))
    if hasattr(member, "log_prob"):
        exact = member.log_prob(stage.params.datasets[dataset].settings(), scored.cpu().numpy().astype(np.float64))
        truth["nll"] = float(-exact.mean())
    summary["floor"] = truth
    for method, values in summary.items():
        stage.metrics({f"{method}.{name}": value for name, value in values.items() if value is not None})
    with stage.output(DATA / "metrics" / f"{dataset}.json") as temporary:
        store.write_json(temporary, summary)


if __name__ == "__main__":
    run(main)
