"""Fetch results from DVC's remote instead of making them."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.orchestration import results, workspace
from pipelines.orchestration.commands import _workspace
from pipelines.runs import storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)


def run(options: argparse.Namespace) -> int:
    """Pull the project with the tables of all profiles, or everything of one profile."""
    root = Path.cwd()
    settings = storage.remotes(root)
    if options.profile == "default":
        storage.pull(root, settings)
        _workspace.point_to_report(root)
        return 0
    described = results.description(root, options.profile)
    if not described.exists():
        known = ", ".join(path.stem for path in sorted(described.parent.glob("*.dvc"))) or "none"
        raise UserError(
            f"{workspace.RESULTS}/{described.name} is missing, and nothing else describes the results of profile "
            f"{options.profile} (found: {known}); commit what `make push` wrote where they were made, and pull by git."
        )
    storage.pull(root, settings, [str(described.relative_to(root))])
    here = results.spread(root, options.profile)
    storage.pull(here, settings)
    _workspace.point_to_report(here)
    return 0
