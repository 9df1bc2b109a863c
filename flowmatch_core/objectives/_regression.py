"""Shared by the regression losses: draws of pairs and times, and what is regressed on what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition, condition_parts
from flowmatch_core._tensors import (
    as_time,
    check_choice,
    check_floating,
    expand_time,
    noise_like,
    time_like,
    weighted_mean,
)
from flowmatch_core.couplings import Coupling
from flowmatch_core.couplings._base import check_coupling
from flowmatch_core.field import Time, TimeSampler, VelocityField
from flowmatch_core.paths import AffinePath, Quantity

__all__ = ["RegressionBatch", "Times", "check_batch", "check_prediction", "draw_pairs", "draw_times"]

Times = Time | TimeSampler
"""Times, a float, 0-d or `(batch,)`, or a sampler of times."""


def check_prediction(prediction: Quantity) -> None:
    """Raise a `ValueError` unless `prediction` is a quantity."""
    check_choice("prediction", prediction, get_args(Quantity))


def check_batch(x1: Tensor, cond: Condition) -> None:
    """Raise a `ValueError` unless the data are floating-point numbers and the conditions have a row for each."""
    check_floating("x1", x1)
    for part in condition_parts(cond):
        if not isinstance(part, Tensor):
            raise ValueError(f"cond is a {type(part).__name__}, but should be a tensor or a mapping of tensors.")
        if part.shape[:1] != x1.shape[:1]:
            raise ValueError(f"cond has shape {tuple(part.shape)}, but should have {len(x1)} rows, one for each of x1.")


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


@final
@dataclass(frozen=True, eq=False)
class RegressionBatch:
    r"""The points of a batch and what a network regresses on there: the loss but for the network.

    Args:
        t: The times, with shape `()` or `(batch,)`.
        x_t: The points, with shape `(batch, *event)`.
        target: What the network predicts, with the same shape.
        cond: The conditions.
        scale: What the prediction is multiplied by, $-\sigma_t$ for a score; None for one.
        weight: The weights of the rows, with shape `(batch,)`; None for ones.
    """

    t: Tensor
    x_t: Tensor
    target: Tensor
    cond: Condition = None
    scale: Tensor | None = None
    weight: Tensor | None = None

    @classmethod
    def of(
        cls,
        prediction: Quantity,
        t: Tensor,
        x_t: Tensor,
        cond: Condition,
        weight: Tensor | None,
        *,
        velocity: Tensor,
        noise: Tensor,
        data: Tensor,
        sigma: Callable[[Tensor], Tensor],
    ) -> RegressionBatch:
        r"""Return the batch of a prediction; that of a score is $-\sigma_t s = x_0$, which is finite at `t = 1`."""
        if prediction == "score":
            return cls(t, x_t, noise, cond, -expand_time(sigma(t), x_t), weight)
        return cls(t, x_t, {"velocity": velocity, "noise": noise, "data": data}[prediction], cond, weight=weight)

    @classmethod
    def along(
        cls,
        path: AffinePath,
        prediction: Quantity,
        x0: Tensor,
        x1: Tensor,
        t: Tensor,
        cond: Condition,
        weight: Tensor | None,
    ) -> RegressionBatch:
        """Return the batch of a prediction on a path between paired noise and data."""
        sample = path.sample(x0, x1, t)
        return cls.of(
            prediction,
            sample.t,
            sample.x_t,
            cond,
            weight,
            velocity=sample.velocity,
            noise=x0,
            data=x1,
            sigma=path.sigma,
        )

    def loss(self, field: VelocityField) -> Tensor:
        """Return the mean squared error of a network, averaged over the event dimensions and the batch."""
        value = call_field(field, self.t, self.x_t, self.cond)
        if self.scale is not None:
            value = self.scale * value
        if self.weight is None:
            return F.mse_loss(value, self.target)
        return weighted_mean((value - self.target).square(), self.weight)

    def split(self, size: int) -> Iterator[RegressionBatch]:
        """Iterate over batches of `size` rows, in their order."""
        if size < 1:
            raise ValueError(f"size is {size}, but should be at least 1.")
        rows = self.x_t.shape[:1]

        def parts(tensor: Tensor | None) -> Iterable[Tensor | None]:
            return torch.split(tensor, size) if tensor is not None and tensor.shape[:1] == rows else repeat(tensor)

        cond: Iterable[Condition]
        if isinstance(self.cond, Mapping):
            rowwise = zip(*map(parts, self.cond.values()), strict=True)
            cond = (dict(zip(self.cond, each, strict=True)) for each in rowwise)
        else:
            cond = parts(self.cond)
        t, x_t, target = parts(self.t), parts(self.x_t), parts(self.target)
        return map(RegressionBatch, t, x_t, target, cond, parts(self.scale), parts(self.weight))
