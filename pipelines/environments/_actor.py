"""Policies that are stored with the project: small networks from observations to actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.environments import Array

Weights = NDArray[np.floating[Any]]

FARTHEST = 10.0
"""Largest standardised component of an observation that an actor is given; a larger one is cut off."""


@dataclass(frozen=True)
class Actor:
    r"""A deterministic policy with actions in $[-1, 1]^a$, computed in double precision.

    $$ a = \tanh(W_n h_{n-1} + b_n), \qquad h_i = \max(W_i h_{i-1} + b_i, 0), \qquad
       h_0 = \mathrm{clip}((s - \mu) / \sigma, -10, 10) $$

    >>> actor = Actor(np.zeros(2), np.ones(2), ((np.array([[0.5, 0.0]]), np.zeros(1)),))
    >>> actor(np.array([[0.0, 3.0], [40.0, 0.0]])).round(4)
    array([[0.    ],
           [0.9999]])

    Attributes:
        loc: Location of observations, shape (s,).
        scale: Their scale, shape (s,).
        layers: Weight (outputs, inputs) and bias (outputs,) of each layer, in single or double precision.
    """

    loc: Array
    scale: Array
    layers: tuple[tuple[Weights, Weights], ...]

    def __call__(self, state: Array) -> Array:
        """Return the actions (n, a) in the states (n, s)."""
        x = np.clip((state - self.loc) / self.scale, -FARTHEST, FARTHEST)
        *hidden, (weight, bias) = self.layers
        for inner, shift in hidden:
            x = np.maximum(x @ inner.T + shift, 0)
        action: Array = np.tanh(x @ weight.T + bias)
        return action

    def write(self, name: str, provenance: Mapping[str, Any]) -> None:
        """Store the actor and its provenance under a name."""
        import torch

        arrays: dict[str, Weights] = {"loc": self.loc, "scale": self.scale}
        for number, (weight, bias) in enumerate(self.layers):
            arrays |= {f"weight{number}": weight, f"bias{number}": bias}
        files.write_tensors(layout.actor(name), {key: torch.from_numpy(array) for key, array in arrays.items()}, {})
        files.write_json(layout.actor_provenance(name), provenance)


def paths(name: str) -> tuple[Path, Path]:
    """Return the files of the actor that is stored under a name, and of its provenance.

    Raises:
        UserError: One of them is missing.
    """
    found = layout.actor(name), layout.actor_provenance(name)
    missing = next((path for path in found if not path.exists()), None)
    if missing is not None:
        raise UserError(f"{missing} is not there; make it by `python -m pipelines.policies.train {name}`.")
    return found


def read(name: str) -> Actor:
    """Return the actor that is stored under a name.

    Raises:
        UserError: There is none.
    """
    arrays = files.read_arrays(paths(name)[0], "loc", "scale", "weight", "bias")[1]
    count = sum(key.startswith("weight") for key in arrays)
    layers = tuple((arrays[f"weight{number}"], arrays[f"bias{number}"]) for number in range(count))
    return Actor(arrays["loc"], arrays["scale"], layers)
