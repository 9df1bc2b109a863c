"""The MLmodel file of trained networks: MLflow's `python_function` flavour by a loader of this project, no pickle."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import files, layout, metric_keys

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.types import Schema
    from numpy.typing import NDArray

LOADER = "pipelines.models.pyfunc"
"""Module whose `_load_pyfunc(path)` MLflow calls; it reads the safetensors files of the folder."""

TYPES = {"float": "double", "integer": "long", "text": "string"}
"""MLflow's names for the types of a user's columns."""

_EXAMPLE = "input_example.json"


def write(networks: Path, folder: Path, run: str) -> None:
    """Write the MLmodel file and the input example of a folder of networks into another folder.

    Args:
        networks: Folder with one network per seed.
        folder: Existing folder to write into.
        run: Id of the run that trained the networks.
    """
    meta, arrays = files.read_arrays(next(iter(layout.networks(networks).values())), "loc", "scale", "marginals.")
    loc, scale = _moments(meta, arrays)
    typical = [loc.tolist(), (loc + scale).tolist()]
    if "gamma" in meta:  # of an environment: a state and an action, then a future state
        states, actions = meta["state_names"], meta["action_names"]
        inputs = [*metric_keys.columns("state", states), *metric_keys.columns("action", actions)]
        outputs = metric_keys.columns("future", states)
        action = meta.get("action_loc") or [0.0] * len(actions)  # older files do not have their mean
        constants = meta.get("constants", {})
        rows: list[list[Any]] = [
            [*(constants.get(name, value) for name, value in zip(states, row, strict=True)), *action] for row in typical
        ]
        types: Mapping[str, str] = {}
    else:
        columns = meta.get("columns") or [f"x{i}" for i in range(len(loc))]  # older files do not name them
        conditions, types = meta.get("conditions", []), meta.get("types", {})
        inputs, outputs = [*columns, *(one["name"] for one in conditions)], ["log_prob"]
        given = [one["levels"][0] if one["kind"] == "words" else one["loc"] for one in conditions]
        rows = [_typed(dict(zip(inputs, [*row, *given], strict=True)), meta) for row in typical]
    (folder / _EXAMPLE).write_text(json.dumps({"columns": inputs, "data": rows}), encoding="utf-8")
    _model(inputs, outputs, types, run).save(str(folder / "MLmodel"))


def _moments(meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the mean and the spread of each column in the units of the data, also where it is transformed first."""
    import numpy as np

    loc, scale = arrays["loc"].copy(), arrays["scale"].copy()
    for place, transform in enumerate(meta.get("marginals", ())):
        if transform["kind"] == "mixture":
            weights, means, scales = (
                arrays[f"marginals.columns.{place}.{name}"] for name in ("weights", "means", "scales")
            )
            loc[place] = weights @ means
            scale[place] = (weights @ (scales**2 + means**2) - loc[place] ** 2) ** 0.5
        elif transform["kind"] == "steps":
            mass = arrays[f"marginals.columns.{place}.mass"]
            levels = transform["low"] + np.arange(len(mass)) - 0.5  # their middles, from the one below the lowest
            values = transform.get("start", 0.0) + transform.get("width", 1.0) * levels  # older files lack both
            loc[place] = mass @ values
            scale[place] = (mass @ (values - loc[place]) ** 2) ** 0.5
    return loc, scale


def _typed(row: Mapping[str, Any], meta: Mapping[str, Any]) -> list[Any]:
    """Return a row of a table with the user's types: words for codes, and integers."""
    types, discrete = meta.get("types", {}), meta.get("discrete", {})
    found = []
    for name, value in row.items():
        words = discrete.get(name, {}).get("levels")
        if words:
            found.append(words[min(max(math.floor(value), 0), len(words) - 1)])
        elif types.get(name) == "integer":
            found.append(math.floor(value) if name in discrete else round(value))
        else:
            found.append(value)
    return found


def _model(inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, str], run: str) -> Model:
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    params = ParamSchema([ParamSpec("seed", "long", 0)])
    model = Model(
        run_id=run,
        signature=ModelSignature(_schema(inputs, types), _schema(outputs, {}), params),
        saved_input_example_info={"artifact_path": _EXAMPLE, "type": "dataframe", "pandas_orient": "split"},
    )
    model.add_flavor("python_function", loader_module=LOADER, python_version=platform.python_version())
    return model


def _schema(names: Sequence[str], types: Mapping[str, str]) -> Schema:
    from mlflow.types import ColSpec, Schema

    return Schema([ColSpec(TYPES[types.get(name, "float")], name) for name in names])
