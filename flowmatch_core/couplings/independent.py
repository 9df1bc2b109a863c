"""The independent coupling."""

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
    """The identity: pairs stay as given, independent if the noise was drawn independently of the data.

    Examples:
        >>> x0, x1, cond = Independent()(torch.zeros(2, 1), torch.ones(2, 1))
    """

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return x0, x1, cond
