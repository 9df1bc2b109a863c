"""Conditions of any shape: how many there are, and their rows.

A condition is a tensor or a mapping of tensors, whose first dimension is the batch. Where the shape of one condition
is declared (`Field.cond_shape`, `cond_shape=` of a flow), all dimensions before it are the batch. Where it is not, a
floating-point tensor of one dimension is a single vector, and an integer tensor without dimensions a single label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CondShape", "Condition", "condition_batch", "condition_rows", "map_condition"]

Condition = Any
"""A tensor with shape `(*batch, *cond)`, or a mapping from names to such tensors."""

CondShape = Sequence[int] | Mapping[str, Sequence[int]] | None
"""The shape of one condition, one shape for each name of a mapping, or None where it is not declared."""


def map_condition(function: Callable[[Tensor], Tensor], cond: Condition) -> Condition:
    """Return the condition with a function applied to its tensor, or to each tensor of a mapping; None stays None.

    Examples:
        >>> map_condition(lambda c: c[:1], {"label": torch.arange(3)})
        {'label': tensor([0])}
    """
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: function(part) for name, part in cond.items()}
    return function(cond)


def condition_batch(cond: Condition, shape: CondShape = None) -> torch.Size:
    """Return the shape of the batch of a condition; `()` for None or for a single condition.

    Args:
        cond: The condition.
        shape: The declared shape of one condition.

    Raises:
        ValueError: It is not a tensor or a mapping of tensors, or does not end in the declared shape.

    Examples:
        >>> condition_batch(torch.zeros(5, 3)), condition_batch(torch.arange(5)), condition_batch(torch.zeros(3))
        (torch.Size([5]), torch.Size([5]), torch.Size([]))
        >>> condition_batch(torch.zeros(5, 1, 8, 8)), condition_batch(torch.zeros(2, 5, 3), shape=(3,))
        (torch.Size([5]), torch.Size([2, 5]))
    """
    if cond is None:
        return torch.Size()
    batches = [part.shape[: part.ndim - dims] for part, dims in _parts(cond, shape)]
    return torch.Size(torch.broadcast_shapes(*batches))  # type: ignore[no-untyped-call]


def condition_rows(cond: Condition, lead: Sequence[int], shape: CondShape = None) -> Condition:
    """Return the conditions of a batch of shape `lead` as rows, with one leading dimension.

    Args:
        cond: The conditions, whose batch broadcasts to `lead`, or None.
        lead: The shape of the batch.
        shape: The declared shape of one condition. Where it is not declared, leading dimensions that equal `lead`
            are the batch.

    Raises:
        ValueError: The batch of the conditions does not broadcast to `lead`.

    Examples:
        >>> condition_rows(torch.zeros(5), (2, 3)).shape, condition_rows(torch.arange(3), (2, 3))
        (torch.Size([6, 5]), tensor([0, 1, 2, 0, 1, 2]))
    """
    if cond is None:
        return None
    lead = tuple(lead)
    parts = iter(_parts(cond, shape, lead))

    def rows(part: Tensor) -> Tensor:
        _, dims = next(parts)
        batch, event = part.shape[: part.ndim - dims], part.shape[part.ndim - dims :]
        try:
            return part.expand(*lead, *event).reshape(math.prod(lead), *event)
        except RuntimeError:
            raise ValueError(
                f"cond has shape {tuple(part.shape)}, of batch {tuple(batch)}, but its batch should broadcast to "
                f"{lead}; declare the shape of one condition by cond_shape if it is not {tuple(event)}."
            ) from None

    return map_condition(rows, cond)


def _parts(cond: Condition, shape: CondShape, lead: tuple[int, ...] = ()) -> list[tuple[Tensor, int]]:
    """Return each tensor of the condition with the number of dimensions of one condition."""
    named = dict(cond) if isinstance(cond, Mapping) else {"": cond}
    declared = dict(shape) if isinstance(shape, Mapping) else dict.fromkeys(named, shape)
    if named.keys() != declared.keys():
        raise ValueError(
            f"cond has the names {sorted(named)}, but should have those of cond_shape, {sorted(declared)}."
        )
    parts = []
    for name, part in named.items():
        label = f"cond[{name!r}]" if name else "cond"
        if not isinstance(part, Tensor):
            raise ValueError(f"{label} is a {type(part).__name__}, but should be a tensor or a mapping of tensors.")
        one = declared[name]
        if one is None:
            parts.append((part, _default_dims(part, lead)))
        elif tuple(part.shape[part.ndim - len(one) :]) == tuple(one) and part.ndim >= len(one):
            parts.append((part, len(one)))
        else:
            raise ValueError(
                f"{label} has shape {tuple(part.shape)}, but should end in {tuple(one)}, that of one condition."
            )
    return parts


def _default_dims(part: Tensor, lead: tuple[int, ...]) -> int:
    if part.ndim > len(lead) > 1 and tuple(part.shape[: len(lead)]) == lead:
        return part.ndim - len(lead)
    single = 1 if part.is_floating_point() else 0
    return part.ndim if part.ndim <= single else part.ndim - 1
