"""Members of an open family: one file each, found by its name.

A family is a package (`pipelines.datasets`, `flowmatch_core.paths`, ...) and a member is a module in it, so a name in
`params.yaml` resolves to a file that can be opened, and adding a member means adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel, ConfigDict

from pipelines.base.errors import UserError, did_you_mean


class Settings(BaseModel):
    """Typed, immutable settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def names(family: str) -> list[str]:
    """The names of the members of a package, sorted, without importing any of them.

    >>> "moons" in names("pipelines.datasets")
    True
    """
    spec = find_spec(family)
    assert spec is not None, family
    return sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations) if not m.name.startswith("_"))


def source(family: str, name: str) -> str:
    """The text of a member's file."""
    spec = find_spec(family)
    assert spec is not None, family
    return Path(*spec.submodule_search_locations or (), f"{name}.py").read_text()


def check(family: str, name: str) -> None:
    """Refuse a name that is not in the family.

    Raises:
        UserError: the sentence lists the members there are and the nearest one.
    """
    known = names(family)
    if name not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"no {name!r} in {family.replace('.', '/')}/, which has {', '.join(known)}{hint}")


def load(family: str, name: str) -> ModuleType:
    """The module of one member.

    Raises:
        UserError: when the family has no such member.
    """
    check(family, name)
    return importlib.import_module(f"{family}.{name}")
