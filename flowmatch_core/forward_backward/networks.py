"""The networks of Forward-Backward representations: the forward map F, the backward map B and the actor."""

from __future__ import annotations

from typing import cast, final

import torch
from torch import Tensor, nn

from flowmatch_core.forward_backward.latents import on_sphere
from flowmatch_core.networks.layers import draw_weights, linear

__all__ = ["Actor", "BackwardMap", "ForwardMap"]


@final
class ForwardMap(nn.Module):
    r"""The forward map $F_i^z(s, a)$: two streams, of (s, a) and of (s, z), and heads on both.

    Args:
        state_dim: The number of dimensions of a state.
        action_dim: The number of dimensions of an action.
        latent_dim: The number $d$ of dimensions of z and of the features.
        width: The width of all hidden layers.
        depth: The number of hidden layers of a head.
        heads: The number of heads.
        generator: The source of randomness of the initial weights.

    References:
        - Does Zero-Shot Reinforcement Learning Exist? (Touati et al., 2023), appendix on architectures,
          https://arxiv.org/abs/2209.14935

    Examples:
        >>> F = ForwardMap(state_dim=4, action_dim=2, latent_dim=8, width=16)
        >>> F(torch.zeros(5, 4), torch.zeros(5, 2), torch.zeros(5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        latent_dim: int,
        width: int = 256,
        depth: int = 1,
        heads: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.of_action = _stream(state_dim + action_dim, width)
        self.of_latent = _stream(state_dim + latent_dim, width)
        self.heads = nn.ModuleList(_perceptron(2 * width, latent_dim, width, depth) for _ in range(heads))
        draw_weights(self, generator=generator)

    def forward(self, state: Tensor, action: Tensor, z: Tensor) -> Tensor:
        """Return the features of all heads, with shape `(heads, batch, d)`."""
        streams = self.of_action(torch.cat([state, action], -1)), self.of_latent(torch.cat([state, z], -1))
        both = torch.cat(streams, -1)
        return torch.stack([head(both) for head in self.heads])


@final
class BackwardMap(nn.Module):
    r"""The backward map $B(s)$, a perceptron whose features have norm $\sqrt d$.

    Args:
        goal_dim: The number of dimensions of a state, or of the part of it that rewards depend on.
        latent_dim: The number $d$ of features.
        width: The width of the hidden layers.
        depth: The number of hidden layers.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> features = BackwardMap(goal_dim=2, latent_dim=9, width=16)(torch.zeros(5, 2))
        >>> features.shape, bool((features.norm(dim=1) - 3).abs().max() < 1e-5)
        (torch.Size([5, 9]), True)
    """

    def __init__(
        self,
        goal_dim: int,
        latent_dim: int,
        width: int = 256,
        depth: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.layers = _perceptron(goal_dim, latent_dim, width, depth)
        draw_weights(self, generator=generator)

    def forward(self, goal: Tensor) -> Tensor:
        """Return the features, with shape `(batch, d)`."""
        return on_sphere(self.layers(goal))


@final
class Actor(nn.Module):
    r"""The policies $\pi_z(s)$, with actions in $[-1, 1]$: two streams, of s and of (s, z).

    Args:
        state_dim: The number of dimensions of a state.
        action_dim: The number of dimensions of an action.
        latent_dim: The number $d$ of dimensions of z.
        width: The width of all hidden layers.
        depth: The number of hidden layers after the streams.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> Actor(state_dim=4, action_dim=2, latent_dim=8, width=16)(torch.zeros(5, 4), torch.zeros(5, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        latent_dim: int,
        width: int = 256,
        depth: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.of_state = _stream(state_dim, width)
        self.of_latent = _stream(state_dim + latent_dim, width)
        self.last = _perceptron(2 * width, action_dim, width, depth)
        draw_weights(self, generator=generator)

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """Return the actions, with shape `(batch, p)`."""
        both = torch.cat([self.of_state(state), self.of_latent(torch.cat([state, z], -1))], -1)
        return cast(Tensor, self.last(both)).tanh()


def _stream(inputs: int, width: int) -> nn.Sequential:
    """Return the first layers of an input; their normalisation and tanh bound it, whatever its units."""
    return nn.Sequential(linear(inputs, width), nn.LayerNorm(width), nn.Tanh(), linear(width, width), nn.ReLU())


def _perceptron(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, linear(inputs, outputs))
