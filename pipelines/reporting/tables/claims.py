"""The paper's claims that a run of minutes can test, each as a ratio with an expected range.

The ranges are based on 57 runs on the maze and the spiral. A ratio above the upper end is not a success, because a
baseline that performs so badly is broken. For a reach reward the ratio of MSE(V) is not informative at this scale, so
it is only measured. Environments with other horizons than those of these runs are not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowmatch_core.intervals import Interval, paired_ratio
from pipelines.config.params import EnvironmentEntry, Params
from pipelines.reporting.tables import Cells, Table, between, limits, numbers_of, paired, papers_task, text

LOOP, REACH, SPIRAL, MIXED = "loop", "reach", "spiral", "mixed"


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
    """

    sentence: str
    where: tuple[str, ...]
    metric: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None
    under_metric: str | None = None

    def admits(self, ratio: float) -> bool:
        """Return whether a ratio is in the range."""
        return (self.at_least is None or self.at_least <= ratio) and (self.at_most is None or ratio <= self.at_most)


EMD, VALUE = "TD²-CFM has a smaller EMD than TD-CFM", "TD²-CFM has a smaller value error than TD-CFM"
CLAIMS = (
    Claim(EMD, (LOOP,), "emd", "td_cfm", "td2_cfm", 1.5, 10.0),
    Claim(EMD, (REACH,), "emd", "td_cfm", "td2_cfm", 1.3),
    Claim(EMD, (SPIRAL,), "emd", "td_cfm", "td2_cfm", 1.5),
    Claim(
        "TD²-CFM at its worst start has a smaller EMD than TD-CFM on average",
        (LOOP,), "emd", "td_cfm", "td2_cfm", 1.0, under_metric="emd_worst",
    ),
    Claim(VALUE, (LOOP,), "mse_v", "td_cfm", "td2_cfm", 2.0, 1000.0),
    Claim(VALUE, (SPIRAL,), "mse_v", "td_cfm", "td2_cfm", 2.0),
    Claim(VALUE, (REACH,), "mse_v", "td_cfm", "td2_cfm"),
    Claim("TD-CFM(C) equals TD²-CFM on straight paths (EMD)", (LOOP,), "emd", "td_cfm_coupled", "td2_cfm", 0.8, 1.5),
    Claim(
        "TD²-CFM has a smaller bootstrap loss than TD-CFM",
        (LOOP,), "final_bootstrap", "td_cfm", "td2_cfm", 10.0, 1e6,
    ),
    Claim(
        "TD²-CFM does not mind a curved path (EMD, curved by straight)",
        (LOOP, SPIRAL), "emd", "td2_cfm_curved", "td2_cfm", 0.75, 1.25,
    ),
    Claim(
        "TD-CFM(C) has a larger EMD than TD²-CFM on curved paths",
        (LOOP, SPIRAL), "emd", "td_cfm_coupled_curved", "td2_cfm_curved", 1.3,
    ),
    Claim("TD²-CFM comes close to MC-CFM (EMD)", (MIXED,), "emd", "td2_cfm", "mc_cfm", at_most=1.25),
    Claim(
        "TD²-CFM with n-step returns comes close to MC-CFM (EMD)",
        (LOOP,), "emd", "td2_cfm_returns", "mc_cfm", at_most=1.25,
    ),
)  # fmt: skip


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment and claim whose methods it runs."""
    import pandas as pd

    seeds, methods = params.successor.seeds, params.successor.methods
    rows = []
    for environment, entry in params.environments.items():
        for claim in CLAIMS:
            pair = (claim.over, claim.under)
            if not _places(entry) & set(claim.where) or not all(m in methods and entry.runs(m) for m in pair):
                continue
            over, under = ({**logs[environment].get(m, {}), **metrics[environment].get(m, {})} for m in pair)
            ratio, each = _ratio(claim, over, under, seeds)
            if over.get("diverged") or under.get("diverged"):
                verdict = "diverged"
            else:
                verdict = "not run" if ratio is None else ratio.verdict(claim.at_least, claim.at_most)
            if verdict == "open" and len(each) > 1 and all(claim.admits(value) for value in each):
                verdict = "open, each seed in range"
            rows.append(
                {
                    "environment": environment,
                    "claim": claim.sentence,
                    "ratio": None if ratio is None else between(*ratio[:3]),
                    "by seed": ", ".join(map(text, each)) or None,
                    "expected": limits(claim.at_least, claim.at_most),
                    "verdict": verdict,
                }
            )
    notes = (
        "Ratio of the means over seeds, with the 95 % t interval of the paired log ratio. A claim holds if the whole "
        "interval lies in the range, FAILS if none of it does, and is open otherwise, as with few seeds it often is, "
        "even where each of them is in the range.",
        "diverged: samples of one of the methods are far outside of the data, which is no success of the other. "
        "A ratio without a range is only measured.",
    )
    columns = ["environment", "claim", "ratio", "by seed", "expected", "verdict"]
    return Table("claims", "Claims", pd.DataFrame(rows, columns=columns), notes)


def _places(entry: EnvironmentEntry) -> set[str]:
    """Return the kinds of environments, in terms of the claims, to which an environment belongs."""
    places, task = set[str](), papers_task(entry)
    if task:
        places |= {LOOP} if task == LOOP else {REACH} if task.startswith(REACH) else set()
        places |= {MIXED} if entry.own.get("behaviour") == "mixed" else set()
    elif entry.kind == "linear_gaussian" and entry.gamma >= 0.95:
        places.add(SPIRAL)
    return places


def _ratio(
    claim: Claim, over: Mapping[str, Any], under: Mapping[str, Any], seeds: tuple[int, ...]
) -> tuple[Interval | None, list[float]]:
    """Return the ratio of the means, or None if a number is missing, and the ratio of each seed."""
    a, b = numbers_of(over, claim.metric, seeds), numbers_of(under, claim.under_metric or claim.metric, seeds)
    if not all(value > 0 for value in (*a.values(), *b.values())):
        return None, []
    ratio = paired(paired_ratio, over, under, claim.metric, seeds, claim.under_metric)
    return ratio, [] if ratio is None else [a[s] / b[s] for s in a]
