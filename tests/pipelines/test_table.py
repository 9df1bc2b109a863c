"""`kind: table`: the rows of files as they are, by law the same for every format, chunk and name; else one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet
from scipy import stats

from flowmatch_core.marginals import Marginals
from pipelines import datasets
from pipelines.base import files, layout, tables
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.data import prepare
from pipelines.datasets import Parts, _rows, table
from pipelines.evaluation import density, density_sampling
from pipelines.runs import sources
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.training import density as training

ROOT = Path(__file__).parents[2]
RAW = ROOT / "data" / "raw" / "penguins.csv"
MEASURES = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / ".flowmatch"))


def read(seed: int = 0, **settings: Any) -> tuple[Parts, dict[str, pd.DataFrame]]:
    """The parts of a table and their rows."""
    settings.setdefault("file", "table.csv")
    scratch = Path("scratch")
    scratch.mkdir()
    try:
        parts = datasets.build(
            "table", table.Settings(**settings), rng=np.random.default_rng(seed), mirror=None, scratch=scratch
        )
        return parts, {part: pd.concat(list(parts.chunks(part)), ignore_index=True) for part in layout.PARTS}
    finally:
        shutil.rmtree(scratch)


def everything(rows: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([rows[part] for part in layout.PARTS], ignore_index=True)


def frame(n: int = 200, seed: int = 0) -> pd.DataFrame:
    """Two measures, a count, two words and a boolean."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "x": rng.normal(size=n).round(6),
            "y": rng.normal(6e6, 0.3, n),
            "count": rng.integers(0, 5, n),
            "colour": rng.choice(["red", "green", "größe"], n),
            "flag": rng.random(n) < 0.5,
        }
    )


def same(one: tuple[Parts, dict[str, pd.DataFrame]], other: tuple[Parts, dict[str, pd.DataFrame]]) -> None:
    for part in layout.PARTS:
        pd.testing.assert_frame_equal(one[1][part], other[1][part], check_exact=True)
    assert one[0].columns == other[0].columns
    assert (one[0].conditions, one[0].discrete) == (other[0].conditions, other[0].discrete)


def refuses(*words: str, **settings: Any) -> str:
    with pytest.raises((UserError, ValueError)) as error:
        read(**settings)
    text = str(error.value)
    assert "\n" not in text or not isinstance(error.value, UserError), text
    for word in words:
        assert word in text, text
    return text


def test_a_file_alone_models_its_numeric_columns_and_says_what_it_leaves_out() -> None:
    data = frame()
    data.to_csv("table.csv", index=False)
    parts, rows = read()
    assert parts.columns == ["x", "y", "count"]
    assert parts.types == {"x": "float", "y": "float", "count": "integer"}
    assert parts.rows == {"train": 160, "val": 20, "test": 20}
    assert any("words" in message and "'colour', 'flag'" in message for message in parts.messages)
    found = everything(rows)
    for name in parts.columns:  # every row once, bit for bit
        np.testing.assert_array_equal(np.sort(found[name]), np.sort(data[name].astype(float)))
    joint = data[["x", "y", "count"]].astype(float).sort_values("x").to_numpy()
    np.testing.assert_array_equal(found.sort_values("x").to_numpy(), joint)


def test_parts_are_drawn_by_the_seed_and_in_random_order() -> None:
    pd.DataFrame({"x": np.arange(5000) + 0.5}).to_csv("table.csv", index=False)
    split = {"val": 0.2, "test": 0.3}
    first, again, other = (read(seed, columns="x", split=split)[1] for seed in (0, 0, 1))
    for part, size in (("train", 2500), ("val", 1000), ("test", 1500)):
        pd.testing.assert_frame_equal(first[part], again[part])
        assert len(first[part]) == size
        assert not first[part].equals(other[part])
        values = first[part]["x"].to_numpy()
        assert stats.kstest(values / 5000, "uniform").pvalue > 1e-4
        assert stats.spearmanr(np.arange(size), values).pvalue > 1e-4


def test_neither_the_size_of_a_chunk_nor_the_format_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "columns": ["x", "colour"],
        "condition": ["flag", "y"],
        "weight": "x2",
        "discrete": {"colour": "uniform"},
    }
    for name, write in (("table.csv", "to_csv"), ("table.parquet", "to_parquet")):
        getattr(frame(800).assign(x2=lambda t: 1 + t["x"] ** 2), write)(name, index=False)
    whole = read(**settings)
    same(whole, read(file="table.parquet", **settings))
    monkeypatch.setattr(tables, "BLOCK", 700)
    monkeypatch.setattr(tables, "ROWS", 7)
    same(whole, read(**settings))
    same(whole, read(file="table.parquet", **settings))


def test_a_part_larger_than_its_memory_is_shuffled_through_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pd.DataFrame({"x": np.arange(4000) + 0.5, "y": np.arange(4000) % 2}).to_csv("table.csv", index=False)
    whole = read(columns=["x", "y"])[1]
    monkeypatch.setattr(_rows, "BUCKET", 2000)
    monkeypatch.setattr(_rows, "_READ", 100)
    rows = read(columns=["x", "y"])[1]
    for part in layout.PARTS:  # the same rows in another order
        assert sorted(map(tuple, rows[part].to_numpy())) == sorted(map(tuple, whole[part].to_numpy()))
    train = rows["train"]["x"].to_numpy()
    assert stats.spearmanr(np.arange(len(train)), train).pvalue > 1e-4
    assert stats.kstest(train[:400] / 4000, "uniform").pvalue > 1e-4


def csv(change: Callable[[str], str] = str, encoding: str = "utf-8", **options: Any) -> bytes:
    return change(frame()[["x", "y", "colour"]].to_csv(index=False, **options)).encode(encoding)


@pytest.mark.parametrize(
    "content",
    [
        csv(sep=";"),
        csv(sep="\t"),
        csv(sep="|"),
        csv(sep=";", decimal=","),
        csv(encoding="utf-8-sig"),
        csv(encoding="utf-16"),
        csv(encoding="latin-1"),
        csv(lambda text: text.replace("\n", "\r\n")),
        csv(lambda text: text.replace(",", " , ")),
        csv(lambda text: text.replace("\n", "\n\n")),
        csv(lambda text: text.rstrip("\n")),
        csv(quoting=1),
        csv(lambda text: text.replace("\n", ",\n")),
        csv(
            lambda text: "".join(f"{i},{line}\n" for i, line in zip(["", *range(200)], text.splitlines(), strict=True))
        ),
    ],
    ids=[
        *("semicolons", "tabs", "bars", "decimal commas", "byte order mark", "utf-16", "latin-1", "crlf", "spaces"),
        *("blank lines", "no last newline", "quotes", "a comma at the end", "an index"),
    ],
)
def test_the_same_numbers_written_otherwise_are_the_same_numbers(content: bytes) -> None:
    Path("table.csv").write_bytes(csv())
    plain = read(condition="colour")
    Path("table.csv").write_bytes(content)
    same(plain, read(condition="colour"))


@pytest.mark.parametrize(
    ("values", "type"),
    [
        (pd.array(range(60), dtype="Int64"), "integer"),
        (pd.array(range(60), dtype="Float64"), "float"),
        (pd.array(range(60), dtype="UInt8"), "integer"),
        (np.arange(60, dtype=np.float16), "float"),
        (np.arange(60, dtype=np.float32), "float"),
        ([Decimal(i) for i in range(60)], "float"),
        (pd.Categorical(range(60)), "integer"),
    ],
    ids=["Int64", "Float64", "UInt8", "half", "single", "Decimal", "categories"],
)
def test_numbers_of_any_type_of_parquet_are_numbers(values: Any, type: str) -> None:
    pd.DataFrame({"x": values}).to_parquet("table.parquet")
    parts, rows = read(file="table.parquet", columns="x")
    assert sorted(everything(rows)["x"]) == list(range(60))
    assert parts.types == {"x": type}


def test_nullable_numbers_and_not_a_number_are_missing_values() -> None:
    pd.DataFrame(
        {"x": pd.array([1, None, 3, 4, 5] * 9, dtype="Int64"), "y": [1.0, 2.0, np.nan, 4.0, 5.0] * 9}
    ).to_parquet("table.parquet")
    parts, rows = read(file="table.parquet", missing="drop")
    assert parts.missing == 18
    assert len(everything(rows)) == 27
    refuses("18 of 45 rows", "x 9, y 9", "missing: drop", file="table.parquet")


def test_conditions_keep_words_as_words_and_numbers_as_numbers() -> None:
    data = frame(400)
    data.to_parquet("table.parquet")
    parts, rows = read(file="table.parquet", columns=["x"], condition=["colour", "flag", "y"])
    assert parts.conditions == {"colour": ["green", "größe", "red"], "flag": ["False", "True"], "y": None}
    found = everything(rows).sort_values("x", ignore_index=True)
    assert list(found) == ["x", "colour", "flag", "y"]
    expected = data.sort_values("x", ignore_index=True)
    assert found["colour"].tolist() == expected["colour"].tolist()
    assert found["flag"].tolist() == expected["flag"].astype(str).tolist()
    np.testing.assert_array_equal(found["y"], expected["y"])


def test_weights_have_mean_one_on_each_part_and_keep_their_ratios() -> None:
    data = frame(300).assign(w=lambda t: np.exp(t["x"]), weight=lambda t: t["x"] * 2)
    data.to_csv("table.csv", index=False)
    parts, rows = read(columns=["x", "weight"], weight="w")
    assert parts.weight == "weight_"
    for part in layout.PARTS:
        weight = rows[part]["weight_"]
        assert weight.mean() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(weight / np.exp(rows[part]["x"]), weight.iloc[0] / np.exp(rows[part]["x"].iloc[0]))
    unweighted = read(columns=["x", "weight"])
    assert unweighted[0].weight is None  # a column of that name is a column
    np.testing.assert_array_equal(unweighted[1]["test"]["x"], rows["test"]["x"])


@pytest.mark.parametrize("how", ["uniform", "steps"])
def test_discrete_columns_are_codes_plus_uniform_noise(how: str) -> None:
    data = frame(2000).assign(count=lambda t: t["count"] - 2)
    data.to_csv("table.csv", index=False)
    parts, rows = read(columns=["x", "count", "colour"], discrete={"count": how, "colour": how})
    found = everything(rows).sort_values("x", ignore_index=True)
    expected = data.sort_values("x", ignore_index=True)
    np.testing.assert_array_equal(np.floor(found["count"]), expected["count"])
    levels = parts.discrete["colour"].levels
    assert levels == ["green", "größe", "red"]
    assert [levels[int(code)] for code in np.floor(found["colour"])] == expected["colour"].tolist()
    assert (parts.discrete["count"].low, parts.discrete["count"].levels) == (-2, None)
    assert parts.types["colour"] == "text"
    noise = np.concatenate([found["count"] % 1, found["colour"] % 1])
    assert stats.kstest(noise, "uniform").pvalue > 1e-4


def test_a_split_by_time_tests_on_the_last_rows() -> None:
    rng = np.random.default_rng(0)
    data = frame(400).assign(t=rng.permutation(400))
    data.to_csv("table.csv", index=False)
    parts, rows = read(split={"time": "t", "val": 0.25, "test": 0.25}, columns=["x", "t"])
    assert (rows["train"]["t"].max(), rows["val"]["t"].min(), rows["val"]["t"].max()) == (199, 200, 299)
    assert rows["test"]["t"].min() == 300
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(data["t"], unit="D")
    for written in (days.dt.strftime("%Y-%m-%d"), days.dt.strftime("%Y-%m-%dT%H:%M:%SZ"), days):
        for name, write in (("table.csv", "to_csv"), ("table.parquet", "to_parquet")):
            getattr(data.assign(day=written), write)(name, index=False)
            by_date = read(file=name, split={"time": "day", "val": 0.25, "test": 0.25}, columns=["x", "t"])
            pd.testing.assert_frame_equal(by_date[1]["test"], rows["test"])
    assert read(split={"time": "t"})[0].columns == ["x", "y", "count"]  # what orders the rows is not modelled by itself
    assert parts.columns == ["x", "t"]


def test_a_split_by_a_column_or_by_files_is_that_split() -> None:
    data = frame(90).assign(part=["train"] * 60 + ["test"] * 20 + ["val"] * 10)
    data.to_csv("table.csv", index=False)
    _, by_column = read(split={"column": "part"})
    for part in layout.PARTS:
        data[data["part"] == part].drop(columns="part").to_csv(f"{part}.csv", index=False)
    by_files = {part: f"{part}.csv" for part in layout.PARTS}
    parts, rows = read(file=None, split={"files": by_files})
    for part in layout.PARTS:
        expected = np.sort(data.loc[data["part"] == part, "y"])
        np.testing.assert_array_equal(np.sort(by_column[part]["y"]), expected)
        np.testing.assert_array_equal(np.sort(rows[part]["y"]), expected)
    assert list(parts.files) == [f"{part}.csv" for part in layout.PARTS]


def test_several_files_are_one_table() -> None:
    data = frame(90)
    data.to_csv("table.csv", index=False)
    whole = read()
    data[:30].to_csv("1.csv", index=False)
    data.iloc[30:60, ::-1].to_parquet("2.parquet")
    data[60:].to_csv("3.csv", index=False, sep=";")
    same(whole, read(file=["1.csv", "2.parquet", "3.csv"]))
    assert set(read(file=["[13].csv", "2.parquet"])[0].files) == {"1.csv", "2.parquet", "3.csv"}
    data[60:].drop(columns="y").to_csv("3.csv", index=False)
    refuses("3.csv", "no column 'y'", file=["1.csv", "2.parquet", "3.csv"])


def test_values_that_are_missing_in_one_part_are_said_with_its_file() -> None:
    for part, x in (("train", "1.5"), ("val", ""), ("test", "2.5")):
        Path(f"{part}.csv").write_text("x,y\n" + "".join(f"{i + 0.1},{i}\n" for i in range(20)) + f"{x},1\n")
    files = {"files": {part: f"{part}.csv" for part in layout.PARTS}}
    assert "train.csv 0" not in refuses("1 of 63 rows", "x 1; val.csv 1", file=None, split=files)


def test_integers_that_double_precision_cannot_tell_apart_are_no_constant() -> None:
    pd.DataFrame({"x": np.arange(40) / 7, "id": 2**62 + np.arange(40)}).to_parquet("table.parquet")
    refuses("'id'", "double precision", file="table.parquet")


def test_columns_that_say_nothing_are_left_out_and_said() -> None:
    data = frame().assign(one=3, row=range(10, 210), day="2024-01-01", nothing=None)
    data.to_csv("table.csv")  # with an index
    parts, _ = read()
    assert parts.columns == ["x", "y", "count"]
    assert parts.constants == {"one": 3}
    assert parts.types["one"] == "integer"
    said = " ".join(parts.messages)
    for word in ("one 3", "'row'", "'day'", "'nothing'", "no name"):
        assert word in said
    assert "row" in read(columns=["x", "row"])[0].columns
    refuses("'one'", "constant (3.0)", "leave it out", columns=["x", "one"])
    refuses("'one'", "`condition`", "constant", columns=["x"], condition="one")
    refuses("'day'", "dates", columns=["x", "day"])
    refuses("'nothing'", "no values", columns=["x", "nothing"])


def line(text: str, row: int, new: str) -> str:
    lines = text.splitlines()
    return "\n".join([*lines[:row], new, *lines[row:]]) + "\n"


PLAIN = "a,b,word\n" + "".join(f"{i + 0.5},{i % 7},{'uv'[i % 2]}\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("", {}, ["is empty"]),
        ("a,b\n", {}, ["no rows"]),
        ("\n\n", {}, ["table.csv"]),
        ("5.1,3.5\n4.9,3.0\n", {}, ["'5.1'", "no names", "line of names"]),
        (line(PLAIN, 1, "mm,g,"), {}, ["'a'", "'mm'", "first row", "second line of names or units"]),
        (line(PLAIN, 9, "?,1,u"), {}, ["'a'", "'?'", "row 9", "1 values in 61"]),
        (line(PLAIN, 9, "1,1"), {}, ["data row 9", "2 values", "3 names"]),
        (line(PLAIN, 9, "1,1,u,2"), {}, ["data row 9", "4 values", "3 names"]),
        ("a table\n" + PLAIN, {}, ["3 values", "1 names", "remove lines above the names"]),
        (line(PLAIN, 9, '"1,234.5",1,u'), {}, ["'1,234.5'", "thousands"]),
        (line(PLAIN, 9, "inf,1,u"), {}, ["'a'", "infinity in 1 of 61 rows"]),
        (line(PLAIN, 9, ",1,u"), {}, ["1 of 61 rows", "a 1", "missing: drop"]),
        (PLAIN, {"columns": ["a", "bb"]}, ["no column 'bb'", "did you mean 'b'?"]),
        (PLAIN, {"columns": ["a"], "weight": "wigth"}, ["no column 'wigth'"]),
        (PLAIN.replace("a,b", "b,b"), {}, ["'b' 2 times"]),
        (PLAIN, {"columns": ["a", "word"]}, ["'word'", "'u'", "discrete: {word: uniform}"]),
        (PLAIN, {"columns": ["a"], "weight": "b"}, ["'b' (`weight`)", "down to 0", "positive"]),
        (PLAIN, {"columns": ["a"], "weight": "word"}, ["'word' (`weight`)", "numbers"]),
        (PLAIN, {"split": {"time": "word"}}, ["'word' (`split.time`)", "2024-12-31"]),
        (PLAIN, {"split": {"column": "word"}}, ["'u'", "train, val or test"]),
        (PLAIN, {"split": {"column": "b"}}, ["'b' (`split.column`)", "words"]),
        (PLAIN, {"discrete": {"a": "uniform"}}, ["'a' (`discrete`)", "decimals"]),
        (PLAIN.replace(",3,", ",300000,"), {"discrete": {"b": "steps"}}, ["300000", "say `uniform`"]),
        ("a\n1.5\n2\n3\n", {}, ["val part", "none of 3 rows"]),
        ("a,b\n1.5,3\n1.5,3\n", {}, ["varies"]),
        ("word\nx\ny\n", {}, ["no numeric column", "'x'"]),
        ("a b c\n1 2 3\n4 5 6\n", {}, ["no numeric column"]),
        ("a;b\n1,234;2\n5,678;3\n", {}, ["'1,234'", "thousands or decimals"]),
        (line(PLAIN, 1, "2.5,1,rare"), {"columns": ["a"], "condition": "word", "split": {"time": "a"}}, []),
    ],
)
def test_a_table_that_cannot_be_read_as_it_is_meant_ends_in_one_sentence(
    text: str, settings: dict[str, Any], words: list[str]
) -> None:
    Path("table.csv").write_text(text, encoding="utf-8")
    if words:
        refuses(*words, **settings)
    else:
        read(**settings)


def test_a_word_that_training_never_sees_is_named_with_its_rows() -> None:
    text = PLAIN + "99,1,rare\n98,1,rare\n"
    Path("table.csv").write_text(text, encoding="utf-8")
    by_time = {"time": "a", "val": 0.1, "test": 0.1}
    refuses("'rare'", "'word'", "2 of 62 rows", columns=["a"], condition="word", split=by_time)
    refuses("'rare'", columns=["a", "word"], discrete={"word": "uniform"}, split=by_time)
    Path("table.csv").write_text(PLAIN + ",1,rare\n", encoding="utf-8")  # a row that is dropped
    parts, _ = read(columns=["a"], condition="word", missing="drop", split=by_time)
    assert parts.conditions == {"word": ["u", "v"]}


def test_many_words_are_no_condition() -> None:
    pd.DataFrame({"x": np.arange(3000.0), "name": [f"n{i}" for i in range(3000)]}).to_csv("table.csv", index=False)
    refuses("'name'", "more than 1000 different words", columns="x", condition="name")


@pytest.mark.parametrize(
    ("values", "what"),
    [([[1.0, 2.0]] * 40, "list"), ([{"a": 1}] * 40, "struct"), ([b"x"] * 40, "binary"), ([None] * 40, "no values")],
)
def test_columns_of_other_types_of_parquet_are_left_out_or_refused(values: list[Any], what: str) -> None:
    pd.DataFrame({"x": np.arange(40) / 7, "other": values}).to_parquet("table.parquet")
    parts, _ = read(file="table.parquet")
    assert parts.columns == ["x"]
    assert any("'other'" in message and what in message for message in parts.messages)
    refuses("'other'", what, file="table.parquet", columns=["x", "other"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("table.parquet", b"PAR1 no", ["table.parquet", "parquet"]),
        ("table.csv", b"PK\x03\x04\0\0", ["no text"]),
        ("table.xlsx", b"x", ["'.xlsx'", "csv"]),
        ("table.csv.gz", b"x", ["'.gz'"]),
        ("tabel.csv", b"x", ["table.csv", "missing", "did you mean 'tabel.csv'?"]),
    ],
)
def test_files_that_are_no_tables_are_named(name: str, content: bytes, words: list[str]) -> None:
    Path(name).write_bytes(content)
    refuses(*words, file="table.csv" if name == "tabel.csv" else name)


def test_files_that_are_not_there_are_named() -> None:
    Path("folder").mkdir()
    refuses("'*.csv'", "no file matches", file="*.csv")
    refuses("folder", "folder/*.csv", file="folder")


@pytest.mark.parametrize("written", ["table.csv", "table.parquet"])
@pytest.mark.parametrize("event", ["vanishes", "changes"])
def test_a_file_that_vanishes_or_changes_while_it_is_read_is_named(
    written: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    getattr(frame(), "to_csv" if written == "table.csv" else "to_parquet")(written, index=False)
    kinds = tables.CsvFile.kinds, tables.ParquetTable.kinds

    def then(self: tables.TableFile, names: list[str]) -> Any:
        found = kinds[isinstance(self, tables.ParquetTable)](self, names)  # type: ignore[arg-type]
        if event == "vanishes":
            self.path.unlink()
        else:
            getattr(frame(seed=1, n=201), "to_csv" if written == "table.csv" else "to_parquet")(written, index=False)
        return found

    monkeypatch.setattr(tables.CsvFile, "kinds", then)
    monkeypatch.setattr(tables.ParquetTable, "kinds", then)
    refuses(written, "could not be read" if event == "vanishes" else "changed while it was read", file=written)


def project(**entry: Any) -> Stage:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw["datasets"] = {"mine": {"kind": "table", "file": "table.csv", **entry}}
    loaded = params.parse(raw, Path("params.yaml"))
    return Stage("prepare@mine", loaded, RunRecord.start("prepare@mine", {}))


def prepared() -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    folder = layout.prepared("mine")
    found = {part: files.read_table(layout.part(folder, part)) for part in layout.PARTS}
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix != ".safetensors") == [
        ".json",
        *[".parquet"] * 3,
    ]
    return files.read_json(layout.provenance(folder)), found


def test_the_penguins_are_prepared_as_their_provenance_says() -> None:
    shutil.copy(RAW, "table.csv")
    prepare.write(project(columns=MEASURES, condition=["species"], missing="drop"), "mine")
    provenance, rows = prepared()
    assert provenance["columns"] == list(MEASURES)
    assert provenance["conditions"] == [
        {"name": "species", "kind": "words", "levels": ["Adelie", "Chinstrap", "Gentoo"]}
    ]
    assert provenance["types"]["body_mass_g"] == "integer"
    assert (provenance["missing"], provenance["weight"], provenance["constants"]) == (2, None, {})
    assert list(provenance["files"]) == ["table.csv"]
    assert provenance["fidelity"] == "own table"
    train = rows["train"][list(MEASURES)]
    np.testing.assert_allclose(provenance["loc"], train.mean(), rtol=1e-14)
    np.testing.assert_allclose(provenance["scale"], train.std(ddof=0), rtol=1e-14)
    said = " ".join(provenance["messages"])
    assert "2 of 344 rows were dropped" in said
    assert "'flipper_length_mm'" in said  # few values
    assert "'bill_length_mm'" not in said


def test_moments_of_a_condition_and_far_columns_are_exact() -> None:
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"x": 1e8 + rng.uniform(-5, 5, 500), "t": 1.7e9 + rng.uniform(-60, 60, 500)})
    data.to_csv("table.csv", index=False)
    prepare.write(project(columns="x", condition="t"), "mine")
    provenance, rows = prepared()
    (condition,) = provenance["conditions"]
    exact = rows["train"]["t"] - 1.7e9
    assert condition["loc"] - 1.7e9 == pytest.approx(exact.mean(), abs=1e-5)
    assert condition["scale"] == pytest.approx(exact.std(ddof=0), rel=1e-8)
    assert (condition["low"], condition["high"]) == (rows["train"]["t"].min(), rows["train"]["t"].max())


def test_marginals_are_fitted_to_the_weighted_training_rows_and_stand_beside_them() -> None:
    rng = np.random.default_rng(0)
    skewed, side = np.exp(rng.normal(size=4000)), rng.integers(0, 2, 4000)
    data = pd.DataFrame({"x": skewed, "y": 5 * side + rng.normal(size=4000), "n": rng.poisson(2.0, 4000)})
    data = data.assign(w=np.where(side == 1, 3.0, 1.0))
    data.to_parquet("table.parquet")
    roles = {"file": "table.parquet", "columns": ["x", "y", "n"], "weight": "w", "discrete": {"n": "steps"}}
    prepare.write(project(**roles, transform="marginals"), "mine")
    provenance, rows = prepared()
    tensors, meta = files.read_tensors(layout.marginals(layout.prepared("mine")))
    assert [one["kind"] for one in meta["marginals"]] == ["mixture", "mixture", "steps"]
    marginals = Marginals.from_description(meta["marginals"])
    marginals.load_state_dict(tensors)
    u = marginals(torch.from_numpy(rows["train"][["x", "y", "n"]].to_numpy(copy=True)))[0].numpy()
    np.testing.assert_allclose(provenance["loc"], u.mean(0), atol=1e-12)
    np.testing.assert_allclose(provenance["scale"], u.std(0), rtol=1e-12)
    weight = rows["train"]["weight"].to_numpy()
    weighted = np.average(u, axis=0, weights=weight), np.average(u**2, axis=0, weights=weight)
    np.testing.assert_allclose(weighted[0], 0, atol=0.05)  # normal under the weights
    np.testing.assert_allclose(weighted[1], 1, atol=0.05)
    assert provenance["loc"][1] < -0.2  # and not without them
    prepare.write(project(**roles), "mine")
    provenance, _ = prepared()
    _, meta = files.read_tensors(layout.marginals(layout.prepared("mine")))
    assert [one["kind"] for one in meta["marginals"]] == ["identity", "identity", "steps"]
    assert provenance["marginals"] is True
    np.testing.assert_allclose(provenance["loc"][:2], rows["train"][["x", "y"]].mean(), rtol=1e-12)
    prepare.write(project(**roles | {"discrete": {"n": "uniform"}}), "mine")
    assert prepared()[0]["marginals"] is False
    assert not layout.marginals(layout.prepared("mine")).exists()


NAMES = [
    *("weight", "seed", "time", "start", "x", "episode", "loss", "log_prob", "row", "with space", "größe", "a/b"),
    *("a.b", "0", "index", "level_0", "train", "None", "true", "[x]", "__index", '"quoted"', "'", "a,b", "%s", "{x}"),
]


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_any_column_name_gives_the_numbers_of_any_other_name(format: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(65, 10, (120, 4))
    values[:, 3] = np.exp(values[:, 3] / 50)
    expected: list[Any] | None = None
    for first in range(0, len(NAMES), 2):
        names = [*NAMES[first : first + 2], "the condition", "how much"]
        data = pd.DataFrame(values, columns=names)
        path = f"table.{format}"
        if format == "csv":
            data.to_csv(path, index=False)
        else:
            data.to_parquet(path)
        roles = {"columns": names[:2], "condition": names[2], "weight": names[3]}
        prepare.write(project(file=path, **roles), "mine")
        provenance, rows = prepared()
        assert provenance["columns"] == names[:2]
        assert list(rows["train"])[:3] == names[:3]
        found = [provenance["loc"], provenance["scale"], *(table.to_numpy().tolist() for table in rows.values())]
        assert expected is None or found == expected
        expected = found


@pytest.mark.slow
def test_any_column_name_gives_the_samples_and_the_scores_of_any_other_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = yaml_files.read_yaml(ROOT / "pipelines" / "config" / "profiles" / "smoke.yaml")
    raw = yaml_files.merge(yaml_files.read_yaml(ROOT / "params.yaml"), smoke)
    raw["density"]["evaluate"] |= {"rows": 50}
    values = np.random.default_rng(0).normal(65, 10, (200, 5))
    found = []
    for names in (["a", "b", "c", "d", "e"], ["weight", "seed", "time", "log_prob", "row"]):
        Path(names[0]).mkdir()
        monkeypatch.chdir(tmp_path / names[0])
        pd.DataFrame(values, columns=names).to_csv("table.csv", index=False)
        entry = {"columns": names[:3], "condition": names[3], "weight": names[4], "fit": {"steps": 20}}
        raw["datasets"] = {"mine": {"kind": "table", "file": "table.csv", **entry}}
        loaded = params.parse(raw, Path("params.yaml"))
        stage = Stage("way", loaded, RunRecord.start("way", {}))
        prepare.write(stage, "mine")
        for method in loaded.density.methods:
            training.train(stage, "mine", method)
        density_sampling.sample(stage, "mine")
        density.evaluate(stage, "mine")
        samples = [files.read_table(path).to_numpy() for path in sorted(layout.samples("mine").iterdir())]
        found.append((samples, files.read_json(layout.metrics("mine"))))
        monkeypatch.chdir(tmp_path)
    (samples, metrics), (others, same_metrics) = found
    assert metrics == same_metrics
    assert len(samples) == len(others) >= 2
    for one, other in zip(samples, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_replaced_file_is_another_source(tmp_path: Path) -> None:
    shutil.copy(RAW, "table.csv")
    loaded = project(columns=MEASURES, condition=["species"], missing="drop").params

    def fingerprint() -> Any:
        sources.refresh(tmp_path, loaded)
        return files.read_json(layout.source("mine"))

    first = fingerprint()
    assert first["files"] == 1
    assert fingerprint() == first
    text = RAW.read_text(encoding="utf-8")
    Path("table.csv").write_text(text.replace("39.1", "39.2"), encoding="utf-8")
    assert fingerprint() != first
    Path("table.csv").unlink()
    with pytest.raises(UserError, match=r"datasets.mine: table.csv is missing"):
        fingerprint()


def test_a_failed_stage_leaves_nothing() -> None:
    Path("table.csv").write_text(PLAIN + "1,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="data row 61"):
        prepare.write(project(), "mine")
    assert not layout.PREPARED.exists() or not list(layout.PREPARED.iterdir())


def test_a_column_that_varies_only_outside_of_training_is_named() -> None:
    data = frame(100).assign(late=[0] * 90 + [1] * 10, t=range(100))
    data.to_csv("table.csv", index=False)
    with pytest.raises(UserError, match="'late' of the training rows of mine is constant"):
        prepare.write(project(columns=["x", "late"], split={"time": "t"}), "mine")


MEASURED = """
from pathlib import Path
from pipelines.config import params
from pipelines.data import prepare
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
prepare.write(Stage("prepare@mine", params.load(), RunRecord.start("prepare@mine", {})), "mine")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
print(status["VmHWM"].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not report the peak of the memory")
def test_a_table_that_is_larger_than_the_memory_that_it_takes() -> None:
    """3 million rows of 8 columns are 192 MB as numbers; tenfold rows take at most half of that more."""
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    roles = {"condition": "word", "weight": "w"}
    raw["datasets"] = {"mine": {"kind": "table", "file": "table.parquet", **roles}}
    Path("params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    peaks = []
    for pieces in (3, 30):
        rng = np.random.default_rng(0)
        with parquet.ParquetWriter(
            "table.parquet",
            pa.schema([*((f"x{i}", pa.float64()) for i in range(6)), ("word", pa.string()), ("w", pa.float64())]),
        ) as writer:
            for _ in range(pieces):
                columns = {f"x{i}": rng.normal(size=100_000) for i in range(6)}
                columns |= {"word": rng.choice(["a", "b"], 100_000), "w": rng.random(100_000) + 1}
                writer.write_table(pa.table(columns))
        command = [sys.executable, "-c", MEASURED]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
        rows = parquet.ParquetFile(layout.part(layout.prepared("mine"), "train")).metadata
        assert rows.num_rows == 80_000 * pieces
        assert rows.row_group(0).num_rows <= _rows.ROWS
    assert peaks[1] - peaks[0] < 96, peaks
