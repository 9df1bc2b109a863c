"""BSDS300, 63-d: patches of 8x8 grey pixels drawn anew from the 300 images, or the rows of the MAF paper."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.base import downloads, layout, plugins
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError, first_line
from pipelines.datasets import Array, Parts, _archives, _maf

if TYPE_CHECKING:
    import pandas as pd

COPY = "bsds300/BSDS300-images.tar"
COPY_SHA = "df51f9848624dd63f28c8abbdf9d9b485fc3c6ea358f1364c8c82366e250547d"
IMAGES = {"train": 200, "test": 100}
TRAIN_IMAGES = 180  # the others are those of the validation rows
SIDE, PIXELS = 8, 64
ROWS = {"train": 1_000_000, "val": 50_000, "test": 250_000}
GAUSSIAN = -96.67
_CHUNK = 50_000

Image = NDArray[np.uint8]


class Settings(plugins.Settings):
    """The source of the rows, and the numbers of patches that are drawn from the images."""

    archive: Literal["images", "maf"] = Field(
        default="images", description="draw patches from the 300 images, or read the rows of the MAF paper's archive"
    )
    train: int = Field(ROWS["train"], ge=1, le=10_000_000, description="train patches, of 180 images")
    val: int = Field(ROWS["val"], ge=1, le=10_000_000, description="validation patches, of 20 other images")
    test: int = Field(ROWS["test"], ge=1, le=10_000_000, description="test patches, of 100 other images")

    @property
    def rows(self) -> dict[str, int]:
        """Number of rows by part."""
        return {part: getattr(self, part) for part in layout.PARTS}


def sources(settings: Settings, mirror: Path | None) -> Mapping[str, Path | Archive]:
    """Return the files that the rows are read from.

    Raises:
        UserError: There is a mirror without them.
    """
    if settings.archive == "maf":
        return _archives.find(mirror, _archives.MAF)
    return _archives.find(mirror, _archives.BSDS300, [COPY])


def parts(settings: Settings, *, rng: np.random.Generator, mirror: Path | None, scratch: Path) -> Parts:
    """Draw the patches, or read those of the paper."""
    (source,) = sources(settings, mirror).values()
    if settings.archive == "maf":
        assert isinstance(source, Archive)
        return _of_paper(source, settings, scratch)
    return _drawn(source, settings, rng)


def _drawn(source: Path | Archive, settings: Settings, rng: np.random.Generator) -> Parts:
    """Return patches by the recipe of Uria et al. 2013 (arXiv 1306.0186), which the MAF paper's rows followed.

    A patch is 8x8 pixels of a random image at a random place, plus uniform noise, divided by 256, minus its mean; the
    last pixel, which the others determine, is left out.
    """
    found = _images(source)
    order = rng.permutation(len(found["train"]))
    train, val = ([found["train"][i] for i in some] for some in np.split(order, [TRAIN_IMAGES]))
    images = {"train": train, "val": val, "test": found["test"]}
    seeds = {part: int(rng.integers(2**63)) for part in layout.PARTS}

    def chunks(part: str) -> Iterator[pd.DataFrame]:
        generator, left = np.random.default_rng(seeds[part]), settings.rows[part]
        while left > 0:
            yield _table(patches(images[part], min(left, _CHUNK), generator))
            left -= _CHUNK

    full = settings.rows == ROWS
    return _parts(
        settings.rows,
        chunks,
        "Berkeley segmentation data set BSDS300 (D. Martin et al. 2001), patches drawn by the recipe of RNADE",
        "equivalent",
        "Patches drawn anew from the 300 images; those of one image resemble one another, so that the true standard "
        "errors are larger than those over rows.",
        # three times the published error: both sets of patches are draws, with standard errors over rows of .13
        (GAUSSIAN, 0.75) if full else None,
    )


def patches(images: list[Image], number: int, generator: np.random.Generator) -> Array:
    """Return patches at random places of random images, without their mean and their last pixel.

    Args:
        images: Grey images.
        number: Number of patches.
        generator: Source of randomness.

    Returns:
        The patches in random order, shape (number, 63).
    """
    chosen, place = generator.integers(len(images), size=number), generator.random((number, 2))
    rows = generator.random((number, PIXELS))  # the noise
    for i, image in enumerate(images):
        here = np.flatnonzero(chosen == i)
        windows = np.lib.stride_tricks.sliding_window_view(image, (SIDE, SIDE))
        corner = (place[here] * windows.shape[:2]).astype(int)
        rows[here] += windows[corner[:, 0], corner[:, 1]].reshape(-1, PIXELS)
    rows /= 256
    rows -= rows.mean(1, keepdims=True)
    return rows[:, :-1]


def _images(source: Path | Archive) -> dict[str, list[Image]]:
    """Return the grey training and test images in the order of their names.

    Raises:
        UserError: They are damaged, or their number is not that of BSDS300.
    """
    if isinstance(source, Archive):
        with downloads.reading(source) as path:
            found = _decoded(path)
    else:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if digest != COPY_SHA:
            raise UserError(
                f"{source} has the sha256 {digest[:12]}..., expected {COPY_SHA[:12]}...; replace this file of the "
                "mirror."
            )
        found = _decoded(source)
    numbers = {part: len(images) for part, images in found.items()}
    if numbers != IMAGES:
        where = source.path if isinstance(source, Archive) else source
        raise UserError(
            f"{where} has {numbers['train']} training and {numbers['test']} test images, expected {IMAGES['train']} "
            f"and {IMAGES['test']}; replace it by the original."
        )
    return found


def _decoded(path: Path) -> dict[str, list[Image]]:
    import PIL.Image

    found: dict[str, dict[str, Image]] = {"train": {}, "test": {}}
    with tarfile.open(path) as packed:
        for entry in packed:
            folder, _, name = entry.name.rpartition("/")
            part = folder.rpartition("/")[2]
            content = packed.extractfile(entry)
            if part not in found or not name.endswith(".jpg") or name.startswith("._") or content is None:
                continue
            try:
                with PIL.Image.open(io.BytesIO(content.read())) as image:
                    found[part][name] = np.asarray(image.convert("L"))
            except OSError as error:  # also what Pillow raises where it knows no such format
                raise UserError(
                    f"{path}: {entry.name} cannot be read ({first_line(error)}), expected a JPEG image; replace the "
                    "archive by the original."
                ) from None
    return {part: [images[name] for name in sorted(images)] for part, images in found.items()}


def _of_paper(archive: Archive, settings: Settings, scratch: Path) -> Parts:
    """Return the rows of the paper's archive.

    Raises:
        UserError: The archive is damaged, its rows have changed, or the settings ask for other numbers of rows.
    """
    import h5py

    name = "BSDS300/BSDS300.hdf5"
    if settings.rows != ROWS:
        raise UserError(
            f"`train`, `val` and `test` of the data set are {', '.join(map(str, settings.rows.values()))}, but "
            f"`archive: maf` has {', '.join(map(str, ROWS.values()))} rows; leave these settings out."
        )
    path = scratch / "BSDS300.hdf5"
    with _archives.member(archive, name) as content, path.open("wb") as copy:
        shutil.copyfileobj(content, copy)
    where, keys = f"{archive.path}: {name}", {"train": "train", "val": "validation", "test": "test"}
    try:
        with h5py.File(path, "r") as file:
            shapes = {part: file[key].shape for part, key in keys.items()}
    except (OSError, KeyError) as error:
        raise UserError(f"{where} cannot be read ({first_line(error)}); replace the archive by the original.") from None
    wanted = {part: (number, PIXELS - 1) for part, number in ROWS.items()}
    if shapes != wanted:
        raise UserError(f"{where} has rows of the shapes {shapes}, expected {wanted}; replace it by the original.")

    def chunks(part: str) -> Iterator[pd.DataFrame]:
        with h5py.File(path, "r") as file:
            for first in range(0, ROWS[part], _CHUNK):
                rows = np.asarray(file[keys[part]][first : first + _CHUNK], dtype=np.float64)
                _maf.check_finite(rows, where)
                yield _table(rows)

    source = "Berkeley segmentation data set BSDS300 (D. Martin et al. 2001), MAF preprocessing"
    return _parts(ROWS, chunks, source, "official", "", (GAUSSIAN, 0.25))


def _parts(
    rows: Mapping[str, int],
    chunks: Callable[[str], Iterator[pd.DataFrame]],
    source: str,
    fidelity: Literal["official", "equivalent"],
    notes: str,
    gaussian: tuple[float, float] | None,
) -> Parts:
    licence = "free for non-commercial research and education"
    types: dict[str, Any] = dict.fromkeys(_columns(), "float")
    return Parts(rows, chunks, _columns(), types, source, licence, fidelity, notes, gaussian=gaussian)


def _table(rows: Array) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=_columns())


def _columns() -> list[str]:
    return [f"pixel_{i:02d}" for i in range(PIXELS - 1)]
