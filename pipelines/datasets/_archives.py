"""Where real data come from: a mirror of local copies, or the archives of their publishers.

With a `mirror`, a data set reads its archive below `archives/` there, else this project's copies in the other folders.
Without one, the stage `prepare` downloads the archive (see `pipelines.base.downloads`).
"""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from pipelines.base import downloads
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError, first_line
from pipelines.datasets import Array

_UCI = "https://archive.ics.uci.edu/static/public"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
_BERKELEY = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision"

MAF = Archive(
    "maf-data.tar.gz",
    (
        "https://zenodo.org/api/records/1161203/files/data.tar.gz/content",
        "https://zenodo.org/record/1161203/files/data.tar.gz",
    ),
    857,
    "CC BY 4.0; BSDS300 for research and education only",
    "md5:9b9c9b0375315ad270eba4ce80c093ab",
)
"""What Papamakarios et al. 2017 preprocessed: the five tabular sets, DOI 10.5281/zenodo.1161203."""
UCI_MINIBOONE = Archive(
    "uci-199-miniboone.zip", (f"{_UCI}/199/miniboone+particle+identification.zip",), 53, "CC BY 4.0"
)
UCI_POWER = Archive(
    "uci-235-power.zip", (f"{_UCI}/235/individual+household+electric+power+consumption.zip",), 20, "CC BY 4.0"
)
UCI_GAS = Archive("uci-322-gas.zip", (f"{_UCI}/322/gas+sensor+array+under+dynamic+gas+mixtures.zip",), 369, "CC BY 4.0")
BSDS300 = Archive(
    "BSDS300-images.tgz",
    (f"{_BERKELEY}/bsds/BSDS300-images.tgz", f"{_BERKELEY}/grouping/segbench/BSDS300-images.tgz"),
    22,
    "free for non-commercial research and education",
)
"""The 300 images; their SHA-256 sums are in the mirror's `bsds300/SHA256SUMS`."""
MNIST = {
    name: Archive(
        f"{name}.gz", (f"{_MNIST}/{name}.gz",), megabytes, "cited as CC BY-SA 3.0 (LeCun, Cortes, Burges)", f"md5:{md5}"
    )
    for name, megabytes, md5 in (
        ("train-images-idx3-ubyte", 10, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("train-labels-idx1-ubyte", 1, "d53e105ee54ea40749a09fcbcd1e9432"),
        ("t10k-images-idx3-ubyte", 2, "9fb629c4189551a2d022fa330f9573f3"),
        ("t10k-labels-idx1-ubyte", 1, "ec29112dd5afa0611ce80d1b7f02629c"),
    )
}
"""The four idx files."""
CIFAR10 = Archive(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    170,
    "unstated (Krizhevsky 2009, from 80 Million Tiny Images)",
    "md5:c32a1d4ab5d03f1284b67883e8d87530",
)
"""The batches as bytes: a label and the red, green and blue planes of each image."""


def find(mirror: Path | None, archive: Archive, copies: Sequence[str] = ()) -> Mapping[str, Path | Archive]:
    """Return what a data set is read from, by name: its archive, or this project's copies of its files.

    Args:
        mirror: Folder of local copies, or None.
        archive: Archive of the publisher; it is preferred where the mirror has it, and downloaded without a mirror.
        copies: Files below the mirror that do as well, named like `maf/miniboone_test.npy`.

    Raises:
        UserError: There is a mirror, which has neither the archive nor all of the copies.
    """
    if mirror is None:
        return {archive.name: archive}
    local = mirror / "archives" / archive.name
    if local.is_file():
        return {archive.name: replace(archive, local=local)}
    if not copies:
        raise UserError(
            f"{local} is missing, expected this archive below `mirror`; get it from {archive.urls[0]} (about "
            f"{archive.megabytes} MB), or set `mirror: null` to have it downloaded."
        )
    return {name: mirror_file(mirror, name, archive) for name in copies}


def mirror_file(mirror: Path, name: str, archive: Archive) -> Path:
    """Return the path of a file below the mirror, which is named like `maf/miniboone_test.npy`.

    Args:
        mirror: Folder of local copies.
        name: Path of the file there.
        archive: Archive that does as well, for the message.

    Raises:
        UserError: The file is missing.
    """
    path = mirror / name
    if not path.is_file():
        raise UserError(
            f"{path} is missing, expected this file below `mirror`; copy it there, set `mirror: null` to download "
            f"{archive.name} (about {archive.megabytes} MB) instead, or leave the data set out."
        )
    return path


def array(path: Path, shape: tuple[int, ...], sha256: str, key: str = "") -> Array:
    """Return an array of a `.npy` or `.npz` file below the mirror, verified by its shape and hash.

    Args:
        path: The file.
        shape: Expected shape.
        sha256: Expected hash of the array as little-endian float32 in C order.
        key: Name of the array in a `.npz` file.

    Raises:
        UserError: The file is unreadable or not the expected one.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            found: Array = np.asarray(loaded[key] if key else loaded, dtype=np.float64)
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)}), expected NumPy arrays; replace this "
            "file of the mirror."
        ) from error
    digest = hashlib.sha256(found.astype("<f4").tobytes()).hexdigest()
    if found.shape != shape or digest != sha256:
        raise UserError(
            f"{path} holds an array {key} of shape {found.shape} with sha256 {digest[:12]}..., expected {shape} with "
            f"{sha256[:12]}...; replace this file of the mirror."
        )
    return found


@contextmanager
def member(archive: Archive, name: str) -> Iterator[IO[bytes]]:
    """Yield one file of an archive, a zip or a compressed tar, without unpacking the others.

    Args:
        archive: An archive that is here.
        name: Path of the file, from its end: `power/data.npy`.

    Raises:
        UserError: The archive was not downloaded, is damaged, or has no such file.
    """
    with downloads.reading(archive) as path:
        if archive.name.endswith((".zip", ".whl")):
            with zipfile.ZipFile(path) as zipped, zipped.open(_named(archive, name, zipped.namelist())) as file:
                yield file
            return
        with tarfile.open(path, "r|*") as packed:  # in one pass, without an index
            for entry in packed:
                if entry.isfile() and _ends(entry.name, name) and (content := packed.extractfile(entry)) is not None:
                    yield content
                    return
        raise UserError(_lacks(archive, name))


def _named(archive: Archive, name: str, names: Sequence[str]) -> str:
    found = next((one for one in names if _ends(one, name)), None)
    if found is None:
        raise UserError(_lacks(archive, name))
    return found


def _ends(path: str, name: str) -> bool:
    """Return whether a path in an archive ends so; the files that macOS adds begin with `._`."""
    return f"/{path}".endswith(f"/{name}") and not path.rpartition("/")[2].startswith("._")


def _lacks(archive: Archive, name: str) -> str:
    return f"{archive.path} has no file {name}, expected it there; replace it by the archive from {archive.urls[0]}."
