"""The geometric horizon of a successor measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_gamma", "geometric"]


def check_gamma(gamma: float) -> None:
    """Raise a `ValueError` unless the discount is in [0, 1)."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma was {gamma}, but should be in [0, 1).")


def geometric(
    gamma: float,
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw T ~ Geometric(1 - gamma) on 1, 2, ..., the number of steps to X = S_T.

    $$
    P(T = n) = (1-\gamma)\,\gamma^{n-1}
    $$

    Examples:
        >>> geometric(0.0, (3,))
        tensor([1, 1, 1])
        >>> bool((geometric(0.5, (1000,), generator=torch.Generator().manual_seed(0)).double().mean() - 2).abs() < 0.2)
        True
    """
    check_gamma(gamma)
    if gamma == 0:
        return torch.ones(tuple(shape), dtype=torch.long, device=device)
    u = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=device)
    return 1 + torch.floor(torch.log1p(-u) / math.log(gamma)).long()
