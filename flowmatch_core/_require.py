"""Late imports of dependencies, with an error that says how to install a missing one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["required"]


def required(module: str, distribution: str) -> Any:
    """Import a module of a dependency and return it.

    Args:
        module: The module, such as `ot`.
        distribution: The name under which pip installs it, such as `POT`.

    Raises:
        ImportError: The dependency is not installed.

    Examples:
        >>> required("math", "math").sqrt(4.0)
        2.0
        >>> required("no_such_module", "no-such-package")
        Traceback (most recent call last):
        ImportError: the package no-such-package is not installed: run `pip install no-such-package`, or `pip install \
flowmatch` for all dependencies.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:  # a dependency of the dependency
            raise
        raise ImportError(
            f"the package {distribution} is not installed: run `pip install {distribution}`, or "
            "`pip install flowmatch` for all dependencies.",
            name=package,
        ) from error
