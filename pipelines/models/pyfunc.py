"""Loader of MLflow's `python_function` flavour: `mlflow.pyfunc.load_model("models:/maze_loop.td2_cfm/latest")`.

A model of a data set returns the log-density of each row, given its conditions. A model of an environment draws one
future state for each state and action. MLflow loads it from the project's folder, because the loader is a module of the
project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipelines.base import layout, metric_keys
from pipelines.models import registry

if TYPE_CHECKING:
    from flowmatch_core.successor import HorizonModel
    from pipelines.models.tables import DensityModel


@dataclass(frozen=True)
class DensityPredictor:
    """The log-density of rows.

    Attributes:
        model: Trained model.
    """

    model: DensityModel

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return the column `log_prob`, one row per row of the input; `params` may have the dequantisation's `seed`."""
        return self.model.log_prob(model_input, seed=int((params or {}).get("seed", 0))).to_frame()


@dataclass(frozen=True)
class SuccessorPredictor:
    """Future states after a state and an action.

    Attributes:
        model: Trained model.
        states: Names of the components of a state.
    """

    model: HorizonModel
    states: tuple[str, ...]

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Return one drawn future state per row of the input; `params` may have the `seed` of the draw."""
        import torch

        rows = torch.tensor(model_input.to_numpy(np.float64))
        state, action = rows[:, : len(self.states)], rows[:, len(self.states) :]
        generator = torch.Generator().manual_seed(int((params or {}).get("seed", 0)))
        with torch.no_grad():
            future = self.model.sample(state, action, 1, generator=generator)[0]
        return pd.DataFrame(future.double().numpy(), columns=metric_keys.columns("future", self.states))


def _load_pyfunc(path: str) -> DensityPredictor | SuccessorPredictor:
    """Return the predictor of the first seed in a folder; MLflow calls this."""
    from pipelines.models import saved
    from pipelines.models.tables import DensityModel

    folder = Path(path)
    model = registry.read(folder, path)
    if isinstance(model, DensityModel):
        return DensityPredictor(model)
    file = next(iter(layout.networks(folder).values()))
    return SuccessorPredictor(model, tuple(saved.meta(file)["state_names"]))
