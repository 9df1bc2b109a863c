"""Sample every successor model of an environment from the same start states with the same noise."""

from __future__ import annotations

from pipelines import store
from pipelines.stage import DATA, Stage, run


def main(stage: Stage, environment: str) -> None:
    import pandas as pd
    import torch

    from pipelines import horizon, starts, training

    successor = stage.params.successor
    entry, settings = stage.params.environments[environment], successor.sample
    device = training.use(stage.params)
    start = starts.read(DATA / "transitions" / environment, device)
    with stage.output(DATA / "samples" / environment) as folder:
        folder.mkdir()
        for method, choice in successor.methods.items():
            tables = []
            for seed in successor.seeds:
                trained = DATA / "models" / environment / method
                model = horizon.horizon_model(trained, seed, entry, choice, device, settings.solver, settings.steps)
                if isinstance(model, str):
                    stage.log(f"{method}: left out, {model}")
                    break
                generator = stage.generator("sample", environment, seed, device=device)
                x = horizon.sample(model, start.state, start.action, settings.samples, generator)
                table = pd.DataFrame(x.flatten(0, 1).cpu().numpy(), columns=start.names)
                index = torch.arange(len(start.state)).repeat(settings.samples).numpy()
                tables.append(table.assign(seed=seed, start=index))
            else:
                store.write_table(folder / f"{method}.parquet", pd.concat(tables, ignore_index=True))
                stage.log(f"{method}: {settings.samples} samples a start by {settings.solver}, {settings.steps} steps")


if __name__ == "__main__":
    run(main)
