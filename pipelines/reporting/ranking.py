"""Summarise metrics in sentences: which method is best in an environment, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from flowmatch_core.intervals import difference
from pipelines.base import metric_keys
from pipelines.config.catalog import ORACLE
from pipelines.config.params import EnvironmentEntry, Params
from pipelines.reporting.labels import label, split

EnvironmentCells = Mapping[str, Mapping[str, Any]]
"""`cells[method][name]`, as `data/metrics/<environment>.json` holds them."""


@dataclass(frozen=True)
class Score:
    """A method's value of a metric, with its interval.

    Attributes:
        mean: Mean over seeds; infinite if there is none because the method diverged.
        low: Lower end of the interval; None for a single seed.
        high: Upper end of the interval; None for a single seed.
        diverged: Whether the method diverged.
        seeds: Value by seed.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    diverged: bool = False
    seeds: Mapping[int, float] = field(default_factory=dict)

    def ties(self, other: Score) -> bool:
        """Return whether the difference is not significant: its interval over seeds contains zero."""
        if not (self.seeds and other.seeds):
            return False
        gap = difference(self.seeds, other.seeds)
        return gap.low <= 0 <= gap.high


def scores(cells: EnvironmentCells, metric: str = "emd", unit: float = 1.0) -> dict[str, Score]:
    """Return a metric of every method that has it or diverged, divided by `unit`; the floor is excluded."""
    found = {}
    for method, cell in cells.items():
        mean, diverged = cell.get(metric), bool(cell.get("diverged"))
        if method == "floor" or (mean is None and not diverged):
            continue
        low, high = (None if (end := cell.get(f"{metric}_{name}")) is None else end / unit for name in ("low", "high"))
        seeds = metric_keys.by_seed(cell, metric)
        found[method] = Score(math.inf if mean is None else mean / unit, low, high, diverged, seeds)
    return found


def over_floor(cells: EnvironmentCells) -> dict[str, Score]:
    """Return the EMD of every method divided by that of the floor."""
    floor = cells.get("floor", {}).get("emd")
    return scores(cells, "emd", floor) if floor else {}


def off_policy(params: Params, entry: EnvironmentEntry, methods: Iterable[str]) -> list[str]:
    """Return the methods that learn from transitions only, not from a closed form or the policy's rollouts."""
    successor, chosen = params.successor, []
    for method in methods:
        choice = successor.methods.get(method)
        if choice is None or choice.loss.name in (ORACLE, "mc_cfm"):
            continue
        if not successor.fit_for(entry, choice).on_policy:
            chosen.append(method)
    return chosen


def best(found: Mapping[str, Score]) -> list[str]:
    """Return the method with the smallest value, then those that tie with it; diverged methods are excluded."""
    ranked = sorted((m for m in found if not found[m].diverged), key=lambda m: found[m].mean)
    return ranked[:1] + [m for m in ranked[1:] if found[m].ties(found[ranked[0]])]


def rivals(params: Params, environment: str, cells: EnvironmentCells) -> dict[str, Score]:
    """Return EMD over floor of the off-policy methods, without variants of a method that is present itself."""
    found = over_floor(cells)
    chosen = off_policy(params, params.environments[environment], found)
    return {method: found[method] for method in chosen if split(method)[0] not in set(chosen) - {method}}


def ranking(found: Mapping[str, Score]) -> str:
    """Return a sentence that ranks off-policy methods by EMD over floor and names those that diverged."""

    def times(methods: Iterable[str]) -> str:
        return ", ".join(f"{label(m)} {found[m].mean:.3g} ×" for m in methods)

    top = best(found)
    lost = [label(m) for m in found if found[m].diverged]
    diverged = f"{_all(lost)} diverged" if lost else ""
    if not top:
        return f"No off-policy method has an EMD{f': {diverged}' if diverged else ''}."
    first, ties = top[0], top[1:]
    rest = sorted((m for m in found if m not in top and not found[m].diverged), key=lambda m: found[m].mean)
    single = " (one seed, so no interval)" if found[first].low is None else ""
    parts = [
        f"{label(first)} has the smallest EMD of the off-policy methods, {found[first].mean:.3g} × the floor{single}",
        f"not significantly different over {_counts(found[m] for m in top)} seeds: {times(ties)}" if ties else "",
        f"then {times(rest)}" if rest else "",
        diverged,
    ]
    return "; ".join(part for part in parts if part) + "."


def residuals(cells: EnvironmentCells) -> str:
    """Return a sentence on the Bellman residuals of the methods, where there is no reference for anything else."""
    name = "bellman_residual"
    floors = {method: cell.get(f"{name}_floor") for method, cell in cells.items()}
    parts = [
        f"{label(method)} {'diverged' if score.diverged else f'{score.mean:.3g} (floor {floors[method]:.3g})'}"
        for method, score in scores(cells, name).items()
    ]
    return f"No reference; Bellman residual: {', '.join(parts) or 'no method has one'}."


def details(params: Params, environment: str, cells: EnvironmentCells, among: Mapping[str, Score]) -> str:
    """Return sentences on the value error of these methods, and on the reference methods."""
    return " ".join(filter(None, [_values(cells, among), _references(params, params.environments[environment], cells)]))


def _values(cells: EnvironmentCells, among: Mapping[str, Score]) -> str:
    floor = cells.get("floor", {}).get("mse_v")
    found = {method: score for method, score in scores(cells, "mse_v").items() if method in among}
    top = best(found)
    if floor is None or not top:
        return ""
    ties = f", not significantly different from {_all([label(m) for m in top[1:]])}" if len(top) > 1 else ""
    return f"MSE(V): {label(top[0])} {found[top[0]].mean:.3g}{ties}, at a floor of {floor:.3g}."


def _references(params: Params, entry: EnvironmentEntry, cells: EnvironmentCells) -> str:
    """Return a sentence on the methods that are not off-policy."""
    found, parts = over_floor(cells), []
    for method in (m for m in found if m in params.successor.methods and not off_policy(params, entry, [m])):
        closed = params.successor.methods[method].loss.name == ORACLE
        what = "the closed form" if closed else f"{label(method)}, trained on the policy's own rollouts,"
        parts.append(f"{what} {'diverged' if found[method].diverged else f'{found[method].mean:.3g} ×'}")
    return f"For reference: {'; '.join(parts)}." if parts else ""


def overall(params: Params, metrics: Mapping[str, EnvironmentCells]) -> str:
    """Return a sentence with the number of environments in which each off-policy method is best or ties."""
    ran: dict[str, list[Score]] = {}
    wins: dict[str, int] = {}
    for environment in params.environments:
        found = rivals(params, environment, metrics[environment])
        for method, score in found.items():
            ran.setdefault(method, []).append(score)
            wins[method] = wins.get(method, 0) + (method in best(found))
    parts = []
    for method in sorted(ran, key=lambda m: (-wins[m] / len(ran[m]), median(s.mean for s in ran[m]))):
        finite = [score.mean for score in ran[method] if not score.diverged]
        lost = len(ran[method]) - len(finite)
        notes = [f"median {median(finite):.3g} × the floor"] if finite else []
        notes += [f"diverged in {lost}"] if lost else []
        parts.append(f"{label(method)} in {wins[method]} of {len(ran[method])} ({', '.join(notes)})")
    head = "Smallest EMD of the off-policy methods, or not significantly different from it"
    return f"{head}: {'; '.join(parts)}." if parts else ""


def horizon_groups(params: Params) -> dict[str, dict[float, str]]:
    """Return groups of environments that differ only in gamma: `groups[first][gamma]` is an environment, by gamma.

    The length of episodes and the step of the target network may differ too, because they must grow with the horizon.
    Of two environments with the same gamma the first is used.
    """

    def rest(entry: EnvironmentEntry) -> tuple[Any, ...]:
        fit = {key: value for key, value in entry.fit.items() if key != "ema_step"}
        return entry.kind, entry.own, entry.reward, entry.transitions, fit

    groups: list[tuple[EnvironmentEntry, dict[float, str]]] = []
    for name, entry in params.environments.items():
        group = next((group for first, group in groups if rest(first) == rest(entry)), None)
        if group is None:
            groups.append((entry, {entry.gamma: name}))
        else:
            group.setdefault(entry.gamma, name)
    several = [group for _, group in groups if len(group) > 1]
    return {next(iter(group.values())): dict(sorted(group.items())) for group in several}


def _counts(found: Iterable[Score]) -> str:
    """Return the number of seeds, or the smallest and the largest one."""
    counts = sorted({len(score.seeds) for score in found})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"


def _all(names: list[str]) -> str:
    """Join names as `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
