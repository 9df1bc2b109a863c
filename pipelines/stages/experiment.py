"""Run an experiment and write its table, its figure and its findings."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, experiment: str) -> None:
    """Run the stage for one experiment."""
    from pipelines import experiments

    experiments.write(stage, experiment)


if __name__ == "__main__":
    run(main)
