r"""Horizon models that turn noise into a state at once, without a path: what the GAN and the VAE share.

Their losses have the two terms of the others, with the loss of one state :math:`x` in place of a regression:

.. math:: \ell(\theta) = (1-\gamma)\,E\,\ell(S'|S,A;\theta) + \gamma\,E\,\ell(\widehat X|S,A;\theta), \quad
    \widehat X = G(Z|S',A';\bar\theta), \quad Z \sim N(0, I)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from flowmatch_core.fields import check_shape, noise_like
from flowmatch_core.networks._common import Encoder, Modulation, check_cond, linear
from flowmatch_core.successor.bootstrap import Loss, discount
from flowmatch_core.successor.horizon_model import HorizonModel
from flowmatch_core.successor.transitions import Transitions


class LatentNetwork(nn.Module, ABC):
    """A network that turns noise and a condition into a state.

    Arguments:
        event_dim: The number of dimensions of a state, and of the noise.
    """

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.event_dim = event_dim

    @abstractmethod
    def generate(self, noise: Tensor, cond: Tensor) -> Tensor:
        """The state that the noise stands for, both ``(batch, event_dim)``, at conditions ``(batch, c)``."""


@final
class LatentHorizonModel(HorizonModel):
    """The horizon model of a network that turns noise into a state; it has samples and values, no density.

    >>> from flowmatch_core.successor import HorizonVAE
    >>> model = LatentHorizonModel(HorizonVAE(event_dim=2, cond_dim=3), gamma=0.9)
    >>> s, a, g = torch.zeros(5, 2), torch.zeros(5, 1), torch.Generator().manual_seed(0)
    >>> model.sample(s, a, 7, generator=g).shape
    torch.Size([7, 5, 2])
    >>> model.log_prob(s, s, a)
    Traceback (most recent call last):
    TypeError: a model with HorizonVAE has no log_prob: it turns noise into states, and knows no density of them.
    """

    has_density = False

    def __init__(
        self, network: LatentNetwork, gamma: float, *, loc: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        super().__init__(gamma, loc, scale)
        self.network = network

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``n`` independent future states for every row, ``(n, batch, d)``."""
        cond = self._condition(state, action)
        noise = torch.randn(
            n, len(cond), self.network.event_dim, generator=generator, dtype=cond.dtype, device=cond.device
        )
        with torch.no_grad():
            x = self.network.generate(noise.flatten(0, 1), cond.repeat(n, 1)).view_as(noise)
        return self._raw(x)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """Raise a `TypeError`: there is no density."""
        name = type(self.network).__name__
        raise TypeError(
            f"a model with {name} has no log_prob: it turns noise into states, and knows no density of them."
        )


@final
class ConditionalMLP(nn.Module):
    r"""A residual perceptron :math:`h \mathrel{+}= W_2\,\phi(W_1\,\phi(g \circ h + b))` whose gains and shifts are
    linear in an embedding of the condition (FiLM); its weights are still to be drawn (see `draw_weights`).
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


def two_states(target: LatentNetwork, batch: Transitions, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The states of both terms, next states above those of the target, and their conditions (S, A), ``(2 batch, .)``.

    Where S' is terminal the process stays, and the bootstrap's state is S' itself.
    """
    with torch.no_grad():
        later = target.generate(noise_like(batch.next_state, generator), batch.next_condition)
        states = torch.cat([batch.visited, batch.where_terminal(batch.next_state, later)])
    return states, torch.cat([batch.condition, batch.condition])


def weigh(rows: Tensor, gamma: float, batch: Transitions) -> Loss:
    """The loss of the rows of `two_states`, ``(2 batch,)``."""
    weight = discount(gamma, batch)
    direct, bootstrap = (term.mean() for term in rows.chunk(2))
    return Loss.of(direct, bootstrap, weight)
