"""Collect an environment's tables: offline transitions, on-policy rollouts and evaluation rollouts."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, environment: str) -> None:
    """Run the stage for one environment."""
    from pipelines.data import collect

    collect.write(stage, environment)


if __name__ == "__main__":
    run(main)
