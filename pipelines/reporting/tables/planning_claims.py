"""The claims about planning that a run of minutes can test, each paired per episode with the best single policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmatch_core.intervals import ONE_SIDED, t_interval
from pipelines.config.params import Params
from pipelines.reporting.tables import RIVAL, Cells, Table, physics_steps, text
from pipelines.reporting.tables.planning import LAWS, SINGLE, seeds_of

AT_LEAST: Mapping[str, float] = {
    "square": 1.4,
    "loop": 1.05,
    "fast_slow": 1.2,
    "reach_bottom_left_long": 2.0,
    "reach_top_left": 0.95,
    "reach_top_right": 0.95,
    "reach_bottom_left": 0.95,
    "reach_bottom_right": 0.95,
}
"""Lower ends of the ratio of GPI's return to that of the best single policy, by task of the maze."""


def build(params: Params, metrics: Cells, logs: Cells, provenance: Mapping[str, Mapping[str, Any]]) -> Table:
    """Build one row per environment and task of the maze with a claim, for GPI with TD²-CFM's model."""
    import pandas as pd

    rows = []
    for name, settings in params.plans.items():
        entry = params.environments[name]
        law = next(law for law in reversed(LAWS) if law in settings.laws)
        for task in settings.rewards if entry.kind == "maze" else ():
            cells = metrics[f"plans/{name}"][task]
            if task not in AT_LEAST or RIVAL not in cells:
                continue
            unit, least = float(physics_steps(entry)), AT_LEAST[task]
            planned, single = (seeds_of(cells[method], law, unit) for method in (RIVAL, SINGLE))
            excess = t_interval([planned[seed] - least * single[seed] for seed in planned], ONE_SIDED)
            rows.append(
                {
                    "environment": name,
                    "claim": f"{task}: GPI returns at least {least:g} times the best single policy",
                    "ratio": sum(planned.values()) / sum(single[seed] for seed in planned),
                    "by seed": ", ".join(text(planned[seed] / single[seed]) for seed in planned),
                    "excess": f"{text(excess.mean)} [{text(excess.low)}, {text(excess.high)}]",
                    "verdict": excess.verdict(0.0, None),
                }
            )
    notes = (
        "Ratio: of the returns' means over seeds and episodes, which have the same starts for both. Excess: the return "
        "of GPI minus so many times that of the best single policy, paired per episode; mean over the episodes of a "
        "seed, then over seeds with the 90 % t interval, whose lower end is a one-sided bound at 5 %. A claim holds if "
        "it lies above 0, FAILS if below, and is open if it contains 0.",
    )
    columns = ["environment", "claim", "ratio", "by seed", "excess", "verdict"]
    return Table("planning_claims", "Claims about planning", pd.DataFrame(rows, columns=columns), notes if rows else ())
