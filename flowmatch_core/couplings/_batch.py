"""Shared by the couplings by optimal transport: centred batches and the costs of their pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape, flatten_event
from flowmatch_core.transport import Matrix

__all__ = ["centred", "centred_pair", "pair_cost"]


def centred(name: str, x: Tensor) -> Tensor:
    """Return the rows of `x` minus their mean, flattened, in float64 on the CPU.

    Raises:
        ValueError: There are no rows, or they are not finite, so that no plan exists.
    """
    if len(x) == 0:
        raise ValueError(f"{name} has no rows, but should have at least one.")
    rows = flatten_event(x.detach()).to("cpu", torch.float64)
    if not rows.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite, but should hold none.")
    return rows - rows.mean(0)


def centred_pair(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noise and the data, each `centred`."""
    check_shape("x0", x0, x1.shape)
    return centred("x0", x0), centred("x1", x1)


def pair_cost(noise: Tensor, data: Tensor) -> Matrix:
    r"""Return $-2 \langle x_1^i, x_0^j \rangle$ for rows `i` of the data and `j` of the noise.

    This is the squared distance $\lVert x_1^i - x_0^j \rVert^2$ minus terms that depend on the row or the column
    alone, which do not change the optimal plan. It takes one matrix product; centred rows avoid cancellation far from
    the origin.
    """
    cost: Matrix = (-2 * data @ noise.T).numpy()
    return cost
