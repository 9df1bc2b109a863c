"""Fixed-step solvers: explicit Runge-Kutta and Adams methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.field import Time
from flowmatch_core.solvers._problem import Clock, CountedField

__all__ = [
    "BASHFORTH",
    "MOULTON",
    "TABLEAUS",
    "Steps",
    "Tableau",
    "adams",
    "adams3",
    "advance",
    "correct",
    "runge_kutta",
]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage times `c`, rows of stage weights `a`, final weights `b`."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau(a=((),), b=(1,), c=(0,)),
    "midpoint": Tableau(a=((), (1 / 2,)), b=(0, 1), c=(0, 1 / 2)),
    "heun": Tableau(a=((), (1,)), b=(1 / 2, 1 / 2), c=(0, 1)),
    "rk4": Tableau(
        a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0, 1 / 2, 1 / 2, 1),
    ),
}

BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    5: (251 / 720, -1274 / 720, 2616 / 720, -2774 / 720, 1901 / 720),
}
"""The weights of the explicit Adams methods by their number of slopes, the oldest slope first."""

MOULTON: dict[int, tuple[float, ...]] = {
    1: (1 / 2, 1 / 2),
    2: (-1 / 12, 8 / 12, 5 / 12),
    3: (1 / 24, -5 / 24, 19 / 24, 9 / 24),
    5: (27 / 1440, -173 / 1440, 482 / 1440, -798 / 1440, 1427 / 1440, 475 / 1440),
}
"""The weights of the implicit Adams methods, which use one more slope, at the prediction."""


class Steps:
    """Equal steps in `s`; a slope is a pair of the rate of the clock and the velocity."""

    def __init__(self, evaluate: CountedField, x: Tensor, clock: Clock, steps: int) -> None:
        self.evaluate, self.clock, self.steps = evaluate, clock, steps
        self.size = expand_time(clock.span, x) / steps if isinstance(clock.span, Tensor) else clock.span / steps

    def slope(self, i: float, x: Tensor) -> tuple[float, Tensor]:
        """Return the rate of time and the velocity at a node; their product is the slope in `s`."""
        s = i / self.steps
        velocity, rate = self.evaluate(self.clock.time(s), x), self.clock.rate(s)
        return (1.0, expand_time(rate, x) * velocity) if isinstance(rate, Tensor) else (rate, velocity)

    def runge_kutta(
        self, tableau: Tableau, i: int, x: Tensor, first: tuple[float, Tensor] | None = None, stride: int = 1
    ) -> Tensor:
        """Return the state `stride` steps after the i-th, given the slope at the i-th if it is known."""
        slopes = [] if first is None else [first]
        for weights, c in list(zip(tableau.a, tableau.c, strict=True))[len(slopes) :]:
            slopes.append(self.slope(i + c * stride, self.advance(x, weights, slopes, stride)))
        return self.advance(x, tableau.b, slopes, stride)

    def advance(
        self, x: Tensor, weights: Sequence[float], slopes: Sequence[tuple[float, Tensor]], stride: int = 1
    ) -> Tensor:
        """Return `x` plus a step of `stride` nodes along the weighted sum of the slopes."""
        rated = [weight * rate for weight, (rate, _) in zip(weights, slopes, strict=True)]
        return advance(x, self.size * stride, rated, [slope for _, slope in slopes])


def advance(x: Tensor, step: Time, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Return `x` plus `step` times the weighted sum of the slopes."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight == 0:
            continue
        if isinstance(step, Tensor):
            x = torch.addcmul(x, step, slope, value=weight)
        else:
            x = torch.add(x, slope, alpha=step * weight)
    return x


def runge_kutta(steps: Steps, x: Tensor, tableau: Tableau) -> Iterator[Tensor]:
    """Yield the state after each step of a Runge-Kutta method."""
    for i in range(steps.steps):
        x = steps.runge_kutta(tableau, i, x)
        yield x


def adams3(steps: Steps, x: Tensor) -> Iterator[Tensor]:
    """Yield the state after each step of the Adams method of order three, whose order rises from one."""
    slopes = [steps.slope(0, x)]
    for i in range(steps.steps):
        x = correct(steps, i, x, slopes)
        slopes = slopes[-3:]
        yield x


def adams(steps: Steps, x: Tensor) -> Iterator[Tensor]:
    """Yield the state after each step of the Adams method of order five, started by `rk4`."""
    slopes = [steps.slope(0, x)]
    start = min(4, steps.steps)
    for i in range(0, start, 2):
        stride = min(2, start - i)
        end = steps.runge_kutta(TABLEAUS["rk4"], i, x, slopes[-1], stride)
        ends = [slopes[-1], steps.slope(i + stride, end)]
        if stride == 2:  # the middle state is interpolated by the cubic with these ends and slopes
            middle = steps.advance((x + end) / 2, (1 / 8, -1 / 8), ends, stride)
            slopes.append(steps.slope(i + 1, middle))
            yield middle
        slopes.append(ends[1])
        x = end
        yield x
    for i in range(start, steps.steps):
        x = correct(steps, i, x, slopes)
        slopes = slopes[-5:]
        yield x


def correct(steps: Steps, i: int, x: Tensor, slopes: list[tuple[float, Tensor]]) -> Tensor:
    """Return the state after the i-th step, and append the slope at its prediction to `slopes`."""
    known = len(slopes)
    slopes.append(steps.slope(i + 1, steps.advance(x, BASHFORTH[known], slopes)))
    return steps.advance(x, MOULTON[known], slopes)
