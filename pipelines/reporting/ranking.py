"""What the numbers say, in sentences made from the metrics: which method is best where, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from flowmatch_core.intervals import paired_difference
from pipelines.base import metric_keys
from pipelines.config.catalog import ORACLE
from pipelines.config.params import Environment, Params
from pipelines.reporting.labels import label, split

Cells = Mapping[str, Mapping[str, Any]]
"""`cells[method][name]`, as `data/metrics/<environment>.json` holds them."""


@dataclass(frozen=True)
class Score:
    """A number of a method with its interval, which a single seed does not have; infinite where it diverged."""

    mean: float
    low: float | None = None
    high: float | None = None
    diverged: bool = False
    seeds: Mapping[int, float] = field(default_factory=dict)

    def ties(self, other: Score) -> bool:
        """Whether the two cannot be told apart: the interval of their difference, paired by seed, contains zero."""
        shared = sorted(self.seeds.keys() & other.seeds.keys())
        if len(shared) < 2:
            return False
        gap = paired_difference([self.seeds[s] for s in shared], [other.seeds[s] for s in shared])
        return gap.low <= 0 <= gap.high


def scores(cells: Cells, metric: str = "emd", unit: float = 1.0) -> dict[str, Score]:
    """A metric of every method that has it or diverged, in some unit; the floor is none."""
    found = {}
    for method, cell in cells.items():
        mean, diverged = cell.get(metric), bool(cell.get("diverged"))
        if method == "floor" or (mean is None and not diverged):
            continue
        low, high = (None if (end := cell.get(f"{metric}_{name}")) is None else end / unit for name in ("low", "high"))
        seeds = metric_keys.by_seed(cell, metric)
        found[method] = Score(math.inf if mean is None else mean / unit, low, high, diverged, seeds)
    return found


def over_floor(cells: Cells) -> dict[str, Score]:
    """The EMD of every method over that of the floor."""
    floor = cells.get("floor", {}).get("emd")
    return scores(cells, "emd", floor) if floor else {}


def off_policy(params: Params, entry: Environment, methods: Iterable[str]) -> list[str]:
    """Of some methods those that learn from transitions alone: neither the closed form nor the policy's rollouts."""
    successor, chosen = params.successor, []
    for method in methods:
        choice = successor.methods.get(method)
        if choice is None or choice.loss.name in (ORACLE, "mc_cfm"):
            continue
        if successor.fit_for(entry, choice).returns == 1:  # n-step returns are taken on the policy's rollouts
            chosen.append(method)
    return chosen


def best(found: Mapping[str, Score]) -> list[str]:
    """The method with the smallest number, then those that tie with it; without those that diverged."""
    ranked = sorted((m for m in found if not found[m].diverged), key=lambda m: found[m].mean)
    return ranked[:1] + [m for m in ranked[1:] if found[m].ties(found[ranked[0]])]


def rivals(params: Params, environment: str, cells: Cells) -> dict[str, Score]:
    """The EMD over the floor of the off-policy methods, without variants of those that are there themselves."""
    found = over_floor(cells)
    chosen = off_policy(params, params.environments[environment], found)
    return {method: found[method] for method in chosen if split(method)[0] not in set(chosen) - {method}}


def ranking(found: Mapping[str, Score], seeds: int) -> str:
    """Which of some off-policy methods is best, by how much against the floor, and which diverged."""

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
        f"not told apart from it by {seeds} seeds: {times(ties)}" if ties else "",
        f"then {times(rest)}" if rest else "",
        diverged,
    ]
    return "; ".join(part for part in parts if part) + "."


def details(params: Params, environment: str, cells: Cells, among: Mapping[str, Score]) -> str:
    """Which of these methods is best in value, and the numbers of those that have seen more than transitions."""
    return " ".join(filter(None, [_values(cells, among), _references(params, params.environments[environment], cells)]))


def _values(cells: Cells, among: Mapping[str, Score]) -> str:
    floor = cells.get("floor", {}).get("mse_v")
    found = {method: score for method, score in scores(cells, "mse_v").items() if method in among}
    top = best(found)
    if floor is None or not top:
        return ""
    ties = f", not told apart from {_all([label(m) for m in top[1:]])}" if len(top) > 1 else ""
    return f"MSE(V): {label(top[0])} {found[top[0]].mean:.3g}{ties}, at a floor of {floor:.3g}."


def _references(params: Params, entry: Environment, cells: Cells) -> str:
    """The numbers that are no off-policy method's."""
    found, parts = over_floor(cells), []
    for method in (m for m in found if m in params.successor.methods and not off_policy(params, entry, [m])):
        closed = params.successor.methods[method].loss.name == ORACLE
        what = "the closed form" if closed else f"{label(method)}, trained on the policy's own rollouts,"
        parts.append(f"{what} {'diverged' if found[method].diverged else f'{found[method].mean:.3g} ×'}")
    return f"For reference: {'; '.join(parts)}." if parts else ""


def overall(params: Params, metrics: Mapping[str, Cells]) -> str:
    """In how many environments each off-policy method is best or not told apart from the best."""
    ran: dict[str, list[Score]] = {}
    wins: dict[str, int] = {}
    for environment in params.environments:
        found = rivals(params, environment, metrics[environment])
        for method, score in found.items():
            ran.setdefault(method, []).append(score)
            wins[method] = wins.get(method, 0) + (method in best(found))
    parts = []
    for method in sorted(ran, key=lambda m: (-wins[m] / len(ran[m]), median(s.mean for s in ran[m]))):
        kept = [score.mean for score in ran[method] if not score.diverged]
        lost = len(ran[method]) - len(kept)
        notes = [f"median {median(kept):.3g} × the floor"] if kept else []
        notes += [f"diverged in {lost}"] if lost else []
        parts.append(f"{label(method)} in {wins[method]} of {len(ran[method])} ({', '.join(notes)})")
    return f"Smallest EMD of the off-policy methods, or not told apart from it: {'; '.join(parts)}." if parts else ""


def horizon_groups(params: Params) -> dict[str, dict[float, str]]:
    """Environments that differ in gamma: `groups[first][gamma]` is the one of that gamma, in order of gamma.

    The rest is the same in a group, but for the length of episodes and the target's step, which must grow with the
    horizon; of two environments of one gamma the first counts.
    """

    def rest(entry: Environment) -> tuple[Any, ...]:
        fit = {key: value for key, value in entry.fit.items() if key != "ema_step"}
        return entry.kind, entry.own, entry.reward, entry.transitions, fit

    groups: list[tuple[Environment, dict[float, str]]] = []
    for name, entry in params.environments.items():
        group = next((group for first, group in groups if rest(first) == rest(entry)), None)
        if group is None:
            groups.append((entry, {entry.gamma: name}))
        else:
            group.setdefault(entry.gamma, name)
    several = [group for _, group in groups if len(group) > 1]
    return {next(iter(group.values())): dict(sorted(group.items())) for group in several}


def _all(names: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
