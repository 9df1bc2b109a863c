"""Shared by the regression losses: draws of pairs and times, and residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition, map_condition
from flowmatch_core._tensors import as_time, check_choice, check_floating, expand_time, noise_like, time_like
from flowmatch_core.couplings import Coupling
from flowmatch_core.couplings._base import check_coupling
from flowmatch_core.field import Time, TimeSampler
from flowmatch_core.paths import Quantity

__all__ = ["Times", "check_batch", "check_prediction", "draw_pairs", "draw_times", "residual"]

Times = Time | TimeSampler
"""Times, a float, 0-d or `(batch,)`, or a sampler of times."""


def check_prediction(prediction: Quantity) -> None:
    """Raise a `ValueError` unless `prediction` is a quantity."""
    check_choice("prediction", prediction, get_args(Quantity))


def check_batch(x1: Tensor, cond: Condition) -> None:
    """Raise a `ValueError` unless the data are floating-point numbers and the conditions have a row for each."""
    check_floating("x1", x1)

    def check(part: Tensor) -> Tensor:
        if not isinstance(part, Tensor):
            raise ValueError(f"cond is a {type(part).__name__}, but should be a tensor or a mapping of tensors.")
        if part.shape[:1] != x1.shape[:1]:
            raise ValueError(f"cond has shape {tuple(part.shape)}, but should have {len(x1)} rows, one for each of x1.")
        return part

    map_condition(check, cond)


def draw_pairs(
    x1: Tensor, x0: Tensor | None, cond: Condition, coupling: Coupling, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Condition]:
    """Return the paired noise and data with their conditions; the noise is standard normal where none is given."""
    check_coupling(coupling)
    check_batch(x1, cond)
    if x0 is None:
        x0 = noise_like(x1, generator)
    return coupling(x0, x1, cond, generator=generator)


def draw_times(time: Times, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return the given times, or draw one for every row of `x`, which needs at least one row."""
    if len(x) == 0:
        raise ValueError("x1 has no rows, but should have at least one.")
    if callable(time) and not isinstance(time, Tensor):
        return time_like(x, time, generator)
    return as_time(time, x)


def residual(
    value: Tensor,
    prediction: Quantity,
    t: Time,
    *,
    velocity: Tensor,
    noise: Tensor,
    data: Tensor,
    sigma: Callable[[Time], Tensor],
) -> Tensor:
    r"""Return the prediction minus its target; for the score $-\sigma_t s - x_0$, which is finite at `t = 1`."""
    if prediction == "score":
        return -expand_time(sigma(t), data) * value - noise
    return value - {"velocity": velocity, "noise": noise, "data": data}[prediction]
