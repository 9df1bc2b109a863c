"""BSDS300: patches of images against their definition, the published Gaussian, and damaged archives."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import PIL.Image
import pytest

from pipelines.base.errors import UserError
from pipelines.datasets import Parts, bsds300
from tests.support.archives import tarred

MIRROR = Path(__file__).parents[3] / "shared" / "data"
SIZES = {"train": 3000, "val": 200, "test": 300}

needs_mirror = pytest.mark.skipif(not (MIRROR / "bsds300").is_dir(), reason=f"there is no mirror at {MIRROR}")


def parts(mirror: Path, scratch: Path, seed: int = 0, **settings: Any) -> Parts:
    chosen = bsds300.Settings.model_validate(settings)
    return bsds300.parts(chosen, rng=np.random.default_rng(seed), mirror=mirror, scratch=scratch)


def rows(given: Parts, part: str) -> np.ndarray:
    return np.concatenate([chunk.to_numpy() for chunk in given.chunks(part)])


def grey(level: int) -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("L", (16, 12), level).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def archive(mirror: Path, train: int = 200, test: int = 100, other: Mapping[str, bytes] = MappingProxyType({})) -> None:
    images = {f"BSDS300/images/train/{i}.jpg": grey(i) for i in range(train)}
    images |= {f"BSDS300/images/test/{i}.jpg": grey(i) for i in range(test)}
    tarred(mirror / "archives" / "BSDS300-images.tgz", {**images, **other})


def test_a_patch_is_pixels_and_noise_without_their_mean() -> None:
    image = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30) // 2
    found = bsds300.patches([image], 4000, np.random.default_rng(0)) * 256
    # every patch of this ramp differs by whole levels: the differences to its first pixel are those of some place
    windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8)).reshape(-1, 64).astype(float)
    centred = (windows - windows.mean(1, keepdims=True))[:, :-1]
    nearest = [np.abs(centred - row).max(1).min() for row in found[:200]]
    assert max(nearest) < 1  # the noise is in [0, 1) and so is its mean
    assert min(nearest) > 0.1
    last = -found.sum(1)  # the pixel that is left out
    assert np.corrcoef(last, found[:, -1])[0, 1] > 0.9


def test_corners_of_an_image_are_as_frequent_as_its_middle() -> None:
    image = np.zeros((9, 10), np.uint8)
    image[0, 0] = 255  # in one of the 2 x 3 places of a patch
    found = bsds300.patches([image], 6000, np.random.default_rng(0))
    share = (found[:, 0] > 0.5).mean()
    assert share == pytest.approx(1 / 6, abs=5 * np.sqrt(5 / 36 / 6000))


@needs_mirror
def test_rows_of_the_mirror(tmp_path: Path) -> None:
    given = parts(MIRROR, tmp_path, **SIZES)
    assert (given.fidelity, given.gaussian, dict(given.rows)) == ("equivalent", None, SIZES)
    found = {part: rows(given, part) for part in SIZES}
    assert {part: values.shape for part, values in found.items()} == {part: (n, 63) for part, n in SIZES.items()}
    np.testing.assert_array_equal(found["train"], rows(given, "train"))  # a part may be read twice
    assert (rows(parts(MIRROR, tmp_path, 1, **SIZES), "val") != found["val"]).any()


@needs_mirror
@pytest.mark.slow
def test_the_gaussian_of_the_literature(tmp_path: Path) -> None:
    given = parts(MIRROR, tmp_path)
    assert given.gaussian is not None
    train, test = rows(given, "train"), rows(given, "test")
    centred, factor = test - train.mean(0), np.linalg.cholesky(np.cov(train.T))
    distance = (np.linalg.solve(factor, centred.T) ** 2).sum(0)
    nll = distance.mean() / 2 + np.log(np.diag(factor)).sum() + 63 / 2 * np.log(2 * np.pi)
    assert nll == pytest.approx(-96.67, abs=0.75)


def refusal(*said: str, mirror: Path, scratch: Path, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        parts(mirror, scratch, **settings)
    text = str(error.value)
    assert all(one in text for one in said), text
    assert "\n" not in text
    assert text.endswith(".")


def test_an_archive_of_other_images_is_refused(tmp_path: Path) -> None:
    archive(tmp_path, train=199)
    refusal("199 training and 100 test images, expected 200 and 100", mirror=tmp_path, scratch=tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    archive(tmp_path, other={"train/7.jpg": b"no image"})
    refusal("train/7.jpg", "JPEG", mirror=tmp_path, scratch=tmp_path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    archive(tmp_path)
    path = tmp_path / "archives" / "BSDS300-images.tgz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refusal(str(path), "cannot be read", mirror=tmp_path, scratch=tmp_path)


@needs_mirror
def test_a_changed_copy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bsds300").mkdir()
    shutil.copy(MIRROR / bsds300.COPY, tmp_path / bsds300.COPY)
    (tmp_path / bsds300.COPY).chmod(0o644)
    with (tmp_path / bsds300.COPY).open("r+b") as file:
        file.write(b"x")
    refusal("sha256", "mirror", mirror=tmp_path, scratch=tmp_path)


def test_patches_of_an_archive_by_image(tmp_path: Path) -> None:
    archive(tmp_path)
    given = parts(tmp_path, tmp_path, train=50, val=20, test=30)
    # grey images have patches of noise alone
    assert np.abs(rows(given, "test")).max() < 1 / 256


def test_rows_of_the_paper_s_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {name: np.random.default_rng(0).normal(size=(n, 63)).astype("f4") for name, n in SIZES.items()}
    stored = io.BytesIO()
    with h5py.File(stored, "w") as file:
        for part, key in (("train", "train"), ("val", "validation"), ("test", "test")):
            file[key] = values[part]
    tarred(tmp_path / "archives" / "maf-data.tar.gz", {"data/BSDS300/BSDS300.hdf5": stored.getvalue()})
    refusal("has rows of the shapes", mirror=tmp_path, scratch=tmp_path, archive="maf")
    refusal("leave these settings out", mirror=tmp_path, scratch=tmp_path, archive="maf", train=5)
    monkeypatch.setattr(bsds300, "ROWS", SIZES)
    given = parts(tmp_path, tmp_path, archive="maf", **SIZES)
    assert (given.fidelity, given.gaussian) == ("official", (-96.67, 0.25))
    np.testing.assert_array_equal(rows(given, "val"), values["val"].astype(float))
