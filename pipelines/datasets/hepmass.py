"""HEPMASS, 21-d: simulated particle collisions; the official rows from the archive of the MAF paper, or their head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.base.downloads import Archive
from pipelines.datasets import Array, Dataset, _archives, _maf

ARCHIVE = _archives.MAF
COPY = "maf/hepmass_head.npz"
TRAIN_SHA = "3c2667507a6dc8a09d6ec8eea80e67280fdd3b323528db082ffaf73bdb35d7b5"
TEST_SHA = "51c46f41e0216d611dbb0a7e04a9abac5dd7eed1b382fad9a1ce51c20cc5ca83"

ROWS = (315_123, 35_013, 174_987)
FIELDS = 28  # the label and f0 to f26
_CHUNK = 50_000


class Settings(_maf.Settings):
    """Whether columns are transformed first."""


def sources(settings: Settings, mirror: Path | None) -> Mapping[str, Path | Archive]:
    """Return the files that the rows are read from.

    Raises:
        UserError: There is a mirror without them.
    """
    return _archives.find(mirror, ARCHIVE, [COPY])


def build(settings: Settings, *, rng: np.random.Generator, mirror: Path | None) -> Dataset:
    """Read the collisions with a new particle and keep the continuous features.

    The moments of standardisation are those of all training rows, with the validation rows among them; the smallest
    value of a dropped feature occurs more than 5 times.
    """
    (source,) = sources(settings, mirror).values()
    if isinstance(source, Archive):
        train, test = (_signal(source, name) for name in ("1000_train.csv", "1000_test.csv"))
    else:
        train = _archives.array(source, (5006, 21), TRAIN_SHA, "train")
        test = _archives.array(source, (4924, 21), TEST_SHA, "test")
    loc, scale = train.mean(0), train.std(0, ddof=1)
    kept = _maf.varies(train)
    train, test = (((rows - loc) / scale)[:, kept] for rows in (train, test))
    before, val = _maf.last_tenth(train)
    official = isinstance(source, Archive)
    if official:
        _maf.check_shapes((before, val, test), ROWS, 21, f"{ARCHIVE.name}: hepmass")
    return Dataset(
        train=before,
        val=val,
        test=test,
        columns=[f"feature_{i:02d}" for i in range(before.shape[1])],
        source="UCI 347 HEPMASS (P. Baldi et al.), DOI 10.24432/C5PP5W, MAF preprocessing",
        licence="CC BY 4.0",
        fidelity="official" if official else "subset",
        notes="".join(
            [
                "" if official else "The first 5,006 of 350,136 training and 4,924 of 174,987 test rows.",
                f" {_maf.NO_MARGINALS}" if settings.marginals else "",
            ]
        ).strip(),
        marginals=settings.marginals,
        gaussian=(27.93, 0.02) if official else None,
    )


def _signal(archive: Archive, name: str) -> Array:
    """Return the features f0 to f25 of the collisions with label 1.

    The script of the paper reads them so that f26 falls away: its name is missing in the header of the training file.

    Raises:
        UserError: The archive is damaged, or the columns have changed.
    """
    with _archives.member(archive, f"hepmass/{name}") as file:
        return _read(file, f"{archive.path}: hepmass/{name}")


def _read(file: IO[bytes], source: str) -> Array:
    import pandas as pd

    kept = []
    for chunk in pd.read_csv(file, header=None, skiprows=1, chunksize=_CHUNK):
        _maf.check_columns(chunk.shape[1], FIELDS, source)
        kept.append(chunk.to_numpy(dtype=np.float64)[chunk[0] == 1, 1:-1])
    rows = np.concatenate(kept)
    _maf.check_finite(rows, source)
    return rows
