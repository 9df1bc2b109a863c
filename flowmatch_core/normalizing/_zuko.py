"""The import of zuko: late, and without what it changes elsewhere."""

from __future__ import annotations

from typing import Any

from torch.distributions import Distribution

__all__ = ["zuko"]


def zuko() -> Any:
    """Return the package zuko.

    Its first import switches off the validation of arguments of every distribution of torch in the process.
    That is put back.
    """
    validate = Distribution._validate_args
    import zuko.flows
    import zuko.lazy
    import zuko.nn
    import zuko.transforms
    import zuko.utils

    Distribution.set_default_validate_args(validate)
    return zuko
