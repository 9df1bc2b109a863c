"""Send the results of the project and of its profiles to DVC's remote."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.orchestration import results, workspace
from pipelines.orchestration.commands import _workspace
from pipelines.runs import graph, storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)


def run(options: argparse.Namespace) -> int:
    """Push the project, and the profile of the options or every complete one."""
    root = Path.cwd()
    settings = storage.remotes(root)
    folders = {"the project": root}
    if graph.dirty(root, external=False):
        print("the project's own results are not up to date; those that are there are pushed.", file=sys.stderr)
    for profile in [options.profile] if options.profile != "default" else workspace.profiles(root):
        try:
            folders[profile] = results.gather(root, profile)
        except UserError as error:
            if options.profile != "default":
                raise
            print(f"left out: {error}", file=sys.stderr)
    for folder in folders.values():
        storage.push(folder, settings)
    print(f"pushed: {', '.join(folders)}")
    described = [os.path.relpath(results.description(root, profile)) for profile in folders if folders[profile] != root]
    if described:
        print(f"commit them: git add {' '.join(described)} {workspace.RESULTS}/.gitignore")
    return 0
