"""The paper's claims that a run of minutes can test, each as a ratio with an expected range.

Environments with other horizons than those of the runs on which the ranges are based are not judged. For a reach reward
the ratio of MSE(V) is not informative at this scale, so it is only measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowmatch_core.intervals import ONE_SIDED, Interval, ratio
from pipelines.config.params import EnvironmentEntry, Params
from pipelines.reporting.tables import (
    Cells,
    Table,
    between,
    has_family,
    limits,
    numbers_of,
    papers_task,
    seeds_note,
    tasks_of,
    text,
)
from pipelines.reporting.tables.domains import PUBLISHED as DOMAINS

LOOP, REACH, TASKS, SPIRAL, MIXED, DOMAIN = "loop", "reach", "tasks", "spiral", "mixed", "domain"
QUALITY, EQUAL, VARIANCE = "quality", "equality", "variance of the target, not quality"


@dataclass(frozen=True)
class Claim:
    """A claim about the ratio of a metric between two methods.

    Attributes:
        sentence: The claim in words.
        where: Kinds of environments to which it applies.
        metric: Name of the metric.
        over: Method of the numerator.
        under: Method of the denominator.
        at_least: Lower end of the expected range; None if there is none.
        at_most: Upper end of the expected range; None if there is none.
        under_metric: Metric of the denominator, if it is another one.
        about: What the claim is about.
    """

    sentence: str
    where: tuple[str, ...]
    metric: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None
    under_metric: str | None = None
    about: str = QUALITY


EMD, VALUE = "TD²-CFM has a smaller EMD than TD-CFM", "TD²-CFM has a smaller value error than TD-CFM"
CURVED = "changes little on a curved path (curved by straight)"
CLAIMS = (
    # A ratio above the upper end is no success, because a baseline that performs so badly is broken.
    Claim(EMD, (LOOP,), "emd", "td_cfm", "td2_cfm", 1.5, 10.0),
    Claim(EMD, (REACH, TASKS), "emd", "td_cfm", "td2_cfm", 1.3),
    Claim(EMD, (SPIRAL,), "emd", "td_cfm", "td2_cfm", 1.5),
    Claim(EMD, (DOMAIN,), "emd", "td_cfm", "td2_cfm", 1.15),
    Claim(f"{EMD}, both in standard deviations", (DOMAIN,), "emd_standardised", "td_cfm", "td2_cfm"),
    Claim(
        "TD²-CFM at its worst start has a smaller EMD than TD-CFM on average",
        (LOOP,), "emd", "td_cfm", "td2_cfm", 1.0, under_metric="emd_worst",
    ),
    Claim(VALUE, (LOOP,), "mse_v", "td_cfm", "td2_cfm", 1.5, 1000.0),
    Claim(VALUE, (SPIRAL,), "mse_v", "td_cfm", "td2_cfm", 2.0),
    Claim(VALUE, (REACH, DOMAIN), "mse_v", "td_cfm", "td2_cfm"),
    Claim(
        "TD-CFM(C) equals TD²-CFM on straight paths (EMD)",
        (LOOP,), "emd", "td_cfm_coupled", "td2_cfm", 0.8, 1.5, about=EQUAL,
    ),
    Claim(
        "TD²-CFM has a smaller bootstrap loss than TD-CFM (theorem 2)",
        (LOOP, DOMAIN), "final_bootstrap", "td_cfm", "td2_cfm", 10.0, 1e6, about=VARIANCE,
    ),
    Claim(
        "10-step returns on the policy's rollouts reduce the value error of TD²-CFM",
        (DOMAIN,), "mse_v", "td2_cfm", "td2_cfm_returns", 5.0,
    ),
    Claim(
        f"EMD of TD²-CFM {CURVED}",
        (LOOP, SPIRAL), "emd", "td2_cfm_curved", "td2_cfm", 0.75, 1.25, about=EQUAL,
    ),
    Claim(f"value error of TD²-CFM {CURVED}", (LOOP, SPIRAL), "mse_v", "td2_cfm_curved", "td2_cfm"),
    Claim(
        "TD-CFM(C) has a larger EMD than TD²-CFM on curved paths",
        (LOOP, SPIRAL), "emd", "td_cfm_coupled_curved", "td2_cfm_curved", 1.3,
    ),
    Claim("TD²-CFM comes close to MC-CFM (EMD)", (MIXED,), "emd", "td2_cfm", "mc_cfm", at_most=1.25),
    Claim(
        "TD²-CFM with n-step returns on the policy's rollouts comes close to MC-CFM (EMD)",
        (LOOP,), "emd", "td2_cfm_returns", "mc_cfm", at_most=1.25,
    ),
    Claim(
        "one-step TD²-CFM on the same rollouts beside MC-CFM (EMD)", (LOOP,), "emd", "td2_cfm_rollouts", "mc_cfm"
    ),
)  # fmt: skip


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment, or group of tasks, and claim whose methods it runs."""
    import pandas as pd

    methods = params.successor.methods
    rows = []
    for title, environments, claim in _places(params):
        pair = (claim.over, claim.under)
        entries = [params.environments[name] for name in environments]
        if not all(method in methods and entry.runs(method) for method in pair for entry in entries):
            continue
        over, under = ([{**logs[e].get(m, {}), **metrics[e].get(m, {})} for e in environments] for m in pair)
        found, each = _ratio(params, claim, entries, over, under)
        verdict = "not run" if found is None else found.verdict(claim.at_least, claim.at_most)
        if any(cell.get("diverged") for cell in (*over, *under)):
            verdict = "diverged"
        rows.append(
            {
                "environment": title,
                "claim": claim.sentence,
                "about": claim.about,
                "ratio": None if found is None else between(*found[:3]),
                "compared": None if found is None or found.n < 2 else found.method,
                "by seed": ", ".join(map(text, each)) or None,
                "expected": limits(claim.at_least, claim.at_most),
                "verdict": verdict,
            }
        )
    notes = (
        "Ratio of the geometric means over seeds with its 90 % interval, whose ends are one-sided bounds at 5 %: "
        "paired is the t interval of the log ratio of shared seeds, welch that of two groups; whichever has less "
        "estimated variance is taken. A claim holds if the whole interval lies in the range (two one-sided tests, "
        "where it has two ends), FAILS if none of it does, and is open otherwise.",
        "The ranges were fixed before the run. They come from 57 earlier runs of nearly this setting on the maze and "
        "the spiral with data seed 0, so on that data seed they are no independent test. The range of the loop's value "
        f"error, at least 1.5, was then fixed for other data seeds; this run has data seed {params.seed}. Those of the "
        "control suite's domains come from one earlier run on cheetah.",
        "The bootstrap loss is the variance of a regression target, which theorem 2 of the paper orders. A smaller one "
        "is no better model.",
        "The intervals cover initialisation and batches. The data set and the start states are the same for all seeds.",
        "diverged: samples of one of the methods are far outside of the data, which is no success of the other. "
        "A ratio without a range is only measured.",
        seeds_note(params.successor, params.environments),
    )
    columns = ["environment", "claim", "about", "ratio", "compared", "by seed", "expected", "verdict"]
    return Table("claims", "Claims", pd.DataFrame(rows, columns=columns), notes)


def _places(params: Params) -> Iterator[tuple[str, Sequence[str], Claim]]:
    """Yield the title, the environments and the claim of each row; a group of tasks is judged as one place."""
    for environment, entry in params.environments.items():
        kinds = _kinds(entry)
        yield from ((environment, (environment,), claim) for claim in CLAIMS if kinds & set(claim.where))
    tasks = tasks_of(params)
    if len(tasks) > 1:
        title, environments = f"{len(tasks)} tasks pooled", list(tasks.values())
        yield from ((title, environments, claim) for claim in CLAIMS if TASKS in claim.where)


def _kinds(entry: EnvironmentEntry) -> set[str]:
    """Return the kinds of environments, in terms of the claims, to which an environment belongs."""
    kinds, task = set[str](), papers_task(entry)
    if task:
        kinds |= {LOOP} if task == LOOP else {REACH} if task.startswith(REACH) else set()
        kinds |= {MIXED} if entry.own.get("behaviour") == "mixed" else set()
    elif entry.kind == "linear_gaussian" and entry.gamma >= 0.95 and not has_family(entry):
        kinds.add(SPIRAL)
    elif entry.kind in DOMAINS:
        kinds.add(DOMAIN)
    return kinds


def _ratio(
    params: Params,
    claim: Claim,
    entries: Sequence[EnvironmentEntry],
    over: Sequence[Mapping[str, Any]],
    under: Sequence[Mapping[str, Any]],
) -> tuple[Interval | None, list[float]]:
    """Return the ratio over all environments, or None if a number is missing, and the ratio of each shared seed."""
    a = _pooled(params, claim.over, entries, over, claim.metric)
    b = _pooled(params, claim.under, entries, under, claim.under_metric or claim.metric)
    if not a or not b:
        return None, []
    return ratio(a, b, ONE_SIDED), [a[seed] / b[seed] for seed in a if seed in b]


def _pooled(
    params: Params, method: str, entries: Sequence[EnvironmentEntry], cells: Sequence[Mapping[str, Any]], metric: str
) -> dict[int, float]:
    """Return the geometric mean over environments by seed; empty if one of the numbers is missing or not positive."""
    each = [numbers_of(params, entry, method, cell, metric) for entry, cell in zip(entries, cells, strict=True)]
    if any(found.keys() != each[0].keys() or min(found.values(), default=0.0) <= 0 for found in each):
        return {}
    return {seed: math.exp(sum(math.log(found[seed]) for found in each) / len(each)) for seed in each[0]}
