"""Archives as publishers pack them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path


def tarred(path: Path, members: Mapping[str, bytes], *, mode: str = "gz") -> None:
    """Write files to a tar archive in their order; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{mode}") as packed:  # type: ignore[call-overload]
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
