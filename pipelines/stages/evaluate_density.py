"""Score every density model of a data set, with the sampling floor of each distance."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, dataset: str) -> None:
    """Run the stage for one data set."""
    from pipelines.evaluation import density

    density.evaluate(stage, dataset)


if __name__ == "__main__":
    run(main)
