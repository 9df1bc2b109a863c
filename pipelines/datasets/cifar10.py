"""CIFAR-10, 32 x 32 colour pixels: the first 45,000 training images, 5,000 for validation, 10,000 test images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError
from pipelines.datasets import Image, Parts, _archives, _images
from pipelines.datasets._images import Bytes, Labelled

BATCHES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
SIDE, ROWS = 32, 10_000  # images in a file
WORDS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE = Image(channels=3, height=SIDE, width=SIDE, levels=256)
PIXELS = IMAGE.channels * SIDE**2


class Settings(_images.Settings):
    """What is modelled, and how much of it."""


def sources(settings: Settings, mirror: Path | None) -> Mapping[str, Path | Archive]:
    """Return the archive that the images are read from.

    Raises:
        UserError: There is a mirror without it.
    """
    return _archives.find(mirror, _archives.CIFAR10)


def parts(settings: Settings, *, rng: np.random.Generator, mirror: Path | None, scratch: Path) -> Parts:
    """Read the batches, of which the last tenth is for validation; nothing is drawn."""
    (archive,) = sources(settings, mirror).values()
    assert isinstance(archive, Archive)
    files: dict[str, str] = {}
    tables = {part: _images_of(archive, names, files) for part, names in BATCHES.items()}
    (pixels, labels), test = tables["train"], tables["test"]
    cut = len(labels) - len(labels) // 10
    return _images.parts(
        settings,
        {"train": (pixels[:cut], labels[:cut]), "val": (pixels[cut:], labels[cut:]), "test": test},
        image=IMAGE,
        columns=[
            f"{colour}_{row:02d}_{column:02d}"
            for colour in ("red", "green", "blue")
            for row in range(SIDE)
            for column in range(SIDE)
        ],
        words=WORDS,
        source="CIFAR-10 (Krizhevsky 2009), split of Papamakarios et al. 2017",
        licence=archive.licence,
        files=files,
    )


def _images_of(archive: Archive, names: tuple[str, ...], files: dict[str, str]) -> Labelled:
    """Return the pixels and labels of some files in their order, and add their hashes to `files`.

    Raises:
        UserError: A file is missing or has another size.
    """
    found = list[Bytes]()
    for name in names:
        with _archives.member(archive, name) as file:
            content = file.read()
        if len(content) != ROWS * (1 + PIXELS):
            raise UserError(
                f"{archive.path}: {name} has {len(content)} bytes, expected {ROWS * (1 + PIXELS)}, a label and "
                f"{PIXELS} pixels of {ROWS} images; replace it by the archive from {archive.urls[0]}."
            )
        files[name] = hashlib.sha256(content).hexdigest()
        found.append(np.frombuffer(content, np.uint8).reshape(ROWS, 1 + PIXELS))
    rows = np.concatenate(found)
    return rows[:, 1:], rows[:, 0]
