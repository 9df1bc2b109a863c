"""The folder of what the pipeline keeps outside of `data/` and shares between profiles: records and downloads."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return the folder of records: `$FLOWMATCH_HOME`, else `.flowmatch` in the DVC project or the current folder."""
    given = os.environ.get("FLOWMATCH_HOME")
    return Path(given).absolute() if given else Path(os.environ.get("DVC_ROOT") or ".").absolute() / ".flowmatch"
