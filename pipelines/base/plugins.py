"""Plugins: one file each, loaded by name.

A family is a package (`pipelines.datasets`, `pipelines.environments`, `pipelines.experiments`) and each of its modules
is a plugin. A name in `params.yaml` resolves to a file, and adding a plugin means adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from types import ModuleType

from pydantic import BaseModel, ConfigDict

from pipelines.base.errors import UserError, did_you_mean


class Settings(BaseModel):
    """Typed, immutable settings that reject unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def names(family: str) -> list[str]:
    """Return the sorted names of the plugins in a family, without importing them.

    >>> "moons" in names("pipelines.datasets")
    True
    """
    spec = find_spec(family)
    assert spec is not None, family
    return sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations) if not m.name.startswith("_"))


def check(family: str, name: str) -> None:
    """Raise an error if a family has no plugin of a name.

    Raises:
        UserError: The name is unknown; the message lists the known names and the closest one.
    """
    known = names(family)
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"no {name!r} in {family.replace('.', '/')}/, which has {', '.join(known)}{hint}")


def load(family: str, name: str) -> ModuleType:
    """Import a plugin and return its module.

    Raises:
        UserError: The family has no such plugin.
    """
    check(family, name)
    return importlib.import_module(f"{family}.{name}")
