"""Confidence intervals for means, differences and ratios over a few seeds, and the tests that their ends are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowmatch_core._require import required

__all__ = [
    "ONE_SIDED",
    "Interval",
    "difference",
    "paired_difference",
    "paired_ratio",
    "ratio",
    "t_interval",
    "welch_difference",
    "welch_ratio",
]

Values = Sequence[float] | NDArray[np.float64]
Method = Literal["paired", "welch"]

ONE_SIDED = 0.9
"""Level of the interval each of whose ends is a one-sided bound at 5 %."""


class Interval(NamedTuple):
    """An estimate, the ends of its confidence interval, and what is behind it.

    Attributes:
        mean: The estimate: a mean, or the geometric mean of ratios.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        n: Number of values, or of pairs; of two groups the number of the smaller one.
        method: How two groups were compared: `"paired"` by seed or by `"welch"`; None for the mean of one group.
    """

    mean: float
    low: float
    high: float
    n: int
    method: Method | None = None

    def verdict(self, at_least: float | None, at_most: float | None) -> str:
        """Test a claim that the true value lies in a range.

        On an interval of level `ONE_SIDED` this is the one-sided t test at 5 % for a range with one end, and the two
        one-sided tests of equivalence (TOST) for a range with two: the claim `holds` if the value is significantly
        above the lower end and below the upper one, and it `FAILS` if the value is significantly outside.

        References:
            D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987) 657-680: two one-sided tests.

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
    return _one_group(_values("values", values)).interval(level)


def paired_difference(a: Values, b: Values, level: float = 0.95) -> Interval:
    r"""Return the t interval of $a_i - b_i$ over shared seeds.

    `a` differs significantly from `b` if the interval excludes zero.

    Args:
        a: One value per seed.
        b: One value per seed, in the same order of seeds.
        level: The probability with which the interval covers the true difference.

    Examples:
        >>> paired_difference([2.0, 3.0], [1.0, 2.0])
        Interval(mean=1.0, low=1.0, high=1.0, n=2, method='paired')
    """
    return _paired(_values("a", a), _values("b", b)).interval(level)


def paired_ratio(a: Values, b: Values, level: float = 0.95) -> Interval:
    r"""Return the geometric mean of the ratios $a_i / b_i$ over shared seeds, with its interval.

    Estimate and ends are $\exp$ of the mean and of the t interval of $\log(a_i / b_i)$. `a` is significantly larger if
    the interval lies above one.

    The effect of a seed on an error is closer to a factor than to a summand, so the logarithm is closer to normal;
    the ends are positive.

    Args:
        a: One positive value per seed.
        b: One positive value per seed, in the same order of seeds.
        level: The probability with which the interval covers the true ratio.

    Examples:
        >>> paired_ratio([1.0, 4.0], [1.0, 1.0]).mean
        2.0
    """
    return _exp(_paired(_logs("a", a), _logs("b", b)).interval(level))


def welch_difference(a: Values, b: Values, level: float = 0.95) -> Interval:
    r"""Return Welch's interval of $\bar a - \bar b$ for two groups with seeds of their own.

    With $v_a = s_a^2 / n_a$ and $v_b$ alike it is

    $$\bar a - \bar b \pm t_\nu \sqrt{v_a + v_b}, \qquad
      \nu = \frac{(v_a + v_b)^2}{v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1)}.$$

    The groups may have different numbers of seeds. If they share seeds whose values correlate negatively, the true
    variance is larger than this one.

    References:
        B. L. Welch, Biometrika 34 (1947) 28-35.

    Args:
        a: One value per seed, of at least two seeds.
        b: One value per seed, of at least two seeds.
        level: The probability with which the interval covers the true difference.

    Examples:
        >>> welch_difference([1.0, 3.0], [1.0, 1.0, 1.0]).mean
        1.0
    """
    return _welch(_values("a", a), _values("b", b)).interval(level)


def welch_ratio(a: Values, b: Values, level: float = 0.95) -> Interval:
    r"""Return the ratio of the geometric means of two groups with seeds of their own, with Welch's interval.

    Estimate and ends are $\exp$ of those of `welch_difference` between $\log a_i$ and $\log b_j$.

    Args:
        a: One positive value per seed, of at least two seeds.
        b: One positive value per seed, of at least two seeds.
        level: The probability with which the interval covers the true ratio.

    Examples:
        >>> welch_ratio([1.0, 4.0], [1.0, 1.0, 1.0]).mean
        2.0
    """
    return _exp(_welch(_logs("a", a), _logs("b", b)).interval(level))


def difference(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Interval:
    r"""Return the difference of two methods, by pairs of seeds or by Welch, whichever has less estimated variance.

    Pairing takes the seeds that both have, Welch all seeds of each. Pairing has less variance where a seed is good or
    bad for both methods; Welch where it is not, or where one method has more seeds. `Interval.method` says which was
    used.

    Choosing by the values themselves costs some coverage: with the same seeds for both, an interval of 90 % covers
    87 % for seeds without effect and 90 % for seeds that correlate by .6 or more. It covers less if the shared seeds
    correlate negatively; give the two methods different seeds where that is to be feared.

    Args:
        a: Values by seed.
        b: Values by seed.
        level: The probability with which the interval covers the true difference.

    Examples:
        >>> difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
        Interval(mean=1.0, low=1.0, high=1.0, n=2, method='paired')
        >>> difference({0: 2.0, 1: 3.0}, {2: 1.0, 3: 2.0}).method
        'welch'
    """
    return _chosen(_by_seed("a", a), _by_seed("b", b)).interval(level)


def ratio(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Interval:
    """Return the ratio of two methods' geometric means, by pairs of seeds or by Welch on the logarithms.

    The method is chosen as that of `difference`, by the estimated variance of the logarithm.

    Args:
        a: Positive values by seed.
        b: Positive values by seed.
        level: The probability with which the interval covers the true ratio.

    Examples:
        >>> ratio({0: 2.0, 1: 4.0}, {0: 1.0, 1: 2.0})
        Interval(mean=2.0, low=2.0, high=2.0, n=2, method='paired')
        >>> ratio({0: 2.0, 1: 4.0}, {0: 2.0, 1: 1.0}).method
        'welch'
    """
    x, y = (dict(zip(values, _logs(name, list(values.values())), strict=True)) for name, values in (("a", a), ("b", b)))
    return _exp(_chosen(x, y).interval(level))


class _Estimate(NamedTuple):
    """A normal estimate with its estimated variance and the degrees of freedom of that."""

    mean: float
    variance: float
    freedom: float
    n: int
    method: Method | None

    def interval(self, level: float) -> Interval:
        stats = required("scipy.stats", "scipy")  # imported here because it takes a second
        if not 0 < level < 1:
            raise ValueError(f"level is {level}, but should be between 0 and 1.")
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * math.sqrt(self.variance)
        return Interval(self.mean, self.mean - half, self.mean + half, self.n, self.method)


def _one_group(x: NDArray[np.float64], method: Method | None = None) -> _Estimate:
    """Return the mean of a group; a single value has no variance, which is `nan`."""
    variance = float(x.var(ddof=1)) / x.size if x.size > 1 else math.nan
    return _Estimate(float(x.mean()), variance, x.size - 1, x.size, method)


def _paired(x: NDArray[np.float64], y: NDArray[np.float64]) -> _Estimate:
    if x.shape != y.shape:
        raise ValueError(f"b has shape {y.shape}, but should have the shape of a, {x.shape}.")
    return _one_group(x - y, "paired")


def _welch(x: NDArray[np.float64], y: NDArray[np.float64]) -> _Estimate:
    a, b = _one_group(x), _one_group(y)
    variance, n = a.variance + b.variance, min(a.n, b.n)
    freedom = float(n - 1)
    if variance > 0:
        freedom = variance**2 / (a.variance**2 / a.freedom + b.variance**2 / b.freedom)
    return _Estimate(a.mean - b.mean, variance, freedom, n, "welch")


def _chosen(a: Mapping[int, float], b: Mapping[int, float]) -> _Estimate:
    """Return the estimate of the difference with less estimated variance, paired if they are equal."""
    welch = _welch(np.array(list(a.values())), np.array(list(b.values())))
    shared = [seed for seed in a if seed in b]
    if not shared:
        return welch
    paired = _paired(np.array([a[seed] for seed in shared]), np.array([b[seed] for seed in shared]))
    # A single pair, or a single value of a group, has the variance nan, which is not less than another.
    return welch if welch.variance < paired.variance or len(shared) == 1 else paired


def _exp(logarithm: Interval) -> Interval:
    mean, low, high = (math.exp(value) for value in logarithm[:3])
    return logarithm._replace(mean=mean, low=low, high=high)


def _values(name: str, values: Values) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}, but should be a list of at least one number.")
    return x


def _logs(name: str, values: Values) -> NDArray[np.float64]:
    x = _values(name, values)
    if not (x > 0).all():
        raise ValueError(f"{name} is {x.tolist()}, but should be positive.")
    return np.log(x)


def _by_seed(name: str, values: Mapping[int, float]) -> dict[int, float]:
    return dict(zip(values, _values(name, list(values.values())).tolist(), strict=True))
