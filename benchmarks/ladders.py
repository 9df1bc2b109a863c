"""The cheapest setting of a method whose error is small enough, and a race of such settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from benchmarks.results import Cell
from benchmarks.timing import Timings, seconds, side_by_side

__all__ = ["OURS", "Ladder", "Rung", "fastest", "race"]

OURS = "flowmatch_core"


@dataclass(frozen=True)
class Rung:
    """A method at one setting, with the seconds that it takes and its error."""

    library: str
    setting: str
    call: Callable[[], Tensor]
    seconds: float
    error: float


class Ladder:
    """The settings of one method, from cheap to costly, each tried only when asked for.

    Arguments:
        library: The name of the library.
        settings: What to call, by name.
        error: The error of a result.
    """

    def __init__(
        self, library: str, settings: Iterable[tuple[str, Callable[[], Tensor]]], error: Callable[[Tensor], float]
    ) -> None:
        self.library, self.error = library, error
        self._untried: Iterator[tuple[str, Callable[[], Tensor]]] = iter(settings)
        self._tried: list[Rung] = []

    def cheapest(self, target: float, patience: float) -> Rung | None:
        """Return the first setting whose error is at most `target`, None if there is none.

        Nor is one returned if a setting that is not good enough already takes `patience` seconds.
        """
        while not any(rung.error <= target for rung in self._tried):
            if self._tried and self._tried[-1].seconds > patience:
                return None
            if (setting := next(self._untried, None)) is None:
                return None
            self._tried.append(self._try(*setting))
        return next(rung for rung in self._tried if rung.error <= target)

    def _try(self, setting: str, call: Callable[[], Tensor]) -> Rung:
        results: list[Tensor] = []
        try:
            elapsed = seconds(lambda: results.append(call()))
        except AssertionError:  # torchdiffeq's only signal of a tolerance that it cannot reach
            return Rung(self.library, setting, call, math.inf, math.inf)
        if elapsed < 0.1:  # too short to be believed
            elapsed = min(elapsed, *(seconds(call) for _ in range(2)))
        return Rung(self.library, setting, call, elapsed, self.error(results[0]))


def fastest(ladders: Iterable[Ladder], target: float) -> Rung | None:
    """Return the fastest of the cheapest settings of several methods, None if none is good enough."""
    best: Rung | None = None
    for ladder in ladders:
        rung = ladder.cheapest(target, patience=math.inf if best is None else 1.5 * best.seconds)
        if rung is not None and (best is None or rung.seconds < best.seconds):
            best = rung
    return best


def race(
    rungs: Mapping[str, Rung],
    field: str,
    target: float,
    count: int,
    unit: str,
    *,
    more: Callable[[Rung], dict[str, Cell]] = lambda rung: {},
    rounds: int,
    budget: float,
) -> tuple[Timings, list[dict[str, Cell]]]:
    """Time the settings of several libraries side by side; return the timings, and a row for each library.

    Arguments:
        rungs: The settings by library, ours among them.
        field: The name of the field.
        target: What their errors are at most.
        count: The number of results of a call.
        unit: What they are.
        more: What a row says besides.
        rounds: The number of rounds.
        budget: The seconds after which no further round begins.
    """
    calls = {library: rung.call for library, rung in rungs.items()}
    known = {library: rung.seconds for library, rung in rungs.items()}
    timings = side_by_side(calls, rounds=rounds, budget=budget, known=known)
    rows: list[dict[str, Cell]] = [
        {
            "field": field,
            "error at most": target,
            "library": library,
            "setting": rung.setting,
            **more(rung),
            "error": rung.error,
            f"{unit}/s": count / timings.median(library),
            "ours / theirs": None if library == OURS else str(timings.ratio(library, OURS)),
        }
        for library, rung in rungs.items()
    ]
    return timings, rows
