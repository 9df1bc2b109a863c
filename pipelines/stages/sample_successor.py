"""Sample every successor model of an environment from the same start states and noise."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, environment: str) -> None:
    """Run the stage for one environment."""
    from pipelines.evaluation import successor_sampling

    successor_sampling.sample(stage, environment)


if __name__ == "__main__":
    run(main)
