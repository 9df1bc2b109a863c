"""A plain multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core._tensors import as_time, check_choice
from flowmatch_core.field import Time
from flowmatch_core.networks._trace import TraceField, trace, trace_weights
from flowmatch_core.networks.embeddings import FourierTime
from flowmatch_core.networks.layers import ACTIVATIONS, check_field_inputs, draw_weights, linear

__all__ = ["MLPField"]


@final
class MLPField(TraceField):
    r"""A multilayer perceptron $v(t, x, c)$ with a Fourier embedding of time.

    Up to two hidden layers its divergence has an exact closed form.

    With $v = W_3\,\phi(W_2\,\phi(W_1 x + b(t, c)) + b_2) + b_3$ and the slopes $s_l = \phi'$ of
    the layers,

    $$
    \operatorname{tr} \partial v / \partial x = s_2^T \left( W_2 \circ (W_1 W_3)^T \right) s_1 ,
    $$

    and $\sum_h s_h (W_1 W_2)_{hh}$ with one hidden layer.

    Args:
        event_dim: The number $d$ of dimensions of `x`.
        hidden: The widths of the hidden layers.
        cond_dim: The number $c$ of dimensions of the condition, 0 for none.
        frequencies: The number of frequencies of the embedding of time.
        activation: One of silu, tanh and softplus.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = MLPField(event_dim=2, hidden=(64, 64), cond_dim=3)
        >>> field(0.5, torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_dim: int,
        hidden: Sequence[int] = (256, 256),
        cond_dim: int = 0,
        frequencies: int = 8,
        activation: str = "silu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        if not hidden:
            raise ValueError("hidden is empty, but should hold the width of at least one layer.")
        self.event_dim, self.cond_dim = event_dim, cond_dim
        self.cond_shape = (cond_dim,) if cond_dim else None
        self.activation, self.slope = ACTIVATIONS[activation]
        self.embedding = FourierTime(frequencies)
        # the first layer is split by input: no concatenation, and a time shared by the batch is embedded once
        self.from_x = linear(event_dim, hidden[0], bias=False)
        self.from_time = linear(self.embedding.features, hidden[0])
        self.from_cond = linear(cond_dim, hidden[0], bias=False) if cond_dim else None
        self.layers = nn.ModuleList(linear(*sizes) for sizes in itertools.pairwise(hidden))
        self.last = linear(hidden[-1], event_dim)
        self.reset_parameters(generator)

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether there are at most two hidden layers."""
        return len(self.layers) <= 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, uniform in ±1/√inputs; a tenth of that for the last layer."""
        draw_weights(self, small=[self.last], generator=generator)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        z = self._first(t, x, cond)
        for layer in self.layers:
            z = layer(self.activation(z))
        velocity: Tensor = self.last(self.activation(z))
        return velocity

    def velocity_and_trace(self, t: Time, x: Tensor, cond: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity `(batch, event_dim)` and its exact divergence `(batch,)`."""
        z = self._first(t, x, cond)
        slopes = [self.slope(z)]
        for layer in self.layers:
            z = layer(self.activation(z))
            slopes.append(self.slope(z))
        return self.last(self.activation(z)), trace(weights, slopes)

    def trace_weights(self) -> Tensor:
        """Return the product of the weights that the divergence needs."""
        middle = cast(nn.Linear, self.layers[0]).weight if self.layers else None
        return trace_weights(self.from_x.weight, middle, self.last.weight)

    def _first(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        check_field_inputs(x, cond, self.event_dim, self.cond_dim)
        z: Tensor = self.from_time(self.embedding(as_time(t, x)))
        z = F.linear(x, self.from_x.weight, z) if z.ndim == 1 else torch.addmm(z, x, self.from_x.weight.T)
        if self.from_cond is not None and cond is not None:
            z = torch.addmm(z, cond, self.from_cond.weight.T)
        return z
