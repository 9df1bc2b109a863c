"""Act in an environment by the models of a family of policies, and compare the returns."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage, environment: str) -> None:
    """Run the stage for one environment."""
    from pipelines.planning import returns

    returns.plan(stage, environment)


if __name__ == "__main__":
    run(main)
