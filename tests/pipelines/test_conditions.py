"""Conditions: their vectors against those computed by hand, and one sentence for every value that cannot be one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.base import metric_keys
from pipelines.base.errors import UserError
from pipelines.models.conditions import Conditions

HEIGHT = {"name": "height", "kind": "number", "loc": 6e6, "scale": 2.0, "low": 6e6 - 3, "high": 6e6 + 3}
SPECIES = {"name": "species", "kind": "words", "levels": ["Adelie", "Gentoo", "NaN bird"]}
BOTH = Conditions((HEIGHT, SPECIES))
ROWS = pd.DataFrame({"species": ["Gentoo", "Adelie"], "other": [0, 0], "height": [6e6 + 1, 6e6 - 2]})


def test_numbers_are_standardised_in_double_precision_and_words_are_one_hot() -> None:
    assert (BOTH.size, BOTH.names) == (4, ["height", "species"])
    vectors = BOTH.encode(ROWS)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [[0.5, 0, 1, 0], [-1, 1, 0, 0]])


def test_no_conditions_are_a_vector_of_length_zero() -> None:
    none = Conditions(())
    assert (none.size, none.names, none.encode(ROWS).shape) == (0, [], (2, 0))
    assert none.table({}, 3).shape == (3, 0)
    assert none.parse({}) == {}


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["Gentoo", "Adelie"], dtype="category"),
        pd.Series(["Gentoo", "Adelie"], dtype="string"),
        np.array(["Gentoo", "Adelie"]),
    ],
)
def test_words_of_any_pandas_type_are_the_same_words(column: Any) -> None:
    np.testing.assert_array_equal(BOTH.encode(ROWS.assign(species=column)), BOTH.encode(ROWS))


def test_booleans_are_the_words_of_python_and_numbers_may_be_nullable() -> None:
    flag = Conditions(({"name": "flag", "kind": "words", "levels": ["False", "True"]},))
    np.testing.assert_array_equal(flag.encode(pd.DataFrame({"flag": [True, False]})), [[0, 1], [1, 0]])
    height = pd.Series([6_000_001, 5_999_998], dtype="Int64")
    np.testing.assert_array_equal(BOTH.encode(ROWS.assign(height=height)), BOTH.encode(ROWS))


def test_values_of_the_shell_take_their_types_and_become_rows() -> None:
    values = BOTH.parse({"species": "Gentoo", "height": "6000001"})
    assert values == {"height": 6000001.0, "species": "Gentoo"}
    rows = BOTH.table(values, 3)
    np.testing.assert_array_equal(BOTH.encode(rows), [[0.5, 0, 1, 0]] * 3)


def test_a_number_outside_the_range_of_training_is_accepted_with_a_sentence() -> None:
    assert BOTH.warnings(ROWS) == []
    far = ROWS.assign(height=[6e6, 6e6 + 4])
    (sentence,) = BOTH.warnings(far)
    assert "'height'" in sentence
    assert "1 of 2 rows" in sentence
    assert BOTH.encode(far)[1, 0] == 2


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"species": ["Gentoo", "Gento"]}, ["'species'", "'Gento'", "never saw", "did you mean 'Gentoo'?"]),
        ({"species": ["Gentoo", "gull"]}, ["'gull'", "Adelie, Gentoo, NaN bird"]),
        ({"species": ["Gentoo", None]}, ["'species'", "missing in 1 of 2 rows"]),
        ({"height": [6e6, np.nan]}, ["'height'", "missing in 1 of 2 rows"]),
        ({"height": [6e6, np.inf]}, ["'height'", "inf", "finite"]),
        ({"height": [6e6, "tall"]}, ["'height'", "'tall'", "number"]),
    ],
)
def test_a_value_that_is_no_condition_ends_in_a_sentence(change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        BOTH.encode(ROWS.assign(**change))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert str(error.value).endswith((".", "?"))


def test_a_table_without_the_column_names_it_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'species'.*did you mean 'specie'\?"):
        BOTH.encode(ROWS.rename(columns={"species": "specie"}))
    with pytest.raises(UserError, match="2 such columns"):
        BOTH.encode(pd.concat([ROWS, ROWS[["species"]]], axis=1))


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ({"specis": "Gentoo", "height": "1"}, "did you mean 'species'?"),
        ({"species": "Gentoo"}, "'height' is not given"),
        ({"species": "Gentoo", "height": "tall"}, "'tall', expected a finite number"),
        ({"species": "Gentoo", "height": "nan"}, "'nan', expected a finite number"),
        ({"species": "gentoo", "height": "1"}, "did you mean 'Gentoo'?"),
    ],
)
def test_text_that_is_no_condition_ends_in_a_sentence(where: dict[str, str], part: str) -> None:
    with pytest.raises(UserError) as error:
        BOTH.parse(where)
    assert part in str(error.value)


def test_internal_columns_never_have_the_name_of_a_users_column() -> None:
    assert metric_keys.free("seed", ["x"]) == "seed"
    assert metric_keys.free("seed", ["seed", "seed_", "time"]) == "seed__"
