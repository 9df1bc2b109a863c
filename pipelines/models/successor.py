"""Successor models: loss, path and network, and a trained model as a horizon model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowmatch_core.networks import NoisePrediction
from flowmatch_core.paths import AffinePath
from flowmatch_core.successor import (
    Discounts,
    EnsembleHorizonModel,
    GaussianEnsemble,
    GeometricHorizonModel,
    HorizonModel,
    LatentHorizonModel,
    LatentNetwork,
    Loss,
)
from flowmatch_core.successor.losses.bootstrap import check_path
from pipelines.base.errors import UserError
from pipelines.config import catalog
from pipelines.config.params import DiscountsChoice
from pipelines.models import build, saved

if TYPE_CHECKING:
    from pipelines.config.params import Fit, PathChoice, SuccessorFit, SuccessorLossChoice


def path(choice: PathChoice) -> AffinePath:
    """Return the probability path of a successor model, whose source must be standard noise.

    Raises:
        UserError: The path has another source.
    """
    built = build.path(choice)
    try:
        check_path(built)
    except ValueError as error:
        raise UserError(f"params.yaml: successor.methods.<name>.{error}") from None
    return built


def discounts(fit: SuccessorFit, gamma: float) -> Discounts | None:
    """Return the law of the discounts of rows; None for an environment's discount alone.

    Raises:
        UserError: The law rejects a value, or the environment's discount is not among them.
    """
    if fit.discounts is None:
        return None
    try:
        law = _law(fit.discounts)
        law.check(gamma)
    except (TypeError, ValueError) as error:
        raise UserError(f"params.yaml: discounts is {fit.discounts.name!r} where gamma is {gamma}: {error}") from None
    return law


def _law(choice: DiscountsChoice) -> Discounts:
    law: Discounts = choice.spec.load()(**choice.values())
    return law


def loss(choice: SuccessorLossChoice, fit: SuccessorFit) -> Callable[..., Loss]:
    """Return the successor loss of a method with its options bound.

    Raises:
        UserError: The loss does not support a setting of the fit.
    """
    spec, name = choice.spec, choice.name
    if fit.particles and not spec.particles:
        able = ", ".join(n for n, row in catalog.SUCCESSOR_LOSSES.items() if row.particles)
        raise UserError(
            f"params.yaml: particles is true for the loss {name!r}; expected {able}, the only one whose bootstrap "
            "points move along the target's flow: set successor.methods.<name>.fit.particles to false."
        )
    if fit.returns > 1 and spec.needs != "target":
        what = "whole futures" if spec.needs == "futures" else "single steps"
        raise UserError(
            f"params.yaml: returns is {fit.returns} for the loss {name!r}, which has no bootstrap but {what}; "
            "expected 1: set successor.methods.<name>.fit.returns to 1."
        )
    if fit.discounts is not None and spec.needs == "transitions":
        raise UserError(
            f"params.yaml: discounts is set for the loss {name!r}, whose model has no discount in its training; "
            "expected null: set successor.methods.<name>.fit.discounts to null."
        )
    return partial(spec.load(), **{key: value for key, value in choice.values().items() if key in spec.options})


def network_config(choice: SuccessorLossChoice, fit: Fit, event_dim: int, cond_dim: int) -> dict[str, Any]:
    """Return the description of a successor method's network: that of its `fit`, or the loss's own."""
    own = choice.spec.network
    if own is None:
        return build.network_config(fit.network, event_dim, cond_dim)
    options = {key: value for key, value in choice.values().items() if key in own.options}
    return build.describe(choice.name, own, options, event_dim, cond_dim)


def network(config: Mapping[str, Any], prediction: str, path: AffinePath) -> nn.Module:
    """Return the network that `network_config` describes, with new weights.

    A network that predicts noise is wrapped in `NoisePrediction`, without which bootstrapping diverges.

    Args:
        config: Description of the network.
        prediction: Output of the network; `state` selects the network class that the loss defines.
        path: Probability path.
    """
    if prediction == "state":
        own = catalog.SUCCESSOR_LOSSES[config["name"]].network
        assert own is not None, config["name"]
        latent: nn.Module = build.make(own, config)
        return latent
    made = build.network(config)
    return NoisePrediction(made, path) if prediction == "noise" else made


def load(
    file: Path,
    device: torch.device,
    solver: str,
    steps: int,
    policy: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> HorizonModel:
    """Return a trained successor model in the units of the environment.

    Args:
        file: File to read.
        device: Device of the model.
        solver: ODE solver; ignored by a model without an ODE.
        steps: Number of solver steps.
        policy: Actions in states, which an ensemble asks for along its rollouts; None: it uses its own model of them.

    Raises:
        UserError: The file is missing or damaged, or another version of this code wrote it.
    """
    model = saved.load(file, device, lambda meta, path: network(meta["network"], meta["prediction"], path))
    meta, gamma, units = model.meta, model.meta["gamma"], _units(model)
    if isinstance(model.network, LatentNetwork):
        return LatentHorizonModel(model.network, gamma, **units, discounts=_discounts(meta))
    if isinstance(model.network, GaussianEnsemble):
        act = None if policy is None else partial(_actions, policy)
        return EnsembleHorizonModel(model.network, gamma, policy=act, terminal=meta["terminal"], **units)
    discounts = _discounts(meta)
    return GeometricHorizonModel(model.field, model.event_shape, gamma, solver, steps, **units, discounts=discounts)


def _discounts(meta: Mapping[str, Any]) -> Discounts | None:
    """Return the law of discounts that a model was trained with; files of older versions do not mention it."""
    described = meta.get("discounts")
    return None if described is None else _law(DiscountsChoice(**described))


def _units(model: saved.Saved) -> dict[str, Any]:
    """Return the units of states and actions; files of older versions have no units of actions and no constants."""
    meta, constants = model.meta, model.meta.get("constants", {})
    names = meta["state_names"]
    varying = [i for i, name in enumerate(names) if name not in constants]
    units = {"loc": model.loc[varying], "scale": model.scale[varying]}
    units |= {name: model.loc.new_tensor(meta[name]) for name in ("action_loc", "action_scale") if name in meta}
    if constants:
        units["constant"] = model.loc.new_tensor([constants.get(name, math.nan) for name in names])
    return units


def _actions(policy: Callable[[NDArray[np.float64]], NDArray[np.float64]], state: Tensor) -> Tensor:
    return torch.from_numpy(policy(state.double().cpu().numpy())).to(state.device)
