"""The exact divergence of two-layer networks in closed form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from torch import Tensor

from flowmatch_core.field import Field, Time

__all__ = ["Prepared", "TraceField", "trace", "trace_weights"]


def trace_weights(first: Tensor, middle: Tensor | None, last: Tensor) -> Tensor:
    r"""Return the product of the weights that `trace` takes.

    It is $W_2 \circ (W_1 W_3)^T$ for two hidden layers, and the diagonal of $W_1 W_3$ for one.

    Args:
        first: The matrix $W_1$, with shape `(h1, d)`.
        middle: The matrix $W_2$, with shape `(h2, h1)`, or None with one hidden layer.
        last: The matrix $W_3$, with shape `(d, h2)`.
    """
    through = last.T @ first.T  # from the first layer straight to the last one
    return through.diagonal() if middle is None else middle * through


def trace(weights: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    r"""Return the trace of the Jacobian of each row, with shape `(batch,)`.

    It is $\operatorname{tr}(W_3 S_2 W_2 S_1 W_1)$, or $\operatorname{tr}(W_3 S_1 W_1)$ for one hidden layer, where
    $S_l$ is the diagonal matrix of a row of slopes.

    It equals $s_2^T \left( W_2 \circ (W_1 W_3)^T \right) s_1$, one matrix product for the whole batch.

    Args:
        weights: The result of `trace_weights`.
        slopes: The slopes $s_l$ of each hidden layer, with shapes `(batch, h1)` and `(batch, h2)`.

    Examples:
        >>> import torch
        >>> trace(trace_weights(torch.eye(2), None, torch.eye(2)), [torch.tensor([[3.0, 4.0]])])
        tensor([7.])
    """
    first, *second = slopes
    return (F.linear(first, weights) * second[0]).sum(-1) if second else first @ weights


class TraceField(Field):
    """A network of one or two hidden layers whose divergence is a `trace` of products of its weights."""

    @abstractmethod
    def trace_weights(self) -> Tensor:
        """Return the product of the weights that `trace` takes, see the function `trace_weights`."""

    @abstractmethod
    def velocity_and_trace(self, t: Time, x: Tensor, cond: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity `(batch, d)` and the divergence `(batch,)`, given the result of `trace_weights`."""

    def prepared(self) -> Field:
        """Return the field with the product of its weights computed once, for the current weights."""
        return Prepared(self, self.trace_weights()) if self.has_closed_form_divergence else self

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the velocity `(batch, d)` and its exact divergence `(batch,)`.

        The divergence of more than two hidden layers is computed by automatic differentiation.
        """
        if not self.has_closed_form_divergence:
            return super().velocity_and_divergence(t, x, cond)
        return self.velocity_and_trace(t, x, cond, self.trace_weights())


@final
class Prepared(Field):
    """A field with the product of its weights that the closed form of its divergence needs, computed once.

    At 64 rows the product takes as long as the rest. It holds for the current weights.
    """

    has_closed_form_divergence = True

    def __init__(self, field: TraceField, weights: Tensor) -> None:
        super().__init__()
        self.field, self.weights, self.cond_shape = field, weights, field.cond_shape

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the velocity, with shape `(batch, d)`."""
        velocity: Tensor = self.field(t, x, cond)
        return velocity

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the velocity `(batch, d)` and its exact divergence `(batch,)`."""
        return self.field.velocity_and_trace(t, x, cond, self.weights)
