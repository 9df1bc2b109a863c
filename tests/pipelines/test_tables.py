"""Tables list what params.yaml asks for, and claims are judged by their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines import params
from pipelines.tables import claims, density, experiments, successor, text

ROOT = Path(__file__).parents[2]
PARAMS = params.load(ROOT / "params.yaml")


def cell(emd: float, mse_v: float = 1.0) -> dict[str, Any]:
    seeds = {f"{name}_seed{seed}": v for seed in PARAMS.successor.seeds for name, v in (("emd", emd), ("mse_v", mse_v))}
    interval = {"emd_low": emd - 0.01, "emd_high": emd + 0.01}
    return {"emd": emd, "mse_v": mse_v, "emd_over_floor": emd / 0.015, **interval, **seeds}


def results(td: float = 0.15, coupled: float = 0.06, td2: float = 0.055) -> dict[str, Any]:
    maze = {
        "floor": cell(0.015),
        "mc_cfm": cell(0.04),
        "td_cfm": cell(td, 50.0),
        "td_cfm_coupled": cell(coupled, 20.0),
        "td2_cfm": cell(td2, 7.0),
        "oracle": {"skipped": "maze_loop has no closed form"},
    }
    spiral = {name: cell(0.1) for name in ("floor", *PARAMS.successor.methods)}
    sets = {
        name: {method: {"emd": 0.2, "nll": 2.0} for method in ("floor", *PARAMS.density.methods)}
        for name in PARAMS.datasets
    }
    return {"maze_loop": maze, "spiral": spiral, **sets}


LOGS = {
    name: {"td_cfm": {"seconds": 20.0, "final_bootstrap": 6.0}, "td2_cfm": {"final_bootstrap": 0.05}}
    for name in (*PARAMS.environments, *PARAMS.datasets)
}
ORIGINS = {name: {"source": "s", "fidelity": "f", "notes": ""} for name in LOGS}


def verdicts(**methods: float) -> list[str]:
    return list(claims.build(PARAMS, results(**methods), LOGS, ORIGINS).rows["verdict"])


def test_claims_hold_for_what_was_measured() -> None:
    assert verdicts() == ["holds"] * 4


@pytest.mark.parametrize(
    ("methods", "failed"),
    [
        ({"td": 0.06}, [0]),  # too close
        ({"td": 3.0}, [0]),  # the baseline diverged, which is no success
        ({"coupled": 0.2}, [2]),
        ({"coupled": 0.02}, [2]),
    ],
)
def test_a_claim_fails_by_its_number(methods: dict[str, float], failed: list[int]) -> None:
    assert [i for i, verdict in enumerate(verdicts(**methods)) if verdict == "FAILS"] == failed


def test_a_claim_without_its_numbers_is_not_run() -> None:
    metrics = results()
    del metrics["maze_loop"]["td_cfm"]
    table = claims.build(PARAMS, metrics, {name: {} for name in LOGS}, ORIGINS)
    assert list(table.rows["verdict"]) == ["not run", "not run", "holds", "not run"]


def test_a_method_that_is_missing_shows_with_its_reason() -> None:
    metrics = results()
    del metrics["maze_loop"]["td2_cfm"]
    table = successor.build(PARAMS, metrics, LOGS, ORIGINS)
    rows = table.rows[table.rows["environment"] == "maze_loop"].set_index("method")
    assert list(rows.index) == ["floor", *PARAMS.successor.methods]
    assert rows.loc[["td2_cfm"], "EMD"].isna().all()
    assert "maze_loop, td2_cfm: left out, not evaluated." in table.notes
    assert "maze_loop, oracle: left out, maze_loop has no closed form." in table.notes
    assert "| maze_loop | td2_cfm | – |" in table.markdown()


def test_the_papers_numbers_stand_only_beside_the_papers_task() -> None:
    table = successor.build(PARAMS, results(), LOGS, ORIGINS)
    paper = table.rows.set_index(["environment", "method"])["paper: EMD, NLL/dim, MSE(V)"]
    assert paper["maze_loop", "td2_cfm"] == "0.02, -0.674, 1.75"
    assert paper["spiral"].isna().all()
    assert any("not comparable in absolute value" in note for note in table.notes)


def test_density_table_has_every_data_set_under_its_floor() -> None:
    rows = density.build(PARAMS, results(), LOGS, ORIGINS).rows
    assert list(rows["method"]) == ["floor", *PARAMS.density.methods] * len(PARAMS.datasets)
    assert list(rows["EMD / floor"]) == [1.0] * len(rows)


def test_experiments_table_has_every_finding_beside_its_range() -> None:
    def finding(low: float | None, high: float | None) -> dict[str, Any]:
        value = {"value": 0.7, "value_low": 0.6, "value_high": 0.8}
        return {"sentence": "SDE / ODE", **value, "at_least": low, "at_most": high, "verdict": "holds"}

    ranges = {"a": finding(None, 1.0), "b": finding(0.5, None), "c": finding(0.5, 1.0), "d": finding(None, None)}
    rows = experiments.build(PARAMS, {f"experiments/{name}": ranges for name in PARAMS.experiments}, {}, {}).rows
    assert list(rows["experiment"].unique()) == list(PARAMS.experiments)
    assert list(rows["expected"])[:3] == ["≤ 1", "≥ 0.5", "0.5 to 1"]
    assert text(rows["expected"][3]) == "–"
    assert set(rows["value"]) == {"0.7 [0.6, 0.8]"}


def test_numbers_as_people_read_them() -> None:
    assert [text(v) for v in (0.0, -0.6744, 12.34, 99999.0, float("nan"), None, 3)] == [
        "0", "-0.674", "12.3", "99999", "–", "–", "3",
    ]  # fmt: skip
