"""Layers of the networks: activations with derivatives, seeded weights, FiLM modulation, input scaling."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "Modulation",
    "check_cond",
    "check_field_inputs",
    "convolution",
    "draw_weights",
    "linear",
    "precondition",
]


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    if torch.is_grad_enabled():
        return s * (1 + z * (1 - s))
    return (1 - s).mul_(z).add_(1).mul_(s)  # the same bits, in place: no graph needs the intermediate values


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "softplus": (F.softplus, torch.sigmoid),
}
"""Smooth activations and their derivatives."""


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer with uninitialised weights (see `draw_weights`)."""
    # skips the usual initialisation, which draws from the global generator
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)  # type: ignore[no-untyped-call]
    return layer


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution with padding `size // 2` and uninitialised weights (see `draw_weights`)."""
    layer: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, inputs, outputs, size, stride=stride, padding=size // 2
    )
    return layer


def draw_weights(
    network: nn.Module, small: Collection[nn.Module] = (), generator: torch.Generator | None = None
) -> None:
    r"""Draw new weights for every layer, uniform in $\pm 1 / \sqrt{n}$ for $n$ inputs.

    Args:
        network: The network, whose layers come from `linear` and `convolution`.
        small: The layers whose weights are ten times smaller.
        generator: The source of randomness.

    Examples:
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


class Modulation(nn.Module):
    r"""Compute the gain $1 + g$ and the shift $b$ of each channel.

    $(g, b)$ is linear in the embeddings of time and condition.

    A time shared by the batch gives gains and shifts of shape `(channels,)`, computed once; otherwise they
    are `(batch, channels)`.

    References:
        - FiLM: Visual Reasoning with a General Conditioning Layer (Perez et al., 2018), https://arxiv.org/abs/1709.07871

    Args:
        channels: The number of channels to modulate.
        time_features: The size of the embedding of time.
        cond_features: The size of the embedding of the condition, 0 for none.

    Examples:
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
        """Return the part of the modulation that depends on the condition alone."""
        return None if self.from_cond is None else self.from_cond(cond)

    def at(self, time: Tensor, of_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gain and the shift, given the result of `of_cond`."""
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
    r"""Return $a_t = (2t - 1) / n_t$ and $b_t = n_t^{-1/2}$, where $n_t = t^2 + (1 - t)^2$.

    On the straight path between standardised data and standard noise, $x_t$ has variance $n_t$, $a_t x_t$ is the best
    linear prediction of the velocity $x_1 - x_0$, and $b_t$ is the standard deviation of the residual. In a field $v
    = a_t x + b_t\, u(t, b_t x)$ the network `u` hence has inputs and targets of unit variance at every time. Both
    scales are smooth for all real `t`.

    References:
        - Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), section 5,
          https://arxiv.org/abs/2206.00364

    Args:
        t: The time, with shape `()` or `(batch,)`.

    Returns:
        Both, each with shape `(1,)` or `(batch, 1)`.

    Examples:
        >>> precondition(torch.tensor(1.0))
        (tensor([1.]), tensor([1.]))
    """
    t = t[..., None]
    variance = t.square() + (1 - t).square()
    return (2 * t - 1) / variance, variance.rsqrt()
