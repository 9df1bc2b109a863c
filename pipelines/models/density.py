"""Density models: the training objective, and a trained model as a flow in the units of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from flowmatch_core.components import ComponentFlow
from flowmatch_core.divergence import DivergenceMethod
from flowmatch_core.flow import ContinuousFlow, Flow
from flowmatch_core.guidance import guided
from flowmatch_core.marginals import Marginals
from flowmatch_core.mixture import MixtureFlow
from flowmatch_core.normalizing import DiscreteTimeFlow
from flowmatch_core.paths import AffinePath, VelocityOf
from flowmatch_core.solvers import TimeGrid, Uniform
from pipelines.base.errors import UserError
from pipelines.config import catalog
from pipelines.config.params import GridChoice
from pipelines.models import build, saved

if TYPE_CHECKING:
    from pipelines.config.params import DensityMethod

LIKELIHOOD_STEPS = 16
"""Steps of a likelihood that is trained, where a method has none."""
FLOW, NORMALIZING, MIXTURE, COMPONENTS = saved.FLOW, "normalizing", "mixture", saved.COMPONENTS
"""Kinds of models, `kind` in the description of a file."""


class Components(nn.Module):
    """A mixture, and the velocity field inside its components, which a call evaluates.

    Args:
        mixture: Mixture of Gaussians of standardised rows.
        field: Velocity field, or a network that predicts something else.
    """

    def __init__(self, mixture: MixtureFlow, field: nn.Module) -> None:
        super().__init__()
        self.mixture, self.field = mixture, field

    def forward(self, t: Tensor, x: Tensor, cond: Tensor) -> Tensor:
        """Return the prediction of the field."""
        value: Tensor = self.field(t, x, cond)
        return value


class Units(TypedDict):
    """The arguments of a flow that stand for the units of the data."""

    loc: Tensor
    scale: Tensor
    marginals: Marginals | None
    whitening: Tensor | None


def objective(method: DensityMethod, *, refined: bool = False) -> Callable[..., Tensor]:
    """Return the objective of a velocity field, `(network, path, rows, generator=...)`, with its options bound.

    One that regresses along the path takes a law of times, `time`, too.

    Args:
        method: Method.
        refined: Whether a likelihood is solved with twice the steps, for checks: a field that is trained through too
            few steps learns to exploit the error of the solver, and its loss at these steps does not show it.

    Raises:
        UserError: The objective accepts no coupling, but one is selected.
    """
    spec = catalog.OBJECTIVES[method.loss.name]
    options: dict[str, Any] = method.loss.values()
    if "grid" in options:
        options["grid"] = build.grid(GridChoice.model_validate(options["grid"]))
    if spec.coupling:
        options["coupling"] = build.coupling(method.coupling)
    elif method.coupling.name != "independent":
        raise UserError(
            f"params.yaml: the loss {method.loss.name!r} draws its noise apart from the data, but has the coupling "
            f"{method.coupling.name!r}; expected independent."
        )
    if spec.path:
        return partial(spec.load(), prediction=method.prediction, **options)
    loss: Callable[..., Tensor] = spec.load()
    options["steps"] = options.get("steps", LIKELIHOOD_STEPS) * (2 if refined else 1)

    def likelihood(network: nn.Module, path: AffinePath, x: Tensor, **given: Any) -> Tensor:
        field = network if method.prediction == "velocity" else VelocityOf(network, path, method.prediction)
        return loss(field, x, base_scale=float(path.sigma(0.0)), **given, **options)

    return likelihood


def normalizing(config: Mapping[str, Any]) -> DiscreteTimeFlow:
    """Return the normalizing flow of standardised data that `build.describe` describes, with new weights.

    Raises:
        UserError: There is no such flow, or its class rejects a value.
    """
    options = {name: value for name, value in config.items() if name not in ("event_dim", "cond_dim")}
    try:
        spec = catalog.find(catalog.NORMALIZING, config["name"])
    except ValueError as error:
        raise UserError(f"the normalizing flow {config['name']!r} is unknown; {error}") from None
    return DiscreteTimeFlow(build.make(spec, options), config["event_dim"], config["cond_dim"])


def load(
    file: Path,
    device: torch.device,
    solver: str,
    steps: int,
    *,
    grid: TimeGrid = Uniform(),
    divergence: DivergenceMethod = "auto",
    guidance: float = 1.0,
) -> Flow:
    """Return a trained density model in the units of the data; a model without an ODE ignores all of the last five.

    Args:
        file: File of the model.
        device: Device of the model.
        solver: ODE solver.
        steps: Number of solver steps.
        grid: Where these steps end in time.
        divergence: How the divergence of the velocity field is computed.
        guidance: Scale of classifier-free guidance, 1 for none.

    Raises:
        UserError: The file is missing or damaged, or another version of this code wrote it.
    """
    model = saved.load(file, device, _network)
    network = model.network
    units = Units(loc=model.loc, scale=model.scale, marginals=model.marginals, whitening=model.whitening)
    if isinstance(network, MixtureFlow):
        return MixtureFlow(network.weights, network.means, network.factors, network.slopes, **units)
    if isinstance(network, DiscreteTimeFlow):
        flow = DiscreteTimeFlow(network.kind, network.event_dim, network.cond_dim, **units)
        flow.transform = network.transform
        return flow
    source = 1.0 if model.path is None else float(model.path.sigma(0.0))  # the noise of a path is not always standard
    if isinstance(network, Components):
        field = replace(model, network=network.field).field
        inner = ContinuousFlow(field, model.event_shape, solver, steps, divergence, grid=grid, base_scale=source)
        return ComponentFlow(network.mixture, inner, model.meta["likeliest"], **units)
    field, size = model.field, model.meta["network"]["cond_dim"]
    if guidance != 1:
        field = guided(field, guidance, null=torch.zeros(size, device=device))  # what training drops conditions to
    return ContinuousFlow(field, model.event_shape, solver, steps, divergence, grid=grid, base_scale=source, **units)


def parameters(file: Path) -> int:
    """Return the number of parameters of a model, without its units.

    A mixture counts the entries of its weights, means, triangular factors and slopes.
    """
    network = saved.load(file, torch.device("cpu"), _network).network
    count = sum(parameter.numel() for parameter in network.parameters())
    mixture = network.mixture if isinstance(network, Components) else network
    if isinstance(mixture, MixtureFlow):
        d = mixture.means.shape[1]
        slopes = 0 if mixture.slopes is None else mixture.slopes.numel()
        count += mixture.means.numel() + len(mixture.weights) - 1 + len(mixture.factors) * d * (d + 1) // 2 + slopes
    return count


def describe_mixture(network: MixtureFlow) -> dict[str, Any]:
    """Return the sizes of a mixture, from which a file rebuilds it."""
    (components, d), slopes = network.means.shape, network.slopes
    sizes = {"components": components, "factors": len(network.factors)}
    return {"event_dim": d, "cond_dim": 0 if slopes is None else len(slopes), **sizes}


def _mixture(config: Mapping[str, Any]) -> MixtureFlow:
    """Return a mixture of the described sizes."""
    d, size, count = config["event_dim"], config["cond_dim"], config["components"]
    one = torch.ones(count, dtype=torch.float64)
    factors = torch.eye(d, dtype=torch.float64).expand(config["factors"], d, d)
    return MixtureFlow(one, one[:, None].expand(count, d), factors, one.new_zeros(size, d) if size else None)


def _network(meta: Mapping[str, Any], path: AffinePath | None) -> nn.Module:
    """Return the network that a file describes, with new weights."""
    make: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
        FLOW: build.network, NORMALIZING: normalizing, MIXTURE: _mixture
    }  # fmt: skip
    if meta.get("kind", FLOW) == COMPONENTS:
        return Components(_mixture(meta["mixture"]), build.network(meta["network"]))
    return make[meta.get("kind", FLOW)](meta["network"])
