"""The results of profiles that travel by git and DVC.

`results/<profile>/` has the profile's dvc.lock, params.yaml, tables, metrics and report in the places that they have in
the profile's folder. A file `results/<profile>.dvc`, which belongs into git, describes it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.orchestration import runner, workspace
from pipelines.runs import graph, storage

_PLACED = (Path("dvc.lock"), layout.TABLES, layout.METRICS, layout.REPORT)


def description(root: Path, profile: str) -> Path:
    """Return the file in git that describes the results of a profile."""
    return root / workspace.RESULTS / f"{profile}.dvc"


def gather(root: Path, profile: str) -> Path:
    """Copy the results of a profile from its folder, let DVC track them, and return the profile's folder.

    Raises:
        UserError: The profile has not run to its end.
    """
    here = root / workspace.WORKSPACES / profile
    if not (here / "dvc.lock").exists() or graph.dirty(here, external=False):
        raise UserError(
            f"profile {profile} is not complete, expected every stage to be up to date; "
            f"run `make repro PROFILE={profile}` first."
        )
    folder = description(root, profile).with_suffix("")
    with files.replacing(folder) as temporary:
        _copy(here, temporary, (*_PLACED, Path("params.yaml")))
    storage.add(root, folder)
    return here


def write_partial(here: Path, invocation: str) -> None:
    """Write tables and a page of the entries that are complete, after stages of an invocation failed."""
    command = [sys.executable, "-m", "pipelines.reporting.partial", invocation]
    runner.run_foreground(command, here, runner.environment(invocation))


def spread(root: Path, profile: str) -> Path:
    """Copy the results of a profile into its folder, where DVC then finds what else its dvc.lock names.

    Returns:
        The profile's folder.
    """
    with workspace.held(root, profile) as here:
        _copy(description(root, profile).with_suffix(""), here, _PLACED)
    return here


def _copy(source: Path, target: Path, parts: Sequence[Path]) -> None:
    """Copy files and folders that exist, each as a whole."""
    for part in parts:
        if (source / part).exists():
            with files.replacing(target / part) as temporary:
                copy = shutil.copytree if (source / part).is_dir() else shutil.copy2
                copy(source / part, temporary)
