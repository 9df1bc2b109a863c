"""The processes that `torchrun` starts for one stage: how many there are, and which one this is.

The first one writes outputs, checkpoints, records and logs; the others only compute.
"""

from __future__ import annotations

import os


def world() -> int:
    """Return the number of processes, 1 unless `torchrun` started this one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def is_first() -> bool:
    """Return whether this process writes what the stage writes."""
    return rank() == 0
