"""Noise paired with data as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.couplings._base import Coupling

__all__ = ["Independent"]


@final
@dataclass(frozen=True)
class Independent(Coupling):
    """The pairs as given, independent when the noise was drawn without looking at the data.

    Examples:
        >>> x0, x1, cond = Independent()(torch.zeros(2, 1), torch.ones(2, 1))
    """

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return x0, x1, cond
