"""The late import of zuko, without its global side effect."""

from __future__ import annotations

from typing import Any

from torch.distributions import Distribution

from flowmatch_core._require import required

__all__ = ["zuko"]


def zuko() -> Any:
    """Return the package zuko.

    Its first import disables argument validation for all torch distributions in the process; the setting is restored
    here.
    """
    validate = Distribution._validate_args
    for part in ("flows", "lazy", "nn", "transforms", "utils"):
        required(f"zuko.{part}", "zuko")
    Distribution.set_default_validate_args(validate)
    return required("zuko", "zuko")
