"""The network of the temporal difference flows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Field, Time, VelocityField
from flowmatch_core.networks.embeddings import Encoder, FourierTime
from flowmatch_core.networks.layers import Modulation, check_cond, check_field_inputs, draw_weights, linear

__all__ = ["UNetMLPField"]


class _Block(nn.Module):
    r"""Compute $\operatorname{mish}(g \circ \operatorname{norm}(W h + w) + b) + S h$."""

    def __init__(self, inputs: int, outputs: int, time_features: int, cond_features: int) -> None:
        super().__init__()
        self.linear = linear(inputs, outputs)
        self.modulation = Modulation(outputs, time_features, cond_features)
        self.shortcut = linear(inputs, outputs, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, time: Tensor, of_cond: Tensor | None) -> Tensor:
        gain, shift = self.modulation.at(time, of_cond)
        z = self.linear(h)
        z = torch.addcmul(shift, gain, F.layer_norm(z, z.shape[-1:]))
        past: Tensor = self.shortcut(h)
        return F.mish(z) + past


@final
class UNetMLPField(Field):
    r"""A perceptron shaped like a U-Net, with layer norms modulated by time and condition.

    Stages of the given widths go down, a middle block follows, and the stages go up in reverse order, each with a
    skip connection from its counterpart. Sinusoids of time pass through two layers, the condition through an encoder
    of its own; both embeddings together give the gain and the shift of each block. The defaults are those of the
    paper for one policy; the paper does not state the order of operations within a block. The divergence has no
    closed form.

    References:
        - Temporal Difference Flows (Farebrother et al., 2025), appendix C.3.1, https://arxiv.org/abs/2503.09817

    Args:
        event_dim: The number of dimensions of `x`.
        stages: The widths of the stages on the way down.
        blocks: The number of blocks of a stage.
        cond_dim: The number $c$ of dimensions of the condition, 0 for none.
        cond_hidden: The widths of the layers that embed the condition.
        time_width: The number of sinusoids of time, and the width of the two layers that embed them.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> field = UNetMLPField(event_dim=2, stages=(64, 32), cond_dim=3, cond_hidden=(32,), time_width=16)
        >>> field(0.5, torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_dim: int,
        stages: Sequence[int] = (512, 512, 512),
        blocks: int = 1,
        cond_dim: int = 0,
        cond_hidden: Sequence[int] = (512, 512, 512),
        time_width: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages is empty, but should hold the width of at least one stage.")
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}, but should be at least 1.")
        self.event_dim, self.cond_dim = event_dim, cond_dim
        self.cond_shape = (cond_dim,) if cond_dim else None
        self.embedding = FourierTime(time_width // 2)
        self.time_encoder = Encoder(self.embedding.features, (time_width, time_width), F.mish)
        self.cond_encoder = Encoder(cond_dim, cond_hidden, F.mish) if cond_dim else None
        contexts = time_width, self.cond_encoder.features if self.cond_encoder else 0

        def stage(inputs: int, outputs: int) -> nn.ModuleList:
            sizes = [inputs, *[outputs] * blocks]
            return nn.ModuleList(_Block(a, b, *contexts) for a, b in itertools.pairwise(sizes))

        self.first = linear(event_dim, stages[0])
        self.down = nn.ModuleList(stage(a, b) for a, b in itertools.pairwise([stages[0], *stages]))
        self.middle = _Block(stages[-1], stages[-1], *contexts)
        back = stages[::-1]
        self.up = nn.ModuleList(stage(a + b, b) for a, b in itertools.pairwise([back[0], *back]))
        self.last = linear(stages[0], event_dim)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, uniform in ±1/√inputs; a tenth of that for the last layer."""
        draw_weights(self, small=[self.last], generator=generator)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, event_dim)`."""
        check_field_inputs(x, cond, self.event_dim, self.cond_dim)
        return self._velocity(t, x, self._of_cond(cond))

    def at_condition(self, cond: Tensor) -> VelocityField:
        """Return the field at conditions `(batch, cond_dim)`, encoded once, with the same result.

        It holds for the current weights and for these rows, and ignores the condition that it is called with.
        """
        check_cond(cond, cond, self.cond_dim)
        of_cond = self._of_cond(cond)

        def field(t: Time, x: Tensor, _: Tensor | None = None, /) -> Tensor:
            return self._velocity(t, x, of_cond)

        return field

    def _of_cond(self, cond: Tensor | None) -> list[Tensor | None]:
        """Return the part of the modulation of each block that depends on the condition, in order of use."""
        code = None if self.cond_encoder is None else self.cond_encoder(cond)
        stages = [*self.down, [self.middle], *self.up]
        return [block.modulation.of_cond(code) for stage in stages for block in cast(list[_Block], stage)]

    def _velocity(self, t: Time, x: Tensor, of_cond: list[Tensor | None]) -> Tensor:
        time, parts = self.time_encoder(self.embedding(as_time(t, x))), iter(of_cond)
        h = self.first(x)
        passed: list[Tensor] = []
        for stage in self.down:
            for block in cast(nn.ModuleList, stage):
                h = block(h, time, next(parts))
            passed.append(h)
        h = self.middle(h, time, next(parts))
        for stage in self.up:
            h = torch.cat([h, passed.pop()], -1)
            for block in cast(nn.ModuleList, stage):
                h = block(h, time, next(parts))
        velocity: Tensor = self.last(h)
        return velocity
