"""The import of zuko: late, and without what it changes elsewhere."""

from __future__ import annotations

from typing import Any

from torch.distributions import Distribution

from flowmatch_core._require import required

__all__ = ["zuko"]


def zuko() -> Any:
    """Return the package zuko.

    Its first import switches off the validation of arguments of every distribution of torch in the process.
    That is put back.
    """
    validate = Distribution._validate_args
    for part in ("flows", "lazy", "nn", "transforms", "utils"):
        required(f"zuko.{part}", "zuko")
    Distribution.set_default_validate_args(validate)
    return required("zuko", "zuko")
