"""Seeds derived from the base seed of `params.yaml`."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(base: int, *key: object) -> int:
    """Return a seed that depends only on the base seed and the key.

    >>> derived_seed(0, "prepare", "moons") == derived_seed(0, "prepare", "moons") != derived_seed(0, "prepare", "ring")
    True
    """
    text = "/".join(str(part) for part in (base, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def generator(base: int, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator with the seed of a key."""
    import torch

    return torch.Generator(device).manual_seed(derived_seed(base, *key))
