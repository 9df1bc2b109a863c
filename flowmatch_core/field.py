"""Velocity fields: any callable of time, state and condition, and the abstract class of those that can do more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from flowmatch_core._conditions import Condition, CondShape
from flowmatch_core._jacobian import exact_divergence

__all__ = [
    "Field",
    "Time",
    "TimeSampler",
    "VelocityField",
    "at_condition",
    "at_times",
    "cond_shape",
    "has_closed_form_divergence",
    "velocity_and_divergence",
]

Time = float | Tensor
"""A float, a 0-d tensor or a tensor of shape `(batch,)`; never `(batch, 1)`."""

TimeSampler = Callable[..., Tensor]
"""A function called like `torch.rand`: `sampler(n, generator=, dtype=, device=)` returns `n` times in [0, 1]."""


class VelocityField(Protocol):
    """Any callable `field(t, x, cond)` whose result is shaped like `x`: a module, a closure, a closed form.

    The library always passes three positional arguments, so their names are free. A plain callable is enough for
    training, sampling and likelihoods; derive from `Field` to speed these up.
    """

    def __call__(self, t: Time, x: Tensor, cond: Condition, /) -> Tensor:
        """Return the velocity.

        Args:
            t: The time, a float, 0-d or `(batch,)`.
            x: The state, with shape `(batch, *event)`.
            cond: The condition, with shape `(batch, *cond)`, a mapping of such tensors, or None.

        Returns:
            The velocity, with the shape of `x`.
        """
        ...


class Field(nn.Module, ABC):
    """A network that serves as a velocity field, with optional methods that save work in solves and likelihoods.

    A subclass defines `forward` and overrides the other methods where it has something better than their defaults.
    Solvers and losses call them only on instances of this class; any other callable is evaluated as it is.

    Examples:
        A linear field $v = a x$ that states its divergence, $a d$:

        >>> class Linear(Field):
        ...     def __init__(self, a):
        ...         super().__init__()
        ...         self.a = nn.Parameter(torch.tensor(a))
        ...
        ...     has_closed_form_divergence = True
        ...
        ...     def forward(self, t, x, cond=None):
        ...         return self.a * x
        ...
        ...     def velocity_and_divergence(self, t, x, cond=None):
        ...         return self.a * x, self.a.expand(len(x)) * x.shape[1]
        >>> import torch
        >>> from flowmatch_core.divergence import divergence
        >>> divergence(Linear(2.0), 0.5, torch.ones(4, 3))[1]
        tensor([6., 6., 6., 6.], grad_fn=<DivBackward0>)
    """

    cond_shape: CondShape = None
    """The shape of one condition, or of each of a mapping; None where the field takes none or does not declare it."""

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether `velocity_and_divergence` is a closed form, which `divergence(method="auto")` then uses."""
        return False

    @abstractmethod
    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the velocity.

        Args:
            t: The time, a float, 0-d or `(batch,)`.
            x: The state, with shape `(batch, *event)`.
            cond: The condition, with shape `(batch, *cond)`, a mapping of such tensors, or None.

        Returns:
            The velocity, with the shape of `x`.
        """

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Return the velocity and its exact divergence; by default by automatic differentiation.

        Args:
            t: The time, a float, 0-d or `(batch,)`.
            x: The state, with shape `(batch, *event)`.
            cond: The condition, with shape `(batch, *cond)`, a mapping of such tensors, or None.

        Returns:
            The velocity `(batch, *event)` and the divergence `(batch,)`.

        Examples:
            >>> import torch
            >>> from flowmatch_core.networks import ResidualField
            >>> field = ResidualField(event_dim=2, width=8, blocks=1)
            >>> velocity, divergence = field.velocity_and_divergence(0.5, torch.zeros(5, 2))
            >>> velocity.shape, divergence.shape
            (torch.Size([5, 2]), torch.Size([5]))
        """
        return exact_divergence(self, t, x, cond)

    def prepared(self) -> Field:
        """Return the field to use throughout one likelihood; by default the field itself.

        Override it to compute what depends on the weights alone once instead of at every step. The result holds for
        the current weights.

        Examples:
            >>> import torch
            >>> from flowmatch_core.networks import MLPField
            >>> field = MLPField(event_dim=2, hidden=(8, 8))
            >>> field.prepared()(0.5, torch.zeros(5, 2)).shape
            torch.Size([5, 2])
        """
        return self

    def at_condition(self, cond: Condition) -> VelocityField:
        """Return the field to evaluate many times at one condition; by default the field itself.

        Override it to encode the condition once. Callers still pass `cond` to the result, which may ignore it.

        Args:
            cond: The conditions, with shape `(batch, *cond)`.

        Examples:
            >>> import torch
            >>> from flowmatch_core.networks import UNetMLPField
            >>> field = UNetMLPField(event_dim=2, stages=(8,), cond_dim=3, cond_hidden=(8,), time_width=8)
            >>> x, cond = torch.zeros(5, 2), torch.zeros(5, 3)
            >>> bool((field.at_condition(cond)(0.5, x, cond) == field(0.5, x, cond)).all())
            True
        """
        return self

    def at_times(self, times: Sequence[Time], x: Tensor) -> Sequence[VelocityField]:
        """Return one field for each of the times; by default the field itself for all of them.

        Override it to compute what depends on the times alone for all of them at once. Callers still pass the times
        to the results.

        Args:
            times: The times, all floats or all of one shape.
            x: A batch like those that the fields will be evaluated at, with shape `(batch, *event)`.

        Examples:
            >>> import torch
            >>> from flowmatch_core.networks import MLPField
            >>> field = MLPField(event_dim=2)
            >>> field.at_times([0.0, 0.5], torch.zeros(3, 2)) == [field, field]
            True
        """
        return [self] * len(times)


def has_closed_form_divergence(field: VelocityField) -> bool:
    """Return whether a field is a `Field` whose divergence has a closed form.

    Examples:
        >>> has_closed_form_divergence(lambda t, x, cond: x)
        False
    """
    return isinstance(field, Field) and field.has_closed_form_divergence


def cond_shape(field: VelocityField) -> CondShape:
    """Return `Field.cond_shape`; None for a plain callable, which does not declare it.

    Examples:
        >>> from flowmatch_core.networks import MLPField
        >>> cond_shape(MLPField(event_dim=2, cond_dim=3))
        (3,)
    """
    return field.cond_shape if isinstance(field, Field) else None


def velocity_and_divergence(field: VelocityField, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
    """Return `Field.velocity_and_divergence`, of a plain callable by automatic differentiation.

    Examples:
        >>> import torch
        >>> velocity_and_divergence(lambda t, x, cond: 3 * x, 0.0, torch.ones(1, 2))[1]
        tensor([6.])
    """
    return (
        field.velocity_and_divergence(t, x, cond) if isinstance(field, Field) else exact_divergence(field, t, x, cond)
    )


def at_condition(field: VelocityField, cond: Condition) -> VelocityField:
    """Return `Field.at_condition`, or a plain callable itself.

    Examples:
        >>> import torch
        >>> field = lambda t, x, cond: x
        >>> at_condition(field, torch.zeros(3, 1)) is field
        True
    """
    return field.at_condition(cond) if isinstance(field, Field) else field


def at_times(field: VelocityField, times: Sequence[Time], x: Tensor) -> Sequence[VelocityField]:
    """Return `Field.at_times`, of a plain callable itself for each of the times.

    Examples:
        >>> import torch
        >>> field = lambda t, x, cond: x
        >>> at_times(field, [0.0, 0.5], torch.zeros(3, 2)) == [field, field]
        True
    """
    return field.at_times(times, x) if isinstance(field, Field) else [field] * len(times)
