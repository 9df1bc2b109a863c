"""Laws of the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flowmatch_core.statistics import paired_difference, t_interval


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


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="values has shape"):
        t_interval([])
    with pytest.raises(ValueError, match="level is 95"):
        t_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="b has shape"):
        paired_difference([1.0, 2.0], [1.0])
