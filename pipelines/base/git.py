"""What git says of the project."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Unavailable(Exception):
    """The exception for a missing git, a folder outside a repository, and any other failure of git."""


def output(*arguments: str, folder: Path | str = ".") -> bytes:
    """Return what a git command prints in a folder.

    Git refuses a repository of another user, as a folder that is mounted into a container most often is. What it
    protects from, settings of the repository that start programs, is no danger to who runs the project's code.

    Raises:
        Unavailable: Git is not installed, or fails.
    """
    command = ["git", "-c", "safe.directory=*", *arguments]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(str(error)) from error
