"""Files of trained models: weights in safetensors, and the description that rebuilds the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch_core.field import VelocityField
from flowmatch_core.marginals import Marginals
from flowmatch_core.paths import AffinePath, VelocityOf
from pipelines.base import files
from pipelines.base.errors import UserError, first_line
from pipelines.config.params import PathChoice
from pipelines.models import build

FLOW = "flow"
"""The kind of a model with a velocity field, which files of older versions do not name."""

COMPONENTS = "components"
"""The kind of a model with a velocity field inside the components of a mixture."""


@dataclass(frozen=True)
class Saved:
    """A saved model.

    Attributes:
        network: Trained network on its device, without gradients.
        path: Probability path of its training; None for a model without a velocity field.
        loc: Mean of the standardisation, `(columns,)`.
        scale: Standard deviation of the standardisation, `(columns,)`.
        meta: Description that rebuilds the model.
        marginals: Transforms of the columns before the standardisation, if there are any.
        whitening: Matrix that the standardised rows are multiplied by, if there is one.
    """

    network: nn.Module
    path: AffinePath | None
    loc: Tensor
    scale: Tensor
    meta: Mapping[str, Any]
    marginals: Marginals | None = None
    whitening: Tensor | None = None

    @property
    def event_shape(self) -> tuple[int]:
        """Shape of one row."""
        return (self.meta["network"]["event_dim"],)

    @property
    def field(self) -> VelocityField:
        """Velocity field, whatever the network predicts."""
        prediction = self.meta["prediction"]
        assert self.path is not None  # the model has a velocity field
        return self.network if prediction == "velocity" else VelocityOf(self.network, self.path, prediction)


def save(
    file: Path,
    network: nn.Module,
    loc: Tensor,
    scale: Tensor,
    meta: Mapping[str, Any],
    marginals: Marginals | None = None,
    whitening: Tensor | None = None,
) -> None:
    """Write a trained network with its standardisation, the transforms before it and the whitening after it."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    if marginals is not None:
        tensors |= {f"marginals.{name}": value for name, value in marginals.state_dict().items()}
        meta = {**meta, "marginals": marginals.description}
    if whitening is not None:
        tensors["whitening"] = whitening
    files.write_tensors(file, {**tensors, "loc": loc, "scale": scale}, meta)


def load(file: Path, device: torch.device, network: Callable[[Mapping[str, Any], Any], nn.Module]) -> Saved:
    """Read a trained network.

    Args:
        file: File to read.
        device: Device of the network and the standardisation.
        network: Function that creates the network from the description and the path.

    Raises:
        UserError: The file is missing or damaged, or another version of this code wrote it.
    """
    tensors, meta = files.read_tensors(file)

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    try:
        path = build.path(PathChoice(**meta["path"])) if meta.get("kind", FLOW) in (FLOW, COMPONENTS) else None
        trained = network(meta, path)
        trained.load_state_dict(below("network."))
        marginals = None
        if "marginals" in meta:
            marginals = read_marginals(meta["marginals"], below("marginals.")).to(device)
        loc, scale = (tensors[name].to(device) for name in ("loc", "scale"))
        whitening = tensors["whitening"].to(device) if "whitening" in tensors else None
        if not all(bool(unit.isfinite().all()) for unit in (loc, scale, whitening) if unit is not None):
            raise ValueError("its units are not finite")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{file} does not hold a model of this version ({first_line(error)}); train it again: `make repro`."
        ) from None
    return Saved(trained.to(device).requires_grad_(False), path, loc, scale, meta, marginals, whitening)


def read_marginals(description: Sequence[Mapping[str, Any]], state: Mapping[str, Tensor]) -> Marginals:
    """Return transforms of columns from their description and their numbers."""
    marginals = Marginals.from_description(description)
    marginals.load_state_dict(state)
    return marginals


def meta(file: Path) -> Mapping[str, Any]:
    """Return the description of a saved model.

    Raises:
        UserError: The file is missing or damaged.
    """
    return files.read_tensors(file)[1]
