"""Networks that map noise and a condition to a state in one evaluation (GAN, VAE)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from flowmatch_core._tensors import check_shape
from flowmatch_core.networks.embeddings import Encoder
from flowmatch_core.networks.layers import Modulation, check_cond, linear

__all__ = ["ConditionalMLP", "LatentNetwork"]


class LatentNetwork(nn.Module, ABC):
    """A network that maps noise and a condition to a state.

    Args:
        event_dim: The number of dimensions of a state, and of the noise.
    """

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.event_dim = event_dim

    @abstractmethod
    def generate(self, noise: Tensor, cond: Tensor) -> Tensor:
        """Map noise `(batch, event_dim)` and conditions `(batch, c)` to states `(batch, event_dim)`."""


@final
class ConditionalMLP(nn.Module):
    r"""A residual perceptron modulated by the condition (FiLM).

    A block is $h \mathrel{+}= W_2\,\phi(W_1\,\phi(g \circ h + b))$ with gains and shifts linear in an embedding of
    the condition. Its weights are uninitialised (see `draw_weights`).
    """

    def __init__(
        self, inputs: int, outputs: int, cond_dim: int, width: int, blocks: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.inputs, self.cond_dim, self.activation = inputs, cond_dim, activation
        self.encoder = Encoder(cond_dim, (width, width), activation)
        self.first = linear(inputs, width)
        self.modulations = nn.ModuleList(Modulation(width, width) for _ in range(blocks))
        self.inner = nn.ModuleList(linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(linear(width, width) for _ in range(blocks))
        self.last = linear(width, outputs)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        check_shape("x", x, (len(x), self.inputs))
        check_cond(x, cond, self.cond_dim)
        code, h = self.encoder(cond), self.first(x)
        for modulation, inner, outer in zip(self.modulations, self.inner, self.outer, strict=True):
            gain, shift = modulation(code, None)
            h = h + outer(self.activation(inner(self.activation(torch.addcmul(shift, gain, h)))))
        y: Tensor = self.last(self.activation(h))
        return y
