"""Retrain on a schedule."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.orchestration.commands import _prefect, _workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    parser.add_argument("--cron", default="0 3 * * *", help="schedule as a cron expression (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Serve the scheduled flow until stopped."""
    _workspace.check(options)
    return _prefect.start("serve", "", root=Path.cwd(), profile=options.profile, cron=options.cron)
