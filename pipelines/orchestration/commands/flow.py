"""Run changed stages in parallel as a Prefect flow."""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil

from pipelines.config import params as parameters
from pipelines.orchestration.commands import _prefect, _workspace
from pipelines.runs import records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    _workspace.add_stages(parser)
    parser.add_argument(
        "--workers", type=_workspace.positive, help="maximum number of parallel stages (default: operation.workers)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the flow in a process of its own."""
    with _workspace.held(options) as here:
        return _run(here, options)


def _run(here: Path, options: argparse.Namespace) -> int:
    if not _workspace.has_work(here, options):
        return 0
    invocation = records.name_of(psutil.Process())
    status = _prefect.start(
        "run",
        invocation,
        root=here,
        targets=options.targets,
        force=options.force,
        workers=options.workers,
        device=parameters.load(here / "params.yaml").device,
    )
    return _workspace.report_outcome(status, here, invocation, options)
