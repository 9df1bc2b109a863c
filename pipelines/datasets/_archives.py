"""Files of real data outside the project: a mirror of local copies, and official archives that are downloaded once."""

from __future__ import annotations

from pathlib import Path

from pipelines.base.errors import UserError


def mirror_file(mirror: Path, name: str) -> Path:
    """Return the path of a file below the mirror, which is named like `maf/miniboone_test.npy`.

    Raises:
        UserError: The file is missing.
    """
    path = mirror / name
    if not path.is_file():
        raise UserError(
            f"{path} is missing, expected this file below `mirror`; copy it there, or set `mirror: null` to download "
            "the official archive."
        )
    return path
