"""Tables list what params.yaml asks for, and claims are judged by their numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.config import params
from pipelines.config.params import DensityMethod
from pipelines.reporting.tables import claims, comparisons, density, experiments, successor, text

ROOT = Path(__file__).parents[2]


def fixed() -> params.Params:
    """Two environments, five methods and three seeds, whatever else params.yaml lists."""
    raw = params.load(ROOT / "params.yaml").model_dump(mode="json")
    raw["environments"] = {
        name: {**raw["environments"][name], "methods": None, "seeds": None} for name in ("maze_loop", "spiral")
    }
    methods = ("mc_cfm", "td_cfm", "td_cfm_coupled", "td2_cfm", "oracle")
    raw["successor"] |= {"methods": {name: raw["successor"]["methods"][name] for name in methods}, "seeds": [0, 1, 2]}
    return params.Params.model_validate(raw)


PARAMS = fixed()


SEEDS = PARAMS.successor.seeds


def cell(emd: float, mse_v: float = 1.0, spread: float = 0.0, **more: Any) -> dict[str, Any]:
    """The numbers of a method whose seeds differ by a factor, the same for all methods of that spread."""
    factors = np.exp(spread * np.linspace(-1, 1, len(SEEDS)))
    each = {"emd": emd * factors, "emd_worst": 1.2 * emd * factors, "mse_v": mse_v * factors}
    seeds = {
        f"{name}_seed{seed}": float(v) for name, values in each.items() for seed, v in zip(SEEDS, values, strict=True)
    }
    means = {name: float(values.mean()) for name, values in each.items()}
    interval = {"emd_low": emd - 0.01, "emd_high": emd + 0.01}
    return {**means, "emd_over_floor": emd / 0.015, **interval, **seeds, "diverged": False, "outside": 0.0, **more}


def results(**methods: dict[str, Any]) -> dict[str, Any]:
    maze = {
        "floor": cell(0.015),
        "mc_cfm": cell(0.04),
        "td_cfm": cell(0.15, 50.0),
        "td_cfm_coupled": cell(0.06, 20.0),
        "td2_cfm": cell(0.055, 7.0),
        "oracle": {"skipped": "maze_loop has no closed form"},
    }
    spiral = {name: cell(0.1) for name in ("floor", *PARAMS.successor.methods)}
    spiral["td_cfm"] = cell(0.4, 3.0)
    sets = {
        name: {method: {"emd": 0.2, "nll": 2.0} for method in ("floor", *PARAMS.density.methods)}
        for name in PARAMS.datasets
    }
    return {"maze_loop": {**maze, **methods}, "spiral": spiral, **sets}


def bootstrap(value: float) -> dict[str, float]:
    return {"final_bootstrap": value, **{f"final_bootstrap_seed{seed}": value for seed in SEEDS}}


LOGS: dict[str, Any] = {
    name: {"td_cfm": {"seconds": 20.0, **bootstrap(6.0)}, "td2_cfm": bootstrap(0.05)}
    for name in (*PARAMS.environments, *PARAMS.datasets)
}
ORIGINS = {
    name: {
        "source": "s",
        "fidelity": "f",
        "truth": "simulator",
        "rows": {"transitions": 9},
        "starts": 2,
        "notes": "",
        "messages": [],
    }
    for name in LOGS
}


def judged(metrics: dict[str, Any], changed: params.Params = PARAMS, environment: str = "maze_loop") -> list[str]:
    """The verdicts of an environment's claims."""
    logs = dict.fromkeys(changed.environments, LOGS["maze_loop"])
    rows = claims.build(changed, metrics, logs, ORIGINS).rows
    return list(rows.loc[rows["environment"] == environment, "verdict"])


def changed(section: str, **entries: Any) -> params.Params:
    """The parameters with some entries of `environments` or of `successor` in the place of theirs."""
    raw = PARAMS.model_dump(mode="json")
    if section == "environments":
        raw["environments"] = {name: {**raw["environments"][old], **more} for name, (old, more) in entries.items()}
    else:
        raw["successor"] = {**raw["successor"], **entries}
    return params.Params.model_validate(raw)


def test_claims_hold_for_what_was_measured() -> None:
    assert judged(results()) == ["holds"] * 5
    assert judged(results(), environment="spiral") == ["holds"] * 2


@pytest.mark.parametrize(
    ("method", "value", "failed"),
    [
        ("td_cfm", cell(0.06, 50.0), [0, 1]),  # too close
        ("td_cfm", cell(3.0, 50.0), [0]),  # the baseline is broken, which is no success
        ("td_cfm", cell(0.15, 10.0), [2]),
        ("td_cfm_coupled", cell(0.2), [3]),
        ("td_cfm_coupled", cell(0.02), [3]),
    ],
)
def test_a_claim_fails_by_its_number(method: str, value: dict[str, Any], failed: list[int]) -> None:
    verdicts = judged(results(**{method: value}))
    assert [i for i, verdict in enumerate(verdicts) if verdict == "FAILS"] == failed
    assert verdicts.count("holds") == len(verdicts) - len(failed)


def test_a_claim_is_open_where_seeds_disagree() -> None:
    noisy = judged(results(td_cfm=cell(0.15, 50.0, spread=0.6)))
    assert noisy == ["open", "open", "holds", "holds", "holds"]
    shared = judged(results(td_cfm=cell(0.15, 50.0, spread=0.6), td2_cfm=cell(0.055, 7.0, spread=0.6)))
    assert shared[:3] == ["holds"] * 3  # what a seed does to both cancels


@pytest.mark.parametrize(
    ("method", "value", "failed"),
    [
        ("mc_cfm", cell(8.0, 0.1), []),
        ("td_cfm", cell(7.2, 9.0), [0]),
        ("td2_cfm_returns", cell(8.0, 0.5), [4]),
    ],
)
def test_claims_of_a_domain_fail_by_their_numbers(method: str, value: dict[str, Any], failed: list[int]) -> None:
    raw = PARAMS.model_dump(mode="json")
    raw["environments"] = {"cheetah_run": {**raw["environments"]["spiral"], "kind": "cheetah", "reward": "run"}}
    raw["successor"]["methods"]["td2_cfm_returns"] = {"loss": "td2_cfm", "fit": {"returns": 10}}
    metrics = {"td_cfm": cell(10.0, 3.0), "td2_cfm": cell(7.0, 2.0), "td2_cfm_returns": cell(8.0, 0.1), method: value}
    logs = {"cheetah_run": LOGS["maze_loop"]}
    rows = claims.build(params.Params.model_validate(raw), {"cheetah_run": metrics}, logs, ORIGINS).rows
    assert len(rows) == 5
    assert [i for i, verdict in enumerate(rows["verdict"]) if verdict == "FAILS"] == failed
    assert list(rows["expected"].dropna()) == ["≥ 1.15", "10 to 1e+06", "≥ 5"]


def test_a_single_seed_decides_nothing() -> None:
    one = changed("successor", seeds=[0])
    assert set(judged(results(), one)) == {"open"}
    rows = comparisons.build(one, results(), LOGS, ORIGINS).rows
    assert set(rows["smaller EMD"]) == {"one seed"}


@pytest.mark.parametrize("method", ["td_cfm", "td2_cfm"])
def test_a_diverged_method_loses_to_nobody_and_beats_nobody(method: str) -> None:
    good = results()["maze_loop"][method]
    for broken in ({**good, "diverged": True}, {**good, "diverged": True, "emd": None, f"emd_seed{SEEDS[-1]}": None}):
        metrics = results(**{method: broken})
        others = ["diverged" if method == "td2_cfm" else "holds"]
        assert judged(metrics) == [*["diverged"] * 3, *others, "diverged"]
        rows = comparisons.build(PARAMS, metrics, LOGS, ORIGINS).rows.set_index(["environment", "method"])
        expected = {"td_cfm"} if method == "td_cfm" else {"mc_cfm", "td_cfm", "td_cfm_coupled"}
        assert set(rows.loc["maze_loop"].index[rows.loc["maze_loop", "smaller EMD"] == "diverged"]) == expected
        assert rows.loc[("maze_loop", "td_cfm"), "smaller MSE(V)"] == "diverged"
        page = successor.build(PARAMS, metrics, LOGS, ORIGINS)
        assert page.rows.set_index(["environment", "method"]).loc[("maze_loop", method), "outside"] == "diverged"


def test_claims_of_methods_that_are_not_run_have_no_row() -> None:
    few = changed("environments", maze_loop=("maze_loop", {"methods": ["mc_cfm", "td2_cfm", "td_cfm_coupled"]}))
    assert judged(results(), few) == ["holds"]
    metrics = results()
    del metrics["maze_loop"]["td_cfm"]
    assert judged(metrics) == ["not run", "not run", "not run", "holds", "holds"]  # losses are in the logs


def seeded(cell: dict[str, Any], name: str, values: list[float]) -> dict[str, Any]:
    """The numbers of a method with other values of a metric by seed."""
    return {**cell, **{f"{name}_seed{seed}": value for seed, value in enumerate(values)}}


def test_a_claim_is_judged_one_sided_at_5_percent() -> None:
    even = cell(1.0)
    for ratios in ([1.7, 2.1, 3.4], [1.5, 2.2, 3.6], [1.4, 1.6, 1.9], [1.0, 1.1, 1.3]):
        test = stats.ttest_1samp(np.log(ratios), math.log(1.3), alternative="greater")
        other = stats.ttest_1samp(np.log(ratios), math.log(1.3), alternative="less")
        expected = "holds" if test.pvalue < 0.05 else "FAILS" if other.pvalue < 0.05 else "open"
        reach = changed("environments", reach=("maze_loop", {"task": "reach_top_left"}))
        metrics = {"reach": {"td_cfm": seeded(even, "emd", ratios), "td2_cfm": even}}
        assert judged(metrics, reach, "reach")[0] == expected, ratios


def test_the_comparison_with_less_variance_is_named() -> None:
    luck = [0.8, 1.0, 1.3]
    methods = {"td_cfm": seeded(cell(0.3), "emd", [0.3 * x for x in luck]), "td2_cfm": cell(0.1)}
    for rival, method in ((luck, "paired"), (luck[::-1], "welch")):
        methods["td2_cfm"] = seeded(cell(0.1), "emd", [0.1 * x for x in rival])
        row = claims.build(PARAMS, results(**methods), LOGS, ORIGINS).rows.iloc[0]
        assert (row["claim"], row["compared"]) == (claims.EMD, method)


def test_methods_may_have_other_seeds_than_the_one_they_are_compared_with() -> None:
    raw = PARAMS.model_dump(mode="json")["successor"]["methods"]
    raw["td_cfm"]["seeds"] = [0, 1, 2, 3, 4]
    more = changed("successor", methods=raw)
    values = [0.13, 0.17, 0.11, 0.15, 0.19]
    metrics = results(td_cfm=seeded(cell(0.15, 50.0), "emd", values), td2_cfm=cell(0.055, 7.0, spread=0.1))
    table = claims.build(more, metrics, LOGS, ORIGINS)
    row = table.rows.iloc[0]
    test = stats.ttest_ind(
        np.log(values), np.log([metrics["maze_loop"]["td2_cfm"][f"emd_seed{s}"] for s in SEEDS]), equal_var=False
    )
    low, high = np.exp(test.confidence_interval(0.9))
    assert (row["compared"], row["verdict"]) == ("welch", "holds")
    assert row["ratio"].endswith(f"[{text(float(low))}, {text(float(high))}]")
    assert "Seeds: [0, 1, 2] (td_cfm [0, 1, 2, 3, 4])." in table.notes
    rows = comparisons.build(more, metrics, LOGS, ORIGINS).rows.set_index(["environment", "method"])
    assert rows.loc[("maze_loop", "td_cfm"), "EMD: difference"].endswith(", welch")
    del metrics["maze_loop"]["td_cfm"]["emd_seed4"]  # a seed that its entry asks for
    assert judged(metrics, more)[0] == "not run"


def test_the_tasks_of_the_paper_are_pooled_within_a_seed() -> None:
    entries = {"loop": ("maze_loop", {}), "reach": ("maze_loop", {"task": "reach_top_left"})}
    here = changed("environments", **entries)
    loop, reach = [1.0, 2.0, 4.0], [4.0, 2.5, 1.0]
    metrics = {
        "loop": {"td_cfm": seeded(cell(1.0), "emd", loop), "td2_cfm": cell(1.0)},
        "reach": {"td_cfm": seeded(cell(1.0), "emd", reach), "td2_cfm": cell(1.0)},
    }
    rows = claims.build(here, metrics, dict.fromkeys(entries, LOGS["maze_loop"]), ORIGINS).rows
    (row,) = rows[rows["environment"] == "2 tasks pooled"].to_dict("records")
    each = np.log(loop) / 2 + np.log(reach) / 2
    low, high = np.exp(stats.t.interval(0.9, 2, each.mean(), stats.sem(each)))
    assert row["ratio"] == f"{text(float(np.exp(each.mean())))} [{text(float(low))}, {text(float(high))}]"
    assert row["by seed"] == "2, 2.24, 2" and row["verdict"] == "holds"
    assert [v for v in rows["verdict"] if v == "open"]  # each task alone is open


def test_claims_belong_to_an_environments_task_behaviour_and_horizon() -> None:
    entries = {
        "reach": ("maze_loop", {"task": "reach_top_left"}),
        "short": ("maze_loop", {"gamma": 0.8}),
        "mixed": ("maze_loop", {"task": "square", "behaviour": "mixed"}),
        "mine": ("spiral", {"behaviour": "mixed", "gamma": 0.9}),
    }
    here = changed("environments", **entries)
    metrics = {name: results()["maze_loop"] for name in entries}
    assert judged(metrics, here, "reach") == ["holds", "measured"]
    assert judged(metrics, here, "short") == []
    assert judged(metrics, here, "mixed") == ["FAILS"]  # .055 / .04
    assert judged(metrics, here, "mine") == []
    rows = claims.build(here, metrics, dict.fromkeys(entries, LOGS["maze_loop"]), ORIGINS).rows
    assert list(rows["expected"].map(text)) == ["≥ 1.3", "–", "≤ 1.25"]


def test_curved_paths_are_judged_where_they_are_run() -> None:
    methods = PARAMS.model_dump(mode="json")["successor"]["methods"]
    curved = {f"{name}_curved": methods[name] for name in ("td_cfm_coupled", "td2_cfm")}
    here = changed("successor", methods={**methods, **curved})
    more = {"td_cfm_coupled_curved": cell(0.1), "td2_cfm_curved": cell(0.06)}
    assert judged(results(**more), here)[-3:] == ["holds", "measured", "holds"]
    more = {"td_cfm_coupled_curved": cell(0.1), "td2_cfm_curved": cell(0.09)}
    assert judged(results(**more), here)[-3:] == ["FAILS", "measured", "FAILS"]


def test_comparisons_name_the_better_one_by_paired_seeds() -> None:
    metrics = results(td_cfm_coupled=cell(0.0575, 20.0, spread=0.3), mc_cfm=cell(0.04))
    rows = comparisons.build(PARAMS, metrics, LOGS, ORIGINS).rows
    maze = rows[rows["environment"] == "maze_loop"].set_index("method")
    assert dict(maze["smaller EMD"]) == {"mc_cfm": "mc_cfm", "td_cfm": "td2_cfm", "td_cfm_coupled": "not significant"}
    assert maze.loc["td_cfm", "EMD: difference"].startswith("0.095 [")
    assert maze.loc["td_cfm", "EMD: ratio"] == pytest.approx(0.15 / 0.055)
    assert maze.loc["td_cfm", "EMD / floor"] == "10 : 3.67"
    assert set(rows["against"]) == {"td2_cfm"}
    assert not {"floor", "oracle", "td2_cfm"} & set(rows["method"])
    paired = results(td_cfm_coupled=cell(0.058, 20.0, spread=0.3), td2_cfm=cell(0.055, 7.0, spread=0.3))
    rows = comparisons.build(PARAMS, paired, LOGS, ORIGINS).rows.set_index(["environment", "method"])
    low, high = re.findall(r"\[(.*), (.*)\]", rows.loc[("maze_loop", "td_cfm_coupled"), "EMD: difference"])[0]
    assert float(high) - float(low) < 0.01  # each alone is known to +- .04 by three seeds


def test_comparisons_leave_out_what_an_environment_does_not_run() -> None:
    entries = {"few": ("maze_loop", {"methods": ["td_cfm", "td2_cfm"]}), "none": ("spiral", {"methods": ["td_cfm"]})}
    here = changed("environments", **entries)
    rows = comparisons.build(here, {name: results()["maze_loop"] for name in entries}, LOGS, ORIGINS).rows
    assert list(rows[["environment", "method"]].itertuples(index=False, name=None)) == [("few", "td_cfm")]


def test_successor_table_has_a_row_for_what_an_environment_runs() -> None:
    entries = {
        "few": ("maze_loop", {"methods": ["td_cfm", "td2_cfm"]}),
        "other": ("maze_loop", {"behaviour": "mixed"}),
        "long": ("maze_loop", {"gamma": 0.99}),
    }
    here, maze = changed("environments", **entries), results()["maze_loop"]
    maze["mc_cfm"] |= {"has_density": False, "sensitivity_state": 0.8, "sensitivity_action": 0.1, "outside": 0.0015}
    maze["mc_cfm"] |= {"nll_solver_error": 0.004}
    origins = dict.fromkeys(entries, ORIGINS["maze_loop"])
    table = successor.build(here, dict.fromkeys(entries, maze), LOGS, origins)
    rows = table.rows.set_index(["environment", "method"])
    assert list(rows.loc["few"].index) == ["floor", "td_cfm", "td2_cfm"]
    assert list(rows.loc["other"].index) == ["floor", *PARAMS.successor.methods]
    paper = rows["paper: EMD, NLL/dim, MSE(V)"]
    assert paper["few", "td2_cfm"] == paper["other", "td2_cfm"] == "0.02, -0.674, 1.75"
    assert paper["long"].isna().all()
    assert "mc_cfm: no NLL, as these models have no density." in table.notes
    assert rows.loc[("other", "mc_cfm"), "sensitivity s, a"] == "0.8, 0.1"
    assert rows.loc[("other", "mc_cfm"), "outside"] == "0.15 %"
    assert rows.loc[("other", "mc_cfm"), "solver error"] == 0.004


def test_the_papers_other_models_stand_in_every_task() -> None:
    for task, methods in successor.PUBLISHED.items():
        assert set(methods) == {"td_cfm", "td_cfm_coupled", "td2_cfm", "td_dd", "td2_dd", "gan", "vae"}, task
        assert [methods[m][1] for m in ("gan", "vae")] == [None, None]
    # The mean over tasks is the paper's Table 1.
    for method, emd in {"td_dd": 0.149, "td2_dd": 0.027, "gan": 0.203, "vae": 0.410, "td_cfm": 0.062}.items():
        mean = np.mean([methods[method][0] for methods in successor.PUBLISHED.values()])
        assert mean == pytest.approx(emd, abs=6e-4), method
    for method, mse in {"td_dd": 1245.2, "td2_dd": 11.13, "gan": 1257.0, "vae": 1822.0, "td2_cfm": 8.74}.items():
        mean = np.mean([methods[method][2] for methods in successor.PUBLISHED.values()])
        assert mean == pytest.approx(mse, rel=5e-3), method


def test_the_note_states_when_a_model_has_diverged() -> None:
    from pipelines.evaluation import truth

    assert truth.MARGIN == 1
    note = next(n for n in successor.build(PARAMS, results(), LOGS, ORIGINS).notes if n.startswith("Outside"))
    assert f"Above {100 * truth.DIVERGED:g} %" in note


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
    assert set(rows["fidelity"]) == {"f"}


FIELDS = {name: choice for name, choice in PARAMS.density.methods.items() if choice.has_field}
MOONS = PARAMS.model_copy(
    update={
        "datasets": {"moons": PARAMS.datasets["moons"]},
        "density": PARAMS.density.model_copy(update={"methods": FIELDS}),
    }
)


def densities(params_: params.Params = MOONS, **cells: dict[str, Any]) -> density.Table:
    """The table of one data set, in which some cells have other numbers."""
    usual = {method: {"emd": 0.2, "nll": 2.0} for method in ("floor", *params_.density.methods)}
    merged = {name: {**usual.get(name, {}), **cells.get(name, {})} for name in {**usual, **cells}}
    origin = {**ORIGINS["moons"], "messages": ["3 rows were left out."]}
    return density.build(params_, {"moons": merged}, LOGS, {"moons": origin})


def test_density_table_has_the_likelihood_of_all_parts_beside_their_errors() -> None:
    parts = {"nll": 3.0, "nll_val": 2.0, "nll_train": 1.0}
    numbers = {**parts, **{f"{name}_standard_error": value / 10 for name, value in parts.items()}}
    row = densities(cfm={**numbers, "chosen_step": 450.0}).rows.set_index("method").loc["cfm"]
    found = {name: row[name] for name in ("NLL train", "± train", "NLL val", "± val", "NLL test", "± test")}
    assert list(found.values()) == pytest.approx([1.0, 0.1, 2.0, 0.2, 3.0, 0.3])
    assert row["chosen step"] == 450


def test_density_table_has_one_gaussian_unless_a_method_is_it_and_a_mixture_below_its_method() -> None:
    mixture = {"mixture_of": "cfm", "nll": 1.9, "gain": 0.1, "gain_standard_error": 0.01}
    cells: dict[str, Any] = {"one Gaussian": {"nll": 3.0}, "cfm x2": mixture}
    order = list(density.shown(MOONS, "moons", {"floor": {}, **cells}))
    first = ["floor", "one Gaussian", "cfm", "cfm x2"]
    assert order[:4] == first and set(order[4:]) == {*MOONS.density.methods} - {"cfm"}
    table = densities(**cells)
    assert list(table.rows["method"]) == order
    assert "moons, cfm x2: 0.1 ± 0.01 nats better than its members on average, by row." in table.notes
    methods = {**FIELDS, "mine": DensityMethod.model_validate({"loss": "gaussian"})}
    other = MOONS.model_copy(update={"density": MOONS.density.model_copy(update={"methods": methods})})
    assert "one Gaussian" not in list(density.shown(other, "moons", cells))


def test_density_table_says_what_was_done_to_a_table_and_what_its_numbers_do_not_show() -> None:
    notes = densities(cfm={"warnings": ["it is worse than one Gaussian."]}, floor={"warnings": ["no limit."]}).notes
    for said in (
        "moons: 3 rows were left out.",
        "moons, cfm: it is worse than one Gaussian.",
        "moons, floor: no limit.",
    ):
        assert said in notes


def test_density_table_has_holes_where_a_model_has_no_likelihood() -> None:
    cell = {"nll": None, "nll_standard_error": None, "warnings": ["the likelihood has no value: it diverged."]}
    table = densities(cfm=cell)
    assert math.isnan(table.rows.set_index("method").loc["cfm", "NLL test"])
    assert "moons, cfm: the likelihood has no value: it diverged." in table.notes


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
