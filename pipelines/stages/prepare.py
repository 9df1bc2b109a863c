"""Prepare a data set: train, val and test as parquet, and where they come from."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, dataset: str) -> None:
    from pipelines.data import prepare

    prepare.write(stage, dataset)


if __name__ == "__main__":
    run(main)
