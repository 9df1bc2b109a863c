"""Check params.yaml with the profile, without running a stage."""

from __future__ import annotations

import argparse

from pipelines.orchestration.commands import _workspace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)


def run(options: argparse.Namespace) -> int:
    """Run the checks that precede a run."""
    from pipelines.orchestration import preflight
    from pipelines.runs import sources

    params = _workspace.check(options)
    preflight.check(params)
    for sentence in sources.downloads(params):
        print(sentence)
    print(f"params.yaml is valid for profile {options.profile}.")
    return 0
