"""Read and merge YAML files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.base.errors import UserError


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with changes: mappings merge, other values are replaced, and null removes a mapping.

    A mapping with another `name` is replaced as a whole, because its options belong to the old name.

    >>> merge({"fit": {"lr": 1, "hidden": [8, 8]}, "sets": {"a": {}, "b": {}}}, {"fit": {"hidden": [2]}})
    {'fit': {'lr': 1, 'hidden': [2]}, 'sets': {'a': {}, 'b': {}}}
    >>> merge({"sets": {"a": {}, "b": {}}, "mirror": "x"}, {"sets": {"a": None}, "mirror": None})
    {'sets': {'b': {}}, 'mirror': None}
    >>> merge({"path": {"name": "vp", "beta_max": 9}}, {"path": {"name": "cosine"}})
    {'path': {'name': 'cosine'}}
    """
    merged = dict(base)
    for key, value in changes.items():
        here = merged.get(key)
        if isinstance(here, Mapping) and value is None:
            del merged[key]
        elif isinstance(here, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, here.get("name")):
            merged[key] = merge(here, value)
        else:
            merged[key] = value
    return merged


class _UniqueKeys(yaml.SafeLoader):
    """A loader that rejects repeated keys, of which plain YAML silently keeps the last."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may be overridden
            continue
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line} has the key {key!r}; expected a word.")
        if key in seen:
            raise UserError(f"the key {key!r} stands twice, on lines {seen[key]} and {line}; remove one of them.")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.1 reads 1e-3 as a string, which users write as a number.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: The file cannot be read, is not YAML, repeats a key, or does not contain a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); run from the project's root.") from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" on line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML{line} ({problem}); fix that line.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}; expected a mapping of keys to values.")
    return raw
