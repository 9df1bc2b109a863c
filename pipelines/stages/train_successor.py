"""Train a successor model, one network per seed."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, environment: str, method: str) -> None:
    """Run the stage for one environment and method."""
    from pipelines.training import successor

    successor.train(stage, environment, method)


if __name__ == "__main__":
    run(main)
