"""What a velocity field is, and how a time meets a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

__all__ = [
    "Time",
    "VelocityField",
    "as_time",
    "check_choice",
    "check_floating",
    "check_shape",
    "expand_time",
    "flatten_event",
]

Time = float | Tensor
"""A float, a 0-d tensor or a tensor of shape `(batch,)`; never `(batch, 1)`."""


class VelocityField(Protocol):
    """Any callable `field(t, x, cond)` with a result shaped like `x`: a module, a closure, a closed form.

    The library always calls it with three arguments in this order, so their names are free.
    """

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None, /) -> Tensor: ...


def as_time(t: Time, x: Tensor) -> Tensor:
    """Return `t` as a tensor of the dtype of `x` and shape `()` or `(batch,)`.

    Arguments:
        t: The time.
        x: The batch it belongs to, with shape `(batch, *event)`.

    Example:
        >>> import torch
        >>> as_time(0.5, torch.zeros(3, 2))
        tensor(0.5000)
    """
    if not isinstance(t, Tensor):
        return x.new_full((), t)
    if t.ndim > 0:
        check_shape("t", t, x.shape[:1], "a float, 0-d or ")
    return t.to(x.dtype)


def expand_time(t: Time, x: Tensor) -> Tensor:
    """Return `t` with trailing ones, so that it broadcasts along the batch of `x` and along nothing else.

    Example:
        >>> import torch
        >>> expand_time(torch.rand(3), torch.zeros(3, 2, 2)).shape
        torch.Size([3, 1, 1])
    """
    t = as_time(t, x)
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t


def flatten_event(x: Tensor) -> Tensor:
    """Return `x` with shape `(batch, size of an event)`, for any event and any batch, an empty one too.

    Example:
        >>> import torch
        >>> flatten_event(torch.zeros(0, 2, 3)).shape, flatten_event(torch.zeros(4)).shape
        (torch.Size([0, 6]), torch.Size([4, 1]))
    """
    return x.unsqueeze(-1).flatten(1)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], alternative: str = "") -> None:
    """Raise a `ValueError` unless the tensor has the shape: nothing broadcasts by accident."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but should be {alternative}of shape {tuple(shape)}.")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise a `ValueError` unless the tensor holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, but should be of a floating-point dtype.")


def check_choice(name: str, given: str, known: Iterable[str]) -> None:
    """Raise a `ValueError` that lists the known names unless the given one is among them."""
    if given not in (names := tuple(known)):
        raise ValueError(f"{name} is {given!r}, but should be one of {', '.join(names)}.")
