"""The paper's claims that a run of minutes can test, each a ratio that should lie in a range.

Ranges: what 57 runs on this maze showed to be safe. A ratio above the upper end means that the baseline diverged, which
is not a success. Only the loop policy is judged: for a reach reward the ratio of MSE(V) says nothing at this scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.params import Params
from pipelines.tables import Cells, Table, text


@dataclass(frozen=True)
class Claim:
    """`metric` of the method `over` divided by that of the method `under` lies between `low` and `high`."""

    sentence: str
    metric: str
    over: str
    under: str
    low: float
    high: float


CLAIMS = (
    Claim("TD²-CFM has a smaller EMD than TD-CFM", "emd", "td_cfm", "td2_cfm", 1.5, 10.0),
    Claim("TD²-CFM has a smaller value error than TD-CFM", "mse_v", "td_cfm", "td2_cfm", 2.0, 1000.0),
    Claim("TD-CFM(C) equals TD²-CFM on straight paths", "emd", "td_cfm_coupled", "td2_cfm", 0.8, 1.5),
    Claim("TD²-CFM has a smaller bootstrap loss than TD-CFM", "final_bootstrap", "td_cfm", "td2_cfm", 10.0, 1e6),
)


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a claim and loop maze."""
    import pandas as pd

    rows = []
    for environment, entry in params.environments.items():
        if entry.kind != "maze" or entry.member.get("task") != "loop":
            continue
        for claim in CLAIMS:
            ratios = [
                _ratio(claim, metrics[environment], logs[environment], suffix)
                for suffix in ("", *(f"_seed{seed}" for seed in params.successor.seeds))
            ]
            ratio, each = ratios[0], [r for r in ratios[1:] if r is not None]
            verdict = "not run" if ratio is None else "holds" if claim.low <= ratio <= claim.high else "FAILS"
            rows.append(
                {
                    "environment": environment,
                    "claim": claim.sentence,
                    "ratio": ratio,
                    "by seed": ", ".join(map(text, each)) or None,
                    "expected": f"{claim.low:g} to {claim.high:g}",
                    "verdict": verdict,
                }
            )
    notes = (
        "Ratio of the means over start states and seeds; a ratio above its range is a diverged baseline, not a win.",
    )
    columns = ["environment", "claim", "ratio", "by seed", "expected", "verdict"]
    return Table("claims", "Claims", pd.DataFrame(rows, columns=columns), notes)


def _ratio(claim: Claim, metrics: Mapping[str, Any], logs: Mapping[str, Any], suffix: str) -> float | None:
    values = []
    for method in (claim.over, claim.under):
        cell = {**logs.get(method, {}), **metrics.get(method, {})}
        values.append(cell.get(claim.metric + suffix))
    over, under = values
    return over / under if over is not None and under else None
