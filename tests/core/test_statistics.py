"""Laws of the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from flowmatch_core.intervals import (
    ONE_SIDED,
    Interval,
    difference,
    paired_difference,
    paired_ratio,
    ratio,
    t_interval,
    welch_difference,
    welch_ratio,
)

Array = NDArray[np.float64]


def by_seed(values: Array, first: int = 0) -> dict[int, float]:
    return dict(enumerate(values.tolist(), first))


def close(share: float, to: float, n: int = 2000) -> bool:
    return abs(share - to) < 4 * math.sqrt(to * (1 - to) / n)


def test_a_small_case_by_hand() -> None:
    # mean 2, s = 1, t quantile of 2 degrees of freedom at 0.975 is 4.302653
    mean, low, high, n, method = t_interval([1.0, 2.0, 3.0])
    assert (mean, n, method) == (2.0, 3, None)
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_agrees_with_scipy(level: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    low, high = stats.t.interval(level, 6, values.mean(), stats.sem(values))
    assert t_interval(values, level)[1:3] == pytest.approx((low, high))
    a, b, c = np.exp(rng.normal(size=7)), np.exp(rng.normal(size=7)), np.exp(0.1 * rng.normal(size=3))
    paired, welch = stats.ttest_rel(np.log(a), np.log(b)), stats.ttest_ind(np.log(a), np.log(c), equal_var=False)
    for found, test, other in ((paired_ratio(a, b, level), paired, b), (welch_ratio(a, c, level), welch, c)):
        assert found.mean == pytest.approx(stats.gmean(a) / stats.gmean(other))
        assert found[1:3] == pytest.approx(tuple(np.exp(test.confidence_interval(level))))
    welch = stats.ttest_ind(a, c, equal_var=False)
    assert welch_difference(a, c, level)[1:3] == pytest.approx(tuple(welch.confidence_interval(level)))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_coverage_is_the_level(n: int) -> None:
    values = np.random.default_rng(n).normal(1.0, 3.0, size=(4000, n))
    covered = np.mean([i.low <= 1.0 <= i.high for i in map(t_interval, values)])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_pairing_removes_what_the_seeds_share() -> None:
    rng = np.random.default_rng(0)
    seeds = 10 * rng.normal(size=5)
    a, b = seeds + 1 + 0.1 * rng.normal(size=5), seeds + 0.1 * rng.normal(size=5)
    assert paired_difference(a, b).low > 0 > welch_difference(a, b).low
    assert paired_difference(b, a)[:4] == pytest.approx(
        (-paired_difference(a, b).mean, -paired_difference(a, b).high, -paired_difference(a, b).low, 5)
    )


@pytest.mark.parametrize("compare", [paired_difference, welch_difference, paired_ratio, welch_ratio])
def test_a_single_value_supports_no_claim(compare: Callable[..., Interval]) -> None:
    mean, low, high, n, _ = t_interval([3.0])
    assert (mean, n) == (3.0, 1) and math.isnan(low) and math.isnan(high)
    found = compare([3.0], [1.0])
    assert found.mean in (2.0, pytest.approx(3.0)) and found.n == 1
    assert found.verdict(0.5, None) == found.verdict(None, 5.0) == "open"


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_of_a_ratio_covers_it(n: int) -> None:
    rng = np.random.default_rng(n)
    seeds = np.exp(rng.normal(size=(4000, n)))
    a, b = 3 * seeds * np.exp(0.3 * rng.normal(size=(4000, n))), seeds * np.exp(0.3 * rng.normal(size=(4000, n)))
    ratios = [paired_ratio(x, y) for x, y in zip(a, b, strict=True)]
    assert np.mean([r.low <= 3 <= r.high for r in ratios]) == pytest.approx(0.95, abs=4 * math.sqrt(0.0475 / 4000))
    assert np.mean([math.log(r.mean) for r in ratios]) == pytest.approx(math.log(3), abs=0.02)


def test_one_outlier_leaves_a_ratio_within_its_interval() -> None:
    found = paired_ratio([1.0] * 29 + [40.0], [1.0] * 30)
    assert found.mean == pytest.approx(40 ** (1 / 30)) and found.mean == pytest.approx(1.131, abs=1e-3)
    assert (found.low, found.high) == pytest.approx((0.879, 1.454), abs=1e-3)
    assert found.low < found.mean < found.high  # the ratio of the means, 2.3, is the estimate of another number


@pytest.mark.parametrize("compare", [paired_ratio, welch_ratio])
def test_a_ratio_turned_round_is_its_inverse(compare: Callable[..., Interval]) -> None:
    a, b = [2.0, 3.5, 4.0], [1.0, 1.5, 2.5]
    one, other = compare(a, b), compare(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((1 / other.mean, 1 / other.high, 1 / other.low))


def test_groups_of_unequal_seeds_are_covered() -> None:
    rng = np.random.default_rng(0)
    a, b = 2 * np.exp(0.4 * rng.normal(size=(2000, 6))), np.exp(0.1 * rng.normal(size=(2000, 3)))
    found = [ratio(by_seed(x), by_seed(y, first=6), ONE_SIDED) for x, y in zip(a, b, strict=True)]
    assert {i.method for i in found} == {"welch"}
    assert close(np.mean([i.low <= 2 <= i.high for i in found]).item(), 0.9)


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.87), (0.6, 0.89), (0.95, 0.9)])
def test_choosing_by_variance_costs_the_stated_coverage(correlation: float, least: float) -> None:
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(2, 2000, 5))
    other = correlation * shared + math.sqrt(1 - correlation**2) * own
    found = [difference(by_seed(x), by_seed(y), ONE_SIDED) for x, y in zip(shared, other, strict=True)]
    covered = np.mean([i.low <= 0 <= i.high for i in found]).item()
    assert least - 4 * math.sqrt(0.1 * 0.9 / 2000) < covered < 0.9 + 4 * math.sqrt(0.1 * 0.9 / 2000)
    paired = np.mean([i.method == "paired" for i in found])
    assert paired == pytest.approx({0.0: 0.5, 0.6: 0.88, 0.95: 1.0}[correlation], abs=0.05)


def test_the_comparison_with_less_variance_is_taken_and_named() -> None:
    rng = np.random.default_rng(2)
    a, luck = np.exp(rng.normal(size=6)), 0.1 * rng.normal(size=6)
    for b, method, compare in (
        (a * np.exp(luck), "paired", paired_ratio),
        (np.exp(luck) / a, "welch", welch_ratio),
    ):
        found = ratio(by_seed(a), by_seed(b), 0.9)
        assert found.method == method and found == compare(a, b, 0.9)
        assert found.high / found.low == min(i.high / i.low for i in (paired_ratio(a, b, 0.9), welch_ratio(a, b, 0.9)))
    some = {0: 1.0, 1: 2.0, 7: 3.0, 8: 40.0}  # two of its seeds are shared, and pairs are made of those alone
    assert ratio(some, {0: 2.0, 1: 4.0, 2: 9.0})[3:] == (2, "paired")
    assert ratio(some, {0: 9.0, 1: 1.0, 2: 4.0})[3:] == (3, "welch")
    assert ratio(some, {0: 1.0, 2: 1.1}).method == ratio(some, {5: 1.0, 2: 1.1}).method == "welch"


@pytest.mark.parametrize(("at_least", "at_most"), [(0.5, None), (None, 1.4), (0.6, 1.6)])
def test_a_verdict_is_that_of_one_sided_tests_at_5_percent(at_least: float | None, at_most: float | None) -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(80):
        a, b = np.exp(rng.normal(rng.normal(), 0.3, size=4)), np.exp(0.3 * rng.normal(size=5))

        def paired(bound: float, side: str, a: Array = a, b: Array = b) -> bool:
            return bool(stats.ttest_rel(np.log(a / bound), np.log(b[:4]), alternative=side).pvalue < 0.05)

        def welch(bound: float, side: str, a: Array = a, b: Array = b) -> bool:
            return bool(stats.ttest_ind(np.log(a / bound), np.log(b), equal_var=False, alternative=side).pvalue < 0.05)

        for found, rejects in (
            (paired_ratio(a, b[:4], ONE_SIDED), paired),
            (welch_ratio(a, b, ONE_SIDED), welch),
        ):
            above = at_least is None or rejects(at_least, "greater")
            below = at_most is None or rejects(at_most, "less")
            outside = at_least is not None and rejects(at_least, "less")
            outside |= at_most is not None and rejects(at_most, "greater")
            expected = "holds" if above and below else "FAILS" if outside else "open"
            assert found.verdict(at_least, at_most) == expected
            seen.add(expected)
    assert seen == {"holds", "FAILS", "open"}


@pytest.mark.parametrize(("true", "at_least", "at_most"), [(1.5, 1.5, None), (1.5, 0.5, 1.5), (1.5, 1.5, 10.0)])
def test_a_claim_at_its_bound_is_accepted_five_times_in_a_hundred(
    true: float, at_least: float | None, at_most: float | None
) -> None:
    rng = np.random.default_rng(4)
    logs = rng.normal(math.log(true), 0.1, size=(2000, 4))
    accepted = [paired_ratio(np.exp(x), np.ones(4), ONE_SIDED).verdict(at_least, at_most) == "holds" for x in logs]
    assert close(np.mean(accepted).item(), 0.05)


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
    with pytest.raises(ValueError, match=r"a is \[-1.0\], but should be positive"):
        ratio({0: -1.0}, {0: 1.0})
    with pytest.raises(ValueError, match="values has shape"):
        t_interval([])
    with pytest.raises(ValueError, match="b has shape"):
        difference({0: 1.0}, {})
    with pytest.raises(ValueError, match="level is 95"):
        t_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="b has shape"):
        paired_difference([1.0, 2.0], [1.0])
