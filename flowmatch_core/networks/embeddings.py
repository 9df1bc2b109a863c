"""Embeddings of times and of conditions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core.networks.layers import linear

__all__ = ["Encoder", "FourierTime"]


class FourierTime(nn.Module):
    r"""Embed a time as $(t, \cos \omega_k t, \sin \omega_k t)$.

    The frequencies $\omega_k$ are geometric from $\pi$ to $30 \pi$.

    A network resolves raw `t` poorly. The lowest frequency makes half a turn on [0, 1], which identifies `t`; the
    highest makes fifteen turns. All features are smooth, and bounded outside [0, 1] too.

    Args:
        frequencies: The number of frequencies.

    Examples:
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


class Encoder(nn.Module):
    """Embed a vector by a multilayer perceptron with an activation after every layer, including the last.

    Without layers it is the identity.

    Args:
        inputs: The number of inputs.
        widths: The widths of the layers.
        activation: The activation.

    Examples:
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
