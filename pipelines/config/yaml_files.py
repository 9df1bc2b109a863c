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


_WORDS = {  # the plain scalars of YAML 1.2 that are no text, as DVC reads them; YAML 1.1 also has `yes`, 1:30 and more
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0b[01_]+|0o?[0-7_]+|[\d_]+|0x[\da-fA-F_]+)", "-+0123456789"),
    "float": (
        r"[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.[\d_]+([eE][-+]\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    """A loader that reads what DVC reads, and rejects repeated keys, of which plain YAML silently keeps the last."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in the class that declares it


class _Dumper(yaml.SafeDumper):
    """A writer that quotes words which a reader of YAML 1.1 or 1.2 would take for something else."""


for _tag, (_pattern, _first) in _WORDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), list(_first))
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        if _tag.endswith((":merge", ":timestamp", ":value")):  # equal in both versions
            _Loader.add_implicit_resolver(_tag, _regexp, [_first])


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may be overridden
            continue
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line} has the key {key!r}; expected a word, which quotes make of anything.")
        if key in seen:
            raise UserError(f"the key {key!r} stands twice, on lines {seen[key]} and {line}; remove one of them.")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    if re.fullmatch(r"[-+]?0\d+", digits):
        raise UserError(
            f"line {node.start_mark.line + 1} has the number {node.value}, whose leading zero means base 8 to some "
            f"readers and nothing to others; write {int(digits)}, or quotes around it if it is a word."
        )
    return int(digits, 0)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


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
        raw = yaml.load(text, _Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:  # such as 0x_ or a date of month 13
        raise UserError(
            f"{path} has a value that is none of its kind ({error}); mend it or put it in quotes."
        ) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" on line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML{line} ({problem}); fix that line.") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{path} holds {found}; expected a mapping of keys to values.")
    return raw


def write_yaml(data: Mapping[str, Any], **layout: Any) -> str:
    r"""Return a mapping as the text of a YAML file, its keys in their order.

    Args:
        data: The mapping.
        layout: Options of PyYAML, such as `width`.

    >>> write_yaml({"columns": ["1e3", "no", "0o17"]})
    "columns:\n- '1e3'\n- 'no'\n- '0o17'\n"
    """
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, **layout))
