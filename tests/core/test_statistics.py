"""Laws of the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flowmatch_core.intervals import Interval, paired_difference, paired_ratio, t_interval


def test_a_small_case_by_hand() -> None:
    # mean 2, s = 1, t quantile of 2 degrees of freedom at 0.975 is 4.302653
    mean, low, high, n = t_interval([1.0, 2.0, 3.0])
    assert (mean, n) == (2.0, 3)
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_agrees_with_scipy(level: float) -> None:
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(level, 6, values.mean(), stats.sem(values))
    assert t_interval(values, level)[1:3] == pytest.approx((low, high))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_coverage_is_the_level(n: int) -> None:
    values = np.random.default_rng(n).normal(1.0, 3.0, size=(4000, n))
    covered = np.mean([low <= 1.0 <= high for _, low, high, _ in map(t_interval, values)])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_pairing_removes_what_the_seeds_share() -> None:
    rng = np.random.default_rng(0)
    seeds = 10 * rng.normal(size=5)
    a, b = seeds + 1 + 0.1 * rng.normal(size=5), seeds + 0.1 * rng.normal(size=5)
    assert paired_difference(a, b).low > 0
    assert t_interval(a).low < t_interval(b).mean
    assert paired_difference(b, a) == pytest.approx(
        (-paired_difference(a, b).mean, -paired_difference(a, b).high, -paired_difference(a, b).low, 5)
    )


def test_a_single_value_supports_no_claim() -> None:
    mean, low, high, n = t_interval([3.0])
    assert (mean, n) == (3.0, 1) and math.isnan(low) and math.isnan(high)
    assert not paired_difference([3.0], [1.0]).low > 0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_of_a_ratio_covers_it(n: int) -> None:
    rng = np.random.default_rng(n)
    seeds = np.exp(rng.normal(size=(4000, n)))
    a, b = 3 * seeds * np.exp(0.3 * rng.normal(size=(4000, n))), seeds * np.exp(0.3 * rng.normal(size=(4000, n)))
    ratios = [paired_ratio(x, y) for x, y in zip(a, b, strict=True)]
    assert np.mean([r.low <= 3 <= r.high for r in ratios]) == pytest.approx(0.95, abs=4 * math.sqrt(0.0475 / 4000))
    assert all(r.mean == pytest.approx(x.mean() / y.mean()) for r, x, y in zip(ratios, a, b, strict=True))


def test_a_ratio_turned_round_is_its_inverse() -> None:
    a, b = [2.0, 3.5, 4.0], [1.0, 1.5, 2.5]
    one, other = paired_ratio(a, b), paired_ratio(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((1 / other.mean, 1 / other.high, 1 / other.low))
    assert math.isnan(paired_ratio([3.0], [1.0]).low)


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most", "verdict"),
    [
        (1.6, 9.0, 1.5, 10.0, "holds"),
        (1.4, 9.0, 1.5, 10.0, "open"),
        (1.6, 11.0, 1.5, 10.0, "open"),
        (1.0, 1.4, 1.5, 10.0, "FAILS"),
        (11.0, 12.0, 1.5, 10.0, "FAILS"),
        (1.4, 99.0, 1.3, None, "holds"),
        (1.2, 99.0, 1.3, None, "open"),
        (1.0, 1.2, 1.3, None, "FAILS"),
        (0.5, 1.2, None, 1.25, "holds"),
        (0.5, 1.3, None, 1.25, "open"),
        (1.3, 1.4, None, 1.25, "FAILS"),
        (math.nan, math.nan, 1.5, None, "open"),
        (0.0, 99.0, None, None, "measured"),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    low: float, high: float, at_least: float | None, at_most: float | None, verdict: str
) -> None:
    assert Interval(2.0, low, high, 3).verdict(at_least, at_most) == verdict


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"b is \[0.0, 1.0\], but should be positive"):
        paired_ratio([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="values has shape"):
        t_interval([])
    with pytest.raises(ValueError, match="level is 95"):
        t_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="b has shape"):
        paired_difference([1.0, 2.0], [1.0])
