"""MINIBOONE, 43-d: the official rows from an archive, or a mirror's official test rows and 54 % of the train rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError
from pipelines.datasets import Array, Dataset, Transform, _archives, _maf

ARCHIVES = {"maf": _archives.MAF, "uci": _archives.UCI_MINIBOONE}
TRAIN, VAL, TEST = "miniboone_train_partial.npz", "miniboone_val.npy", "miniboone_test.npy"

# SHA-256 of the rows as little-endian float32 in C order.
VAL_SHA = "3f8464516c2e175976966bd4a80637911645f9bf9fc2569a9e0f60f88ed619ef"
TEST_SHA = "99a3d20513965ddfde36f5b58848404e6b4b364d64cfd4d27e9370fbf418a65f"
TRAIN_SHA = "88b0c52977e8ae80cc25c7e0b756dcb1f5b8b0c954bf8c34ba118e4ae6acd067"
WEIGHT_SHA = "b1a4f5adba13f4b80326e6c05b1271122300d1c3b1949220a07556d32728a515"

ROWS = (29_556, 3_284, 3_648)
FIELDS, SIGNAL = 50, 36_499  # columns, and rows of the signal, which come first
_MISSING = -100  # a smaller number in column 0 stands for a missing value

SOURCE = "UCI 199 MiniBooNE particle identification (B. Roe), DOI 10.24432/C5QC87, MAF preprocessing"


class Settings(_maf.Settings):
    """The source, the effect of the importance weights of the train rows, and whether columns are transformed first."""

    archive: Literal["maf", "uci"] = Field(
        default="uci", description="what is downloaded without a mirror: UCI 199, or the archive of the MAF paper"
    )
    weight_exponent: float = Field(
        0.4,
        ge=0,
        le=1,
        description="power of the importance weights of a mirror's rows: 1 restores the official distribution but "
        "overfits the 739 rows that stand for 14,355; 0 ignores the weights; .4 is best on the validation rows",
    )


def sources(settings: Settings, mirror: Path | None) -> Mapping[str, Path | Archive]:
    """Return the files that the rows are read from.

    Raises:
        UserError: There is a mirror without them.
    """
    return _archives.find(mirror, ARCHIVES[settings.archive], [f"maf/{name}" for name in (TRAIN, VAL, TEST)])


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    """Read the rows that Papamakarios et al. 2017 (arXiv 1705.07057) standardised, in their order."""
    found = sources(settings, mirror)
    archive = found.get(ARCHIVES[settings.archive].name)
    return _official(archive, settings) if isinstance(archive, Archive) else _partial(found, settings)


def _official(archive: Archive, settings: Settings) -> Dataset:
    rows = _signal(archive) if settings.archive == "uci" else _of_paper(archive)
    train_val, test = _maf.last_tenth(rows)
    loc, scale = train_val.mean(0), train_val.std(0)
    train, val = _maf.last_tenth((train_val - loc) / scale)
    test = (test - loc) / scale
    _maf.check_shapes((train, val, test), ROWS, 43, str(archive.path))
    for part, part_rows, sha in (("validation", val, VAL_SHA), ("test", test, TEST_SHA)):
        digest = hashlib.sha256(part_rows.astype("<f4").tobytes()).hexdigest()
        if digest != sha:
            raise UserError(
                f"the {part} rows of {archive.path} have the sha256 {digest[:12]}..., expected {sha[:12]}...; replace "
                "it by the original."
            )
    return Dataset(
        train=train,
        val=val,
        test=test,
        columns=_columns(),
        source=SOURCE,
        licence="CC BY 4.0",
        fidelity="official",
        notes=_maf.NO_MARGINALS if settings.marginals else "",
        marginals=settings.marginals,
        gaussian=(37.24, 1.07),
    )


def _of_paper(archive: Archive) -> Array:
    """Return the rows of the paper's archive, which were selected but not standardised."""
    with _archives.member(archive, "miniboone/data.npy") as file:
        rows = _maf.load(file)
    _maf.check_finite(rows, f"{archive.path}: miniboone/data.npy")
    return rows


def _signal(archive: Archive) -> Array:
    """Return the signal rows of UCI's text without missing values, and its continuous columns.

    Raises:
        UserError: The archive is damaged, or its rows or columns have changed.
    """
    import pandas as pd

    name = "MiniBooNE_PID.txt"
    with _archives.member(archive, name) as file:
        first = file.readline().split()
        if first[:1] != [str(SIGNAL).encode()]:
            raise UserError(
                f"{archive.path}: {name} begins with {b' '.join(first[:2])!r}, expected the number of its signal rows, "
                f"{SIGNAL}; replace it by the original."
            )
        table = pd.read_csv(file, sep=r"\s+", header=None, nrows=SIGNAL)
    _maf.check_columns(table.shape[1], FIELDS, f"{archive.path}: {name}")
    rows: Array = table.to_numpy(dtype=np.float64)
    _maf.check_finite(rows, f"{archive.path}: {name}")
    rows = rows[rows[:, 0] >= _MISSING]
    return rows[:, _maf.varies(rows)]


def _partial(found: Mapping[str, Path | Archive], settings: Settings) -> Dataset:
    r"""Return the rows of the mirror, which lacks 13,616 train rows, all of one stratum.

    The 739 available rows of that stratum have weight $w = 19.4$, the others $w = 1$; train rows are drawn with
    probability $\propto w^\alpha$. Validation and test rows are complete, so scores on them are comparable with the
    literature. Transforms of columns are fitted with the weights $w$.
    """
    train, val, test = (Path(str(found[f"maf/{name}"])) for name in (TRAIN, VAL, TEST))
    weight = _archives.array(train, (15940,), WEIGHT_SHA, "weight") ** settings.weight_exponent
    power = 1 / settings.weight_exponent if settings.weight_exponent else 0.0
    notes = ["15,940 of 29,556 official train rows, importance weighted; official validation and test rows."]
    return Dataset(
        train=_archives.array(train, (15940, 43), TRAIN_SHA, "x"),
        val=_archives.array(val, (3284, 43), VAL_SHA),
        test=_archives.array(test, (3648, 43), TEST_SHA),
        columns=_columns(),
        source=SOURCE,
        licence="CC BY 4.0",
        fidelity="official-test/partial-train",
        weight=weight / weight.mean(),
        weight_power=power or 1.0,
        notes=" ".join([*notes, *([_maf.NO_MARGINALS] if settings.marginals else [])]),
        marginals=dict.fromkeys(_columns(), Transform("mixture", weight_power=power)) if settings.marginals else False,
    )


def _columns() -> list[str]:
    return [f"feature_{i:02d}" for i in range(43)]
