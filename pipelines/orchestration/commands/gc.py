"""Remove from DVC's cache what neither the project nor a profile uses."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.orchestration import workspace
from pipelines.runs import graph, storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option."""


def run(options: argparse.Namespace) -> int:
    """Collect garbage, and print how much was removed and whose results were kept."""
    root = Path.cwd()
    folders = workspace.folders(root)
    for folder in (root, *folders):
        graph.dirty(folder, external=False)  # outputs that the cache has lost return to it, so that DVC knows them
    removed = storage.collect_garbage(root, folders)
    print(f"removed {removed / 1e6:.1f} MB; kept what these use: {', '.join(('default', *(f.name for f in folders)))}")
    return 0
