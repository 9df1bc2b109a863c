"""The inputs of every solver: a counted field, the times of its steps and the output times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition, map_condition
from flowmatch_core._tensors import expand_time, flatten_event
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.solvers.grids import TimeGrid

__all__ = [
    "GAUSS",
    "Clock",
    "CountedField",
    "SolverError",
    "check_finite",
    "check_output_times",
    "output_marks",
    "step_ends",
]

GAUSS = ((-math.sqrt(0.6), 5 / 18), (0.0, 8 / 18), (math.sqrt(0.6), 5 / 18))
"""The points within [-1, 1] and the weights, of sum one, of the Gauss rule that is exact up to degree five."""


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


def check_output_times(times: Sequence[float] | Tensor, t0: Time, t1: Time, save: bool) -> list[float]:
    """Return the output times as floats.

    Raises:
        ValueError: They neither increase nor decrease, or the interval or `save` is given as well.
    """
    if save or isinstance(t0, Tensor) or isinstance(t1, Tensor) or (t0, t1) != (0.0, 1.0):
        raise ValueError(
            f"t0, t1 and save are {t0}, {t1} and {save}, but should be left out where times is given, whose ends are "
            "those of the solve and whose states are kept."
        )
    given = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    gaps = [after - before for before, after in pairwise(given)]
    if not gaps or not all(map(math.isfinite, gaps)) or not (min(gaps) > 0 or max(gaps) < 0):
        raise ValueError(f"times is {given}, but should hold at least two times that increase or decrease.")
    return given


def output_marks(clock: Clock, steps: int, save: bool, outputs: list[float] | None) -> list[float]:
    """Return where in [0, 1] the states are kept: at the ends, at the ends of the steps, or at the output times."""
    if save:
        return [i / steps for i in range(steps + 1)]
    inner = [] if outputs is None else [(t - outputs[0]) / (outputs[-1] - outputs[0]) for t in outputs[1:-1]]
    return [0.0, *map(clock.forward.position, inner), 1.0]


def step_ends(steps: int, marks: Sequence[float]) -> list[float]:
    """Return the ends of `steps` equal steps in [0, 1], divided at the marks.

    Where an end and a mark almost coincide, the mark replaces it.

    Examples:
        >>> step_ends(2, [0.0, 0.25, 1.0])
        [0.0, 0.25, 0.5, 1.0]
    """
    taken = {round(1e6 * mark) for mark in marks}
    return sorted([*marks, *(i / steps for i in range(steps + 1) if round(1e6 * i / steps) not in taken)])


class CountedField:
    """A field with its condition bound, its results checked and its evaluations counted."""

    def __init__(self, field: VelocityField, cond: Condition, name: str = "field") -> None:
        self.field, self.cond, self.name, self.calls = field, cond, name, 0

    def __call__(self, t: Time, x: Tensor, rows: Tensor | None = None) -> Tensor:
        self.calls += 1
        cond = self.cond if rows is None else map_condition(lambda part: part[rows], self.cond)
        return call_field(self.field, t, x, cond, name=self.name)


class Clock:
    """The times of a solve: a grid mapped onto each sample's interval, forward or backward."""

    def __init__(self, grid: TimeGrid, start: Time, span: Time) -> None:
        self.start, self.span = start, span
        self.forward, self.backward = grid, grid.backward()
        if isinstance(span, float):
            self.forward = self.backward = self.backward if span < 0 else self.forward

    def fraction(self, s: float) -> Time:
        """Return the fraction of the interval that has passed at `s`."""
        return self._either(self.forward.time(s), self.backward.time(s))

    def rate(self, s: float) -> Time:
        """Return the derivative of `fraction`."""
        return self._either(self.forward.rate(s), self.backward.rate(s))

    def time(self, fraction: Time) -> Time:
        """Return the time at which a fraction of the interval has passed."""
        return self.start + self.span * fraction

    def times(self, marks: Sequence[float], x: Tensor) -> Tensor:
        """Return the times at `marks`, with shape `(marks,)` or `(marks, batch)`."""
        times = [self.time(self.fraction(s)) for s in marks]
        return torch.stack([torch.as_tensor(t, dtype=x.dtype, device=x.device) for t in times])

    def stretch(self, share: Time, x: Tensor) -> Time:
        """Return the length of a share of the interval, ready to be multiplied by `x`."""
        length = self.span * share
        return expand_time(length, x) if isinstance(length, Tensor) else length

    def _either(self, forward: float, backward: float) -> Time:
        if self.forward is self.backward or not isinstance(self.span, Tensor):
            return forward
        return forward + (backward - forward) * (self.span < 0).to(self.span.dtype)
