"""Score every successor model of an environment, with the sampling floor of each score."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, environment: str) -> None:
    """Run the stage for one environment."""
    from pipelines.evaluation import successor

    successor.evaluate(stage, environment)


if __name__ == "__main__":
    run(main)
