"""Timings of alternatives side by side, and ratios that a busy machine does not bend.

The clock is the CPU time of the process, which is the wall time of one thread on a quiet machine; what runs beside the
process then costs it little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Ratio", "Timings", "seconds", "side_by_side"]


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with the middle half of them; where said, a mean with its interval of confidence.

    With `at_least` the true ratio is above.
    """

    median: float
    low: float
    high: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'> ' * self.at_least}{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Timings:
    """The seconds of every alternative in every round; a round runs all of them, one after another."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Return how many times the seconds of `fast` those of `slow` are, from the pairs of each round.

        >>> Timings({"a": [2.0, 6.0, 4.0], "b": [1.0, 2.0, 2.0]}).ratio("a", "b")
        Ratio(median=2.0, low=2.0, high=2.5, at_least=False)
        """
        ratios = [s / f for s, f in zip(self.rounds[slow], self.rounds[fast], strict=True)]
        if len(ratios) == 1:
            return Ratio(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, low, high)


def seconds(call: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.process_time) -> float:
    """Return the time of one of `calls` calls."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def side_by_side(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 21,
    budget: float = 10.0,
    block: float = 0.02,
    known: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Timings:
    """Time the alternatives in turn, round after round, so that what disturbs the machine disturbs all.

    Arguments:
        alternatives: What to time.
        rounds: The number of rounds.
        budget: The seconds after which no further round begins; there are at least three.
        block: The least number of seconds between two readings of the clock: a quick call is repeated.
        known: The seconds that a call takes, if it is known and warm.
        clock: The clock; `time.perf_counter` where two threads share the work, or a device has it.
    """
    if known is None:
        known = {name: _typical(call, block, clock) for name, call in alternatives.items()}
    calls = {name: max(1, round(block / max(known[name], 1e-6))) for name in alternatives}
    names = list(alternatives)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > budget:
            break
        for name in names if i % 2 == 0 else reversed(names):
            times[name].append(seconds(alternatives[name], calls[name], clock))
    return Timings(times)


def _typical(call: Callable[[], object], block: float, clock: Callable[[], float]) -> float:
    first = seconds(call, clock=clock)  # warm-up
    # a machine that is busy elsewhere makes a call seem slow, never quick
    return first if first > 10 * block else min(seconds(call, clock=clock) for _ in range(3))
