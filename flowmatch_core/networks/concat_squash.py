"""The network of FFJORD, with concat-squash layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core._tensors import as_time, check_choice
from flowmatch_core.field import Field, Time
from flowmatch_core.networks._trace import trace, trace_weights
from flowmatch_core.networks.embeddings import FourierTime
from flowmatch_core.networks.layers import ACTIVATIONS, check_field_inputs, draw_weights, linear

__all__ = ["ConcatSquashField"]


class _ConcatSquash(nn.Module):
    r"""A layer $(W x + b) \circ \operatorname{sigmoid}(G c + g) + H c'$, gated by a context.

    Args:
        inputs: The number of inputs.
        outputs: The number of outputs.
        gate_features: The size of the context $c$ of the gate.
        shift_features: The size of the context $c'$ of the shift.

    Examples:
        >>> layer = _ConcatSquash(2, 8, gate_features=1, shift_features=1)
        >>> z, gate = layer(torch.zeros(5, 2), torch.zeros(1), torch.zeros(1))
        >>> z.shape, gate.shape
        (torch.Size([5, 8]), torch.Size([8]))
    """

    def __init__(self, inputs: int, outputs: int, gate_features: int, shift_features: int) -> None:
        super().__init__()
        self.linear = linear(inputs, outputs)
        self.gate = linear(gate_features, outputs)
        self.shift = linear(shift_features, outputs, bias=False)

    def forward(self, x: Tensor, gate_context: Tensor, shift_context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs `(batch, outputs)` and the gate, with shape `(outputs,)` or `(batch, outputs)`."""
        gate = torch.sigmoid(self.gate(gate_context))
        return torch.addcmul(self.shift(shift_context), self.linear(x), gate), gate


@final
class ConcatSquashField(Field):
    r"""A perceptron of concat-squash layers, with an exact divergence in closed form up to two hidden layers.

    Each layer computes $z = (W a + b) \circ q + r$ with a gate $q = \operatorname{sigmoid}(G \tau +
    g)$ and a shift $r = H \tau$, where $\tau$ holds time and condition. With $s_l = \phi'
    \circ q_l$ in the hidden layers,

    $$
    \operatorname{tr} \partial v / \partial x = s_2^T \left( W_2 \circ (W_1 \operatorname{diag}(q_3)
    W_3)^T \right) s_1 .
    $$

    The gate $q_3$ of the last layer depends on time alone: when the batch shares its time, the trace is one matrix
    product for any conditions. With one time per row and two hidden layers it takes one product per dimension, as
    many as automatic differentiation but without a graph.

    `frequencies=0` passes the raw `t`, as in the paper, which trains by maximum likelihood. For flow matching embed
    the time, for instance with 8 frequencies.

    References:
        - FFJORD: Free-form Continuous Dynamics (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367

    Args:
        event_dim: The number $d$ of dimensions of `x`.
        hidden: The widths of the hidden layers.
        cond_dim: The number $c$ of dimensions of the condition, 0 for none.
        frequencies: The number of frequencies of the embedding of time, 0 for time itself.
        activation: One of silu, tanh and softplus.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = ConcatSquashField(event_dim=2, hidden=(64, 64))
        >>> v, div = field.velocity_and_divergence(0.5, torch.zeros(5, 2))
        >>> v.shape, div.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        event_dim: int,
        hidden: Sequence[int] = (256, 256),
        cond_dim: int = 0,
        frequencies: int = 0,
        activation: str = "softplus",
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
        features = self.embedding.features + cond_dim
        self.layers = nn.ModuleList(
            _ConcatSquash(a, b, features, features) for a, b in itertools.pairwise([event_dim, *hidden])
        )
        self.last = _ConcatSquash(hidden[-1], event_dim, self.embedding.features, features)
        self.reset_parameters(generator)

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether there are at most two hidden layers."""
        return len(self.layers) <= 2

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, uniform in ±1/√inputs; a tenth of that for the last layer."""
        draw_weights(self, small=[self.last.linear, self.last.shift], generator=generator)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        return self._velocity(t, x, cond)[0]

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the velocity `(batch, event_dim)` and its exact divergence `(batch,)`.

        The divergence of more than two hidden layers is computed by automatic differentiation.
        """
        if not self.has_closed_form_divergence:
            return super().velocity_and_divergence(t, x, cond)
        slopes: list[Tensor] = []
        velocity, gate = self._velocity(t, x, cond, slopes)
        first, *rest = (cast(_ConcatSquash, layer).linear.weight for layer in self.layers)
        last = self.last.linear.weight
        if gate.ndim == 1:
            return velocity, trace(trace_weights(first, rest[0] if rest else None, gate[:, None] * last), slopes)
        if not rest:
            return velocity, (F.linear(slopes[0], first.T * last) * gate).sum(-1)
        divergence = x.new_zeros(len(x))
        for i in range(self.event_dim):
            row = F.linear(slopes[0] * first[:, i], rest[0]) * (slopes[1] * last[i])
            divergence = divergence + row.sum(-1) * gate[:, i]
        return velocity, divergence

    def _velocity(
        self, t: Time, x: Tensor, cond: Tensor | None, slopes: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        check_field_inputs(x, cond, self.event_dim, self.cond_dim)
        time = self.embedding(as_time(t, x))
        context = time if cond is None else torch.cat([time.expand(len(x), -1), cond], -1)
        a = x
        for layer in self.layers:
            z, gate = layer(a, context, context)
            if slopes is not None:
                slopes.append(gate * self.slope(z))
            a = self.activation(z)
        velocity, gate = self.last(a, time, context)
        return velocity, gate
