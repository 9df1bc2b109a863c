"""Conditions of any shape: how many there are, and their rows.

A condition is a tensor or a mapping of tensors, whose first dimension is the batch. Where the shape of one condition
is declared (`Field.cond_shape`, `cond_shape=` of a flow), all dimensions before it are the batch. Where it is not, a
floating-point tensor of one dimension is a single vector, and an integer tensor without dimensions a single label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BoundCondition",
    "CondShape",
    "Condition",
    "bind_condition",
    "condition_batch",
    "condition_parts",
    "condition_rows",
    "map_condition",
]

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


def condition_parts(cond: Condition) -> list[Any]:
    """Return the tensors of a condition.

    Examples:
        >>> condition_parts({"label": torch.arange(3)}), condition_parts(None)
        ([tensor([0, 1, 2])], [])
    """
    if isinstance(cond, BoundCondition):
        return condition_parts(cond.rows)
    if cond is None:
        return []
    return list(cond.values()) if isinstance(cond, Mapping) else [cond]


@dataclass(frozen=True)
class BoundCondition:
    """A condition whose batch is known: it needs no declared shape.

    Args:
        rows: The conditions as rows, one for each entry of the batch, or None.
        batch: The shape of the batch.
    """

    rows: Condition
    batch: torch.Size

    def expand(self, batch: Sequence[int]) -> BoundCondition:
        """Return the condition with its batch expanded to another shape."""
        batch = torch.Size(batch)
        if batch == self.batch:
            return self
        try:
            index = torch.arange(math.prod(self.batch)).reshape(self.batch).expand(batch).reshape(-1)
        except RuntimeError:
            raise ValueError(
                f"cond has a batch of shape {tuple(self.batch)}, but should have one that broadcasts to {tuple(batch)}."
            ) from None
        return BoundCondition(map_condition(lambda part: part[index.to(part.device)], self.rows), batch)


def bind_condition(cond: Condition, batch: Sequence[int], shape: CondShape = None) -> BoundCondition:
    """Return the condition with its batch, of which it keeps the rows.

    Examples:
        >>> bound = bind_condition(torch.arange(3), (3,))
        >>> bound.expand((2, 3)).rows
        tensor([0, 1, 2, 0, 1, 2])
    """
    if isinstance(cond, BoundCondition):
        return cond.expand(batch)
    return BoundCondition(condition_rows(cond, batch, shape), torch.Size(batch))


def condition_batch(cond: Condition, shape: CondShape = None, lead: Sequence[int] = ()) -> torch.Size:
    """Return the shape of the batch of a condition; `()` for None or for a single condition.

    Args:
        cond: The condition.
        shape: The declared shape of one condition.
        lead: The shape of the batch of what the condition belongs to, for a condition whose shape is not declared:
            leading dimensions that equal it are the batch.

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
    if isinstance(cond, BoundCondition):
        return cond.batch
    batches = [part.shape[: part.ndim - dims] for part, dims in _parts(cond, shape, tuple(lead))]
    try:
        return torch.Size(torch.broadcast_shapes(*batches))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"cond has parts of the batches {sorted(map(tuple, batches))}, but should have one batch."
        ) from None


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
    if isinstance(cond, BoundCondition):
        return cond.expand(lead).rows
    lead = tuple(lead)
    parts = iter(_parts(cond, shape, lead))

    def rows(part: Tensor) -> Tensor:
        _, dims = next(parts)
        batch, event = part.shape[: part.ndim - dims], part.shape[part.ndim - dims :]
        try:
            return part.expand((*lead, *event)).reshape(math.prod(lead), *event)
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
        elif part.ndim >= len(one) and tuple(part.shape[part.ndim - len(one) :]) == tuple(one):
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
