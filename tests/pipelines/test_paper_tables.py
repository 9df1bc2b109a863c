"""Tables of curved paths, solver steps and horizons: the right pairs, their differences, and slopes by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flowmatch_core.intervals import t_interval
from pipelines.config.params import Params
from pipelines.config.yaml_files import merge
from pipelines.reporting.tables import HOLE, Table, between, horizons, maze, ode_steps, paths, text
from tests.pipelines.test_tables import ORIGINS, PARAMS, SEEDS, cell

RAW = PARAMS.model_dump(mode="json")
MAZE = RAW["environments"]["maze_loop"]


def built(table: Any, cells: dict[str, dict[str, Any]], **changes: Any) -> Table:
    params = Params.model_validate(merge(RAW, changes))
    everywhere: dict[str, dict[str, Any]] = {name: cells.get(name, {}) for name in params.environments}
    result: Table = table.build(params, everywhere, {}, ORIGINS)
    return result


CURVED = {"td2_cfm_curved": {"loss": "td2_cfm", "path": "cosine"}}


def test_a_path_is_compared_with_the_same_method_on_the_straight_one() -> None:
    cells = {"maze_loop": {"td2_cfm": cell(0.05, 7.0), "td2_cfm_curved": cell(0.06, 5.0), "td_cfm": cell(0.1)}}
    rows = built(paths, cells, successor={"methods": CURVED}).rows
    (row,) = rows[rows["environment"] == "maze_loop"].to_dict("records")
    assert (row["method"], row["path"]) == ("td2_cfm", "cosine")
    assert row["EMD: difference"] == "0.01 [0.01, 0.01], paired"  # curved minus straight, the same at every seed
    assert row["MSE(V): difference"] == "-2 [-2, -2], paired"
    assert row["paper: EMD straight, curved"] == "0.02, 0.02"


def test_methods_that_differ_in_more_than_their_path_are_no_pair() -> None:
    other = {"td2_cfm_curved": {**CURVED["td2_cfm_curved"], "fit": {"ode_steps": 9}}}
    assert built(paths, {}, successor={"methods": other}).rows.empty
    assert built(paths, {}).markdown() == ""


def test_an_environment_that_does_not_run_both_has_no_row() -> None:
    some = {name: {"methods": ["td2_cfm"]} for name in ("maze_loop", "spiral")}
    assert built(paths, {}, successor={"methods": CURVED}, environments=some).rows.empty


def test_a_diverged_path_is_said() -> None:
    cells = {"maze_loop": {"td2_cfm": cell(0.05), "td2_cfm_curved": cell(0.06, diverged=True)}}
    rows = built(paths, cells, successor={"methods": CURVED}).rows
    assert list(rows["diverged"]) == ["td2_cfm_curved", ""]


def test_steps_of_training_and_of_sampling_are_told_apart() -> None:
    sampled = {"emd_steps2": 0.09, "emd_steps2_low": 0.08, "emd_steps2_high": 0.1, "mse_v_steps2": 30.0}
    cells = {"maze_loop": {"td2_cfm": cell(0.05, **sampled), "td2_cfm_k2": cell(0.06), "td_cfm": cell(0.1)}}
    fast = {"td2_cfm_k2": {"loss": "td2_cfm", "fit": {"ode_steps": 2}}}
    table = built(ode_steps, cells, successor={"methods": fast, "evaluate": {"solver_steps": {"maze_loop": [2]}}})
    rows = table.rows[table.rows["environment"] == "maze_loop"]
    steps = rows[["method", "varied", "training steps", "sampling steps"]].to_numpy().tolist()
    assert steps == [
        ["td2_cfm_k2", "training", 2, 20],
        ["td2_cfm", "training", 5, 20],
        ["td_cfm", "sampling", 5, 2],
        ["td2_cfm", "sampling", 5, 2],
    ]
    assert list(rows["EMD"])[-1] == "0.09 [0.08, 0.1]"
    paper = list(map(text, rows["paper: EMD, MSE(V)"]))
    assert paper == ["0.076, 379.5", "0.036, 23.8", HOLE, "0.076, 379.5"]  # which has TD²-CFM alone


def grown(power: float, horizon: float, spread: float = 0.0, **more: Any) -> dict[str, Any]:
    """A method whose errors are the horizon to some power, up to a factor of each seed; V itself is a sum over it."""
    return cell(horizon**power, horizon ** (power + 2), spread, **more)


def slopes(**methods: Any) -> dict[str, dict[str, Any]]:
    """The rows of the value error over horizons of 5, 20 and 100 transitions."""
    gammas = {"maze_loop_g80": 0.8, "maze_loop": 0.95, "maze_loop_g99": 0.99}
    cells = {name: {m: f(1 / (1 - gamma)) for m, f in methods.items()} for name, gamma in gammas.items()}
    entries = {name: {**MAZE, "gamma": gamma} for name, gamma in gammas.items()}
    rows = built(horizons, cells, environments={**entries, "spiral": None}).rows
    return {row["method"]: row for row in rows[rows["metric"] == "MSE(V) (1 - γ)²"].to_dict("records")}


def test_the_slope_is_the_power_of_the_horizon() -> None:
    rows = slopes(td_cfm=lambda h: grown(2.0, h), td2_cfm=lambda h: grown(0.5, h))
    assert rows["td_cfm"]["slope"] == "2 [2, 2]"
    assert rows["td2_cfm"]["slope"] == "0.5 [0.5, 0.5]"
    assert rows["td_cfm"]["minus that of td2_cfm"] == "1.5 [1.5, 1.5], paired"
    assert rows["td_cfm"]["horizon 500"] == "10000"  # transitions of 5 physics steps


@pytest.mark.parametrize(
    ("power", "luck", "more", "verdict"),
    [
        (1.5, 0.0, {}, "holds"),
        (0.5, 0.0, {}, "FAILS"),
        (1.1, 1.0, {}, "open"),
        (1.5, 0.0, {"diverged": True}, "diverged"),
        (1.5, 0.0, {"diverged": True, "emd": None, "mse_v": None}, "diverged"),
    ],
)
def test_a_steeper_slope_is_judged_by_seeds(power: float, luck: float, more: dict[str, Any], verdict: str) -> None:
    def td_cfm(horizon: float) -> dict[str, Any]:
        values = {**grown(power, horizon), **more}
        for seed, share in zip(SEEDS, np.linspace(-1, 1, len(SEEDS)), strict=True):  # seeds grow at different rates
            values[f"mse_v_seed{seed}"] *= horizon ** (luck * share)
        return values

    rows = slopes(td_cfm=td_cfm, td2_cfm=lambda h: grown(1.0, h))
    assert rows["td_cfm"]["steeper than TD²-CFM"] == verdict
    assert text(rows["td2_cfm"]["steeper than TD²-CFM"]) == HOLE


def test_nobody_wins_against_a_rival_that_diverged() -> None:
    rows = slopes(td_cfm=lambda h: grown(1.5, h), td2_cfm=lambda h: grown(1.0, h, diverged=h > 50))
    assert rows["td_cfm"]["steeper than TD²-CFM"] == "diverged"


def test_a_difference_needs_every_seed() -> None:
    lost = {f"emd_seed{SEEDS[-1]}": None, "emd": None, "diverged": True}  # of the last seed there is no number
    cells = {"maze_loop": {"td2_cfm": cell(0.05), "td2_cfm_curved": {**cell(0.06), **lost}}}
    rows = built(paths, cells, successor={"methods": CURVED}).rows
    assert list(map(text, rows["EMD: difference"])) == [HOLE, HOLE]


REACH = {**MAZE, "task": "reach_top_left"}


def test_the_mean_over_tasks_is_taken_within_a_seed() -> None:
    cells = {"maze_loop": {"td2_cfm": cell(0.05, 7.0, 0.3)}, "reach": {"td2_cfm": cell(0.07, 9.0, -0.3)}}
    table = built(maze, cells, environments={"reach": REACH, "spiral": None})
    row = {row["method"]: row for row in table.rows.to_dict("records")}["td2_cfm"]
    each = [sum(cells[e]["td2_cfm"][f"emd_seed{s}"] for e in cells) / 2 for s in SEEDS]
    assert row["EMD"] == between(*t_interval(each)[:3])
    assert (row["paper: EMD"], row["paper: MSE(V)"]) == ("0.0225", "12.6")  # (.020 + .025) / 2, (1.75 + 23.5) / 2
    assert "loop, reach_top_left" in table.notes[0]


def test_the_order_of_the_baselines_stands_beside_the_papers() -> None:
    others = {name: {"loss": name} for name in ("gan", "vae", "td_dd")}
    found = {"td_cfm": cell(0.14), "td_dd": cell(0.12), "gan": cell(0.16), "vae": cell(0.11)}
    cells = {"maze_loop": found, "reach": found}
    changes: dict[str, Any] = {"environments": {"reach": REACH, "spiral": None}, "successor": {"methods": others}}
    note = built(maze, cells, **changes).notes[1]
    here = "VAE 0.11 < TD-DD 0.12 < TD-CFM 0.14 < GAN 0.16"
    assert f"EMD here: {here}; in the paper: TD-CFM 0.063 < TD-DD 0.145 < GAN 0.178 < VAE 0.389." in note
    del cells["reach"]["gan"]
    assert "Order" not in built(maze, cells, **changes).notes[1]


@pytest.mark.parametrize("more", [{"gamma": 0.8}, {"behaviour": "mixed"}, {"task": "loop"}, {"task": "square"}])
def test_a_mean_over_tasks_wants_several_of_the_papers(more: dict[str, Any]) -> None:
    table = built(maze, {"maze_loop": {"td2_cfm": cell(0.05)}}, environments={"other": {**REACH, **more}})
    assert table.rows.empty


def test_a_method_that_lacks_a_horizon_has_no_row() -> None:
    rows = slopes(td2_cfm=lambda h: grown(1.0, h), gan=lambda h: grown(1.0, h) if h > 6 else {})
    assert set(rows) == {"td2_cfm"}
