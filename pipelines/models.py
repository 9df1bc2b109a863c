"""Trained models as files: weights in safetensors, everything needed to rebuild them in its description."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowmatch_core.couplings import Coupling
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.paths import AffinePath, VelocityOf
from flowmatch_core.successor import (
    GeometricHorizonModel,
    HorizonModel,
    LatentHorizonModel,
    LatentNetwork,
    Loss,
    NoisePrediction,
)
from flowmatch_core.successor.losses.bootstrap import check_path
from pipelines import members, store
from pipelines.errors import UserError, first_line
from pipelines.params import NETWORKS, SUCCESSOR, PathChoice

if TYPE_CHECKING:
    from pipelines.params import (
        Choice,
        CouplingChoice,
        DensityMethod,
        Fit,
        NetworkChoice,
        SuccessorFit,
        SuccessorLossChoice,
    )

_DECIDED = {  # arguments of losses and networks that come from the data, the method and its fit
    *("field", "target", "batch", "future", "gamma", "path", "steps", "solver", "time", "progress"),
    *("generator", "event_dim", "cond_dim"),
}


def path(choice: PathChoice) -> AffinePath:
    """The probability path that a method names.

    Raises:
        UserError: its class does not take the given arguments.
    """
    built: AffinePath = _build("flowmatch_core.paths", choice)
    return built


def successor_path(choice: PathChoice) -> AffinePath:
    """The same for a successor model, whose path starts in pure noise.

    Raises:
        UserError: it starts elsewhere.
    """
    built = path(choice)
    try:
        check_path(built)
    except ValueError as error:
        raise UserError(f"params.yaml: successor.methods.<name>.{error}") from None
    return built


def coupling(choice: CouplingChoice) -> Coupling:
    """The coupling that a method names.

    Raises:
        UserError: its class does not take the given arguments.
    """
    built: Coupling = _build("flowmatch_core.couplings", choice)
    return built


def _build(family: str, choice: Choice) -> Any:
    kind = _class(family, choice.name)
    try:
        return kind(**choice.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"params.yaml: {choice.name!r} was given {choice.arguments}, which {kind.__name__} does not take "
            f"({error}); expected the arguments of its class in {family.replace('.', '/')}/{choice.name}.py."
        ) from None


def _class(family: str, name: str) -> Any:
    module = members.load(family, name)
    return getattr(module, module.__all__[0])


def density_loss(method: DensityMethod) -> Callable[..., Tensor]:
    """The objective of a method, `(network, path, rows, generator=...)`, with its choices and arguments filled in.

    Raises:
        UserError: it does not take these arguments, or no coupling where one is chosen.
    """
    choice, name = method.loss, method.loss.name
    loss = getattr(members.load("flowmatch_core.objectives", name), f"{name}_loss")
    takes = inspect.signature(loss).parameters
    if unknown := set(choice.arguments) - set(takes):
        raise UserError(
            f"params.yaml: the loss {name!r} was given {', '.join(sorted(unknown))}; expected arguments of "
            f"{name}_loss in flowmatch_core/objectives/{name}.py."
        )
    options: dict[str, Any] = {"prediction": method.prediction, **choice.arguments}
    if "coupling" in takes:
        options["coupling"] = coupling(method.coupling)
    elif method.coupling.name != "independent":
        raise UserError(
            f"params.yaml: the loss {name!r} draws its noise apart from the data, but has the coupling "
            f"{method.coupling.name!r}; expected independent."
        )
    return partial(loss, **options)


def successor_loss(choice: SuccessorLossChoice, fit: SuccessorFit) -> Callable[..., Loss]:
    """The successor loss of a method, with its arguments filled in.

    Raises:
        UserError: an argument is one of neither the loss nor the network that it brings, or the fit asks for what the
            loss cannot do.
    """
    name, own = choice.name, _latent_class(choice.name)
    loss = getattr(members.load(SUCCESSOR, name), f"{name}_loss")
    takes = inspect.signature(loss).parameters
    known = {*takes, *(() if own is None else inspect.signature(own).parameters)} - _DECIDED
    if unknown := set(choice.arguments) - known:
        raise UserError(
            f"params.yaml: the loss {name!r} was given {', '.join(sorted(unknown))}; expected of its arguments in "
            f"flowmatch_core/successor/{name}.py: {', '.join(sorted(known)) or 'none'}."
        )
    if fit.particles and name != "td2_cfm":
        raise UserError(
            f"params.yaml: particles is true for the loss {name!r}; expected td2_cfm, the only one whose bootstrap "
            "points are on their way through the target's flow: set successor.methods.<name>.fit.particles to false."
        )
    if fit.returns > 1 and "future" in takes:
        raise UserError(
            f"params.yaml: returns is {fit.returns} for the loss {name!r}, which has no bootstrap but whole futures; "
            "expected 1: set successor.methods.<name>.fit.returns to 1."
        )
    filled = partial(loss, **{key: value for key, value in choice.arguments.items() if key in takes})
    return update_wrapper(filled, loss)  # what the network predicts is an attribute of the loss


def successor_network_config(choice: SuccessorLossChoice, fit: Fit, event_dim: int, cond_dim: int) -> dict[str, Any]:
    """The description of the network of a successor method: that of its `fit`, or the one that its loss brings."""
    own = _latent_class(choice.name)
    if own is None:
        return network_config(fit.network, event_dim, cond_dim)
    takes = inspect.signature(own).parameters
    arguments = {key: value for key, value in choice.arguments.items() if key in takes}
    return _config(choice.name, own, arguments, event_dim, cond_dim)


def successor_network(config: Mapping[str, Any], prediction: str, way: AffinePath) -> nn.Module:
    """The network that `successor_network_config` describes, with new weights.

    One that predicts noise is wrapped in `NoisePrediction`, without which bootstrapping makes it diverge.
    """
    own = _latent_class(config["name"]) if prediction == "state" else None
    if own is not None:
        return _make(own, config)
    made = network(config)
    return NoisePrediction(made, way) if prediction == "noise" else made


def _latent_class(name: str) -> type[LatentNetwork] | None:
    """The network that the file of a successor loss brings, which turns noise into a state at once."""
    module = members.load(SUCCESSOR, name)
    own = (value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__)
    return next((v for v in own if isinstance(v, type) and issubclass(v, LatentNetwork)), None)


def network_config(choice: NetworkChoice, event_dim: int, cond_dim: int) -> dict[str, Any]:
    """A network's name and all arguments of its class, the defaults too, as they are stored beside its weights."""
    return _config(choice.name, _class(NETWORKS, choice.name), choice.arguments, event_dim, cond_dim)


def _config(
    name: str, kind: type[nn.Module], arguments: Mapping[str, Any], event_dim: int, cond_dim: int
) -> dict[str, Any]:
    takes = inspect.signature(kind).parameters.values()
    defaults = {p.name: p.default for p in takes if p.name != "generator"}
    return {"name": name, **defaults, **arguments, "event_dim": event_dim, "cond_dim": cond_dim}


def network(config: Mapping[str, Any]) -> nn.Module:
    """The network that `network_config` describes, with new weights from torch's own generator.

    Raises:
        UserError: its class does not take one of the arguments.
    """
    return _make(_class(NETWORKS, config["name"]), config)


def _make(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    name, arguments = config["name"], {key: value for key, value in config.items() if key != "name"}
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"the network {name!r} was given {arguments}, but {kind.__name__} says: {error}") from None


def save(file: Path, network: nn.Module, loc: Tensor, scale: Tensor, meta: Mapping[str, Any]) -> None:
    """Write a trained field with its standardisation."""
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    store.write_tensors(file, {**weights, "loc": loc, "scale": scale}, meta)


def load_density(file: Path, device: torch.device, solver: str, steps: int) -> ContinuousFlow:
    """A density model in the units of the data."""
    model = load(file, device, solver, steps)
    assert isinstance(model, ContinuousFlow), file
    return model


def load_successor(file: Path, device: torch.device, solver: str, steps: int) -> HorizonModel:
    """A successor model in the units of the environment; one without an ODE does not use solver and steps."""
    model = load(file, device, solver, steps)
    assert isinstance(model, HorizonModel), file
    return model


def load(file: Path, device: torch.device, solver: str, steps: int) -> HorizonModel | ContinuousFlow:
    """Whichever model a file holds.

    Raises:
        UserError: the file is missing or damaged, or another version of this code wrote it.
    """
    tensors, meta = store.read_tensors(file)
    prefix = "network."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        config, prediction, gamma = meta["network"], meta["prediction"], meta.get("gamma")
        way = path(PathChoice(**meta["path"]))
        trained = network(config) if gamma is None else successor_network(config, prediction, way)
        trained.load_state_dict(weights)
        event_shape = (config["event_dim"],)
        loc, scale = (tensors[name].to(device) for name in ("loc", "scale"))
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(
            f"{file} does not hold a model of this version ({first_line(error)}); train it again: `make repro`."
        ) from None
    trained.to(device).requires_grad_(False)
    if isinstance(trained, LatentNetwork):
        return LatentHorizonModel(trained, meta["gamma"], loc=loc, scale=scale)
    field = trained if prediction == "velocity" else VelocityOf(trained, way, prediction)
    if gamma is not None:
        return GeometricHorizonModel(field, event_shape, gamma, solver, steps, loc=loc, scale=scale)
    source = float(way.sigma(0.0))  # of paths that do not end in unit noise
    return ContinuousFlow(field, event_shape, solver, steps, base_scale=source, loc=loc, scale=scale)
