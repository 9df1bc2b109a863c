"""Shared by the couplings by optimal transport: centred batches and the costs of their pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition, condition_parts
from flowmatch_core._tensors import check_shape, flatten_event
from flowmatch_core.transport import Matrix

__all__ = ["centred_pair", "check_weight", "conditional_costs", "pair_cost"]


def centred_pair(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the noise and of the data, each minus their mean, flattened, in float64 on the CPU.

    Raises:
        ValueError: The shapes differ, there are no rows, or they are not finite, so that no plan exists.
    """
    check_shape("x0", x0, x1.shape)
    return _centred("x0", _flat(x0)), _centred("x1", _flat(x1))


def pair_cost(noise: Tensor, data: Tensor) -> Matrix:
    r"""Return $-2 \langle x_1^i, x_0^j \rangle$ for rows `i` of the data and `j` of the noise.

    This is the squared distance $\lVert x_1^i - x_0^j \rVert^2$ minus terms that depend on the row or the column
    alone, which do not change the optimal plan. It takes one matrix product; centred rows avoid cancellation far from
    the origin.
    """
    cost: Matrix = (-2 * data @ noise.T).numpy()
    return cost


def check_weight(weight: float) -> None:
    """Raise a `ValueError` unless the weight of a change of condition is at least 0."""
    if not weight >= 0:
        raise ValueError(f"weight is {weight}, but should be at least 0.")


def conditional_costs(x0: Tensor, x1: Tensor, cond: Condition, weight: float) -> Iterator[tuple[Tensor, Matrix]]:
    r"""Yield the rows of each block, within which partners may be exchanged, with the `pair_cost` of its pairs.

    For an infinite weight the rows of equal conditions are a block. For a finite weight $w$ all rows are one block,
    with $w D \lVert c^i - c^j \rVert^2 / E\lVert c - c' \rVert^2$ added to the cost, where `D` is the mean of the
    squared distances of `x1` and `x0` after aligning their means. The price of a mapping is the mean of its tensors'.
    """
    noise, data = centred_pair(x0, x1)
    if math.isinf(weight):
        _, label, counts = torch.unique(
            torch.cat(_condition_parts(cond, x1), 1), dim=0, return_inverse=True, return_counts=True
        )
        for rows in label.argsort(stable=True).split(counts.tolist()):
            yield rows, pair_cost(noise[rows], data[rows])
        return
    cost = pair_cost(noise, data)
    if weight > 0:
        parts = [_centred("cond", part) for part in _condition_parts(cond, x1)]
        price = sum(pair_cost(part, part) / _mean_distance(part, part) for part in parts) / len(parts)
        cost += weight * _mean_distance(noise, data) * price
    yield torch.arange(len(x1)), cost


def _flat(x: Tensor) -> Tensor:
    return flatten_event(x.detach()).to("cpu", torch.float64)


def _centred(name: str, rows: Tensor) -> Tensor:
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows, but should have at least one.")
    if not rows.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite, but should hold none.")
    return rows - rows.mean(0)


def _condition_parts(cond: Condition, x1: Tensor) -> list[Tensor]:
    """Return the conditions as matrices with a row for each row of the data, one for each tensor of a mapping."""
    parts = condition_parts(cond)
    if not parts:
        raise ValueError(
            "cond is None, but should hold the conditions of the rows of x1, which the coupling keeps apart; take "
            "MinibatchOT() or Sinkhorn() for data without conditions."
        )
    for part in parts:
        if part.shape[:1] != x1.shape[:1]:
            raise ValueError(
                f"cond has shape {tuple(part.shape)}, but should have shape ({len(x1)}, c), one for each row of x1."
            )
    return [_flat(part) for part in parts]


def _mean_distance(x: Tensor, y: Tensor) -> float:
    """Return the mean squared distance of the rows of two centred sets; not zero, for a division."""
    distance = x.square().sum(1).mean() + y.square().sum(1).mean()
    return max(float(distance), torch.finfo(distance.dtype).tiny)
