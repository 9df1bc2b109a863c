"""Prepare a data set: train, val and test tables as parquet, with their provenance."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, dataset: str) -> None:
    """Run the stage for one data set."""
    from pipelines.data import prepare

    prepare.write(stage, dataset)


if __name__ == "__main__":
    run(main)
