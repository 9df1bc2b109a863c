"""Invertible residual networks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from flowmatch_core.normalizing._base import Architecture, check_layers
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["Residual"]

LIPSWISH = 1.1
"""The divisor that keeps the slope of silu, at most 1.0998, below one."""


@final
@dataclass(frozen=True)
class Residual(Architecture):
    r"""A stack of residual blocks from data to noise, $z = x + F(x)$, whose `F` contracts.

    With a Lipschitz constant below one a block is invertible, by the iteration $x \leftarrow z - F(x)$.
    The determinant of $I + \partial F / \partial x$ is exact: the Jacobian of `F` is the product of its weights and
    slopes, without automatic differentiation and without the power series of the paper.

    References:
        - Invertible Residual Networks (Behrmann et al., 2019), https://arxiv.org/abs/1811.00995
        - Residual Flows for Invertible Generative Modeling (Chen et al., 2019), https://arxiv.org/abs/1906.02735

    Args:
        blocks: The number of blocks.
        hidden: The widths of the hidden layers of `F`.
        lipschitz: The bound of the Lipschitz constant of `F`, above 0 and below 1.

    Examples:
        >>> Residual(blocks=4)
        Residual(blocks=4, hidden=(64, 64), lipschitz=0.9)
    """

    blocks: int = 8
    hidden: tuple[int, ...] = (64, 64)
    lipschitz: float = 0.9

    def __post_init__(self) -> None:
        check_layers("blocks", self.blocks, self.hidden)
        if not 0 < self.lipschitz < 1:
            raise ValueError(f"lipschitz is {self.lipschitz}, but should be above 0 and below 1.")

    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        blocks = (_ResidualBlock(event_dim, cond_dim, self.hidden, self.lipschitz) for _ in range(self.blocks))
        transform: nn.Module = zuko().lazy.LazyComposedTransform(*blocks)
        return transform


class _ResidualBlock(nn.Module):
    def __init__(self, event_dim: int, cond_dim: int, hidden: tuple[int, ...], lipschitz: float) -> None:
        super().__init__()
        widths = (event_dim, *hidden, event_dim)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.from_cond = nn.Linear(cond_dim, hidden[0], bias=False) if cond_dim else None
        self.norm = lipschitz ** (1 / len(self.layers))

    def forward(self, cond: Tensor | None) -> Transform:
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            spectral = torch.linalg.matrix_norm(layer.weight, ord=2)
            weights.append(layer.weight * (self.norm / spectral).clamp(max=1))
            biases.append(layer.bias)
        if self.from_cond is not None:
            biases[0] = biases[0] + self.from_cond(cond)
        return ResidualTransform(weights, biases)


class ResidualTransform(Transform):
    """The map `y = x + F(x)` with a contracting multilayer perceptron `F` of slopes below one.

    Args:
        weights: The weights of the layers of `F`, each of spectral norm at most one.
        biases: Their biases, which may differ from row to row.

    Examples:
        >>> half = ResidualTransform([torch.eye(2), 0.5 * torch.eye(2)], [torch.zeros(2), torch.zeros(2)])
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> torch.allclose(half.inv(half(x)), x)
        True
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, weights: list[Tensor], biases: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.biases = weights, biases

    def _call(self, x: Tensor) -> Tensor:
        return x + self._contraction(x)

    def _contraction(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weights[0]) + self.biases[0]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            h = F.linear(F.silu(h) / LIPSWISH, weight) + bias
        return h

    def _jacobian(self, x: Tensor) -> Tensor:
        """Return the Jacobian of `x + F(x)`, with shape `(*, d, d)`."""
        h = F.linear(x, self.weights[0]) + self.biases[0]
        jacobian = self.weights[0]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            s = torch.sigmoid(h)
            slope = s * (1 + h * (1 - s)) / LIPSWISH
            jacobian = weight @ (slope[..., None] * jacobian)
            h = F.linear(F.silu(h) / LIPSWISH, weight) + bias
        return jacobian + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)

    def _inverse(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            x: Tensor = y
            for _ in range(100):  # to 3e-5 at the default constant of 0.9, where Newton's steps square the error
                x = y - self._contraction(x)
            x = x - torch.linalg.solve(self._jacobian(x), x + self._contraction(x) - y)
            jacobian = self._jacobian(x)
        # the last step carries the gradients of the implicit function
        last: Tensor = torch.linalg.solve(jacobian, x + self._contraction(x) - y)
        return x - last

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        volume: Tensor = torch.linalg.slogdet(self._jacobian(x)).logabsdet
        return volume
