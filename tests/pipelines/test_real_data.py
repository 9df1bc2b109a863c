"""Real data sets: the preprocessing against the script of the paper, on small archives of the same form, and bad input.

The truths of `official_*` follow the published script (Papamakarios et al. 2017) line by line.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from flowmatch_core.marginals import Marginals
from pipelines.base import downloads, files, layout
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.config import yaml_files
from pipelines.data import prepare
from pipelines.datasets import Dataset, Transform, gas, hepmass, miniboone, moons, power
from pipelines.orchestration.__main__ import main
from pipelines.runs import sources
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from tests.pipelines.test_datasets import MIRROR, needs_mirror, sentence
from tests.support.archives import tarred
from tests.support.web import Script, serving, without_proxies

ROOT = Path(__file__).parents[2]
PARTS = ("train", "val", "test")
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def build(member: ModuleType, mirror: Path | None, seed: int = 0, **settings: Any) -> Dataset:
    data: Dataset = member.build(member.Settings(**settings), rng=np.random.default_rng(seed), mirror=mirror)
    return data


def close(data: Dataset, truth: Parts, columns: slice = slice(None)) -> None:
    for part, rows in zip(PARTS, truth, strict=True):
        np.testing.assert_allclose(getattr(data, part)[:, columns], rows[:, columns], rtol=0, atol=1e-11)


def official_split(data: np.ndarray) -> Parts:
    n_test = int(0.1 * data.shape[0])
    test, data = data[-n_test:], data[0:-n_test]
    n_validate = int(0.1 * data.shape[0])
    return data[0:-n_validate], data[-n_validate:], test


def zipped(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


def with_forks(members: dict[str, bytes]) -> dict[str, bytes]:
    """Members below data/, each after the resource fork that the paper's archive has of it."""
    found = {}
    for name, content in members.items():
        found[f"data/{Path(name).parent}/._{Path(name).name}"] = b"fork"
        found[f"data/{name}"] = content
    return found


def npy(rows: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


# POWER: five days and a bit, with gaps of which one is longer than a day, and a minute that repeats by chance

MINUTES, GAPS, CHANCE = 7205, ((1600, 1603), (2000, 3800)), 6500


@dataclass
class Power:
    """A mirror with all forms of the same table."""

    mirror: Path
    text: bytes
    official: np.ndarray  # the rows that the script begins with, the time without noise


def measurements() -> np.ndarray:
    rng = np.random.default_rng(3)
    kilowatts = (rng.gamma(2, 500, (MINUTES, 2)) // 2 * 2) / 1000
    volts, amperes = (rng.normal(size=(MINUTES, 2)) * [300, 10] + [24000, 50]).round().T / [[100], [10]]
    values = np.column_stack([kilowatts, volts, amperes, rng.poisson([0.3, 1.0, 9.0], (MINUTES, 3))])
    values[CHANCE] = values[CHANCE - 1440]
    for first, last in GAPS:
        values[first:last] = np.nan
    return values


@pytest.fixture
def household(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Power:
    values, start = measurements(), datetime(2006, 12, 16, 17, 24)  # noqa: DTZ001
    times = [start + timedelta(minutes=minute) for minute in range(MINUTES)]
    lines = [power._NAMES]
    for time, row in zip(times, values, strict=True):
        numbers = "?;?;?;?;?;?;" if np.isnan(row[0]) else ";".join(f"{value:.3f}" for value in row)
        lines.append(f"{time.day}/{time.month}/{time.year};{time:%H:%M:%S};{numbers}")
    text = "".join(f"{line}\r\n" for line in lines).encode()
    filled = values.copy()
    for minute in range(1440, MINUTES):
        if np.isnan(filled[minute, 0]):
            filled[minute] = filled[minute - 1440]
    frame = pd.DataFrame(filled, index=pd.Index(times, name="date_time"), columns=power._NAMES.split(";")[2:])
    mirror = tmp_path / "mirror"
    zipped(mirror / "archives" / power.ARCHIVES["uci"].name, {power.TEXT: text})
    wheel = mirror / "maf" / power.WHEEL.name
    zipped(wheel, {power.WHEEL_MEMBER: frame.to_csv(lineterminator="\r\n").encode()})
    listed = {"minutes": [f"{times[CHANCE]:%Y-%m-%d %H:%M}"]}
    (mirror / "maf" / power.COINCIDENCES).write_text(json.dumps(listed))
    there = ~np.isnan(values[:, 0])
    minutes = np.array([time.hour * 60 + time.minute for time in times], float)
    official = np.column_stack([values, minutes])[there]
    tarred(mirror / "archives" / power.ARCHIVES["maf"].name, with_forks({"power/data.npy": npy(official)}))
    monkeypatch.setattr(power, "TEXT_SHA", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(power, "ROWS", tuple(map(len, official_split(official))))
    return Power(mirror, text, official)


def official_power(data: np.ndarray) -> Parts:
    rng = np.random.RandomState(42)
    data = data.copy()
    rng.shuffle(data)
    n = data.shape[0]
    data = np.delete(data, 3, axis=1)
    data = np.delete(data, 1, axis=1)
    voltage_noise = 0.01 * rng.rand(n, 1)
    gap_noise = 0.001 * rng.rand(n, 1)
    sm_noise = rng.rand(n, 3)
    time_noise = np.zeros((n, 1))
    data = data + np.hstack((gap_noise, voltage_noise, sm_noise, time_noise))
    train, validate, test = official_split(data)
    both = np.vstack((train, validate))
    mu, s = both.mean(axis=0), both.std(axis=0)
    return (train - mu) / s, (validate - mu) / s, (test - mu) / s


def test_power_from_the_archive_of_the_paper_is_that_of_its_script(household: Power) -> None:
    data = build(power, household.mirror, archive="maf")
    close(data, official_power(household.official))
    assert (data.fidelity, data.gaussian) == ("official", (7.74, 0.02))


@pytest.mark.parametrize("wheel", [False, True])
def test_power_from_texts_has_the_same_rows_but_for_the_noise_of_the_time(household: Power, wheel: bool) -> None:
    if wheel:
        (household.mirror / "archives" / power.ARCHIVES["uci"].name).unlink()
    data, other = (build(power, household.mirror, seed) for seed in (0, 1))
    truth = official_power(household.official)
    close(data, truth, slice(0, 5))
    assert data.fidelity == "official rows and split, time noise redrawn"
    assert "noise of the minute" in data.notes
    assert (data.train[:, 5] != other.train[:, 5]).all()
    raw = [build(power, household.mirror, archive="maf"), data]
    times = [np.concatenate([one.train, one.val, one.test])[:, 5] for one in raw]
    assert np.corrcoef(times)[0, 1] > 1 - 1e-5  # whole minutes of one day


def test_the_columns_of_power_get_smooth_steps_and_uniform_marginals(household: Power) -> None:
    data = build(power, household.mirror, transform="marginals")
    assert isinstance(data.marginals, dict)
    kinds = [data.marginals[name].kind for name in data.columns]
    assert kinds == ["mixture", "mixture", "steps", "steps", "steps", "uniform"]
    assert "smooth" in data.notes and "published models had no" in data.notes
    for i, name in enumerate(data.columns[2:], 2):
        transform = data.marginals[name]
        place = (data.train[:, i] - transform.start) / transform.width
        assert place.min() >= 0
        if name == "time":
            assert 0.95 < place.max() <= 1
        else:  # whole numbers with uniform noise: as many above as below each half
            share = ((place % 1) < 0.5).mean()
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(place))
            assert place.max() > 5 or name != "sub_metering_3"


def test_a_text_that_is_not_the_official_one_is_refused(household: Power) -> None:
    path = household.mirror / "archives" / power.ARCHIVES["uci"].name
    zipped(path, {power.TEXT: household.text.replace(b"16/12/2006;17:24", b"16/12/2006;17:25", 1)})
    with pytest.raises(UserError) as error:
        build(power, household.mirror)
    sentence(error, str(path), power.TEXT, "sha256", "expected", "replace it by the original")
    path.unlink()
    coincidences = household.mirror / "maf" / power.COINCIDENCES
    coincidences.write_text('{"minutes": []}')
    with pytest.raises(UserError) as error:
        build(power, household.mirror)
    sentence(error, power.WHEEL.name, str(coincidences), "sha256", "expected")
    for text in ("{", "{}", '{"minutes": [3]}', '{"minutes": ["yesterday"]}'):
        coincidences.write_text(text)
        with pytest.raises(UserError) as error:
            build(power, household.mirror)
        sentence(error, str(coincidences), "expected JSON")


@pytest.mark.slow
@needs_mirror
def test_the_complete_power_table_has_the_published_gaussian() -> None:
    """Its text comes out byte for byte, else `build` refuses it; published: 7.74 +- .02."""
    data = build(power, MIRROR)
    assert [len(getattr(data, part)) for part in PARTS] == list(power.ROWS)
    covariance = np.cov(data.train.T)
    away = np.linalg.solve(np.linalg.cholesky(covariance), (data.test - data.train.mean(0)).T)
    nll = 0.5 * (away**2).sum(0).mean() + 3 * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] / 2
    assert nll == pytest.approx(7.742, abs=0.002)


# GAS


def official_gas(data: pd.DataFrame) -> Parts:
    data = data.drop(["Meth", "Eth", "Time"], axis=1)

    def correlations(frame: pd.DataFrame) -> np.ndarray:
        return (frame.corr() > 0.98).to_numpy().sum(axis=1)

    while np.any(correlations(data) > 1):
        data = data.drop(data.columns[np.where(correlations(data) > 1)[0][0]], axis=1)
    return official_split(((data - data.mean()) / data.std()).to_numpy())


@pytest.fixture
def sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, pd.DataFrame]:
    rng = np.random.default_rng(5)
    groups = rng.normal(size=(403, 8))[:, [0, 1, 1, 2, 3, 3, 4, 0, 5, 6, 7, 2, 1, 4, 4, 5]]
    rows = (100 * (groups + 0.01 * rng.normal(size=(403, 16)))).round(2)
    table = np.column_stack([np.arange(403) / 100, np.zeros((403, 2)), rows])
    text = "Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)\n"
    text += "".join(" ".join(f"{value:.2f}" for value in row) + "  \n" for row in table)
    zipped(tmp_path / "archives" / gas.ARCHIVE.name, {"ethylene_methane.txt": b"", gas.MEMBER: text.encode()})
    monkeypatch.setattr(gas, "ROWS", (82, 9, 10))
    monkeypatch.setattr(gas, "_CHUNK", 150)
    names = ["Time", "Meth", "Eth", *(f"s{i}" for i in range(16))]
    return tmp_path, pd.DataFrame(table, columns=names)


def test_gas_is_a_quarter_of_the_rows_with_the_preprocessing_of_the_script(
    sensors: tuple[Path, pd.DataFrame],
) -> None:
    mirror, table = sensors
    drawn = np.random.default_rng(gas.SAMPLE_SEED).permutation(403)[:101]
    data = build(gas, mirror, seed=7)
    close(data, official_gas(table.iloc[drawn]))
    assert (data.fidelity, data.gaussian) == ("equivalent", (3.58, 0.75))


# HEPMASS


def official_hepmass(folder: Path) -> Parts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # the header of the training file is short
        train = pd.read_csv(filepath_or_buffer=folder / "1000_train.csv", index_col=False)
        test = pd.read_csv(filepath_or_buffer=folder / "1000_test.csv", index_col=False)
    train, test = train[train[train.columns[0]] == 1], test[test[test.columns[0]] == 1]
    train, test = train.drop(train.columns[0], axis=1), test.drop(test.columns[0], axis=1)
    test = test.drop(test.columns[-1], axis=1)
    mu, s = train.mean(), train.std()
    train_rows = ((train - mu) / s).to_numpy()
    test_rows = ((test - mu.to_numpy()) / s.to_numpy()).to_numpy()
    features_to_remove = []
    for i, feature in enumerate(train_rows.T):
        if np.array([v for _, v in sorted(Counter(feature).items())])[0] > 5:
            features_to_remove.append(i)
    kept = [i for i in range(train_rows.shape[1]) if i not in features_to_remove]
    train_rows, test_rows = train_rows[:, kept], test_rows[:, kept]
    n_validate = int(len(train_rows) * 0.1)
    return train_rows[0:-n_validate], train_rows[-n_validate:], test_rows


@pytest.fixture
def collisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng, members = np.random.default_rng(6), {}
    for name, count in (("train", 230), ("test", 140)):
        rows = rng.normal(size=(count, 28))
        rows[:, 0] = rng.random(count) < 0.6
        rows[:, [6, 10, 14, 18, 22]] = rng.integers(0, 2, (count, 5))  # f5, f9, f13, f17 and f21
        names = ["# label", *(f"f{i}" for i in range(26 if name == "train" else 27))]
        text = ",".join(names) + "\n" + "".join(",".join(f"{v:.8e}" for v in row) + "\n" for row in rows)
        members[f"hepmass/1000_{name}.csv"] = text.encode()
        (tmp_path / f"1000_{name}.csv").write_text(text)
    tarred(tmp_path / "archives" / hepmass.ARCHIVE.name, with_forks(members))
    monkeypatch.setattr(hepmass, "_CHUNK", 100)
    monkeypatch.setattr(hepmass, "ROWS", tuple(map(len, official_hepmass(tmp_path))))
    return tmp_path


def test_hepmass_is_that_of_the_script(collisions: Path) -> None:
    data = build(hepmass, collisions)
    assert len(data.columns) == 21
    close(data, official_hepmass(collisions))
    assert (data.fidelity, data.gaussian) == ("official", (27.93, 0.02))


# MINIBOONE


def official_miniboone(data: np.ndarray) -> Parts:
    indices = data[:, 0] < -100
    data = data[~indices]
    features_to_remove = []
    for i, feature in enumerate(data.T):
        if np.array([v for _, v in sorted(Counter(feature).items())])[0] > 5:
            features_to_remove.append(i)
    data = data[:, np.array([i for i in range(data.shape[1]) if i not in features_to_remove])]
    train, validate, test = official_split(data)
    both = np.vstack((train, validate))
    mu, s = both.mean(axis=0), both.std(axis=0)
    return (train - mu) / s, (validate - mu) / s, (test - mu) / s


@pytest.fixture
def particles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    rng = np.random.default_rng(8)
    rows = rng.gamma(2, size=(260, 50)).round(6)
    rows[:, [5, 13, 22, 26, 34, 44, 45]] = rng.integers(0, 2, (260, 7))
    rows[[3, 70]] = -999
    signal = rows[:200]
    text = "   200    60\n" + "".join("   ".join(f"{v: .9e}" for v in row) + "\n" for row in rows)
    truth = official_miniboone(signal)
    zipped(tmp_path / "archives" / miniboone.ARCHIVES["uci"].name, {"MiniBooNE_PID.txt": text.encode()})
    selected = signal[signal[:, 0] >= -100]
    selected = selected[:, [i for i in range(50) if i not in (5, 13, 22, 26, 34, 44, 45)]]
    tarred(tmp_path / "archives" / miniboone.ARCHIVES["maf"].name, with_forks({"miniboone/data.npy": npy(selected)}))
    monkeypatch.setattr(miniboone, "SIGNAL", 200)
    monkeypatch.setattr(miniboone, "ROWS", tuple(map(len, truth)))
    for name, part in (("VAL_SHA", truth[1]), ("TEST_SHA", truth[2])):
        monkeypatch.setattr(miniboone, name, hashlib.sha256(part.astype("<f4").tobytes()).hexdigest())
    return tmp_path, signal


@pytest.mark.parametrize("archive", ["uci", "maf"])
def test_miniboone_is_that_of_the_script(particles: tuple[Path, np.ndarray], archive: str) -> None:
    mirror, signal = particles
    data = build(miniboone, mirror, archive=archive)
    close(data, official_miniboone(signal))
    assert (data.fidelity, data.gaussian, data.weight) == ("official", (37.24, 1.07), None)


def test_other_rows_than_the_official_ones_are_refused(
    particles: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniboone, "TEST_SHA", "0" * 64)
    with pytest.raises(UserError) as error:
        build(miniboone, particles[0])
    sentence(error, "test rows", "sha256", "expected 000000000000", "replace")


# All of them: bad archives and mirrors

Damage = Callable[[bytes], bytes]
FORMS: dict[str, tuple[ModuleType, str, str, str]] = {
    "power of UCI": (power, "household", "uci", power.TEXT),
    "power of the paper": (power, "household", "maf", "power/data.npy"),
    "gas": (gas, "sensors", "", gas.MEMBER),
    "hepmass": (hepmass, "collisions", "", "hepmass/1000_train.csv"),
    "miniboone of UCI": (miniboone, "particles", "uci", "MiniBooNE_PID.txt"),
    "miniboone of the paper": (miniboone, "particles", "maf", "miniboone/data.npy"),
}


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Change the members of an archive."""
    members = {}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
    else:
        with tarfile.open(path) as packed:
            for entry in packed:
                inside = packed.extractfile(entry)
                assert inside is not None
                members[entry.name.removeprefix("data/")] = inside.read()
        members = {name: content for name, content in members.items() if "._" not in name}
    changed = {name: new for name, content in members.items() if (new := change(name, content)) is not None}
    (zipped if path.suffix == ".zip" else tarred)(path, changed)


def more_columns(name: str, content: bytes) -> bytes:
    if name.endswith(".npy"):
        rows = np.load(io.BytesIO(content))
        return npy(np.column_stack([rows, rows[:, 0]]))
    separator = b"," if name.endswith(".csv") else b";" if name == power.TEXT else b" "
    lines = content.splitlines()
    return b"".join(line + (separator + b"7" if i else b"") + b"\n" for i, line in enumerate(lines))


def with_nan(name: str, content: bytes) -> bytes:
    if name.endswith(".npy"):
        rows = np.load(io.BytesIO(content))
        rows[5:, 0] = np.nan
        return npy(rows)
    lines = content.splitlines()
    separator = b"," if name.endswith(".csv") else b";" if name == power.TEXT else None
    for i in range(5, len(lines)):
        fields = lines[i].split(separator)
        fields[4] = b"nan"
        lines[i] = (separator or b" ").join(fields)
    return b"\n".join(lines) + b"\n"


def words(name: str, content: bytes) -> bytes:
    return b"a header\n" + b"neither numbers nor, the, same; number of fields\nin every row\n" * 300


def fewer_rows(name: str, content: bytes) -> bytes:
    if name.endswith(".npy"):
        return npy(np.load(io.BytesIO(content))[:-30])
    return b"\n".join(content.splitlines()[:100]) + b"\n"


DAMAGES: list[Any] = [more_columns, with_nan, fewer_rows, words, "missing", "cut", "text"]
CASES = [(form, damage) for form in FORMS for damage in DAMAGES]
CASES += [(form, "pickle") for form, (*_, name) in FORMS.items() if name.endswith(".npy")]


@pytest.mark.parametrize(("form", "damage"), CASES)
def test_a_damaged_archive_is_a_sentence(form: str, damage: Any, request: pytest.FixtureRequest) -> None:
    member, fixture, archive, name = FORMS[form]
    made = request.getfixturevalue(fixture)
    mirror = made.mirror if isinstance(made, Power) else made[0] if isinstance(made, tuple) else made
    settings = {"archive": archive} if archive else {}
    declared = member.ARCHIVES[archive] if archive else member.ARCHIVE
    path = mirror / "archives" / declared.name
    if damage == "missing":
        rewrite(path, lambda one, content: None if one == name else content)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_bytes(b"<html>not found</html>")
    elif damage == "pickle":
        with_objects = io.BytesIO()
        np.save(with_objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        rewrite(path, lambda _, content: with_objects.getvalue())
    else:
        rewrite(path, lambda one, content: damage(one, content) if one == name else content)
    with pytest.raises(UserError) as error:
        build(member, mirror, **settings)
    sentence(error, str(path), "expected", "replace")


@pytest.mark.parametrize("member", [power, gas, hepmass, miniboone])
def test_a_mirror_without_the_file_names_it_and_the_other_ways(member: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        member.sources(member.Settings(), tmp_path)
    sentence(error, str(tmp_path / "maf"), "is missing", "`mirror: null`", "MB", "leave the data set out")


@pytest.mark.parametrize("member", [power, gas, hepmass, miniboone])
def test_without_a_mirror_the_archive_is_what_will_be_downloaded(
    member: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path))
    (source,) = member.sources(member.Settings(), None).values()
    assert isinstance(source, Archive)
    assert source.path == tmp_path / "archives" / source.name
    with pytest.raises(UserError) as error:
        build(member, None)
    sentence(error, str(source.path), "the stage `prepare` downloads it", source.urls[0], f"{source.megabytes} MB")


@needs_mirror
@pytest.mark.parametrize(("member", "rows", "fidelity"), [
    (gas, (10_000, 10_000, 10_000), "subset-alt-columns"),
    (hepmass, (4_506, 500, 4_924), "subset"),
])  # fmt: skip
def test_subsets_of_the_mirror_are_standardised_and_labelled(
    member: ModuleType, rows: tuple[int, ...], fidelity: str
) -> None:
    data = build(member, MIRROR)
    assert tuple(len(getattr(data, part)) for part in PARTS) == rows
    assert (data.fidelity, data.gaussian) == (fidelity, None)
    every = np.concatenate([data.train, data.val, *([data.test] if member is gas else [])])
    np.testing.assert_allclose(every.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(every.std(0, ddof=1), 1, atol=1e-9)


# The stage


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / "home"))
    without_proxies(monkeypatch)

    def stage(entry: dict[str, Any], **changes: Any) -> Stage:
        raw = yaml_files.read_yaml(ROOT / "params.yaml")
        raw |= {"datasets": {"real": entry}, **changes}
        Path("params.yaml").write_text(yaml.safe_dump(raw))
        Path("dvc.yaml").touch()
        given = parameters.load(Path("params.yaml"))
        return Stage("prepare@real", given, RunRecord.start("prepare@real", {"dataset": "real"}, {}))

    return stage


def test_prepare_downloads_what_is_missing_and_only_once(
    project: Callable[..., Stage],
    particles: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror, signal = particles
    local = mirror / "archives" / miniboone.ARCHIVES["uci"].name
    script = Script(local.read_bytes())
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Dataset, "parts", lambda self, whole=Dataset.parts: replace(whole(self), gaussian=None))
    with serving(script) as address:
        given = replace(miniboone.ARCHIVES["uci"], urls=(f"{address}/file",))
        monkeypatch.setattr(miniboone, "ARCHIVES", {"uci": given})
        stage = project({"kind": "miniboone"})
        pending = sources.downloads(stage.params)
        assert pending == [f"real: {given.name} (about 53 MB, CC BY 4.0) will be downloaded from {address}/file."]
        assert main(["validate"]) == 0
        assert pending[0] in capsys.readouterr().out
        sources.refresh(Path.cwd(), stage.params)
        before = layout.source("real").read_bytes()
        script.stops = [1000, *[0] * 4]
        with pytest.raises(UserError, match="same command again, which resumes"):
            prepare.write(stage, "real")
        assert not layout.prepared("real").exists()
        prepare.write(stage, "real")
        prepare.write(project({"kind": "miniboone", "transform": "marginals"}), "real")
    assert script.asked[-1] == "bytes=1000-"
    assert sources.downloads(stage.params) == []
    sources.refresh(Path.cwd(), stage.params)
    assert layout.source("real").read_bytes() == before
    table = files.read_table(layout.part(layout.prepared("real"), "train")).to_numpy()
    np.testing.assert_allclose(table, official_miniboone(signal)[0], atol=1e-11)
    assert "downloading" in capsys.readouterr().out


def test_a_changed_archive_of_the_mirror_runs_prepare_again(
    project: Callable[..., Stage], particles: tuple[Path, np.ndarray]
) -> None:
    mirror, _ = particles

    def fingerprint(**settings: Any) -> str:
        stage = project({"kind": "miniboone", **settings}, mirror=str(mirror))
        sources.refresh(Path.cwd(), stage.params)
        return layout.source("real").read_text()

    before, known = fingerprint(), fingerprint(archive="maf")
    rewrite(mirror / "archives" / miniboone.ARCHIVES["uci"].name, lambda _, content: content + b"\n")
    assert len({before, fingerprint(), known}) == 3
    (mirror / "archives" / miniboone.ARCHIVES["maf"].name).write_bytes(b"")  # `prepare` compares its checksum
    assert fingerprint(archive="maf") == known


def rows(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, 2))
    return np.column_stack([x[:, 0], 0.6 * x[:, 0] + 0.8 * x[:, 1]])


def handed_out(monkeypatch: pytest.MonkeyPatch, **change: Any) -> None:
    """Let the kind `moons` return Gaussian rows."""
    fields: dict[str, Any] = {"train": rows(3000, 0), "val": rows(100, 1), "test": rows(500, 2), "columns": ["a", "b"]}
    fields |= {"source": "the source", "licence": "none", "fidelity": "official"}
    data = Dataset(**(fields | change))
    monkeypatch.setattr(moons, "build", lambda *_, **__: data)


def test_the_stage_checks_rows_by_the_published_gaussian(
    project: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = 0.5 * (2 + math.log(0.64)) + math.log(2 * math.pi)  # the entropy
    handed_out(monkeypatch, gaussian=(exact, 0.2))  # five standard errors of 500 rows
    prepare.write(project({"kind": "moons"}), "real")
    described = files.read_json(layout.provenance(layout.prepared("real")))
    train, test = rows(3000, 0), rows(500, 2)
    away = np.linalg.solve(np.linalg.cholesky(np.cov(train.T, bias=True)), (test - train.mean(0)).T)
    logdet = np.linalg.slogdet(np.cov(train.T, bias=True))[1]
    assert described["gaussian"] == pytest.approx((away**2).sum(0).mean() / 2 + logdet / 2 + math.log(2 * math.pi))
    assert f"{described['gaussian']:.3f}, published" in capsys.readouterr().out
    files.remove(layout.prepared("real"))
    handed_out(monkeypatch, gaussian=(exact + 0.5, 0.2))
    with pytest.raises(UserError) as error:
        prepare.write(project({"kind": "moons"}), "real")
    sentence(error, "real", f"expected the published {exact + 0.5:g} ± 0.2", "replace the source", "the source")
    assert not layout.prepared("real").exists()


def test_each_column_gets_the_transform_that_the_data_set_names(
    project: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    train = np.column_stack([
        rng.gamma(2, size=2000), 5 + 0.5 * (rng.poisson(2, 2000) + rng.random(2000)), 4 * rng.random(2000) - 1,
        rng.normal(size=2000),
    ])  # fmt: skip
    transforms = {
        "a": Transform("mixture", components=5, floor=0.1, weight_power=2.0),
        "b": Transform("steps", start=5.0, width=0.5),
        "c": Transform("uniform", start=-1.0, width=4.0),
    }
    weight = train[:, 0] + 0.2  # so that their power shifts the mean
    handed_out(
        monkeypatch,
        train=train,
        val=train,
        test=train,
        columns=["a", "b", "c", "d"],
        marginals=transforms,
        weight=weight,
    )
    prepare.write(project({"kind": "moons"}), "real")
    folder = layout.prepared("real")
    tensors, meta = files.read_tensors(layout.marginals(folder))
    assert [one["kind"] for one in meta["marginals"]] == ["mixture", "steps", "steps", "identity"]
    assert (meta["marginals"][0]["components"], meta["marginals"][2]["levels"]) == (5, 1)
    marginals = Marginals.from_description(meta["marginals"])
    marginals.load_state_dict(tensors)
    x = torch.from_numpy(train)
    u, log_det = marginals(x)
    assert torch.equal(u[:, 3], x[:, 3])
    _, slope = marginals.columns[2](x[:, 2])
    density = (slope - u[:, 2] ** 2 / 2 - math.log(2 * math.pi) / 2).exp()
    np.testing.assert_allclose(density, 2000 / 2001 / 4, rtol=1e-9)
    squared = (torch.from_numpy(weight) ** 2)[:, None]
    centred = (squared * u[:, :1]).sum(0) / squared.sum()
    assert abs(float(centred)) < 0.02  # the mixture is that of the weights squared
    assert bool(log_det.isfinite().all())


@pytest.mark.slow
@needs_mirror
@pytest.mark.parametrize(("entry", "nll"), [({"kind": "miniboone"}, 25.87), ({"kind": "power"}, 0.513)])
def test_marginals_and_a_gaussian_reach_what_was_measured_before(
    project: Callable[..., Stage], entry: dict[str, Any], nll: float
) -> None:
    prepare.write(project({**entry, "transform": "marginals"}, mirror=str(MIRROR)), "real")
    folder = layout.prepared("real")
    described = files.read_json(layout.provenance(folder))
    columns = described["columns"]
    tensors, meta = files.read_tensors(layout.marginals(folder))
    marginals = Marginals.from_description(meta["marginals"])
    marginals.load_state_dict(tensors)

    def images(part: str, names: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for group in files.row_groups(layout.part(folder, part), names):
            for block in np.array_split(group, max(1, len(group) // 50_000)):
                u, log_det = marginals(torch.from_numpy(block[:, : len(columns)]))
                yield u.numpy(), log_det.numpy(), block[:, -1]

    weight = described["weight"]
    u, _, last = (
        np.concatenate(some) for some in zip(*images("train", columns + [weight] * bool(weight)), strict=True)
    )
    weights = last ** (1 / 0.4) if weight else None
    mean, covariance = np.average(u, 0, weights), np.cov(u.T, aweights=weights)
    u, log_det, _ = (np.concatenate(some) for some in zip(*images("test", columns), strict=True))
    away = np.linalg.solve(np.linalg.cholesky(covariance), (u - mean).T)
    found = 0.5 * (away**2).sum(0) - log_det
    constant = len(columns) / 2 * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] / 2
    assert found.mean() + constant == pytest.approx(nll, abs=0.03)
