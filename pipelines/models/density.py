"""Density models: the training objective, and a trained model as a flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.solvers import TimeGrid, Uniform
from pipelines.base.errors import UserError
from pipelines.models import build, saved

if TYPE_CHECKING:
    from pipelines.config.params import DensityMethod


def objective(method: DensityMethod) -> Callable[..., Tensor]:
    """Return the objective of a method, `(network, path, rows, generator=...)`, with its options bound.

    Raises:
        UserError: The objective accepts no coupling, but one is selected.
    """
    spec = method.loss.spec
    options: dict[str, Any] = {"prediction": method.prediction, **method.loss.values()}
    if spec.coupling:
        options["coupling"] = build.coupling(method.coupling)
    elif method.coupling.name != "independent":
        raise UserError(
            f"params.yaml: the loss {method.loss.name!r} draws its noise apart from the data, but has the coupling "
            f"{method.coupling.name!r}; expected independent."
        )
    return partial(spec.load(), **options)


def load(file: Path, device: torch.device, solver: str, steps: int, *, grid: TimeGrid = Uniform()) -> ContinuousFlow:
    """Return a trained density model in the units of the data.

    Raises:
        UserError: The file is missing or damaged, or another version of this code wrote it.
    """
    model = saved.load(file, device, lambda meta, path: build.network(meta["network"]))
    source = float(model.path.sigma(0.0))  # the noise of a path is not always standard
    return ContinuousFlow(
        model.field, model.event_shape, solver, steps, grid=grid, base_scale=source, loc=model.loc, scale=model.scale
    )
