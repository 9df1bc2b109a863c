"""The geometric horizon of a successor measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowmatch_core._tensors import check_floating, check_shape

__all__ = ["check_gamma", "geometric", "log_discount"]


def check_gamma(gamma: float | Tensor, rows: int | None = None) -> None:
    """Raise a `ValueError` unless the discount, or that of every row, is in [0, 1).

    The values of a tensor are looked at on the CPU only: elsewhere that would wait for the device.

    Args:
        gamma: The discount; where `rows` is given also a tensor of one discount for each, with shape `(rows,)`.
        rows: The number of rows.

    Examples:
        >>> check_gamma(torch.tensor([0.5, 1.0]), rows=2)
        Traceback (most recent call last):
        ValueError: gamma holds 1.0, but should hold numbers in [0, 1).
    """
    if not isinstance(gamma, Tensor):
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma was {gamma}, but should be in [0, 1).")
        return
    if rows is None:
        raise ValueError(f"gamma was a tensor of shape {tuple(gamma.shape)}, but should be a number in [0, 1).")
    check_shape("gamma", gamma, (rows,), "a number or ")
    check_floating("gamma", gamma)
    if gamma.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = gamma[~((gamma >= 0) & (gamma < 1))]
    if len(outside):
        raise ValueError(f"gamma holds {float(outside[0])}, but should hold numbers in [0, 1).")


def geometric(
    gamma: float | Tensor,
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw T ~ Geometric(1 - gamma) on 1, 2, ..., the number of steps to X = S_T.

    $$
    P(T = n) = (1-\gamma)\,\gamma^{n-1}
    $$

    Args:
        gamma: The discount, or one for each entry of the last dimension, with shape `(shape[-1],)`.
        shape: The shape of the result.
        generator: The source of randomness.
        device: The device of the result.

    Examples:
        >>> geometric(0.0, (3,))
        tensor([1, 1, 1])
        >>> bool((geometric(0.5, (1000,), generator=torch.Generator().manual_seed(0)).double().mean() - 2).abs() < 0.2)
        True
    """
    check_gamma(gamma, shape[-1] if len(shape) else None)
    if not isinstance(gamma, Tensor) and gamma == 0:
        return torch.ones(tuple(shape), dtype=torch.long, device=device)
    u = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=device)
    return 1 + torch.floor(torch.log1p(-u) / log_discount(gamma)).long()


def log_discount(gamma: float | Tensor) -> float | Tensor:
    """Return log gamma in double precision, minus infinity for 0."""
    if isinstance(gamma, Tensor):
        return gamma.double().log()
    return math.log(gamma) if gamma > 0 else -math.inf
