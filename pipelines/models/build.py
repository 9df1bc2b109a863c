"""Build the paths, couplings and networks of `flowmatch_core` that `params.yaml` selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from flowmatch_core.couplings import Coupling
from flowmatch_core.paths import AffinePath
from flowmatch_core.solvers import TimeGrid
from flowmatch_core.times import TimeLaw
from pipelines.base.errors import UserError
from pipelines.config import catalog

if TYPE_CHECKING:
    from pipelines.config.catalog import NetworkSpec, Spec
    from pipelines.config.params import Choice, CouplingChoice, GridChoice, NetworkChoice, PathChoice, TimeChoice


def path(choice: PathChoice) -> AffinePath:
    """Return the probability path that a method selects.

    Raises:
        UserError: The class rejects a value.
    """
    built: AffinePath = _build(choice.spec, choice)
    return built


def coupling(choice: CouplingChoice) -> Coupling:
    """Return the coupling that a method selects.

    Raises:
        UserError: The class rejects a value.
    """
    built: Coupling = _build(choice.spec, choice)
    return built


def grid(choice: GridChoice) -> TimeGrid:
    """Return the grid of times that an evaluation selects.

    Raises:
        UserError: The class rejects a value.
    """
    built: TimeGrid = _build(choice.spec, choice)
    return built


def times(choice: TimeChoice) -> TimeLaw:
    """Return the law of the flow times that a training selects.

    Raises:
        UserError: The class rejects a value.
    """
    built: TimeLaw = _build(choice.spec, choice)
    return built


def _build(spec: Spec, choice: Choice) -> Any:
    try:
        return spec.load()(**choice.values())
    except (TypeError, ValueError) as error:
        raise UserError(
            f"params.yaml: {choice.name!r} was given {choice.arguments}, which {spec.attribute} does not take "
            f"({error}); expected the arguments of its class in {spec.file}."
        ) from None


def network_config(
    choice: NetworkChoice, event_dim: int, cond_dim: int, image: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the description of a network: its name, its sizes and all options, including defaults.

    Args:
        choice: Network and its options.
        event_dim: Length of a vector.
        cond_dim: Length of a condition vector.
        image: Channels, height and width of an image, where the vectors are images.

    Raises:
        UserError: The network is one of images, but the vectors are none.
    """
    described = describe(choice.name, choice.spec, choice.values(), event_dim, cond_dim)
    if not choice.spec.image:
        return described
    if image is None:
        raise UserError(
            f"params.yaml: the network {choice.name!r} is for images, but these rows are none; expected a network of "
            "vectors, such as film_mlp."
        )
    return {**described, "image": list(image)}


def describe(name: str, spec: NetworkSpec, options: Mapping[str, Any], event_dim: int, cond_dim: int) -> dict[str, Any]:
    """Return the description of a network from its name, the options of its class and its sizes."""
    return {"name": name, "event_dim": event_dim, **spec.defaults, **options, "cond_dim": cond_dim}


def network(config: Mapping[str, Any]) -> nn.Module:
    """Return the network that `network_config` describes, with new weights from torch's global generator.

    Raises:
        UserError: There is no such network, or its class rejects a value.
    """
    try:
        spec = catalog.find(catalog.NETWORKS, config["name"])
    except ValueError as error:
        raise UserError(f"the network {config['name']!r} is unknown; {error}") from None
    made: nn.Module = make(spec, config)
    return made


def make(spec: NetworkSpec, config: Mapping[str, Any]) -> Any:
    """Return the network of an entry of the catalog, or its architecture of a normalizing flow, from a description.

    Raises:
        UserError: The class rejects a value.
    """
    name, arguments = config["name"], {key: value for key, value in config.items() if key != "name"}
    try:
        return spec.load()(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"the network {name!r} was given {arguments}, but {spec.attribute} says: {error}") from None
