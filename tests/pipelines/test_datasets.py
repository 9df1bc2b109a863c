"""Data sets: densities against integrals and samples, dequantisation, published baselines, bad input."""

from __future__ import annotations

import math
import shutil
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pipelines import datasets
from pipelines.base import plugins
from pipelines.base.errors import UserError
from pipelines.datasets import Dataset, checkerboard, digits, eight_gaussians, miniboone, moons, normal, s_curve

GENERATED = [moons, eight_gaussians, checkerboard, s_curve, normal]
WITH_DENSITY = [eight_gaussians, checkerboard, normal]
MIRROR = Path(__file__).parents[3] / "shared" / "data"

needs_mirror = pytest.mark.skipif(
    not (MIRROR / "maf").is_dir(), reason=f"the local mirror of real data is not at {MIRROR}"
)


def build(member: ModuleType, seed: int = 0, **settings: Any) -> Dataset:
    data: Dataset = member.build(member.Settings(**settings), rng=np.random.default_rng(seed), mirror=None)
    return data


@pytest.mark.parametrize("member", [*GENERATED, digits], ids=lambda m: m.__name__)
def test_the_seed_decides_every_row(member: ModuleType) -> None:
    one, same, other = build(member, 0), build(member, 0), build(member, 1)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(one, part), getattr(same, part))
        assert (getattr(one, part) != getattr(other, part)).all()


@pytest.mark.parametrize("member", GENERATED, ids=lambda m: m.__name__)
def test_parts_have_their_sizes_and_share_no_row(member: ModuleType) -> None:
    data = build(member, train=300, val=200, test=100)
    assert [len(part) for part in (data.train, data.val, data.test)] == [300, 200, 100]
    assert len(np.unique(np.concatenate([data.train, data.val, data.test]), axis=0)) == 600


@pytest.mark.parametrize("member", WITH_DENSITY, ids=lambda m: m.__name__)
def test_density_integrates_to_one(member: ModuleType) -> None:
    # Midpoint rule on a grid whose lines include the edges of the checkerboard's squares.
    edges = np.linspace(-9, 9, 361)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
    mass = np.exp(member.log_prob(member.Settings(), grid)).sum() * (edges[1] - edges[0]) ** 2
    assert mass == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("member", "change"),
    [
        (eight_gaussians, {}),
        (eight_gaussians, {"radius": 2.0, "noise": 0.9}),
        (checkerboard, {}),
        (checkerboard, {"squares": 8, "half_width": 2.0}),
        (normal, {}),
        (normal, {"deviation": 1.7}),
    ],
)
def test_samples_follow_the_density(member: ModuleType, change: dict[str, Any]) -> None:
    settings = member.Settings(train=40_000, val=1, test=1, **change)
    x = member.build(settings, rng=np.random.default_rng(0), mirror=None).train
    # Pearson's test of counts in squares of side 1/2, the rare ones together, against the density's mass.
    fine = np.linspace(-9, 9, 361)
    middle = (fine[1:] + fine[:-1]) / 2
    grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
    mass = np.exp(member.log_prob(settings, grid)) * (fine[1] - fine[0]) ** 2
    expected, *_ = np.histogram2d(*grid.T, bins=36, range=[[-9, 9]] * 2, weights=mass)
    counts, *_ = np.histogram2d(*x.T, bins=36, range=[[-9, 9]] * 2)
    expected *= len(x)
    assert counts[expected == 0].sum() == 0
    seldom = expected < 5
    observed = np.append(counts[~seldom], counts[seldom].sum())
    predicted = np.append(expected[~seldom], expected[seldom].sum() + 1e-9)
    statistic = ((observed - predicted) ** 2 / predicted).sum()
    assert stats.chi2.sf(statistic, len(observed) - 1) > 1e-4
    assert np.isfinite(member.log_prob(settings, x)).all()


def test_entropy_of_the_checkerboard_is_the_log_of_its_area() -> None:
    settings = checkerboard.Settings(train=10, val=1, test=1)
    x = checkerboard.build(settings, rng=np.random.default_rng(0), mirror=None).train
    np.testing.assert_allclose(-checkerboard.log_prob(settings, x), math.log(32), atol=1e-15)


def test_entropy_of_far_gaussians() -> None:
    settings = eight_gaussians.Settings(train=200_000, val=1, test=1, radius=50.0, noise=0.3)
    x = eight_gaussians.build(settings, rng=np.random.default_rng(0), mirror=None).train
    expected = math.log(8) + 1 + math.log(2 * math.pi * 0.3**2)
    # The log density of a 2-d Gaussian has standard deviation 1.
    assert -eight_gaussians.log_prob(settings, x).mean() == pytest.approx(expected, abs=4 / 200_000**0.5)


def test_moons_without_noise_lie_on_two_half_circles() -> None:
    x = build(moons, train=4000, val=1, test=1, noise=0.0, scale=1.0).train + np.array([0.5, 0.0])
    upper = np.abs(np.hypot(*x.T) - 1) < 1e-12
    lower = np.abs(np.hypot(x[:, 0] - 1, x[:, 1] - 0.5) - 1) < 1e-12
    assert (upper | lower).all()
    assert (x[upper & ~lower, 1] >= 0).all()
    assert (x[lower & ~upper, 1] <= 0.5).all()
    assert abs(upper.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    angle = np.arctan2(x[upper & ~lower, 1], x[upper & ~lower, 0])
    assert stats.kstest(angle, "uniform", (0, np.pi)).pvalue > 1e-4


def test_noise_of_the_moons_has_its_variance_after_scaling() -> None:
    quiet, loud = (build(moons, train=50_000, val=1, test=1, noise=noise).train for noise in (0.0, 0.3))
    noise = loud - quiet  # the same seed draws the same points
    np.testing.assert_allclose(noise.std(0), 0.6, rtol=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_s_curve_is_that_of_scikit_learn(noise: float) -> None:
    from sklearn.datasets import make_s_curve

    x = build(s_curve, train=20_000, val=1, test=1, noise=noise, scale=1.0).train
    y = make_s_curve(20_000, noise=noise, random_state=0)[0][:, [0, 2]]
    for direction in ([1, 0], [0, 1], [1, 1], [1, -1]):
        assert stats.ks_2samp(x @ direction, y @ direction).pvalue > 1e-3


@pytest.mark.parametrize("member", [moons, s_curve], ids=lambda m: m.__name__)
def test_deviation_centres_and_scales_all_coordinates_together(member: ModuleType) -> None:
    plain, scaled = (build(member, noise=0.1, deviation=deviation) for deviation in (None, 7.0))
    rows = np.concatenate([scaled.train, scaled.val, scaled.test])
    assert rows.mean() == pytest.approx(0, abs=1e-12)
    assert rows.std() == pytest.approx(7)
    assert rows.std(0).max() > 7.5  # one factor for both coordinates, so that the shape stays
    ratio = (scaled.train - scaled.train[0])[1:] / (plain.train - plain.train[0])[1:]
    np.testing.assert_allclose(ratio, ratio[0, 0])


def test_digits_round_back_to_the_shipped_pixels() -> None:
    from sklearn.datasets import load_digits

    data = build(digits)
    every = np.concatenate([data.test, data.val, data.train])
    assert (every >= 0).all()
    assert (every < 1).all()
    pixels = np.floor(every * data.discrete_bins).astype(int)
    shipped = load_digits().data.astype(int)
    assert (pixels.min(), pixels.max()) == (0, 16)
    assert sorted(map(tuple, pixels)) == sorted(map(tuple, shipped))
    noise = every * 17 - pixels
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-4


def test_digits_hold_the_same_images_out_for_every_seed() -> None:
    one, other = (np.floor(build(digits, seed).test * 17) for seed in (0, 1))
    np.testing.assert_array_equal(one, other)


def test_digits_follow_the_convention_of_bits_per_dimension() -> None:
    # A density that is constant on each level needs as many bits as the levels have entropy.
    x = build(digits).train
    bins = build(digits).discrete_bins
    assert bins is not None
    levels = np.floor(x * bins).astype(int)
    probability = np.bincount(levels.ravel()) / levels.size
    nll_per_dimension = -np.log(probability[levels] * bins).mean()
    bits = nll_per_dimension / math.log(2) + math.log2(bins)
    shipped = np.unique(np.floor(x * 17), return_counts=True)[1] / x.size
    assert bits == pytest.approx(stats.entropy(shipped, base=2), abs=1e-12)


@needs_mirror
def test_miniboone_gaussian_baseline_is_the_published_one() -> None:
    """A weighted full-covariance Gaussian scores -37.34 nats; the MAF paper gives -37.24 +- 1.07."""
    data = miniboone.build(miniboone.Settings(weight_exponent=1.0), rng=np.random.default_rng(0), mirror=MIRROR)
    assert data.weight is not None
    assert data.weight.mean() == pytest.approx(1)
    mean = np.average(data.train, axis=0, weights=data.weight)
    gaussian = stats.multivariate_normal(mean, np.cov(data.train.T, aweights=data.weight))
    assert gaussian.logpdf(data.test).mean() == pytest.approx(-37.34, abs=0.01)
    unweighted = stats.multivariate_normal(data.train.mean(0), np.cov(data.train.T))
    assert unweighted.logpdf(data.test).mean() == pytest.approx(-38.38, abs=0.01)


@needs_mirror
@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_miniboone_weights_are_tempered(exponent: float) -> None:
    settings = miniboone.Settings(weight_exponent=exponent)
    data = miniboone.build(settings, rng=np.random.default_rng(0), mirror=MIRROR)
    assert data.weight is not None
    heavy = data.weight.max() / data.weight.min()
    assert heavy == pytest.approx(19.424898**exponent, rel=1e-6)
    assert np.unique(data.weight).size == (1 if exponent == 0 else 2)


def sentence(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert text.endswith(".")
    assert "\n" not in text


@needs_mirror
@pytest.mark.parametrize("name", ["miniboone_val.npy", "miniboone_test.npy", "miniboone_train_partial.npz"])
@pytest.mark.parametrize("damage", ["cut", "flip", "text", "pickle", "empty"])
def test_miniboone_names_a_damaged_file(tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(MIRROR / "maf", tmp_path / "maf")
    path = tmp_path / "maf" / name
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 3
        content[middle : middle + 8] = bytes(8)
        path.write_bytes(content)
    elif damage == "pickle":
        with path.open("wb") as file:
            np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        path.write_text("not an array" if damage == "text" else "")
    with pytest.raises(UserError) as error:
        miniboone.build(miniboone.Settings(), rng=np.random.default_rng(0), mirror=tmp_path)
    sentence(error, str(path), "expected", "mirror")


def dataset(**change: Any) -> Dataset:
    part = np.zeros((4, 2))
    fields: dict[str, Any] = {"train": part, "val": part, "test": part, "columns": ["height", "width"]}
    fields |= {"source": "the source", "licence": "none", "fidelity": "subset"}
    return Dataset(**(fields | change))


def test_not_finite_rows_are_refused_by_column_and_count() -> None:
    for value in (np.nan, np.inf):
        bad = np.zeros((4, 2))
        bad[1:3, 1] = value
        for part in ("train", "val", "test"):
            with pytest.raises(UserError) as error:
                dataset(**{part: bad})
            sentence(error, "'width'", part, "2 of 4 rows", "the source", "finite")


def test_wrong_shapes_and_weights_are_refused() -> None:
    assert dataset(weight=np.ones(4)).weight is not None
    for change in ({"train": np.zeros((4, 3))}, {"val": np.zeros((0, 2))}, {"test": np.zeros(4)}):
        with pytest.raises(UserError) as error:
            dataset(**change)
        sentence(error, "2 columns", "the source")
    for weight in (np.ones(3), np.array([1, 1, 1, -1.0]), np.array([1, 1, 1, np.nan])):
        with pytest.raises(UserError) as error:
            dataset(weight=weight)
        sentence(error, "weights of the source")


VALUES = np.array([[1.0, 6e6 + 0.25], [2.0, 6e6 + 0.5], [3.0, 6e6 + 0.75], [4.0, 6e6 + 1]])


@pytest.mark.parametrize(
    "rows",
    [
        VALUES.tolist(),
        VALUES.astype(object),
        [tuple(row) for row in VALUES],
        torch.tensor(VALUES, requires_grad=True),
        pd.DataFrame(VALUES, columns=["height", "width"]),
        pd.DataFrame(VALUES[:, ::-1], columns=["width", "height"]),
        pd.DataFrame(VALUES, columns=["height", "width"], index=[9, 8, 7, 9]).astype("Float64"),
        pd.DataFrame(VALUES, columns=["height", "width"]).astype(object),
        pd.DataFrame(VALUES, columns=["height", "width"]).map(Decimal),
        pd.DataFrame(VALUES, columns=["height", "width"]).astype({"height": "int8"}),
        pd.DataFrame(VALUES, columns=["height", "width"]).astype({"height": "category"}),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_any_library_become_double_precision(rows: Any) -> None:
    for columns in (
        ["height", "width"],
        ("height", "width"),
        np.array(["height", "width"]),
        pd.Index(["height", "width"]),
    ):
        data = dataset(train=rows, columns=columns)
        assert data.train.dtype == np.float64
        np.testing.assert_array_equal(data.train, VALUES)
        assert data.columns == ["height", "width"]


def test_large_parts_are_handed_out_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_CHUNK_BYTES", 8 * 2 * 30)
    monkeypatch.setattr(datasets, "_LEAST_ROWS", 20)
    train, weight = np.random.default_rng(0).normal(size=(100, 2)), np.arange(1.0, 101)
    parts = dataset(train=train, test=train[:40], weight=weight).parts()
    chunks = list(parts.chunks("train"))
    assert [len(chunk) for chunk in chunks] == [30, 30, 30, 10]
    np.testing.assert_array_equal(pd.concat(chunks), np.column_stack([train, weight]))
    np.testing.assert_array_equal(pd.concat(parts.chunks("test")), train[:40])


def test_integers_booleans_and_single_columns_are_rows() -> None:
    for rows in (np.arange(8).reshape(4, 2), torch.arange(8).reshape(4, 2), torch.arange(8.0).reshape(4, 2).bfloat16()):
        np.testing.assert_array_equal(dataset(train=rows).train, np.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(dataset(train=np.eye(2, dtype=bool)).train, np.eye(2))
    one: dict[str, Any] = {part: np.arange(4.0) for part in ("train", "val", "test")}
    for column in (np.arange(4.0), pd.Series(np.arange(4)), list(range(4)), torch.arange(4)):
        assert dataset(**{**one, "train": column}, columns=[0]).train.shape == (4, 1)
    assert dataset(**one, columns=pd.RangeIndex(1)).columns == ["0"]
    weight = pd.Series([1, 1, 2, 0.5], index=[3, 1, 2, 0])
    np.testing.assert_array_equal(dataset(weight=weight).weight, [1, 1, 2, 0.5])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train": pd.DataFrame(VALUES, columns=["height", "weight"])}, ["'weight'", "expected 'height', 'width'"]),
        ({"train": pd.DataFrame(VALUES, columns=["width", "width"])}, ["'width', 'width'"]),
        ({"columns": ["width", "width"]}, ["'width' twice"]),
        ({"columns": [0, "0"]}, ["'0' twice"]),
        ({"train": [["a", "b"]]}, ["train rows of the source", "numbers", "kind: table"]),
        ({"train": pd.DataFrame({"height": ["a"], "width": [1.0]})}, ["column 'height'", "'a'", "kind: table"]),
        ({"train": pd.DataFrame({"height": [1.0, None], "width": [1.0, 1]})}, ["'height'", "1 of 2 rows"]),
        (
            {"train": pd.DataFrame({"height": pd.array([1, None], dtype="Int64"), "width": [1.0, 1]})},
            ["'height'", "1 of 2 rows"],
        ),
        ({"train": [[1.0, 2.0], [3.0]]}, ["train rows", "rectangle"]),
        ({"train": VALUES + 1j}, ["real numbers"]),
        ({"train": np.zeros((4, 2, 1))}, ["shape (4, 2, 1)"]),
        ({"train": np.zeros(4)}, ["shape (4,)"]),
        ({"train": None}, ["train rows"]),
        ({"weight": ["a"] * 4}, ["weights of the source", "numbers"]),
    ],
)
def test_rows_that_cannot_be_read_as_numbers_are_named(change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        dataset(**change)
    sentence(error, *parts)


def test_a_plugin_that_returns_no_data_set_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(moons, "build", lambda *_, **__: (VALUES, VALUES, VALUES))
    with pytest.raises(UserError) as error:
        datasets.build(
            "moons", moons.Settings.model_validate({}), rng=np.random.default_rng(0), mirror=None, scratch=tmp_path
        )
    sentence(error, "'moons'", "tuple", "Dataset")


@pytest.mark.parametrize("name", plugins.names("pipelines.datasets"))
def test_settings_refuse_unknown_keys_and_describe_theirs(name: str) -> None:
    settings = plugins.load("pipelines.datasets", name).Settings
    with pytest.raises(ValueError, match="nosie"):
        settings(nosie=1)
    assert all(field.description for field in settings.model_fields.values())


@pytest.mark.parametrize(
    ("member", "change"),
    [
        (moons, {"noise": -0.1}),
        (moons, {"train": 0}),
        (eight_gaussians, {"noise": 0.0}),
        (checkerboard, {"squares": 5}),
        (digits, {"test": 0}),
        (miniboone, {"weight_exponent": 1.5}),
    ],
)
def test_settings_refuse_values_out_of_range(member: ModuleType, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        member.Settings(**change)
