"""Time grids of fixed-step solvers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from torch import Tensor

__all__ = ["EDM", "Nodes", "Power", "TimeGrid", "Uniform", "Warped"]


class TimeGrid(ABC):
    r"""An increasing map $t(s)$ of [0, 1] onto itself: equal steps in `s` are the steps in time.

    It is mapped onto the interval of a solve from its earlier to its later end; a backward solve visits the same
    nodes in reverse. Arguments and results are Python floats: a grid has no device, and a solve that uses one can be
    compiled.
    """

    @abstractmethod
    def time(self, s: float) -> float:
        """Return $t(s)$."""

    @abstractmethod
    def rate(self, s: float) -> float:
        """Return the derivative $t'(s)$, which is not negative."""

    @abstractmethod
    def backward(self) -> TimeGrid:
        """Return the mirrored grid $1 - t(1 - s)$; a symmetric grid returns itself."""

    @final
    def nodes(self, steps: int) -> list[float]:
        """Return the `steps + 1` times between the steps.

        Examples:
            >>> Power(2).nodes(2)
            [0.0, 0.75, 1.0]
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, but should be at least 1.")
        return [self.time(i / steps) for i in range(steps + 1)]

    @final
    def position(self, time: float) -> float:
        """Return the `s` at which $t(s)$ is a given time, by bisection.

        Examples:
            >>> round(Power(2).position(0.75), 12)
            0.5
        """
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.time(middle) < time else (low, middle)
        return high


@final
@dataclass(frozen=True)
class Uniform(TimeGrid):
    """The grid of equal steps.

    Examples:
        >>> Uniform().nodes(4)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def time(self, s: float) -> float:
        return s

    def rate(self, s: float) -> float:
        return 1.0

    def backward(self) -> TimeGrid:
        return self


@final
@dataclass(frozen=True)
class Warped(TimeGrid):
    r"""The grid $t(s) = s - p \sin(2 \pi s) / (2 \pi)$, with small steps near $t=0$ and $t=1$.

    A trained field changes fastest near $t=0$ and $t=1$. There the steps are `1 - p` times those of the uniform grid,
    in the middle `1 + p` times. This saves up to two thirds of the steps of a likelihood, most for a field that is
    smooth in the middle.

    Args:
        p: The strength $p$ of the warp, in [0, 1].

    Examples:
        >>> [round(t, 3) for t in Warped().nodes(4)]
        [0.0, 0.139, 0.5, 0.861, 1.0]
    """

    p: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is {self.p}, but should be in [0, 1].")

    def time(self, s: float) -> float:
        return s - self.p * math.sin(2 * math.pi * s) / (2 * math.pi)

    def rate(self, s: float) -> float:
        return 1 - self.p * math.cos(2 * math.pi * s)

    def backward(self) -> TimeGrid:
        return self


@final
@dataclass(frozen=True)
class Power(TimeGrid):
    r"""The grid $t(s) = 1 - (1 - s)^\rho$, with small steps near $t=1$.

    Args:
        rho: The power $\rho$, a whole number: otherwise the grid is not smooth at the end, where methods of high
            order lose their order.

    Examples:
        >>> Power(2).nodes(4)
        [0.0, 0.4375, 0.75, 0.9375, 1.0]
    """

    rho: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf or self.rho % 1:
            raise ValueError(f"rho is {self.rho}, but should be a whole number from 1.")

    def time(self, s: float) -> float:
        return float(1 - (1 - s) ** self.rho)

    def rate(self, s: float) -> float:
        return float(self.rho * (1 - s) ** (self.rho - 1))

    def backward(self) -> TimeGrid:
        return _Mirrored(self)


@final
@dataclass(frozen=True)
class EDM(TimeGrid):
    r"""The noise levels of EDM as times of the straight path.

    $$
    \kappa(s) = \bigl(\kappa_{\max}^{1/\rho} + s\,(\kappa_{\min}^{1/\rho}
    - \kappa_{\max}^{1/\rho})\bigr)^\rho, \qquad \tau(s) = \frac{1}{1 + \kappa(s)}
    $$

    where $\kappa = (1 - t) / t$ is the ratio of noise to data. The range of $\tau$ is rescaled to [0, 1].

    References:
        - Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
          https://arxiv.org/abs/2206.00364

    Args:
        rho: The power $\rho$.
        noisiest: The highest ratio $\kappa_{\max}$ of noise to data.
        cleanest: The lowest ratio $\kappa_{\min}$, positive.

    Examples:
        >>> [round(t, 3) for t in EDM().nodes(4)]
        [0.0, 0.042, 0.276, 0.855, 1.0]
    """

    rho: float = 7.0
    noisiest: float = 80.0
    cleanest: float = 0.002

    def __post_init__(self) -> None:
        if not 1 <= self.rho < math.inf:
            raise ValueError(f"rho is {self.rho}, but should be at least 1 and finite.")
        if not 0 < self.cleanest < self.noisiest < math.inf:
            raise ValueError(
                f"cleanest and noisiest are {self.cleanest} and {self.noisiest}, but should be positive and finite, "
                "cleanest below noisiest."
            )

    def time(self, s: float) -> float:
        first, last = 1 / (1 + self.noisiest), 1 / (1 + self.cleanest)
        return float((1 / (1 + self._root(s) ** self.rho) - first) / (last - first)) if 0 < s < 1 else float(s)

    def rate(self, s: float) -> float:
        first, last = 1 / (1 + self.noisiest), 1 / (1 + self.cleanest)
        root, slope = self._root(s), self._root(0) - self._root(1)
        falling = self.rho * root ** (self.rho - 1) * slope
        return float(falling / (1 + root**self.rho) ** 2 / (last - first))

    def backward(self) -> TimeGrid:
        return _Mirrored(self)

    def _root(self, s: float) -> float:
        first, last = (ratio ** (1 / self.rho) for ratio in (self.noisiest, self.cleanest))
        return float(first + s * (last - first))


@final
@dataclass(frozen=True, init=False)
class Nodes(TimeGrid):
    r"""The grid through given increasing nodes, equidistant in `s` and interpolated by monotone cubics.

    A solve with as many steps as there are intervals ends each step on a node. The slope at an inner node is
    the harmonic mean of those of the two intervals beside it, so that $t(s)$ increases and $t'(s)$ is
    continuous.

    References:
        - Monotone Piecewise Cubic Interpolation (Fritsch & Carlson, 1980), https://doi.org/10.1137/0717021

    Args:
        times: The nodes, with shape `(intervals + 1,)`, from 0 to 1.

    Examples:
        >>> Nodes([0.0, 0.125, 0.5, 1.0]).nodes(3)
        [0.0, 0.125, 0.5, 1.0]
    """

    times: tuple[float, ...]

    def __init__(self, times: Sequence[float] | Tensor) -> None:
        given = tuple(float(t) for t in (times.tolist() if isinstance(times, Tensor) else times))
        if len(given) < 2 or (given[0], given[-1]) != (0.0, 1.0):
            raise ValueError(f"times is {given}, but should hold at least two nodes, from 0 to 1.")
        for before, after in pairwise(given):
            if not before < after:
                raise ValueError(f"times holds {before} before {after}, but should increase.")
        object.__setattr__(self, "times", given)

    def time(self, s: float) -> float:
        u, left, gap, rise, fall = self._interval(s)
        return left + u * (rise + u * (3 * gap - 2 * rise - fall + u * (rise + fall - 2 * gap)))

    def rate(self, s: float) -> float:
        u, _, gap, rise, fall = self._interval(s)
        return (len(self.times) - 1) * (rise + u * (6 * gap - 4 * rise - 2 * fall + 3 * u * (rise + fall - 2 * gap)))

    def backward(self) -> TimeGrid:
        return _Mirrored(self)

    def _interval(self, s: float) -> tuple[float, float, float, float, float]:
        """Return the position of `s` in its interval, the left node, the width, and the slopes at both ends."""
        intervals = len(self.times) - 1
        i = min(int(s * intervals), intervals - 1)
        return s * intervals - i, self.times[i], self._gap(i), self._slope(i), self._slope(i + 1)

    def _gap(self, i: int) -> float:
        i = min(max(i, 0), len(self.times) - 2)
        return self.times[i + 1] - self.times[i]

    def _slope(self, i: int) -> float:
        before, after = self._gap(i - 1), self._gap(i)
        return 2 * before * after / (before + after)


@final
@dataclass(frozen=True)
class _Mirrored(TimeGrid):
    grid: TimeGrid

    def time(self, s: float) -> float:
        return 1 - self.grid.time(1 - s)

    def rate(self, s: float) -> float:
        return self.grid.rate(1 - s)

    def backward(self) -> TimeGrid:
        return self.grid
