"""The MLmodel file of trained networks: MLflow's `python_function` flavour by a loader of this project, no pickle."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.base import files, layout, metric_keys

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.types import Schema

LOADER = "pipelines.models.pyfunc"
"""Module whose `_load_pyfunc(path)` MLflow calls; it reads the safetensors files of the folder."""

_EXAMPLE = "input_example.json"


def write(networks: Path, folder: Path, run: str) -> None:
    """Write the MLmodel file and the input example of a folder of networks into another folder.

    Args:
        networks: Folder with one network per seed.
        folder: Existing folder to write into.
        run: Id of the run that trained the networks.
    """
    meta, loc, scale = files.read_description(next(iter(layout.networks(networks).values())))
    if "gamma" in meta:  # of an environment: a state and an action, then a future state
        states, actions = meta["state_names"], meta["action_names"]
        inputs = [*metric_keys.columns("state", states), *metric_keys.columns("action", actions)]
        outputs = metric_keys.columns("future", states)
    else:
        inputs = meta.get("columns") or [f"x{i}" for i in range(len(loc))]  # older files do not name them
        outputs = ["log_prob"]
    shifted = [center + spread for center, spread in zip(loc, scale, strict=True)]
    rows = [[*row, *[0.0] * (len(inputs) - len(row))] for row in (loc, shifted)]
    (folder / _EXAMPLE).write_text(json.dumps({"columns": inputs, "data": rows}), encoding="utf-8")
    _model(inputs, outputs, run).save(str(folder / "MLmodel"))


def _model(inputs: Sequence[str], outputs: Sequence[str], run: str) -> Model:
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    params = ParamSchema([ParamSpec("seed", "long", 0)])
    model = Model(
        run_id=run,
        signature=ModelSignature(_schema(inputs), _schema(outputs), params),
        saved_input_example_info={"artifact_path": _EXAMPLE, "type": "dataframe", "pandas_orient": "split"},
    )
    model.add_flavor("python_function", loader_module=LOADER, python_version=platform.python_version())
    return model


def _schema(names: Sequence[str]) -> Schema:
    from mlflow.types import ColSpec, Schema

    return Schema([ColSpec("double", name) for name in names])
