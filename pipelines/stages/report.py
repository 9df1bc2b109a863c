"""Write the report: one self-contained HTML page and its figures."""

from __future__ import annotations

from pipelines.runs.context import Stage
from pipelines.stages._main import run


def main(stage: Stage) -> None:
    """Run the stage."""
    from pipelines.reporting import report

    report.write(stage)


if __name__ == "__main__":
    run(main)
