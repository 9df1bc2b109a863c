"""Run changed stages by dvc repro."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.config import operation
from pipelines.orchestration import runner
from pipelines.orchestration.commands import _workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    _workspace.add_stages(parser)


def run(options: argparse.Namespace) -> int:
    """Run the stages one after the other and publish their records."""
    return _workspace.run_changed(options, execute)


def execute(here: Path, invocation: str, options: argparse.Namespace) -> int:
    """Run the changed stages of a folder by dvc, and publish their records."""
    from pipelines.runs import live

    command = [sys.executable, "-m", "dvc", "repro", "--keep-going", *options.targets]
    command += ["--force"] if options.force else []
    runner.raise_on_signals()
    with live.live(here, invocation) as outcome:
        env = runner.environment(invocation, timeout=operation.read(here / "params.yaml").timeout)
        status = runner.run_foreground(command, here, env)
        outcome.status = "FAILED" if status else "FINISHED"
    return status
