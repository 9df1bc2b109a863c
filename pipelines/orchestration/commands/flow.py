"""Run changed stages in parallel as a Prefect flow."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.config import params as parameters
from pipelines.orchestration.commands import _prefect, _workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    _workspace.add_stages(parser)
    parser.add_argument(
        "--workers", type=_workspace.positive, help="maximum number of parallel stages (default: operation.workers)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the flow in a process of its own."""
    return _workspace.run_changed(options, _run)


def _run(here: Path, invocation: str, options: argparse.Namespace) -> int:
    return _prefect.start(
        "run",
        invocation,
        root=here,
        targets=options.targets,
        force=options.force,
        workers=options.workers,
        device=parameters.load(here / "params.yaml").device,
    )
