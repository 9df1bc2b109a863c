"""Velocity fields."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core.field import Time


def zero(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return torch.zeros_like(x)
