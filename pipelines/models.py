"""Trained models as files: weights in safetensors, everything needed to rebuild them in its description."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowmatch_core.couplings import Coupling
from flowmatch_core.fields import VelocityField
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.paths import AffinePath, VelocityOf
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import members, store
from pipelines.errors import UserError
from pipelines.params import NETWORKS, PathChoice

if TYPE_CHECKING:
    from pipelines.params import Choice, CouplingChoice, DensityMethod, NetworkChoice


def path(choice: PathChoice) -> AffinePath:
    """The probability path that a method names.

    Raises:
        UserError: its class does not take the given arguments.
    """
    built: AffinePath = _build("flowmatch_core.paths", choice)
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


def network_config(choice: NetworkChoice, event_dim: int, cond_dim: int) -> dict[str, Any]:
    """A network's name and all arguments of its class, the defaults too, as they are stored beside its weights."""
    takes = inspect.signature(_class(NETWORKS, choice.name)).parameters.values()
    defaults = {p.name: p.default for p in takes if p.name != "generator"}
    return {"name": choice.name, **defaults, **choice.arguments, "event_dim": event_dim, "cond_dim": cond_dim}


def network(config: Mapping[str, Any]) -> nn.Module:
    """The network that `network_config` describes, with new weights from torch's own generator.

    Raises:
        UserError: its class does not take one of the arguments.
    """
    name, arguments = config["name"], {key: value for key, value in config.items() if key != "name"}
    kind = _class(NETWORKS, name)
    try:
        built: nn.Module = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"the network {name!r} was given {arguments}, but {kind.__name__} says: {error}") from None
    return built


def save(file: Path, network: nn.Module, loc: Tensor, scale: Tensor, meta: Mapping[str, Any]) -> None:
    """Write a trained field with its standardisation."""
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    store.write_tensors(file, {**weights, "loc": loc, "scale": scale}, meta)


@dataclass(frozen=True)
class _Model:
    """What a file holds: the velocity field, whatever the network predicts, and what goes with it."""

    field: VelocityField
    path: AffinePath
    loc: Tensor
    scale: Tensor
    meta: Mapping[str, Any]

    @property
    def event_shape(self) -> tuple[int]:
        return (self.meta["network"]["event_dim"],)

    def density(self, solver: str, steps: int) -> ContinuousFlow:
        source = float(self.path.sigma(0.0))  # of paths that do not end in unit noise
        return ContinuousFlow(
            self.field, self.event_shape, solver, steps, base_scale=source, loc=self.loc, scale=self.scale
        )

    def successor(self, solver: str, steps: int) -> GeometricHorizonModel:
        gamma = self.meta["gamma"]
        return GeometricHorizonModel(self.field, self.event_shape, gamma, solver, steps, loc=self.loc, scale=self.scale)


def _load(file: Path, device: torch.device) -> _Model:
    tensors, meta = store.read_tensors(file)
    prefix = "network."
    try:
        trained = network(meta["network"])
        trained.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        loc, scale, prediction, choice = (
            tensors["loc"],
            tensors["scale"],
            meta["prediction"],
            PathChoice(**meta["path"]),
        )
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file} does not hold a model of this version ({reason}); train it again: `make repro`."
        ) from None
    way, field = path(choice), trained.to(device).requires_grad_(False)
    if prediction != "velocity":
        field = VelocityOf(field, way, prediction)
    return _Model(field, way, loc.to(device), scale.to(device), meta)


def load_density(file: Path, device: torch.device, solver: str, steps: int) -> ContinuousFlow:
    """A density model in the units of the data."""
    return _load(file, device).density(solver, steps)


def load_successor(file: Path, device: torch.device, solver: str, steps: int) -> GeometricHorizonModel:
    """A successor model in the units of the environment."""
    return _load(file, device).successor(solver, steps)


def load(file: Path, device: torch.device, solver: str, steps: int) -> HorizonModel | ContinuousFlow:
    """Whichever model a file holds."""
    model = _load(file, device)
    return model.successor(solver, steps) if "gamma" in model.meta else model.density(solver, steps)
