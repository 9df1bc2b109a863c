"""List the stages and whether they have changed."""

from __future__ import annotations

import argparse

from pipelines.orchestration.commands import _workspace
from pipelines.runs import graph


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)


def run(options: argparse.Namespace) -> int:
    """Print one line for each stage."""
    with _workspace.held(options) as here:
        nodes, changed = graph.compare(here)
        for name in nodes:
            print(f"{'changed' if name in changed else 'up to date':10}  {name}")
    return 0
