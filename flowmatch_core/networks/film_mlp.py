"""A shallow perceptron whose hidden layers are modulated by time and condition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn

from flowmatch_core._tensors import as_time, check_choice
from flowmatch_core.field import Time
from flowmatch_core.networks._trace import TraceField, trace, trace_weights
from flowmatch_core.networks.embeddings import Encoder
from flowmatch_core.networks.layers import (
    ACTIVATIONS,
    Modulation,
    check_field_inputs,
    draw_weights,
    linear,
    precondition,
)

__all__ = ["FiLMField", "LogitTime"]


class LogitTime(nn.Module):
    r"""Embed a time with finer resolution near 0 and 1.

    With $u = \log \frac{t + 0.02}{1 - t + 0.02} / \log 51$, which runs from -1 to 1 like the logarithm of the
    signal-to-noise ratio, the features are $t, u$, cosine and sine of $k \pi t$ for `k = 1, 2, 3`
    and of $k \pi (u + 1) / 2$ for `k = 1, \dots, 4`. Outside [0, 1] $u$ continues by $u_{t + 1} = u_t + 2$, with the
    same slope: each unit of time has the same resolution, as needed by a model of several intervals, `field(t + k)`.

    Examples:
        >>> LogitTime()(torch.rand(5)).shape
        torch.Size([5, 16])
    """

    features: ClassVar[int] = 16
    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", math.pi * torch.tensor([1.0, 2, 3, 0.5, 1, 1.5, 2]), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        t = t[..., None]
        unit = (t.ceil() - 1).clamp_min(0) + t.floor().clamp_max(0)  # 0 on [0, 1], both ends included
        within = t - unit
        u = ((within + 0.02) / (1.02 - within)).log() / math.log(51) + 2 * unit
        angle = torch.cat([t * self.angles[:3], (u + 1) * self.angles[3:]], -1)
        return torch.cat([t, u, angle.cos(), angle.sin()], -1)


@final
class FiLMField(TraceField):
    r"""A perceptron with one or two hidden layers, modulated by time and condition (FiLM).

    Its divergence has an exact closed form: the recommended network for densities.

    $$
    v(t, x, c) = a_t x + b_t \left( W_3\,\phi(g_2 \circ W_2\,\phi(g_1 \circ W_1 b_t x + h_1) + h_2) +
    b_3 \right)
    $$

    with gains $g_l$ and shifts $h_l$ linear in an embedding of time (`LogitTime`) and in one of
    the condition (a perceptron), and the scales $a_t = (2t - 1) / n_t$, $b_t = n_t^{-1/2}$,
    $n_t = t^2 + (1 - t)^2$ for which the inner network has inputs and targets of unit variance on the straight path
    between standardised data and standard noise. With the slopes $s_l = g_l \circ \phi'$,

    $$
    \operatorname{tr} \partial v / \partial x = d\, a_t + b_t^2\, s_2^T \left( W_2 \circ (W_1
    W_3)^T \right) s_1 .
    $$

    A time shared by the batch is cheaper than one per row: its modulation is computed once. The features of time
    change fast near $t = 0$ and $t = 1$, so a likelihood needs a time grid that is dense there.

    References:
        - FiLM: Visual Reasoning with a General Conditioning Layer (Perez et al., 2018), https://arxiv.org/abs/1709.07871
        - Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
          https://arxiv.org/abs/2206.00364

    Args:
        event_dim: The number $d$ of dimensions of `x`.
        hidden: The widths of the one or two hidden layers.
        cond_dim: The number $c$ of dimensions of the condition, 0 for none.
        cond_hidden: The widths of the layers that embed the condition; empty to pass the condition itself.
        activation: One of silu, tanh and softplus.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = FiLMField(event_dim=2, hidden=(64, 64), cond_dim=3)
        >>> v, div = field.velocity_and_divergence(0.5, torch.zeros(5, 2), torch.zeros(5, 3))
        >>> v.shape, div.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    has_closed_form_divergence = True

    def __init__(
        self,
        event_dim: int,
        hidden: Sequence[int] = (512, 512),
        cond_dim: int = 0,
        cond_hidden: Sequence[int] = (64,),
        activation: str = "silu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        if len(hidden) not in (1, 2):
            raise ValueError(f"hidden has {len(hidden)} layers, but should have one or two.")
        self.event_dim, self.cond_dim = event_dim, cond_dim
        self.cond_shape = (cond_dim,) if cond_dim else None
        self.activation, self.slope = ACTIVATIONS[activation]
        self.embedding = LogitTime()
        self.encoder = Encoder(cond_dim, cond_hidden) if cond_dim else None
        cond_features = self.encoder.features if self.encoder else 0
        self.layers = nn.ModuleList(linear(a, b, bias=False) for a, b in itertools.pairwise([event_dim, *hidden]))
        self.modulations = nn.ModuleList(Modulation(h, self.embedding.features, cond_features) for h in hidden)
        self.last = linear(hidden[-1], event_dim)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights: outputs near unit variance for the hidden layers, small for the last one."""
        draw_weights(self, generator=generator)
        with torch.no_grad():
            for layer, gain in zip(self.layers, (1.0, 1.7), strict=False):
                weight = cast(nn.Linear, layer).weight
                weight.normal_(0, math.sqrt(gain / weight.shape[1]), generator=generator)
            for modulation in self.modulations:
                for parameter in cast(Modulation, modulation).from_time.parameters():
                    parameter.normal_(0, 0.1, generator=generator)
            self.last.weight.normal_(0, 0.1 * self.last.in_features**-0.5, generator=generator)
            self.last.bias.zero_()

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        return self._velocity(t, x, cond)

    def velocity_and_trace(self, t: Time, x: Tensor, cond: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity `(batch, event_dim)` and its exact divergence `(batch,)`."""
        slopes: list[Tensor] = []
        velocity = self._velocity(t, x, cond, slopes)
        skip, scale = precondition(as_time(t, x))
        return velocity, torch.addcmul(self.event_dim * skip[..., 0], scale[..., 0].square(), trace(weights, slopes))

    def trace_weights(self) -> Tensor:
        """Return the product of the weights that the divergence needs."""
        first, *middle = (cast(nn.Linear, layer).weight for layer in self.layers)
        return trace_weights(first, middle[0] if middle else None, self.last.weight)

    def _velocity(self, t: Time, x: Tensor, cond: Tensor | None, slopes: list[Tensor] | None = None) -> Tensor:
        check_field_inputs(x, cond, self.event_dim, self.cond_dim)
        time = as_time(t, x)
        skip, scale = precondition(time)
        features = self.embedding(time)
        code = None if self.encoder is None else self.encoder(cond)
        a = scale * x
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            gain, shift = modulation(features, code)
            z = torch.addcmul(shift, gain, layer(a))
            if slopes is not None:
                slopes.append(gain * self.slope(z))
            a = self.activation(z)
        return torch.addcmul(skip * x, scale, self.last(a))
