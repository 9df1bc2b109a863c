"""The tables beside the literature say what was measured, what was published, and what an aim's row has reached."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from pipelines.config import params
from pipelines.evaluation import density as evaluation
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.density import Scored, Scorer
from pipelines.evaluation.rows import Rows
from pipelines.reporting.figures import density as figures
from pipelines.reporting.published import DATA, MODELS
from pipelines.reporting.tables import Table, aims, literature, literature_rows
from pipelines.reporting.times import Times
from pipelines.runs import records

ROOT = Path(__file__).parents[2]
METHODS = {
    "gaussian_mixture": {"loss": "gaussian_mixture"},
    "cfm": {"loss": "cfm"},
    "maf": {"loss": "maf"},
}


def parameters(**datasets: dict[str, Any]) -> params.Params:
    raw = params.load(ROOT / "params.yaml").model_dump(mode="json")
    raw["datasets"] = datasets
    raw["density"] |= {"methods": METHODS, "seeds": [0, 1, 2, 3]}
    return params.Params.model_validate(raw)


PARAMS = parameters(miniboone={"kind": "miniboone"}, moons={"kind": "moons", "train": 9, "val": 9, "test": 9})


def origin(fidelity: str = "official-test/partial-train", columns: int = 43) -> dict[str, Any]:
    return {"fidelity": fidelity, "columns": [f"c{i}" for i in range(columns)], "rows": {"test": 3648}}


def cell(nll: float, **more: Any) -> dict[str, Any]:
    return {"nll": nll, "nll_val": nll - 0.6, "nll_standard_error": 0.2, **more}


def gain(value: float, error: float) -> dict[str, Any]:
    return {"over_mixture": value, "over_mixture_standard_error": error, "over_mixture_of": "gaussian_mixture"}


CELLS: dict[str, dict[str, Any]] = {
    "floor": {},
    "one Gaussian": cell(37.34),
    "gaussian_mixture": cell(20.15),
    "cfm": cell(12.6, nll_seed_error=0.02, parameters=341035, **gain(7.5, 0.1)),
    "cfm x4": cell(12.0, mixture_of="cfm", **gain(8.1, 0.1)),
    "maf": cell(12.83, **gain(7.3, 0.1)),
}
METRICS = {"miniboone": CELLS, "moons": {"floor": {}, "cfm": cell(2.0)}}
ORIGINS = {"miniboone": origin(), "moons": origin("exact generator", 2)}


def wide(metrics: dict[str, Any] = METRICS, changed: params.Params = PARAMS, origins: Any = ORIGINS) -> Table:
    return literature.build(changed, metrics, {}, origins)


def column(table: Table, heading: str) -> dict[tuple[str, str], str]:
    """A column of the wide table by the first two, in its order."""
    columns = (table.rows[name].astype(str).tolist() for name in ("from", "model", heading))
    return {(source, model): cell for source, model, cell in zip(*columns, strict=True)}


def test_our_rows_stand_above_the_published_ones_with_their_errors_and_the_best_is_marked() -> None:
    assert list(wide().rows.columns) == ["from", "model", *DATA.values()]
    found = column(wide(), "MINIBOONE")
    assert found["data", "label"] == "official-test/partial-train"
    assert found["this run", "CFM"] == "12.60 ± 0.20 (seeds ± 0.02)"
    assert found["this run", "MAF"] == "12.83 ± 0.20" and found["published", "MAF"] == "11.75 ± .44"
    best = ("this run", "CFM, mixture of 4 seeds")
    assert found[best] == "12.00 ± 0.20 *" and [key for key, cell in found.items() if cell.endswith("*")] == [best]
    other = column(wide(), "CIFAR-10")
    assert other["data", "label"] == "not run" and other["this run", "CFM"] == "–"
    assert "moons" not in " ".join([*wide().rows.columns, *wide().notes])


def test_a_number_that_a_few_rows_decide_is_said_to_be_so() -> None:
    rows = np.full(1000, -24.0)
    rows[0] = -7e9  # a density that is right but for one row
    here = {"nll": -rows.mean(), "nll_standard_error": rows.std() / math.sqrt(1000), "nll_val": 24.0}
    metrics = {**METRICS, "miniboone": {**CELLS, "maf": here}}
    sentence = "MAF: a few test rows, to which it gives almost no density, decide its NLL."
    assert f"miniboone: {sentence}" in wide(metrics).notes
    assert not any("a few test rows" in note for note in wide().notes)


def test_every_published_number_has_its_source_and_every_model_without_a_row_its_reason() -> None:
    notes = wide().notes
    for each in MODELS:
        assert any(each.model in note and note.endswith(f": {each.source}.") for note in notes)
        assert not each.absent or any(each.model in note and note.endswith(f": {each.absent}.") for note in notes)
        assert each.values.keys() <= DATA.keys()
        for text in each.values.values():
            assert re.fullmatch(r"-?\d*\.\d+( ± \d*\.\d+)?", text), text
    assert {each.model for each in MODELS if each.absent} == {"TAN", "TAN, as FFJORD quotes it", "MAF-DDSF"}


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (8.1, 0.1, "beats Gaussian mixture by 8.1 ± 0.1 nats a row."),
        (0.1, 0.1, "is not separated from Gaussian mixture: 0.1 ± 0.1 nats a row."),
        (-0.5, 0.1, "does not beat Gaussian mixture: it is 0.5 ± 0.1 nats a row worse."),
    ],
)
def test_a_sentence_says_whether_the_flow_chosen_on_validation_rows_beats_the_mixture(
    value: float, error: float, said: str
) -> None:
    cells = {**CELLS, "cfm x4": {**CELLS["cfm x4"], **gain(value, error)}}
    best = "miniboone: CFM, mixture of 4 seeds, the flow of the lowest validation NLL, "
    assert f"{best}{said}" in wide({**METRICS, "miniboone": cells}).notes


def test_images_are_in_bits_per_dimension_with_errors_in_them_too() -> None:
    changed = parameters(mnist={"kind": "miniboone"})
    entry = changed.datasets["mnist"].model_copy(update={"kind": "mnist"})
    changed = changed.model_copy(update={"datasets": {"mnist": entry}})
    bits = {"cfm": cell(700.0, bits_per_dim=1.32, nll_standard_error=784 * math.log(2) * 0.016)}
    table = wide({"mnist": {"floor": {}, **bits}}, changed, {"mnist": origin("official", 784)})
    assert column(table, "MNIST")["this run", "CFM"] == "1.320 ± 0.016 *"


def test_the_long_table_has_the_costs_that_are_known_and_the_paper_of_the_same_kind() -> None:
    rows = literature_rows.build(PARAMS, METRICS, {}, ORIGINS).rows.set_index("method")
    assert list(rows.index) == ["one Gaussian", "gaussian_mixture", "cfm", "cfm x4", "maf"]
    assert rows.loc["cfm", "parameters"] == 341035
    assert rows.loc["maf", "published"] == "11.75 ± .44" and rows.loc["one Gaussian", "published"] == "37.24 ± 1.07"
    assert rows.loc["cfm x4", "nats above the mixture"] == "8.1 ± 0.1"
    assert "training, s" not in rows  # nothing known


def test_a_tilted_row_states_the_error_of_its_constant() -> None:
    tilted = cell(11.9, mixture_of="cfm", log_constant=0.0526, log_constant_error=0.005)
    notes = literature_rows.build(PARAMS, {**METRICS, "miniboone": {**CELLS, "cfm_tilted": tilted}}, {}, ORIGINS).notes
    said = "miniboone, CFM, mixture of seeds, tilted: the constant of the tilt has the logarithm 0.0526 ± 0.005; "
    assert [note for note in notes if "tilt" in note] == [f"{said}the column test has the error over rows alone."]


@pytest.mark.parametrize(("step", "limit"), [(2000, "time"), (1900, "time"), (600, "rows (step 600 of 2000)")])
def test_a_network_is_limited_by_time_unless_its_validation_loss_rose(step: float, limit: str) -> None:
    cells = {**CELLS, "cfm": {**CELLS["cfm"], "chosen_step": step}}
    rows = literature_rows.build(PARAMS, {**METRICS, "miniboone": cells}, {}, ORIGINS).rows.set_index("method")
    assert rows["limited by"].dropna().to_dict() == {"cfm": limit}


def verdicts(cells: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    rows = aims.build(PARAMS, {**METRICS, "miniboone": cells}, {}, ORIGINS).rows
    return list(rows[["method", "reached", "verdict"]].itertuples(index=False, name=None))


def test_an_aim_is_judged_by_the_row_of_the_lowest_validation_loss() -> None:
    assert verdicts(CELLS) == [("cfm", "yes", "open"), ("cfm x4", "yes", "open"), ("cfm x4", "no", "open")]
    lucky = {**CELLS, "maf": cell(11.0, nll_val=13.0)}  # the best on test rows, but not chosen
    assert verdicts(lucky)[2] == ("cfm x4", "no", "open")
    good, bad = ({**CELLS, "cfm": cell(value)} for value in (12.0, 13.5))
    assert verdicts(good)[0] == ("cfm", "yes", "holds") and verdicts(bad)[0] == ("cfm", "no", "FAILS")


def test_a_mixture_of_several_methods_is_one_of_flows_unless_one_of_them_is_none() -> None:
    both = {"mixture_of": "cfm, maf", **gain(9.0, 0.1)}
    cells = {**CELLS, "both": cell(11.0, **both), "tilted": cell(10.9, mixture_of="cfm", log_constant=0.1)}
    changed = PARAMS.model_copy(
        update={
            "density": PARAMS.density.model_copy(
                update={"mixtures": {"both": {"methods": ["cfm", "maf"]}, "tilted": {"methods": ["cfm"]}}}
            )
        }
    )
    metrics = {**METRICS, "miniboone": cells}
    rows = aims.build(changed, metrics, {}, ORIGINS).rows
    assert list(rows["method"]) == ["cfm", "cfm x4", "tilted"]  # not of conditional flows alone; not their mixture
    said = "both, the flow of the lowest validation NLL, beats Gaussian mixture by 9 ± 0.1 nats a row."
    assert said in list(literature.beaten("miniboone", changed, metrics))
    cells["both"]["mixture_of"] = "cfm, gaussian_mixture"
    assert said not in list(literature.beaten("miniboone", changed, metrics))


def test_times_are_those_of_the_training_with_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(seconds: float, loss: float, seed: int = 0) -> SimpleNamespace:
        metrics = {"train/seconds": seconds, "train/final_loss": loss}
        return SimpleNamespace(cells=[records.Cell("miniboone", "cfm", seed, metrics=metrics, trained=True)])

    found = {"a": [record(60.0, 1.25), record(70.0, 1.5, seed=1)], "b": [record(9.0, 2.0)]}
    monkeypatch.setattr(records, "by_invocation", lambda home: found)
    times = Times()
    final = {"final_loss": 1.375, "final_loss_seed0": 1.25, "final_loss_seed1": 1.5}
    assert times.mean("miniboone", "cfm", [0, 1], final) == 65.0
    assert times.mean("miniboone", "cfm", [0], {"final_loss_seed0": 2.0}) == 9.0
    assert times.mean("miniboone", "cfm", [0, 2], final) is None
    assert times.mean("power", "cfm", [0], final) is None


def test_an_aim_without_its_row_was_not_run() -> None:
    del (cells := dict(CELLS))["cfm x4"]
    assert [verdict for *_, verdict in verdicts(cells)][:2] == ["open", "not run"]


def test_without_a_data_set_of_the_literature_the_tables_are_empty() -> None:
    changed = parameters(moons={"kind": "moons", "train": 9, "val": 9, "test": 9})
    for module in (literature, literature_rows, aims):
        table = module.build(changed, METRICS, {}, ORIGINS)
        assert table.rows.empty and table.markdown() == table.latex() == ""


def test_latex_has_every_cell_and_no_character_that_it_reads_otherwise() -> None:
    table = wide()
    text = table.latex()
    inside = text[text.index(r"\toprule") : text.index(r"\bottomrule")].replace(r"\&", "")
    lines = [line for line in inside.splitlines() if line.endswith(r" \\")]
    assert len(lines) == len(table.rows) + 1
    assert {line.count("&") for line in lines} == {len(table.rows.columns) - 1}
    assert not re.search(r"(?<!\\)[%#_~^](?!2\$)", inside) and not re.search(r"[^\x00-\x7f]", inside)


def test_the_gain_over_the_mixture_is_the_mean_difference_of_log_densities_by_row() -> None:
    """Of each method's mean over seeds, and of the mixture of its seeds, over the better mixture of Gaussians."""
    rng = np.random.default_rng(3)
    n, seeds = 500, [0, 1]
    log_prob = {(m, s): rng.normal(-3, 1, n) for m in METHODS for s in (seeds if m != "gaussian_mixture" else [0])}
    rows = Rows(np.zeros((n, 2)), None, np.zeros((n, 0), np.float32))  # type: ignore[arg-type]
    scorer = Scorer(PARAMS, "miniboone", None, None, {"test": rows}, None, rows, rows)  # type: ignore[arg-type]
    scores = {Cell(m, s): Scored({"nll_val": float(-x.mean())}, {"test": x}, None) for (m, s), x in log_prob.items()}
    reference = evaluation._reference(scores, scorer)
    assert reference is not None and reference.method == "gaussian_mixture"
    mean = np.mean([log_prob["cfm", s] for s in seeds], 0)
    difference = mean - log_prob["gaussian_mixture", 0]
    found = evaluation._over_mixture("cfm", mean, scorer, reference)
    assert found["over_mixture"] == pytest.approx(difference.mean())
    assert found["over_mixture_standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(n))
    assert evaluation._over_mixture("gaussian_mixture", mean, scorer, reference) == {}
    alone = {cell: one for cell, one in scores.items() if cell.method != "gaussian_mixture"}
    assert evaluation._reference(alone, scorer) is None


def test_a_patch_is_drawn_with_the_pixel_that_the_others_determine() -> None:
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(3, 63)))
    figure = figures.patches(rows, {"cfm": rows})
    for axis in figure.axes:
        (picture,) = axis.images
        drawn = np.asarray(picture.get_array())
        patch = drawn[1:9, 11:19]  # the second one, each in a frame of one pixel
        assert patch.ravel()[:63] == pytest.approx(rows.iloc[1].to_numpy())
        assert patch.sum() == pytest.approx(0)
    plt.close(figure)
