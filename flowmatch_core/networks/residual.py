"""A deep residual perceptron modulated by time and condition."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Field, Time
from flowmatch_core.networks.embeddings import Encoder, FourierTime
from flowmatch_core.networks.layers import Modulation, check_field_inputs, draw_weights, linear, precondition

__all__ = ["ResidualField"]


class _Block(nn.Module):
    r"""Add $W_2\,\phi(W_1 (g \circ \operatorname{norm}(h) + b))$ to `h`."""

    def __init__(self, width: int, features: int, cond_features: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, features, cond_features)
        self.inner, self.outer = linear(width, width), linear(width, width)

    def forward(self, h: Tensor, time: Tensor, cond: Tensor | None) -> Tensor:
        gain, shift = self.modulation(time, cond)
        normal = torch.addcmul(shift, gain, F.layer_norm(h, h.shape[-1:]))
        added: Tensor = self.outer(F.silu(self.inner(normal)))
        return h + added


@final
class ResidualField(Field):
    r"""A residual perceptron of any depth, $v = a_t x + b_t\, u(t, b_t x, c)$.

    Time and condition give the gains and shifts of its layer norms.

    The scales $a_t$ and $b_t$ are those of `FiLMField`, for the straight path between standardised data and standard
    noise. The divergence has no closed form.

    References:
        - FiLM: Visual Reasoning with a General Conditioning Layer (Perez et al., 2018), https://arxiv.org/abs/1709.07871
        - Deep Residual Learning for Image Recognition (He et al., 2016), https://arxiv.org/abs/1512.03385

    Args:
        event_dim: The number of dimensions of `x`.
        width: The width of all hidden layers.
        blocks: The number of residual blocks, of two layers each.
        cond_dim: The number $c$ of dimensions of the condition, 0 for none.
        frequencies: The number of frequencies of the embedding of time.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = ResidualField(event_dim=2, width=64, blocks=2, cond_dim=3)
        >>> field(0.5, torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_dim: int,
        width: int = 256,
        blocks: int = 3,
        cond_dim: int = 0,
        frequencies: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}, but should be at least 1.")
        self.event_dim, self.cond_dim = event_dim, cond_dim
        self.cond_shape = (cond_dim,) if cond_dim else None
        self.embedding = FourierTime(frequencies)
        self.time_encoder = Encoder(self.embedding.features, (width,))
        self.cond_encoder = Encoder(cond_dim, (width, width)) if cond_dim else None
        self.first = linear(event_dim, width)
        self.blocks = nn.ModuleList(_Block(width, width, width if cond_dim else 0) for _ in range(blocks))
        self.last = linear(width, event_dim)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, uniform in ±1/√inputs; a tenth of that for the last layer."""
        draw_weights(self, small=[self.last], generator=generator)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        check_field_inputs(x, cond, self.event_dim, self.cond_dim)
        time = as_time(t, x)
        skip, scale = precondition(time)
        features = self.time_encoder(self.embedding(time))
        code = None if self.cond_encoder is None else self.cond_encoder(cond)
        h = self.first(scale * x)
        for block in self.blocks:
            h = block(h, features, code)
        return torch.addcmul(skip * x, scale, self.last(F.silu(h)))
