"""What the networks share: embeddings, layers with drawn weights, gains and shifts, a trace in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core.fields import Time

__all__ = [
    "ACTIVATIONS",
    "Encoder",
    "FourierTime",
    "Modulation",
    "Prepared",
    "check_cond",
    "check_field_inputs",
    "convolution",
    "draw_weights",
    "linear",
    "precondition",
    "trace",
    "trace_weights",
]


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
    if torch.is_grad_enabled():
        return s * (1 + z * (1 - s))
    return (1 - s).mul_(z).add_(1).mul_(s)  # bit by bit the same: without a graph, nobody needs the intermediate values


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "softplus": (F.softplus, torch.sigmoid),
}
"""Smooth activations and their derivatives."""


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer whose weights are still to be drawn (see `draw_weights`)."""
    # without the usual initial weights, which would be drawn from the global generator
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)  # type: ignore[no-untyped-call]
    return layer


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the size of an image at stride 1; its weights are still to be drawn."""
    layer: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, inputs, outputs, size, stride=stride, padding=size // 2
    )
    return layer


def draw_weights(
    network: nn.Module, small: Collection[nn.Module] = (), generator: torch.Generator | None = None
) -> None:
    """Draw new weights for every layer, uniform within the root of the number of inputs.

    Arguments:
        network: The network, whose layers come from `linear` and `convolution`.
        small: The layers whose weights are ten times smaller.
        generator: The source of randomness.

    Example:
        >>> layer = linear(100, 3)
        >>> draw_weights(layer, small=[layer])
        >>> bool(layer.weight.abs().max() <= 0.01)
        True
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                if module in small:
                    bound *= 0.1
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)


class Encoder(nn.Module):
    """Embed a vector by a multilayer perceptron with an activation behind every layer, the last one too.

    Without any layer the vector stays as it is.

    Arguments:
        inputs: The number of inputs.
        widths: The widths of the layers.
        activation: The activation.

    Example:
        >>> Encoder(3, widths=(16, 8))(torch.zeros(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, inputs: int, widths: Sequence[int], activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        sizes = [inputs, *widths]
        self.layers = nn.ModuleList(linear(*pair) for pair in itertools.pairwise(sizes))
        self.features = sizes[-1]
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


class Modulation(nn.Module):
    r"""Compute the gain :math:`1 + g` and the shift :math:`b` of each channel, with `(g, b)` linear in the
    embeddings of time and condition.

    A time shared by the batch gives gains and shifts of shape `(channels,)`, computed once; otherwise they
    are `(batch, channels)`.

    References:
        | FiLM: Visual Reasoning with a General Conditioning Layer (Perez et al., 2018), https://arxiv.org/abs/1709.07871

    Arguments:
        channels: The number of channels to modulate.
        time_features: The size of the embedding of time.
        cond_features: The size of the embedding of the condition, 0 for none.

    Example:
        >>> gain, shift = Modulation(channels=8, time_features=3)(torch.zeros(3), None)
        >>> gain.shape, shift.shape
        (torch.Size([8]), torch.Size([8]))
    """

    def __init__(self, channels: int, time_features: int, cond_features: int = 0) -> None:
        super().__init__()
        self.from_time = linear(time_features, 2 * channels)
        self.from_cond = linear(cond_features, 2 * channels, bias=False) if cond_features else None

    def forward(self, time: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.at(time, self.of_cond(cond))

    def of_cond(self, cond: Tensor | None) -> Tensor | None:
        """The part of the condition, which may be kept while times change."""
        return None if self.from_cond is None else self.from_cond(cond)

    def at(self, time: Tensor, of_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gain and the shift, from the part of the condition."""
        both = self.from_time(time)
        if of_cond is not None:
            both = both + of_cond
        gain, shift = both.chunk(2, -1)
        return 1 + gain, shift


def check_field_inputs(x: Tensor, cond: Tensor | None, event_dim: int, cond_dim: int) -> None:
    """Raise a `ValueError` unless `x` has shape `(batch, event_dim)` and `cond` the shape that goes with it."""
    if x.ndim != 2 or x.shape[1] != event_dim:
        raise ValueError(f"x has shape {tuple(x.shape)}, but should have shape (batch, {event_dim}).")
    check_cond(x, cond, cond_dim)


def check_cond(x: Tensor, cond: Tensor | None, cond_dim: int) -> None:
    """Raise a `ValueError` unless `cond` has shape `(batch, cond_dim)`, or is None where that is 0."""
    given = None if cond is None else tuple(cond.shape)
    wanted = (len(x), cond_dim) if cond_dim else None
    if given != wanted:
        raise ValueError(f"cond has shape {given}, but should have shape {wanted}.")


def precondition(t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`a_t = (2t - 1) / n_t` and :math:`b_t = n_t^{-1/2}`, where :math:`n_t = t^2 + (1 - t)^2`.

    On the straight path between standardised data and standard noise, :math:`x_t` has variance :math:`n_t`,
    :math:`a_t x_t` is the best linear guess of the velocity :math:`x_1 - x_0`, and :math:`b_t` is the
    standard deviation of what is left. A field :math:`v = a_t x + b_t\, u(t, b_t x)` hence leaves to its
    network `u` inputs and targets of unit variance at every time. Both are smooth for all real `t`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), section 5,
          https://arxiv.org/abs/2206.00364

    Arguments:
        t: The time, with shape `()` or `(batch,)`.

    Returns:
        Both, each with shape `(1,)` or `(batch, 1)`.

    Example:
        >>> precondition(torch.tensor(1.0))
        (tensor([1.]), tensor([1.]))
    """
    t = t[..., None]
    variance = t.square() + (1 - t).square()
    return (2 * t - 1) / variance, variance.rsqrt()


def trace_weights(first: Tensor, middle: Tensor | None, last: Tensor) -> Tensor:
    r"""Return :math:`W_2 \circ (W_1 W_3)^T`, or the diagonal of :math:`W_3 W_1` turned round with one hidden layer: all
    that `trace` needs of the weights.

    Arguments:
        first: The matrix :math:`W_1`, with shape `(h1, d)`.
        middle: The matrix :math:`W_2`, with shape `(h2, h1)`, or None with one hidden layer.
        last: The matrix :math:`W_3`, with shape `(d, h2)`.
    """
    through = last.T @ first.T  # from the first layer straight to the last one
    return through.diagonal() if middle is None else middle * through


def trace(weights: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\operatorname{tr}(W_3 S_2 W_2 S_1 W_1)` of each row, or :math:`\operatorname{tr}(W_3 S_1
    W_1)`, where :math:`S_l` is the diagonal matrix of a row of slopes.

    It equals :math:`s_2^T \left( W_2 \circ (W_1 W_3)^T \right) s_1`: one matrix product for the whole batch,
    no loop over dimensions, no noise.

    Arguments:
        weights: The result of `trace_weights`.
        slopes: The slopes :math:`s_l` of each hidden layer, with shapes `(batch, h1)` and `(batch, h2)`.

    Example:
        >>> trace(trace_weights(torch.eye(2), None, torch.eye(2)), [torch.tensor([[3.0, 4.0]])])
        tensor([7.])
    """
    first, *second = slopes
    return (F.linear(first, weights) * second[0]).sum(-1) if second else first @ weights


@final
@dataclass(frozen=True)
class Prepared:
    """A field with the product of its weights that the closed form of its divergence needs, computed once.

    At 64 rows the product takes as long as the rest. It is that of the weights of the moment: for one solve.
    """

    field: Any
    weights: Tensor
    has_closed_form_divergence: ClassVar[bool] = True

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        velocity: Tensor = self.field(t, x, cond)
        return velocity

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.field.velocity_and_divergence(t, x, cond, self.weights)
        return result
