"""Run an experiment: every number as a table, its picture, its findings beside what is expected."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, experiment: str) -> None:
    from pipelines import experiments

    experiments.write(stage, experiment)


if __name__ == "__main__":
    run(main)
