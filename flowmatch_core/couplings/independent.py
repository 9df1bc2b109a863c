"""The independent coupling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core.couplings._base import IndexCoupling

__all__ = ["Independent"]


@final
@dataclass(frozen=True)
class Independent(IndexCoupling):
    """The identity: pairs stay as given, independent if the noise was drawn independently of the data.

    Examples:
        >>> x0, x1, cond = Independent()(torch.zeros(2, 1), torch.ones(2, 1))
    """

    def partners(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.arange(len(x1), device=x0.device)

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Condition]:
        return x0, x1, cond  # the same objects, without a copy
