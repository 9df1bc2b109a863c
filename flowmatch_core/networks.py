"""Networks that serve as velocity fields."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core.fields import Time, as_time, check_choice

__all__ = ["FourierTime", "MLPField"]


class FourierTime(nn.Module):
    r"""Embed a time as :math:`(t, \cos \omega_k t, \sin \omega_k t)` with geometric frequencies :math:`\pi
    \dots 30 \pi`.

    A raw `t` leaves a network nearly blind to time. The lowest frequency is half a turn on [0, 1], one to
    one with `t`; the highest is fifteen turns. All features are smooth and bounded outside [0, 1] too.

    Arguments:
        frequencies: The number of frequencies.

    Example:
        >>> FourierTime(8)(torch.rand(5)).shape
        torch.Size([5, 17])
    """

    omega: Tensor

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.features = 1 + 2 * frequencies
        self.register_buffer("omega", math.pi * torch.logspace(0, math.log10(30), frequencies), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[..., None] * self.omega
        return torch.cat([t[..., None], angle.cos(), angle.sin()], -1)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "softplus": (F.softplus, torch.sigmoid),
}
"""Smooth activations and their derivatives."""


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    # without the usual initial weights, which would be drawn from the global generator
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)  # type: ignore[no-untyped-call]
    return layer


class MLPField(nn.Module):
    r"""A multilayer perceptron :math:`v(t, x, c)` with a Fourier embedding of time and, up to two hidden
    layers, an exact divergence in closed form.

    With :math:`v = W_3\,\phi(W_2\,\phi(W_1 x + b(t, c)) + b_2) + b_3` and the slopes :math:`s_l = \phi'` of
    the layers,

    .. math:: \operatorname{tr} \partial v / \partial x = s_2^T \left( W_2 \circ (W_1 W_3)^T \right) s_1 ,

    and :math:`\sum_h s_h (W_1 W_2)_{hh}` with one hidden layer: no loop over dimensions, no noise.

    Arguments:
        event_dim: The number :math:`d` of dimensions of `x`.
        hidden: The widths of the hidden layers.
        cond_dim: The number :math:`c` of dimensions of the condition, 0 for none.
        frequencies: The number of frequencies of the embedding of time.
        activation: One of silu, tanh and softplus.
        generator: The source of randomness of the initial weights.

    Example:
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
        self.activation, self.slope = ACTIVATIONS[activation]
        self.embedding = FourierTime(frequencies)
        # the first layer is split: no concatenation, and a time shared by the batch is embedded once
        self.from_x = _linear(event_dim, hidden[0], bias=False)
        self.from_time = _linear(self.embedding.features, hidden[0])
        self.from_cond = _linear(cond_dim, hidden[0], bias=False) if cond_dim else None
        self.layers = nn.ModuleList(_linear(*sizes) for sizes in itertools.pairwise(hidden))
        self.last = _linear(hidden[-1], event_dim)
        self.reset_parameters(generator)

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether `velocity_and_divergence` exists for this depth."""
        return len(self.layers) <= 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, uniform within the root of the number of inputs; the last layer near zero."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    bound = module.in_features**-0.5
                    if module is self.last:
                        bound *= 0.1
                    for parameter in module.parameters():
                        parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        z = self._first(t, x, cond)
        for layer in self.layers:
            z = layer(self.activation(z))
        velocity: Tensor = self.last(self.activation(z))
        return velocity

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the velocity and its exact divergence, with shapes `(batch, event_dim)` and `(batch,)`."""
        if not self.has_closed_form_divergence:
            raise ValueError(
                f"hidden has {len(self.layers) + 1} layers, but should have one or two for a divergence in closed form."
            )
        z = self._first(t, x, cond)
        slope = self.slope(z)
        through = self.last.weight.T @ self.from_x.weight.T  # from the first layer straight to the last one
        if self.layers:
            middle = cast(nn.Linear, self.layers[0])
            z = middle(self.activation(z))
            divergence = (F.linear(slope, middle.weight * through) * self.slope(z)).sum(-1)
        else:
            divergence = slope @ through.diagonal()
        return self.last(self.activation(z)), divergence

    def _first(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.event_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, but should have shape (batch, {self.event_dim}).")
        given = None if cond is None else tuple(cond.shape)
        wanted = (len(x), self.cond_dim) if self.cond_dim else None
        if given != wanted:
            raise ValueError(f"cond has shape {given}, but should have shape {wanted}.")
        z: Tensor = self.from_time(self.embedding(as_time(t, x)))
        z = F.linear(x, self.from_x.weight, z) if z.ndim == 1 else torch.addmm(z, x, self.from_x.weight.T)
        if self.from_cond is not None and cond is not None:
            z = torch.addmm(z, cond, self.from_cond.weight.T)
        return z
