"""Confidence intervals for means, paired differences and ratios over a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowmatch_core._require import required

__all__ = ["Interval", "paired_difference", "paired_ratio", "t_interval"]

Values = Sequence[float] | NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, the ends of its confidence interval, and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def verdict(self, at_least: float | None, at_most: float | None) -> str:
        """Compare the interval with a range.

        Args:
            at_least: The lower end of the range; None for no lower end.
            at_most: The upper end of the range; None for no upper end.

        Returns:
            `holds` if the interval lies within the range, `FAILS` if they are disjoint, else `open`; `measured`
            without a range.

        Examples:
            >>> Interval(1.0, 0.5, 1.5, 3).verdict(0.0, None), Interval(1.0, -0.5, 2.5, 3).verdict(0.0, None)
            ('holds', 'open')
        """
        if at_least is None and at_most is None:
            return "measured"
        least = -math.inf if at_least is None else at_least
        most = math.inf if at_most is None else at_most
        if least <= self.low and self.high <= most:
            return "holds"
        return "FAILS" if self.high < least or self.low > most else "open"


def t_interval(values: Values, level: float = 0.95) -> Interval:
    r"""Return the mean with its t interval $\bar x \pm t_{n-1} s / \sqrt n$.

    It is exact for normal values at any `n`; a percentile bootstrap of three seeds covers 73 % at a nominal 95 %. For
    a single value the ends are `nan`, and comparisons with them are false.

    Args:
        values: One value per seed.
        level: The probability with which the interval covers the true mean.

    Examples:
        >>> t_interval([1.0, 2.0, 3.0]).n
        3
    """
    stats = required("scipy.stats", "scipy")  # imported here because it takes a second
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, but should be between 0 and 1.")
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"values has shape {x.shape}, but should be a list of at least one number.")
    n, mean = x.size, float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: Values, b: Values, level: float = 0.95) -> Interval:
    r"""Return the t interval of $a_i - b_i$ over shared seeds.

    `a` differs significantly from `b` if the interval excludes zero.

    Args:
        a: One value per seed.
        b: One value per seed, in the same order of seeds.
        level: The probability with which the interval covers the true difference.

    Examples:
        >>> paired_difference([2.0, 3.0], [1.0, 2.0])
        Interval(mean=1.0, low=1.0, high=1.0, n=2)
    """
    x, y = _pairs(a, b)
    return t_interval(x - y, level)


def paired_ratio(a: Values, b: Values, level: float = 0.95) -> Interval:
    r"""Return the ratio of the means of positive `a` and `b` over shared seeds, with its interval.

    Its ends are those of the t interval of $\log(a_i / b_i)$; `a` is significantly larger if they exceed one.

    The effect of a seed on an error is closer to a factor than to a summand, so the logarithm is closer to normal;
    the ends are positive.

    Args:
        a: One positive value per seed.
        b: One positive value per seed, in the same order of seeds.
        level: The probability with which the interval covers the true ratio.

    Examples:
        >>> paired_ratio([2.0, 4.0], [1.0, 2.0])
        Interval(mean=2.0, low=2.0, high=2.0, n=2)
    """
    x, y = _pairs(a, b)
    for name, values in (("a", x), ("b", y)):
        if not (values > 0).all():
            raise ValueError(f"{name} is {values.tolist()}, but should be positive.")
    logarithm = t_interval(np.log(x / y), level)
    return Interval(float(x.mean() / y.mean()), math.exp(logarithm.low), math.exp(logarithm.high), logarithm.n)


def _pairs(a: Values, b: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"b has shape {y.shape}, but should have the shape of a, {x.shape}.")
    return x, y
