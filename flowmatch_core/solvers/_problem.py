"""The inputs of every ODE solver: a counted field and the times of its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._conditions import map_condition
from flowmatch_core._tensors import check_shape, flatten_event
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.solvers.grids import TimeGrid

__all__ = ["Clock", "CountedField", "SolverError", "check_finite"]


class SolverError(FloatingPointError):
    """An integration that produced a value that is not finite or could not reach its tolerance."""


def check_finite(solver: str, x: Tensor) -> None:
    """Raise a `SolverError` if a row of the end of a solve holds a value that is not finite."""
    finite = flatten_event(torch.isfinite(x)).all(1)
    if not finite.all():
        raise SolverError(
            f"solver {solver!r} ended in values that are not finite in {int((~finite).sum())} "
            f"of {len(x)} samples; look for NaN or exploding velocities in the field, or take more steps."
        )


class CountedField:
    """A field with its condition bound, its results checked and its evaluations counted."""

    def __init__(self, field: VelocityField, cond: Tensor | None) -> None:
        self.field, self.cond, self.calls = field, cond, 0

    def __call__(self, t: Time, x: Tensor, rows: Tensor | None = None) -> Tensor:
        self.calls += 1
        cond = self.cond if rows is None else map_condition(lambda part: part[rows], self.cond)
        velocity = self.field(t, x, cond)
        check_shape("the result of field", velocity, x.shape)
        return velocity


class Clock:
    """The times of a solve: a grid mapped onto each sample's interval, forward or backward."""

    def __init__(self, grid: TimeGrid, start: Time, span: Time) -> None:
        self.start, self.span = start, span
        self.forward, self.backward = grid, grid.backward()
        if isinstance(span, float):
            self.forward = self.backward = self.backward if span < 0 else self.forward

    def time(self, s: float) -> Time:
        return self.start + self.span * self._fraction(s)

    def rate(self, s: float) -> Time:
        return self._either(self.forward.rate(s), self.backward.rate(s))

    def times(self, steps: int, x: Tensor) -> Tensor:
        even = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
        shifts = [self._fraction(i / steps) - i / steps for i in range(steps + 1)]
        shift = torch.stack([torch.as_tensor(s, dtype=x.dtype, device=x.device) for s in shifts])
        if isinstance(self.span, Tensor) and self.span.ndim:
            even, shift = even[:, None], shift.reshape(steps + 1, -1)
        return self.start + self.span * (even + shift)

    def _fraction(self, s: float) -> Time:
        return self._either(self.forward.time(s), self.backward.time(s))

    def _either(self, forward: float, backward: float) -> Time:
        if self.forward is self.backward or not isinstance(self.span, Tensor):
            return forward
        return forward + (backward - forward) * (self.span < 0).to(self.span.dtype)
