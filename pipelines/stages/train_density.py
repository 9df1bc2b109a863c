"""Train a density model, one network per seed."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, dataset: str, method: str) -> None:
    """Run the stage for one data set and method."""
    from pipelines.training import density

    density.train(stage, dataset, method)


if __name__ == "__main__":
    run(main)
