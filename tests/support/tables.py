"""Public tables that packages ship, as a user would write and describe them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class PublicTable:
    """A table, the file that it is written to, and its entry in params.yaml.

    Attributes:
        load: Function that returns the table.
        file: Name of its file, whose ending is its format.
        entry: Keys of the entry besides `kind` and `file`.
        refused: Words of the sentence that it ends in; none if it works.
        options: Arguments of pandas's function that writes it.
    """

    load: Callable[[], pd.DataFrame]
    file: str
    entry: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: {"index": False})

    def write(self, folder: Path) -> pd.DataFrame:
        """Write the file and return the table."""
        table = self.load()
        write = table.to_parquet if self.file.endswith("parquet") else table.to_csv
        write(folder / self.file, **self.options)
        return table


def penguins() -> pd.DataFrame:
    """Return the measurements of 344 penguins."""
    table: pd.DataFrame = import_module("palmerpenguins").load_penguins()
    return table


def vega(name: str) -> Callable[[], pd.DataFrame]:
    """Return a function that loads a table of vega_datasets."""

    def load() -> pd.DataFrame:
        table: pd.DataFrame = getattr(import_module("vega_datasets").local_data, name)()
        return table

    return load


def statsmodels(name: str) -> Callable[[], pd.DataFrame]:
    """Return a function that loads a table of statsmodels."""

    def load() -> pd.DataFrame:
        table: pd.DataFrame = import_module(f"statsmodels.datasets.{name}").load_pandas().data
        return table

    return load


def sklearn(name: str) -> Callable[[], pd.DataFrame]:
    """Return a function that loads a table of scikit-learn."""

    def load() -> pd.DataFrame:
        table: pd.DataFrame = getattr(import_module("sklearn.datasets"), f"load_{name}")(as_frame=True).frame
        return table

    return load


def tables() -> dict[str, PublicTable]:
    """Return the tables by name."""
    semicolons = {"index": False, "sep": ";", "decimal": ",", "encoding": "latin-1"}
    return {
        "penguins": PublicTable(penguins, "penguins.csv", {"condition": ["species", "sex"], "missing": "drop"}),
        "penguins_alone": PublicTable(penguins, "penguins.csv", refused=("2 of 344 rows", "missing: drop")),
        "penguins_discrete": PublicTable(
            penguins,
            "penguins.parquet",
            {"discrete": {"year": "uniform", "island": "steps", "body_mass_g": "steps"}, "missing": "drop"},
        ),
        "cars": PublicTable(
            vega("cars"), "cars.csv", {"condition": "Origin", "discrete": {"Cylinders": "uniform"}, "missing": "drop"}
        ),
        "cars_by_year": PublicTable(vega("cars"), "cars.parquet", {"split": {"time": "Year"}, "missing": "drop"}),
        "iris": PublicTable(vega("iris"), "iris.tsv", {"condition": "species"}, options={"index": False, "sep": "\t"}),
        "airports": PublicTable(vega("airports"), "airports.parquet"),
        "airports_by_state": PublicTable(
            vega("airports"), "airports.parquet", {"condition": "state", "missing": "drop"}
        ),
        "anscombe": PublicTable(vega("anscombe"), "anscombe.csv", {"condition": "Series"}, options=semicolons),
        "barley": PublicTable(vega("barley"), "barley.csv", {"columns": "yield", "condition": ["variety", "year"]}),
        "burtin": PublicTable(vega("burtin"), "burtin.csv"),
        "driving": PublicTable(vega("driving"), "driving.csv", {"columns": ["miles", "gas"], "condition": "side"}),
        "ohlc": PublicTable(vega("ohlc"), "ohlc.csv", {"split": {"time": "date"}}),
        "seattle_weather": PublicTable(
            vega("seattle_weather"), "weather.csv", {"condition": "weather", "split": {"time": "date"}}
        ),
        "sf_temps": PublicTable(vega("sf_temps"), "temps.parquet"),
        "stocks": PublicTable(vega("stocks"), "stocks.csv", {"condition": "symbol"}),
        "us_employment": PublicTable(vega("us_employment"), "employment.csv"),
        "wheat": PublicTable(vega("wheat"), "wheat.csv", refused=("wages", "missing: drop")),
        "wine": PublicTable(sklearn("wine"), "wine.parquet", {"condition": "target"}),
        "wine_marginals": PublicTable(sklearn("wine"), "wine.csv", {"condition": "target", "transform": "marginals"}),
        "breast_cancer": PublicTable(sklearn("breast_cancer"), "cancer.csv", options={}),
        "diabetes": PublicTable(sklearn("diabetes"), "diabetes.csv", {"columns": ["bmi", "bp"], "condition": "target"}),
        "linnerud": PublicTable(sklearn("linnerud"), "linnerud.csv"),
        "co2": PublicTable(statsmodels("co2"), "co2.csv", {"missing": "drop"}, options={}),
        "fair": PublicTable(statsmodels("fair"), "fair.parquet", {"columns": ["age", "affairs"]}),
        "fertility": PublicTable(statsmodels("fertility"), "fertility.csv", refused=("lack a value", "missing: drop")),
        "grunfeld": PublicTable(
            statsmodels("grunfeld"), "grunfeld.csv", {"columns": ["invest", "value", "capital"], "condition": "firm"}
        ),
        "macrodata": PublicTable(
            statsmodels("macrodata"),
            "macro.csv",
            {"columns": ["infl", "unemp", "realint"], "split": {"time": "year", "val": 0.2, "test": 0.2}},
        ),
        "randhie": PublicTable(statsmodels("randhie"), "randhie.parquet", {"discrete": {"mdvis": "steps"}}),
        "spector": PublicTable(
            statsmodels("spector"), "spector.csv", {"columns": ["GPA", "TUCE"], "condition": "GRADE"}
        ),
        "sunspots": PublicTable(statsmodels("sunspots"), "sunspots.csv"),
    }
