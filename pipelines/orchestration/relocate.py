"""Paths of params.yaml for a run in another folder: stages run in workspaces, and paths are those of the project."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines.base import plugins
from pipelines.base.errors import UserError

_FAMILIES = {"datasets": "pipelines.datasets", "environments": "pipelines.environments"}


def relocate(params: Mapping[str, Any], root: Path, folder: Path) -> dict[str, Any]:
    """Return parameters of a project whose paths are relative to another folder; absolute paths stay as they are.

    Paths are `mirror` and every setting of a data set or an environment whose type is `Path`. They stay relative, so
    that a project that was moved or copied reads its own files.

    Args:
        params: Contents of params.yaml; what its schema refuses is returned as it is.
        root: Folder of the project.
        folder: Folder that the stages run in.
    """
    up = Path(os.path.relpath(root.resolve(), folder.resolve()))
    moved = {**params, "mirror": _moved(params.get("mirror"), Path(), up)} if params.get("mirror") else dict(params)
    for section, family in _FAMILIES.items():
        if isinstance(params.get(section), Mapping):
            moved[section] = {name: _entry(family, entry, up) for name, entry in params[section].items()}
    return moved


def _entry(family: str, raw: Any, up: Path) -> Any:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("kind"), str):
        return raw
    try:
        schema = plugins.load(family, raw["kind"]).Settings
        settings = schema.model_validate({key: value for key, value in raw.items() if key in schema.model_fields})
    except (ValidationError, UserError):  # the schema of params.yaml refuses it in a sentence
        return raw
    return _moved(raw, settings, up)


def _moved(raw: Any, typed: Any, up: Path) -> Any:
    """Return a raw setting with its paths moved; `typed` is the setting as the schema reads it."""
    if isinstance(typed, Path) and isinstance(raw, str):
        return os.path.normpath(up / raw)
    if isinstance(raw, Mapping) and isinstance(typed, (BaseModel, Mapping)):
        inside = dict(typed)
        return {key: _moved(value, inside.get(key), up) for key, value in raw.items()}
    if isinstance(raw, list) and isinstance(typed, Sequence):
        return [_moved(value, one, up) for value, one in zip(raw, typed, strict=True)]
    if (
        isinstance(typed, Sequence) and not isinstance(typed, str) and len(typed) == 1
    ):  # a single path, which the schema reads as a list of one
        return _moved(raw, typed[0], up)
    return raw
