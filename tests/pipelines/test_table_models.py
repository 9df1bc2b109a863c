"""A trained density on DataFrames: the user's columns, units and types, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from flowmatch_core.flow import Flow
from pipelines.base.errors import UserError
from pipelines.models import tables
from pipelines.models.tables import DensityModel

LOC, SCALE = np.array([6e6, 2007.5, 1.2]), np.array([0.3, 1.5, 0.7])
SHIFT = 0.1  # of the first column, per unit of the encoded conditions
LEVELS = ["blue", "red", "self"]
META: dict[str, Any] = {
    "columns": ["northing", "year", "colour"],
    "types": {"northing": "float", "year": "integer", "colour": "text", "size": "float", "place": "text"},
    "discrete": {
        "year": {"how": "uniform", "low": 2000, "levels": None},
        "colour": {"how": "uniform", "low": 0, "levels": LEVELS},
    },
    "constants": {"self": "x", "unit": 3},
    "conditions": [
        {"name": "size", "kind": "number", "loc": 10.0, "scale": 2.0, "low": 0.0, "high": 20.0},
        {"name": "place", "kind": "words", "levels": ["here", "there"]},
    ],
}
GIVEN = {"size": 12.0, "place": "there"}
MEAN = LOC + np.array([SHIFT * (1.0 + 1.0), 0, 0])  # given GIVEN, which is encoded as (1, 0, 1)


class Normal(Flow):
    """Independent normals, the first of which moves with the sum of the conditions."""

    def __init__(self) -> None:
        super().__init__((3,), (3,))

    def _mean(self, cond: Any) -> Tensor:
        shift: Tensor = SHIFT * cond.double().sum(-1, keepdim=True) * torch.tensor([1.0, 0, 0]).double()
        return torch.as_tensor(LOC) + shift

    def sample(
        self, sample_shape: Sequence[int] = (), cond: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        mean = self._mean(cond)
        noise = torch.randn(*sample_shape, *mean.shape, generator=generator, dtype=torch.float64)
        drawn: Tensor = mean + noise * torch.as_tensor(SCALE)
        return drawn

    def log_prob(self, value: Tensor, cond: Any = None, *, generator: torch.Generator | None = None) -> Tensor:
        z = (value - self._mean(cond)) / torch.as_tensor(SCALE)
        return -(z.square() / 2 + torch.as_tensor(SCALE).log() + math.log(2 * math.pi) / 2).sum(-1)


@pytest.fixture
def model() -> DensityModel:
    return DensityModel(Normal(), META, torch.device("cpu"))


def rows(**changes: Any) -> pd.DataFrame:
    table: dict[str, Any] = {
        "place": ["there", "there", "there"],
        "size": [12.0, 12.0, 12.0],
        "other": [None, 1, "words"],
        "colour": ["red", "self", "blue"],
        "year": [2007, 2008, 2009],
        "northing": [6e6, 6e6 + 0.25, 6e6 - 0.25],
    }
    return pd.DataFrame({**table, **changes}, index=[5, 3, 3])


def test_samples_have_the_columns_types_and_distribution_of_the_users_table(model: DensityModel) -> None:
    n = 20_000
    table = model.sample(n, GIVEN, torch.Generator().manual_seed(0))
    assert list(table) == ["northing", "year", "colour", "size", "place", "self", "unit"]
    assert len(table) == n
    assert table["year"].dtype == np.int64
    assert table["northing"].dtype == np.float64
    assert set(table["colour"]) == set(LEVELS)
    assert set(table["place"]) == {"there"}
    assert set(table["self"]) == {"x"}
    assert set(table["unit"]) == {3}
    assert table["northing"].nunique() > n / 2  # float32 has steps of half a metre there
    error = 5 * SCALE[0] / n**0.5
    assert abs(table["northing"].mean() - MEAN[0]) < error
    for year in (2006, 2007, 2008):  # the year that has begun
        p = stats.norm.cdf(year + 1, MEAN[1], SCALE[1]) - stats.norm.cdf(year, MEAN[1], SCALE[1])
        assert abs((table["year"] == year).mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    p = stats.norm.cdf(1, MEAN[2], SCALE[2])  # the first category takes what lies below it
    assert abs((table["colour"] == "blue").mean() - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_an_integer_that_was_modelled_as_continuous_is_rounded() -> None:
    model = DensityModel(Normal(), {**META, "discrete": {}, "types": {"year": "integer"}}, torch.device("cpu"))
    table = model.sample(9, GIVEN, torch.Generator().manual_seed(0))
    plain = model.sample((9,), torch.tensor([1.0, 0.0, 1.0]), torch.Generator().manual_seed(0))
    assert table["year"].tolist() == plain[:, 1].round().tolist()
    assert table["colour"].tolist() == plain[:, 2].tolist()


def test_rows_of_conditions_get_so_many_samples_each(model: DensityModel) -> None:
    conditions = pd.DataFrame({"place": ["here", "there"], "size": [1.0, 2.0]}, index=[7, 7])
    table = model.sample(3, conditions)
    assert table["size"].tolist() == [1.0] * 3 + [2.0] * 3
    assert table["place"].tolist() == ["here"] * 3 + ["there"] * 3


def test_log_densities_are_those_of_the_closed_form() -> None:
    continuous = {**META, "discrete": {"colour": META["discrete"]["colour"]}}
    model = DensityModel(Normal(), {**continuous, "types": {}}, torch.device("cpu"))
    found = model.log_prob(rows())
    assert found.index.tolist() == [5, 3, 3]
    table = rows()
    exact = stats.norm.logpdf(table[["northing", "year"]], MEAN[:2], SCALE[:2]).sum(-1)
    for place, (row, code) in enumerate(zip(found, (1, 2, 0), strict=True)):
        low, high = sorted(stats.norm.logpdf([code, code + 1], MEAN[2], SCALE[2]))
        peak = stats.norm.logpdf(MEAN[2], MEAN[2], SCALE[2])
        assert exact[place] + low < row < exact[place] + (peak if code == 1 else high)


def test_a_dequantised_row_has_the_mean_over_the_noise(model: DensityModel) -> None:
    def part(column: int, code: int) -> float:
        density = stats.norm(MEAN[column], SCALE[column])
        return float(integrate.quad(lambda u: density.logpdf(code + u), 0, 1)[0])

    exact = stats.norm.logpdf(6e6, MEAN[0], SCALE[0]) + part(1, 2007) + part(2, 1)
    table = pd.concat([rows().iloc[:1]] * 2000, ignore_index=True)
    found = model.log_prob(table, seed=3)
    assert found.nunique() > 1900
    assert abs(found.to_numpy().mean() - exact) < 5 * found.to_numpy().std() / 2000**0.5
    assert found.equals(model.log_prob(table, seed=3))
    assert not found.equals(model.log_prob(table, seed=4))


def test_batches_and_unused_columns_change_nothing(model: DensityModel, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows()
    whole, drawn = model.log_prob(table), model.sample(5, GIVEN, torch.Generator().manual_seed(0))
    assert whole.equals(model.log_prob(table.drop(columns="other")[list(reversed(table.columns.drop("other")))]))
    monkeypatch.setattr(tables, "ROWS", 2)
    done: list[tuple[int, int]] = []
    again = model.sample(5, GIVEN, torch.Generator().manual_seed(0), lambda *now: done.append(now))
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert len(again) == len(drawn)
    table.index = pd.Index([0.5, 2.5, 7.5])
    assert model.log_prob(table).tolist() == whole.tolist()


def test_a_row_that_has_no_score_says_why_and_is_nan(model: DensityModel) -> None:
    table = rows(
        northing=[6e6, np.nan, 6e6], year=pd.array([2007, 2008, None], "Int64"), colour=["green", "red", "red"]
    )
    found = model.problems(table).tolist()
    assert found == [
        "'colour' is 'green', which training never saw",
        "'northing' is missing",
        "'year' is missing",
    ]
    assert model.log_prob(table).isna().all()
    half = model.log_prob(rows(size=[12.0, np.inf, 12.0], place=["there", "there", None]))
    assert half.isna().tolist() == [False, True, True]
    assert half.iloc[0] == model.log_prob(rows().iloc[:1]).iloc[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.rename(columns={"colour": "color"}), r"no single column 'colour'.*; did you mean 'color'\?$"),
        (lambda t: pd.concat([t, t[["year"]]], axis=1), "no single column 'year', .* 2 such columns"),
        (lambda t: t.assign(northing=["a", "b", "c"]), "the column 'northing' holds .*expected numbers"),
    ],
)
def test_a_table_that_does_not_fit_is_a_sentence(model: DensityModel, change: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        model.log_prob(change(rows()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "cond", "sentence"),
    [
        (0, GIVEN, "the number of rows is 0, expected at least 1"),
        (1, {}, "the condition 'size' is not given"),
        (1, {**GIVEN, "plcae": 1}, "no condition 'plcae'.*did you mean 'place'"),
        (1, {"size": 3.0, "place": "nowhere"}, "'place' is 'nowhere', which training never saw; expected one of here"),
        (1, pd.DataFrame({"size": [3.0]}), "no single column 'place'"),
    ],
)
def test_conditions_that_do_not_fit_are_a_sentence(model: DensityModel, size: int, cond: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        model.sample(size, cond)
