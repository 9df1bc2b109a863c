"""Apply a profile's changes to params.yaml, whose entries the user may have renamed or removed."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pipelines.base.errors import UserError
from pipelines.config.yaml_files import merge

_ENTRIES: dict[tuple[str, ...], set[str]] = {
    ("datasets",): {"kind"},
    ("environments",): {"kind"},
    ("experiments",): {"kind"},
    ("plans",): {"rewards"},
    ("density", "methods"): {"loss"},
    ("successor", "methods"): {"loss"},
}
"""Sections with entries of free names, and the keys that make an entry complete."""

_NO_ENTRIES: Mapping[str, Any] = {}

ONLY = "only"
"""Key of a profile: by section the entries of params.yaml that it keeps, for a profile that is about given entries."""


SKIP_MISSING = "skip_missing"
"""Key of a profile: whether data sets whose files are missing are left out, for one of all that a machine has."""


def apply(base: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return parameters with a profile's changes, and the keys of the changes that were skipped.

    A change to an entry that `base` does not have is skipped unless it defines a complete one. So is a name in the
    `methods` of an environment or in `solver_steps` whose entry `base` does not have or the profile removes. Of a
    section that the profile lists under `only`, the entries of `base` that it does not name are removed.

    Raises:
        UserError: `only` is no mapping of sections to lists of names.

    >>> base = {"datasets": {"mine": {"kind": "moons"}}}
    >>> apply(base, {"datasets": {"moons": {"train": 9}, "digits": None, "blobs": {"kind": "moons"}}})
    ({'datasets': {'mine': {'kind': 'moons'}, 'blobs': {'kind': 'moons'}}}, ['datasets.moons'])
    >>> apply(base, {"only": {"datasets": []}, "seed": 3})
    ({'datasets': {}, 'seed': 3}, [])
    """
    given, base, skipped = base, _keep_only(base, changes.get(ONLY, {})), list[str]()
    changes = deepcopy({key: value for key, value in changes.items() if key not in (ONLY, SKIP_MISSING)})
    for section, complete in _ENTRIES.items():
        present, entries = _at(base, *section), _at(changes, *section)
        for name in [name for name in entries if name not in present]:
            change = entries[name]
            if not (isinstance(change, Mapping) and complete <= change.keys()):
                del entries[name]
                if change is not None:  # nothing is left to remove
                    skipped.append(".".join((*section, name)))
    merged = deepcopy(merge(base, changes))
    for name in _at(given, "environments").keys() - _at(merged, "environments").keys():
        _at(merged, "plans").pop(name, None)  # there is no planning without its environment
    return merged, skipped + _drop_names(merged, base, changes)


def _keep_only(base: Mapping[str, Any], only: Any) -> Mapping[str, Any]:
    """Return parameters with the named entries of some sections and all entries of the others."""
    sections = {".".join(section): section for section in _ENTRIES}
    valid = isinstance(only, Mapping) and all(isinstance(names, list) for names in only.values())
    if not valid or not only.keys() <= sections.keys():
        raise UserError(
            f"the profile's {ONLY} is {only!r}; expected lists of names under {', '.join(sections)}, such as "
            "{datasets: [], environments: [spiral]}."
        )
    kept = deepcopy(dict(base))
    for key, names in only.items():
        entries = _at(kept, *sections[key])
        for name in [name for name in entries if name not in names]:
            del entries[name]
    return kept


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
