"""Apply a profile's changes to params.yaml, whose entries the user may have renamed or removed."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pipelines.config.yaml_files import merge

_ENTRIES: dict[tuple[str, ...], set[str]] = {
    ("datasets",): {"kind"},
    ("environments",): {"kind"},
    ("experiments",): {"kind"},
    ("density", "methods"): {"path", "coupling", "loss"},
    ("successor", "methods"): {"loss"},
}
"""Sections with entries of free names, and the keys that make an entry complete."""

_NO_ENTRIES: Mapping[str, Any] = {}


def apply(base: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return parameters with a profile's changes, and the keys of the changes that were skipped.

    A change to an entry that `base` does not have is skipped unless it defines a complete one. So is a name in the
    `methods` of an environment or in `solver_steps` whose entry `base` does not have or the profile removes.

    >>> base = {"datasets": {"mine": {"kind": "moons"}}}
    >>> apply(base, {"datasets": {"moons": {"train": 9}, "digits": None, "blobs": {"kind": "moons"}}})
    ({'datasets': {'mine': {'kind': 'moons'}, 'blobs': {'kind': 'moons'}}}, ['datasets.moons'])
    """
    changes, skipped = deepcopy(dict(changes)), []
    for section, complete in _ENTRIES.items():
        present, entries = _at(base, *section), _at(changes, *section)
        for name in [name for name in entries if name not in present]:
            change = entries[name]
            if not (isinstance(change, Mapping) and complete <= change.keys()):
                del entries[name]
                if change is not None:  # nothing is left to remove
                    skipped.append(".".join((*section, name)))
    merged = deepcopy(merge(base, changes))
    return merged, skipped + _drop_names(merged, base, changes)


def _drop_names(merged: Mapping[str, Any], base: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Remove names without an entry from lists in `merged`, except names that only the user can have misspelt."""
    dropped = []
    methods = _at(merged, "successor", "methods")
    removed = _at(base, "successor", "methods").keys() - methods.keys()
    for name, entry in _at(merged, "environments").items():
        listed = _at(merged, "environments", name).get("methods")
        if not isinstance(listed, list):
            continue
        from_profile = "methods" in _at(changes, "environments", name)
        unknown = [method for method in listed if method not in methods and (from_profile or method in removed)]
        if len(unknown) < len(listed):  # an empty list would be an error about something else
            entry["methods"] = [method for method in listed if method not in unknown]
            dropped += [f"{method} of environments.{name}.methods" for method in unknown]
    solver_steps = ("successor", "evaluate", "solver_steps")
    environments, steps = _at(merged, "environments"), _at(merged, *solver_steps)
    for name in [name for name in steps if name not in environments]:
        if name in _at(base, "environments") or name in _at(changes, *solver_steps):
            del steps[name]
            dropped.append(f"solver_steps of {name}")
    return dropped


def _at(nested: Mapping[str, Any], *keys: str) -> Any:
    """Return the mapping at a key, or an empty one; a value of another type is left to the schema."""
    here: Any = nested
    for key in keys:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else _NO_ENTRIES
