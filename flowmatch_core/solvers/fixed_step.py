"""Fixed-step solvers: explicit Runge-Kutta and Adams methods."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.solvers._problem import GAUSS, Clock, CountedField

__all__ = ["BASHFORTH", "MOULTON", "TABLEAUS", "Adams", "Tableau", "adams", "adams3", "advance", "runge_kutta"]


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


def integral_weights(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """Return the weights that integrate the polynomial through values at up to six nodes from 0 to `end`.

    The Gauss rule with three points is exact for it.

    Examples:
        >>> [round(weight, 3) for weight in integral_weights([0, 1, 2], 2.0)]  # Simpson's rule
        [0.333, 1.333, 0.333]
    """

    def basis(node: float, s: float) -> float:
        return math.prod((s - other) / (node - other) for other in nodes if other != node)

    return tuple(sum(end * w * basis(node, end * (1 + z) / 2) for z, w in GAUSS) for node in nodes)


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


def runge_kutta(
    evaluate: CountedField, x: Tensor, clock: Clock, ends: Sequence[float], tableau: Tableau
) -> Iterator[Tensor]:
    """Yield the state at the end of each step of a Runge-Kutta method, a step between any two neighbours of `ends`."""
    for start, end in pairwise(ends):
        x = runge_kutta_step(evaluate, x, clock, start, end, tableau)
        yield x


def runge_kutta_step(
    evaluate: CountedField,
    x: Tensor,
    clock: Clock,
    start: float,
    end: float,
    tableau: Tableau,
    first: Tensor | None = None,
) -> Tensor:
    """Return the state after a step in time, given the velocity at its start if it is known."""
    before, after = clock.fraction(start), clock.fraction(end)
    size = clock.stretch(after - before, x)
    slopes = [] if first is None else [first]
    for weights, c in list(zip(tableau.a, tableau.c, strict=True))[len(slopes) :]:
        t = clock.time((1 - c) * before + c * after)  # exactly the ends where c is 0 or 1
        slopes.append(evaluate(t, advance(x, size, weights, slopes)))
    return advance(x, size, tableau.b, slopes)


Slope = tuple[Time, Tensor]
"""The time that a step in `s` takes at the rate of a node, ready to be multiplied, and the velocity there."""


class Adams:
    """Equal steps in `s` of a multistep method; a state between two nodes is an integral of the slopes.

    The corrector is the same integral up to the next node, so these states have the order of the method.
    """

    def __init__(self, evaluate: CountedField, x: Tensor, clock: Clock, steps: int, marks: Sequence[float]) -> None:
        self.evaluate, self.clock, self.steps = evaluate, clock, steps
        self.positions = deque(round(steps * mark, 9) for mark in marks[1:])

    def slope(self, i: int, x: Tensor) -> Slope:
        """Return the slope at a node."""
        s = i / self.steps
        velocity = self.evaluate(self.clock.time(self.clock.fraction(s)), x)
        return self.clock.stretch(self.clock.rate(s) / self.steps, x), velocity

    def advance(self, x: Tensor, weights: Sequence[float], slopes: Sequence[Slope]) -> Tensor:
        """Return `x` plus a step along the weighted sum of the slopes."""
        for weight, (step, velocity) in zip(weights, slopes, strict=True):
            x = advance(x, step, (weight,), (velocity,))
        return x

    def multistep(self, first: int, x: Tensor, slopes: list[Slope], known: int) -> Iterator[Tensor]:
        """Yield the states at the marks after the node `first`, the state at which is `x`.

        Args:
            first: The node.
            x: The state there.
            slopes: The slopes up to there.
            known: The number of slopes that the method remembers.
        """
        for node in range(first, self.steps):
            order = len(slopes)
            slopes.append(self.slope(node + 1, self.advance(x, BASHFORTH[order], slopes)))
            end = self.advance(x, MOULTON[order], slopes)
            yield from self.states(node, node + 1, x, end, slopes, node + 1 - order)
            x, slopes = end, slopes[-known:]

    def states(
        self, start: int, end: int, x: Tensor, x_end: Tensor, slopes: Sequence[Slope], oldest: int
    ) -> Iterator[Tensor]:
        """Yield the states at the marks between the nodes `start` and `end` and at `end`.

        Args:
            start: The node of `x`.
            end: The node of `x_end`.
            x: The state at `start`.
            x_end: The state at `end`.
            slopes: The slopes at successive nodes.
            oldest: The node of the first of them.
        """
        nodes = range(oldest - start, oldest - start + len(slopes))
        while self.positions and self.positions[0] <= end:
            position = self.positions.popleft()
            yield x_end if position == end else self.advance(x, integral_weights(nodes, position - start), slopes)


def adams3(method: Adams, x: Tensor) -> Iterator[Tensor]:
    """Yield the states at the marks by the Adams method of order three, whose order rises from one."""
    yield from method.multistep(0, x, [method.slope(0, x)], known=3)


def adams(method: Adams, x: Tensor) -> Iterator[Tensor]:
    """Yield the states at the marks by the Adams method of order five, started by `rk4`."""
    slopes, states = [method.slope(0, x)], [x]
    start = min(4, method.steps)
    ends = [*range(0, start, 2), start]
    for i, j in pairwise(ends):
        between = (i / method.steps, j / method.steps)
        x = runge_kutta_step(method.evaluate, x, method.clock, *between, TABLEAUS["rk4"], slopes[-1][1])
        slope = method.slope(j, x)
        if j == i + 2:  # the middle state is interpolated by the cubic with these ends and slopes
            middle = method.advance((states[-1] + x) / 2, (1 / 4, -1 / 4), (slopes[-1], slope))
            slopes.append(method.slope(i + 1, middle))
        slopes.append(slope)
        states.append(x)
    for (i, before), (j, after) in pairwise(zip(ends, states, strict=True)):
        yield from method.states(i, j, before, after, slopes, 0)
    yield from method.multistep(start, x, slopes, known=5)
