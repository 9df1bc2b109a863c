"""Trained models as files: weights in safetensors, everything needed to rebuild them in its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.paths import AffinePath
from flowmatch_core.successor import GeometricHorizonModel
from pipelines import members, store
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.params import Fit, PathChoice


def path(choice: PathChoice) -> AffinePath:
    """The probability path that a method names.

    Raises:
        UserError: its class does not take the given arguments.
    """
    module = members.load("flowmatch_core.paths", choice.name)
    try:
        built: AffinePath = getattr(module, module.__all__[0])(**choice.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"params.yaml: the path {choice.name!r} was given {choice.arguments}, which {module.__all__[0]} does not "
            f"take ({error}); expected the arguments of its class in flowmatch_core/paths/{choice.name}.py."
        ) from None
    return built


def coupling(name: str) -> Any:
    """The coupling of that name."""
    module = members.load("flowmatch_core.couplings", name)
    return getattr(module, module.__all__[0])()


def successor_loss(name: str) -> Any:
    """The successor loss of that name.

    Raises:
        UserError: the file of that name holds no loss.
    """
    loss = getattr(members.load("flowmatch_core.successor", name), f"{name}_loss", None)
    if loss is None:
        raise UserError(
            f"params.yaml: the successor loss {name!r} names flowmatch_core/successor/{name}.py, which has no function "
            f"{name}_loss; expected the file of a loss."
        )
    return loss


def network_config(event_dim: int, cond_dim: int, fit: Fit) -> dict[str, Any]:
    """The arguments of `MLPField`, as they are stored beside its weights."""
    return {
        "event_dim": event_dim,
        "cond_dim": cond_dim,
        "hidden": list(fit.hidden),
        "frequencies": fit.frequencies,
        "activation": fit.activation,
    }


def save(file: Path, network: nn.Module, loc: Tensor, scale: Tensor, meta: Mapping[str, Any]) -> None:
    """Write a trained field with its standardisation."""
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    store.write_tensors(file, {**weights, "loc": loc, "scale": scale}, meta)


def _load(file: Path, device: torch.device) -> tuple[MLPField, Tensor, Tensor, dict[str, Any]]:
    tensors, meta = store.read_tensors(file)
    try:
        config = meta["network"]
        network = MLPField(**{**config, "hidden": tuple(config["hidden"])})
        prefix = "network."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        loc, scale = tensors["loc"], tensors["scale"]
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file} does not hold a model of this version ({reason}); train it again: `make repro`."
        ) from None
    return network.to(device).requires_grad_(False), loc.to(device), scale.to(device), meta


def load_density(file: Path, device: torch.device, solver: str, steps: int) -> ContinuousFlow:
    """A density model in the units of the data."""
    network, loc, scale, meta = _load(file, device)
    return ContinuousFlow(network, (meta["network"]["event_dim"],), solver=solver, steps=steps, loc=loc, scale=scale)


def load_successor(file: Path, device: torch.device, solver: str, steps: int) -> GeometricHorizonModel:
    """A successor model in the units of the environment."""
    network, loc, scale, meta = _load(file, device)
    event_shape = (meta["network"]["event_dim"],)
    return GeometricHorizonModel(
        network, event_shape, gamma=meta["gamma"], solver=solver, steps=steps, loc=loc, scale=scale
    )
