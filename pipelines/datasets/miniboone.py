"""MINIBOONE, 43-d, from a local mirror: the official validation and test rows, 54 % of the train rows."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
from pydantic import Field

from pipelines.base import plugins
from pipelines.base.errors import UserError
from pipelines.datasets import Array, Dataset

# SHA-256 of the rows as little-endian float32 in C order.
VAL_SHA = "3f8464516c2e175976966bd4a80637911645f9bf9fc2569a9e0f60f88ed619ef"
TEST_SHA = "99a3d20513965ddfde36f5b58848404e6b4b364d64cfd4d27e9370fbf418a65f"
TRAIN_SHA = "88b0c52977e8ae80cc25c7e0b756dcb1f5b8b0c954bf8c34ba118e4ae6acd067"
WEIGHT_SHA = "b1a4f5adba13f4b80326e6c05b1271122300d1c3b1949220a07556d32728a515"

TRAIN, VAL, TEST = "miniboone_train_partial.npz", "miniboone_val.npy", "miniboone_test.npy"
REMEDY = "set `mirror` to a folder with this project's copy of MINIBOONE, or leave the data set out"


class Settings(plugins.Settings):
    """The effect of the importance weights of the train rows."""

    weight_exponent: float = Field(
        0.4,
        ge=0,
        le=1,
        description="power of the importance weights: 1 restores the official distribution but overfits the "
        "739 rows that stand for 14,355; 0 ignores the weights; .4 is best on the validation rows",
    )


def sources(settings: Settings, mirror: Path | None) -> dict[str, Path]:
    """Return the files of the three parts.

    Raises:
        UserError: There is no mirror, or a file is missing.
    """
    return {name: find(mirror, name) for name in (TRAIN, VAL, TEST)}


def find(mirror: Path | None, name: str) -> Path:
    """Return the path of a file below the mirror.

    Raises:
        UserError: There is no mirror, or the file is missing.
    """
    if mirror is None:
        raise UserError(f"the data set miniboone reads maf/{name} below a mirror, found no mirror; {REMEDY}.")
    path = mirror / "maf" / name
    if not path.is_file():
        raise UserError(f"{path} is missing, expected this file of MINIBOONE below the mirror; {REMEDY}.")
    return path


def read(mirror: Path | None, name: str, sha: str, shape: tuple[int, ...], key: str = "") -> Array:
    """Return an array of a `.npy` or `.npz` file below the mirror, verified by its hash and shape.

    Args:
        mirror: Folder with the files.
        name: Name of the file.
        sha: Expected SHA-256 of the array as little-endian float32 in C order.
        shape: Expected shape.
        key: Name of the array in a `.npz` file.

    Raises:
        UserError: There is no mirror, or the file is missing, unreadable or not the expected one.
    """
    path = find(mirror, name)
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            array: Array = np.asarray(loaded[key] if key else loaded, dtype=np.float64)
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}), expected NumPy arrays; {REMEDY}."
        ) from error
    found = hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()
    if array.shape != shape or found != sha:
        raise UserError(
            f"{path} holds an array {key} of shape {array.shape} with sha256 {found[:12]}..., expected "
            f"{shape} with {sha[:12]}...; {REMEDY}."
        )
    return array


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    r"""Read the rows that Papamakarios et al. 2017 (arXiv 1705.07057) standardised, in their order.

    The mirror lacks 13,616 train rows, all of one stratum. The 739 available rows of that stratum have weight $w =
    19.4$, the others $w = 1$; train rows are drawn with probability $\propto w^\alpha$. Validation and test rows are
    complete, so scores on them are comparable with the literature.
    """
    train = read(mirror, TRAIN, TRAIN_SHA, (15940, 43), "x")
    weight = read(mirror, TRAIN, WEIGHT_SHA, (15940,), "weight") ** settings.weight_exponent
    return Dataset(
        train=train,
        val=read(mirror, VAL, VAL_SHA, (3284, 43)),
        test=read(mirror, TEST, TEST_SHA, (3648, 43)),
        columns=[f"feature_{i:02d}" for i in range(43)],
        source="UCI 199 MiniBooNE particle identification (B. Roe), DOI 10.24432/C5QC87, MAF preprocessing",
        licence="CC BY 4.0",
        fidelity="official-test/partial-train",
        weight=weight / weight.mean(),
        notes="15,940 of 29,556 official train rows, importance weighted; official validation and test rows.",
    )
