"""Shared by the regression losses: draws of noise and times, and residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from flowmatch_core._tensors import (
    as_time,
    check_choice,
    check_floating,
    check_shape,
    expand_time,
    noise_like,
    time_like,
)
from flowmatch_core.field import Time, TimeSampler
from flowmatch_core.paths import Quantity

__all__ = ["Times", "check_prediction", "draw_noise", "draw_times", "residual"]

Times = Time | TimeSampler
"""Times, a float, 0-d or `(batch,)`, or a sampler of times."""


def check_prediction(prediction: Quantity) -> None:
    """Raise a `ValueError` unless `prediction` is a quantity."""
    check_choice("prediction", prediction, get_args(Quantity))


def draw_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise like the data `x`."""
    check_floating("x1", x)
    return noise_like(x, generator)


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
    check_shape("the result of field", value, data.shape)
    if prediction == "score":
        return -expand_time(sigma(t), data) * value - noise
    return value - {"velocity": velocity, "noise": noise, "data": data}[prediction]
