"""The evaluation of densities: likelihoods with their errors, references in closed form, distances, and sentences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from flowmatch_core.divergence import DivergenceMethod
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.solvers import TimeGrid
from pipelines.base import files, layout
from pipelines.config import params
from pipelines.config.params import GridChoice, MixtureRow, NetworkChoice, Params
from pipelines.evaluation import density as evaluation
from pipelines.evaluation import density_sampling, likelihood, rows
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.density import Scored, Scorer
from pipelines.evaluation.likelihood import Likelihood, likelihoods
from pipelines.evaluation.rows import Prepared, Rows
from pipelines.evaluation.tilt import Tilt
from pipelines.models import build, density, saved
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord

GIVEN = params.load(Path(__file__).parents[2] / "params.yaml")
PARAMS = GIVEN.model_copy(update={"datasets": {"mine": GIVEN.datasets["moons"]}})
CPU = torch.device("cpu")
TRUTH = GaussianMixture(
    torch.tensor([0.5, 0.5], dtype=torch.float64),
    torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64),
    0.1 * torch.eye(2, dtype=torch.float64).repeat(2, 1, 1),
)
SPECIES = {"name": "species", "kind": "words", "levels": ["a", "b"]}
AGE = {"name": "age", "kind": "number", "loc": 0.0, "scale": 1.0, "low": -3.0, "high": 3.0}

Table = dict[str, Any]


def rows_of(x: Any, weight: Any = None) -> Rows:
    """Rows without conditions."""
    array = np.asarray(x, dtype=np.float64)
    nothing = np.empty((len(array), 0), np.float32)
    return Rows(array, pd.DataFrame(index=range(len(array))), nothing, None if weight is None else np.asarray(weight))


def prepared(
    folder: Path,
    parts: dict[str, Table],
    conditions: list[dict[str, Any]] | None = None,
    weight: str | None = None,
    groups: int | None = None,
) -> Prepared:
    """A prepared data set of these parts; the table of the training rows has row groups of a size."""
    folder.mkdir(parents=True)
    named = [*(one["name"] for one in conditions or []), weight]
    for part in layout.PARTS:
        pd.DataFrame(parts[part]).to_parquet(layout.part(folder, part), index=False, row_group_size=groups)
    described = {
        "kind": "moons",
        "columns": [name for name in parts["train"] if name not in named],
        "conditions": conditions or [],
        "weight": weight,
        "weight_power": 1.0,
        "discrete_bins": None,
        "rows": {part: len(pd.DataFrame(table)) for part, table in parts.items()},
    }
    files.write_json(layout.provenance(folder), described)
    return Prepared.read(folder)


def scorer_of(made: Prepared, **settings: Any) -> Scorer:
    """The scorer of a prepared data set of which every row is scored."""
    scored = {part: made.part(part) for part in ("test", "val", "train")}
    moments = made.training(1, np.random.default_rng(0))[1]
    return Scorer(changed(**settings), "mine", CPU, made, scored, moments, scored["test"], scored["val"])


def changed(**settings: Any) -> Params:
    evaluate = PARAMS.density.evaluate.model_copy(update=settings)
    return PARAMS.model_copy(update={"density": PARAMS.density.model_copy(update={"evaluate": evaluate})})


def normal_parts(n: int = 400, **columns: Any) -> dict[str, Table]:
    """Independent normal columns with these means and deviations."""
    rng = np.random.default_rng(0)
    return {part: {name: rng.normal(*unit, n) for name, unit in columns.items()} for part in layout.PARTS}


# ---- likelihood ----


def likelihood_of(monkeypatch: pytest.MonkeyPatch, steps: int) -> Likelihood:
    def load(
        file: Path, device: torch.device, solver: str, steps: int, grid: TimeGrid, divergence: DivergenceMethod
    ) -> ContinuousFlow:
        return ContinuousFlow(TRUTH.velocity_field(), (2,), solver, steps, divergence, grid=grid)

    monkeypatch.setattr(density, "load", load)
    test = rows_of(TRUTH.sample(150, generator=torch.Generator().manual_seed(0)))
    settings = changed(solver="rk4", grid=GridChoice.model_validate("uniform"), steps=steps).density.evaluate
    return likelihoods(Path(), {"test": test}, settings, CPU)["test"]


def test_a_likelihood_is_reported_with_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = TRUTH.log_prob(TRUTH.sample(150, generator=torch.Generator().manual_seed(0))).numpy()
    found = likelihood_of(monkeypatch, 64)
    np.testing.assert_allclose(found.log_prob, exact, atol=5e-3)
    assert found.error.max() < 0.1 and found.warning is None


def test_an_estimated_likelihood_is_unbiased_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the field that exchanges the coordinates, whose divergence is 0, a probe makes 2 or -2."""

    def load(
        file: Path, device: torch.device, solver: str, steps: int, grid: TimeGrid, divergence: DivergenceMethod
    ) -> ContinuousFlow:
        return ContinuousFlow(lambda t, x, cond: x.flip(1), (2,), solver, steps, divergence, grid=grid)

    monkeypatch.setattr(density, "load", load)
    test = rows_of(TRUTH.sample(150, generator=torch.Generator().manual_seed(0)))
    settings = changed(solver="rk4", steps=16).density.evaluate
    exact, found, again = (
        likelihoods(Path(), {"test": test}, settings.model_copy(update={"divergence": one}), CPU)["test"].log_prob
        for one in ("exact", "hutchinson", "hutchinson")
    )
    noise = found - exact
    np.testing.assert_allclose(np.abs(noise), 2, atol=1e-3)
    assert abs(noise.mean()) < 5 * 2 / np.sqrt(150) and (found == again).all()


def test_a_coarse_solver_is_told_and_its_error_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = TRUTH.log_prob(TRUTH.sample(150, generator=torch.Generator().manual_seed(0))).numpy()
    found = likelihood_of(monkeypatch, 4)
    assert found.warning is not None and "exceeds the standard error of its mean" in found.warning
    assert found.error.mean() > 0.2 * np.abs(found.log_prob - exact).mean()


def test_long_likelihoods_tell_how_far_they_are_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = likelihood_of(monkeypatch, 8)
    told: list[str] = []
    monkeypatch.setattr(likelihood, "BLOCK", 60)
    monkeypatch.setattr(likelihood, "LINE_SECONDS", 0.0)
    test = rows_of(TRUTH.sample(150, generator=torch.Generator().manual_seed(0)))
    settings = changed(solver="rk4", grid=GridChoice.model_validate("uniform"), steps=8).density.evaluate
    found = likelihoods(Path(), {"test": test}, settings, CPU, "cfm seed 0: ", told.append)["test"]
    np.testing.assert_allclose(found.log_prob, whole.log_prob, atol=1e-5)
    assert told == [f"cfm seed 0: test rows: likelihood of {n} of 150" for n in (0, 60, 120)]


# ---- means, standard errors and moments ----


def test_a_mean_has_the_standard_error_of_its_rows_and_whole_weights_are_repeated_rows() -> None:
    values = np.random.default_rng(0).normal(size=50)
    mean, error = rows_of(np.zeros((50, 1))).mean(values)
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(stats.sem(values))
    weight = np.arange(1.0, 51.0)
    weighted, _ = rows_of(np.zeros((50, 1)), weight).mean(values)
    assert weighted == pytest.approx(np.repeat(values, np.arange(1, 51)).mean())
    assert math.isnan(rows_of(np.zeros((1, 1))).mean(np.ones(1))[1])


def test_the_standard_error_of_a_weighted_mean_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(2000):
        x = rng.normal(size=100)
        mean, error = rows_of(np.zeros((100, 1)), np.exp(0.5 * x)).mean(x)  # importance weights towards larger x
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 6e6])
def test_one_gaussian_is_the_normal_distribution_with_the_moments_of_the_training_rows(
    tmp_path: Path, shift: float
) -> None:
    mix = np.array([[1.0, 0.5], [0.0, 0.2]])
    rng = np.random.default_rng(0)
    parts = {part: dict(zip("xy", (rng.normal(size=(90, 2)) @ mix + shift).T, strict=True)) for part in layout.PARTS}
    made = prepared(tmp_path / "mine", parts, groups=40)
    _, moments = made.training(10, rng)
    train, test = (np.column_stack(list(parts[part].values())) - shift for part in ("train", "test"))
    expected = stats.multivariate_normal(train.mean(0), np.cov(train.T, bias=True)).logpdf(test)
    found = moments.log_prob(made.part("test"))
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_whole_weights_of_training_rows_are_repeated_rows_in_the_moments(tmp_path: Path) -> None:
    parts = normal_parts(x=(1.0, 2.0), y=(0.0, 1.0))
    weight = np.random.default_rng(5).integers(1, 5, 400)
    repeated = {**parts, "train": {name: np.repeat(values, weight) for name, values in parts["train"].items()}}
    weighted = {part: {**table, "w": np.ones(400)} for part, table in parts.items()}
    weighted["train"]["w"] = weight / weight.mean()
    a = prepared(tmp_path / "a", weighted, weight="w").training(5, np.random.default_rng(0))[1]
    b = prepared(tmp_path / "b", repeated).training(5, np.random.default_rng(0))[1]
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-9)
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-9)


def test_one_gaussian_given_words_and_numbers_is_the_least_squares_fit_with_normal_residuals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts: dict[str, Table] = {}
    for part in layout.PARTS:
        word, age, noise = rng.integers(0, 2, 200), rng.normal(size=200), rng.normal(size=(2, 200))
        x, y = 3.0 * word + age + noise[0], noise[0] + 0.5 * noise[1] - word
        parts[part] = {"x": x, "y": y, "species": np.array(["a", "b"])[word], "age": age}
    made = prepared(tmp_path / "mine", parts, [SPECIES, AGE], groups=70)
    _, moments = made.training(10, rng)

    def design(table: Table) -> NDArray[np.float64]:
        return np.column_stack([np.ones(200), table["species"] == "b", table["age"]])

    train, test = (np.column_stack([parts[part][name] for name in "xy"]) for part in ("train", "test"))
    slopes = np.linalg.lstsq(design(parts["train"]), train, rcond=None)[0]
    left = train - design(parts["train"]) @ slopes
    expected = stats.multivariate_normal(np.zeros(2), left.T @ left / 200).logpdf(test - design(parts["test"]) @ slopes)
    found = moments.log_prob(made.part("test"))
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_columns_that_are_functions_of_others_have_no_gaussian(tmp_path: Path) -> None:
    parts = normal_parts(x=(5e5, 1.0), y=(0.0, 1.0))
    for table in parts.values():
        table["sum"] = table["x"] + 2 * table["y"]
    made = prepared(tmp_path / "mine", parts)
    assert made.training(5, np.random.default_rng(0))[1].log_prob(made.part("test")) is None


def test_training_rows_are_a_random_sample_of_all_row_groups(tmp_path: Path) -> None:
    parts = normal_parts(x=(0.0, 1.0))
    made = prepared(tmp_path / "mine", parts, groups=30)
    found = made.training(100, np.random.default_rng(0))[0].x[:, 0]
    place = {value: i for i, value in enumerate(parts["train"]["x"])}
    chosen = [place[value] for value in found]
    assert chosen == sorted(set(chosen)) and len(chosen) == 100
    assert np.histogram(chosen, 4, (0, 400))[0].min() > 10
    np.testing.assert_array_equal(made.training(1000, np.random.default_rng(0))[0].x[:, 0], parts["train"]["x"])


def test_other_rows_limit_the_training_and_validation_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared(layout.prepared("mine"), normal_parts(50, x=(0.0, 1.0), y=(0.0, 1.0)))

    def sizes(**settings: Any) -> dict[str, int]:
        return {part: len(found) for part, found in Scorer.of(changed(**settings), "mine", CPU).scored.items()}

    assert sizes(likelihood_rows=None, other_rows=None) == {"test": 50, "val": 50, "train": 50}
    assert sizes(likelihood_rows=None, other_rows=7) == {"test": 50, "val": 7, "train": 7}
    assert sizes(likelihood_rows=20, other_rows=30) == {"test": 20, "val": 20, "train": 20}


def test_rows_come_once_before_they_come_again_and_weighted_ones_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    found = rows_of(np.arange(10.0)[:, None]).draw(25, rng).x[:, 0]
    assert sorted(found[:10]) == sorted(found[10:20]) == list(range(10)) and list(found[:10]) != list(range(10))
    drawn = rows_of(np.arange(3.0)[:, None], [1.0, 2.0, 5.0]).draw(8000, rng)
    np.testing.assert_allclose(np.bincount(drawn.x[:, 0].astype(int)) / 8000, [1 / 8, 2 / 8, 5 / 8], atol=0.02)
    assert drawn.weight is None


# ---- distances ----


def test_standardised_distances_see_what_raw_ones_do_not_and_no_unit_changes_them(tmp_path: Path) -> None:
    """Penguins in millimetres and grams: one column moved by ten of its deviations."""
    units = {"bill_mm": (44.0, 5.0), "depth_mm": (17.0, 2.0), "flipper_mm": (200.0, 14.0), "mass_g": (4200.0, 800.0)}
    parts = normal_parts(n=100, **units)
    scorer = scorer_of(prepared(tmp_path / "a", parts))
    samples = scorer.other
    moved = replace(samples, x=samples.x + np.array([0, 10 * 2.0, 0, 0]))
    before, after = scorer.distances(samples), scorer.distances(moved)
    assert after["emd_raw"] < 1.2 * before["emd_raw"]
    assert before["emd"] < 2 and 8 < after["emd"] < 12
    assert after["sliced_wasserstein"] > 5 * before["sliced_wasserstein"]
    kilograms = {part: {**table, "mass_g": table["mass_g"] / 1000 + 6e6} for part, table in parts.items()}
    other = scorer_of(prepared(tmp_path / "b", kilograms))
    found = other.distances(other.other)
    for name in ("emd", "sliced_wasserstein"):
        assert found[name] == pytest.approx(before[name], rel=1e-6)
    assert found["emd_raw"] < 0.5 * before["emd_raw"]


def test_distances_given_conditions_see_samples_of_the_wrong_word(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts: dict[str, Table] = {}
    for part in layout.PARTS:
        word = rng.integers(0, 2, 150)
        parts[part] = {"x": 6.0 * word + rng.normal(size=150), "species": np.array(["a", "b"])[word]}
    scorer = scorer_of(prepared(tmp_path / "mine", parts, [SPECIES]))
    exchanged = replace(scorer.other, x=6.0 - scorer.other.x)  # the same values over all, each at the other word
    good, bad = scorer.distances(scorer.other), scorer.distances(exchanged)
    assert bad["emd"] > 3 * good["emd"]
    assert bad["emd_raw"] < 2 * good["emd_raw"]  # of values alone


# ---- mixtures of seeds, and sentences ----


def scored(log_prob: dict[str, Any], warning: str | None = None) -> Scored:
    return Scored(
        {"parameters": 5, "nfe": 7},
        {part: np.asarray(values, dtype=np.float64) for part, values in log_prob.items()},
        warning,
    )


def test_a_mixture_of_seeds_is_the_mean_of_their_densities_and_never_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(tmp_path / "mine", normal_parts(x=(0.0, 1.0)))
    scorer = scorer_of(made, rows=50)
    monkeypatch.setattr(Scorer, "samples", lambda self, cell: self.other)
    means = (-0.7, 0.9, 0.1)
    each = {
        Cell("cfm", seed): scored(
            {part: stats.norm(mean, 1).logpdf(part_rows.x[:, 0]) for part, part_rows in scorer.scored.items()}
        )
        for seed, mean in enumerate(means)
    }
    found = evaluation._mixture(each, scorer, None)
    x = scorer.scored["test"].x[:, 0]
    density_of_mixture = np.mean([stats.norm(mean, 1).pdf(x) for mean in means], 0)
    assert found["nll"] == pytest.approx(-np.log(density_of_mixture).mean())
    members = np.mean([-one.log_prob["test"].mean() for one in each.values()])
    assert found["mixture_of"] == "cfm" and found["gain"] == pytest.approx(members - found["nll"]) and found["gain"] > 0
    gains = np.log(density_of_mixture) - np.mean([one.log_prob["test"] for one in each.values()], 0)
    assert (gains >= 0).all()  # Jensen
    assert found["gain_standard_error"] == pytest.approx(stats.sem(gains))
    assert (found["parameters"], found["nfe"]) == (15, 21)  # of its three members
    same = {Cell("cfm", seed): each[Cell("cfm", 0)] for seed in range(3)}
    assert evaluation._mixture(same, scorer, None)["gain"] == pytest.approx(0, abs=1e-12)


def test_a_mixture_is_tilted_by_its_ratio_and_the_constant_of_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N(0, 1) times exp(x) is N(1, 1) times exp(1/2)."""
    made = prepared(tmp_path / "mine", normal_parts(1_000, x=(0.0, 1.0)))
    scorer = scorer_of(made, rows=50)
    monkeypatch.setattr(Scorer, "samples", lambda self, cell: self.other)
    drawn = np.random.default_rng(5).normal(size=(1_000, 1))
    monkeypatch.setattr(Scorer, "draws", lambda self, members: drawn)
    each = {Cell("cfm", 0): scored({part: stats.norm.logpdf(rows.x[:, 0]) for part, rows in scorer.scored.items()})}
    ratio = SimpleNamespace(log_ratio=lambda x: x[:, 0])
    found = evaluation._mixture(each, scorer, None, cast(Tilt, ratio))
    error = found["log_constant_error"]
    assert error == pytest.approx(np.sqrt((np.e - 1) / 1_000), rel=0.3)
    assert found["log_constant"] == pytest.approx(0.5, abs=4 * error)
    exact = -stats.norm(1, 1).logpdf(scorer.scored["test"].x[:, 0]).mean()
    assert found["nll"] - exact == pytest.approx(found["log_constant"] - 0.5)


@pytest.mark.parametrize(
    ("test", "train", "said"),
    [
        (0.0, 0.0, []),
        (-0.3, -0.3, ["worse than one Gaussian"]),
        (-0.3, 0.5, ["worse than one Gaussian", "far better on training rows"]),
        (0.3, 1.2, ["far better on training rows"]),
        (0.0, 0.08, []),
    ],
)
def test_a_model_that_is_no_better_than_a_gaussian_or_that_memorised_rows_is_told(
    tmp_path: Path, test: float, train: float, said: list[str]
) -> None:
    scorer = scorer_of(prepared(tmp_path / "mine", normal_parts(x=(0.0, 1.0))))
    gains = {"test": test, "val": test, "train": train}
    gaussian = {part: np.asarray(scorer.moments.log_prob(scorer.scored[part])) for part in gains}
    each = {Cell("cfm", 0): scored({part: gaussian[part] + gains[part] for part in gains}, "the solver is coarse.")}
    numbers = scorer.nll(next(iter(each.values())).log_prob)
    found = evaluation._warnings(each, numbers, scorer)
    assert found[0] == "the solver is coarse."
    assert [next((word for word in said if word in one), one) for one in found[1:]] == said


def test_the_constant_of_a_tilt_rests_on_equal_parts_of_the_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(prepared(tmp_path / "mine", normal_parts(100, x=(0.0, 1.0))), rows=50)

    def load(file: Path, *_: Any, **__: Any) -> SimpleNamespace:
        seed = float(file.stem.removeprefix("seed"))
        return SimpleNamespace(sample=lambda shape, cond, generator: torch.full((*shape, 1), seed))

    monkeypatch.setattr(evaluation.density, "load", load)
    found, count = np.unique(scorer.draws([Cell("cfm", seed) for seed in range(3)]), return_counts=True)
    assert found.tolist() == [0, 1, 2]
    assert set(count) == {-(-evaluation.DRAWS // 3)}


def test_samples_have_the_conditions_of_validation_rows_for_every_method(tmp_path: Path) -> None:
    parts = normal_parts(n=60, x=(0.0, 1.0))
    for seed, table in enumerate(parts.values()):
        table["age"] = np.random.default_rng(seed).normal(size=60)
    made = prepared(tmp_path / "mine", parts, [AGE])
    found = rows.conditions(PARAMS, "mine", made.part("val"))
    assert len(found) == PARAMS.density.sample.samples
    assert sorted(found.table["age"][:60]) == sorted(parts["val"]["age"])


# ---- the stages, on models of random weights ----


def scores_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Sample and score two networks of two columns given a word; return metrics, samples and particles."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLOWMATCH_CORES", "1")
    rng = np.random.default_rng(0)
    parts: dict[str, Table] = {}
    for part in layout.PARTS:
        word, values = rng.integers(0, 2, 40), rng.normal(size=(2, 40))
        parts[part] = {names[0]: 6e6 + values[0] + word, names[1]: values[1], "species": np.array(["a", "b"])[word]}
    prepared(layout.prepared("mine"), parts, [SPECIES])
    config = build.network_config(NetworkChoice.model_validate({"name": "mlp", "hidden": [8]}), 2, 2)
    units = torch.tensor([6e6, 0.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for seed in (0, 1):
        torch.manual_seed(seed)
        file = layout.network(layout.models("mine", "cfm"), seed)
        described = {"network": config, "path": {"name": "cond_ot"}, "prediction": "velocity", "chosen_step": 50}
        saved.save(file, build.network(config), *units, {**described, "conditions": [SPECIES]})
    methods = {"cfm": PARAMS.density.methods["cfm"]}
    mixtures = {"both": MixtureRow(methods=("cfm",)), "tilted": MixtureRow(methods=("cfm",), tilt=True)}
    update = {
        "methods": methods,
        "mixtures": mixtures,
        "seeds": (0, 1),
        "sample": PARAMS.density.sample.model_copy(update={"samples": 60}),
    }
    changes = {"density": PARAMS.density.model_copy(update=update)}
    stage = Stage("test", PARAMS.model_copy(update={**changes, "device": "cpu"}), RunRecord.start("test", {}))
    density_sampling.sample(stage, "mine")
    evaluation.evaluate(stage, "mine")
    samples = pd.read_parquet(layout.sampled(layout.samples("mine"), "cfm"))
    particles = pd.read_parquet(layout.trajectory(layout.samples("mine"), "cfm"))
    assert not layout.field(layout.samples("mine"), "cfm").exists()  # it depends on the condition
    return files.read_json(layout.metrics("mine")), samples, particles


def test_a_conditional_model_is_sampled_and_scored_and_no_name_of_a_column_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, samples, particles = scores_of(tmp_path / "a", monkeypatch, ["x", "y"])
    assert list(samples) == ["x", "y", "species", "seed"] and list(particles) == ["x", "y", "time"]
    assert (samples["species"][:60].to_numpy() == samples["species"][60:].to_numpy()).all()
    assert samples["x"].dtype == np.float64 and samples["x"].nunique() > 100  # no digits are lost near 6e6
    assert metrics["cfm"]["chosen_step"] == 50 and metrics["cfm x2"]["mixture_of"] == "cfm"
    assert metrics["cfm x2"]["nll"] <= metrics["cfm"]["nll"]
    assert metrics["both"] == metrics["cfm x2"] and "tilted" not in metrics  # no weights were tempered
    assert metrics["cfm"]["nll_seed_error"] == pytest.approx(metrics["cfm"]["nll_std"] / np.sqrt(2))
    assert metrics["cfm"]["parameters"] == metrics["both"]["parameters"] / 2 > 0
    assert metrics["cfm"]["nfe"] > PARAMS.density.evaluate.steps
    rows_ = pd.read_parquet(layout.log_prob(layout.evaluations("mine")))
    assert list(rows_) == ["row", "method", "seed", "log_prob"] and len(rows_) == 2 * 40
    assert -rows_["log_prob"].mean() == pytest.approx(metrics["cfm"]["nll"])
    other, renamed, moved = scores_of(tmp_path / "b", monkeypatch, ["seed", "time"])
    assert list(renamed) == ["seed", "time", "species", "seed_"] and list(moved) == ["seed", "time", "time_"]
    assert other == metrics
    for one, two in ((samples, renamed), (particles, moved)):
        assert (one.to_numpy() == two.to_numpy()).all()
