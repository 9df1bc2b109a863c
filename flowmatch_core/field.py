"""The velocity field: any callable of time, state and condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Time", "TimeSampler", "VelocityField", "at_condition", "at_times", "has_closed_form_divergence"]

Time = float | Tensor
"""A float, a 0-d tensor or a tensor of shape `(batch,)`; never `(batch, 1)`."""

TimeSampler = Callable[..., Tensor]
"""What has the call of `torch.rand`: `sampler(n, generator=, dtype=, device=)` gives `n` times in [0, 1]."""


class VelocityField(Protocol):
    """Any callable `field(t, x, cond)` with a result shaped like `x`: a module, a closure, a closed form.

    The library always calls it with three arguments in this order, so their names are free.
    """

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None, /) -> Tensor: ...


def at_condition(field: VelocityField, cond: Tensor) -> VelocityField:
    """Return a field for many evaluations at one condition: with this encoded once if the field knows how to.

    Arguments:
        field: The field; see `UNetMLPField.at_condition`.
        cond: The conditions, with shape `(batch, c)`, that the result is to be given nevertheless.

    Example:
        >>> import torch
        >>> field = lambda t, x, cond: x
        >>> at_condition(field, torch.zeros(3, 1)) is field
        True
    """
    known: Callable[[Tensor], VelocityField] | None = getattr(field, "at_condition", None)
    return field if known is None else known(cond)


def at_times(field: VelocityField, times: Sequence[Time], x: Tensor) -> Sequence[VelocityField]:
    """Return a field for each of the times: with what depends on these alone computed for all of them at once if the
    field knows how to.

    Arguments:
        field: The field; see `NoisePrediction.at_times`.
        times: The times, all floats or all of one shape, that the results are to be given nevertheless.
        x: A batch like those that they will see.

    Example:
        >>> import torch
        >>> field = lambda t, x, cond: x
        >>> at_times(field, [0.0, 0.5], torch.zeros(3, 2)) == [field, field]
        True
    """
    known: Callable[[Sequence[Time], Tensor], Sequence[VelocityField]] | None = getattr(field, "at_times", None)
    return [field] * len(times) if known is None else known(times, x)


def has_closed_form_divergence(field: VelocityField) -> bool:
    """Return whether a field says that it has the method `velocity_and_divergence`; see `MLPField`.

    Example:
        >>> has_closed_form_divergence(lambda t, x, cond: x)
        False
    """
    return bool(getattr(field, "has_closed_form_divergence", False))
