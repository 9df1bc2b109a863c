"""Files are whole or not there, and a damaged one is a sentence, not a traceback."""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines.base import files
from pipelines.base.errors import UserError
from pipelines.data.moments import Moments
from tests.pipelines.conftest import ROOT


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"old": 1}
    assert leftovers(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for name in ("one", "two"):
        with files.replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert leftovers(path) == ["two"]
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert leftovers(path) == ["two"]
    assert leftovers(tmp_path) == ["out"]


def test_tables_tensors_and_json_come_back_as_they_were(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [0.1, -1e300], "name": ["a", "b"]})
    files.write_table(tmp_path / "t.parquet", table)
    pd.testing.assert_frame_equal(files.read_table(tmp_path / "t.parquet", ["x"]), table)
    tensors = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.arange(3)}
    files.write_tensors(tmp_path / "m.safetensors", tensors, {"list": [1, 2]})
    back, meta = files.read_tensors(tmp_path / "m.safetensors")
    assert meta == {"list": [1, 2]}
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)
    files.write_json(tmp_path / "n.json", {"nan": math.nan, "deep": [math.inf, 1.5]})
    assert files.read_json(tmp_path / "n.json") == {"nan": None, "deep": [None, 1.5]}


READERS = {"a.parquet": files.read_table, "a.json": files.read_json, "a.safetensors": files.read_tensors}


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_is_named_with_its_remedy(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"is not there; make it: `make repro`"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"", b"\x00\x01garbage", b"PAR1 and no more"])
def test_a_corrupt_file_is_named_with_its_remedy(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is not a whole .* file .*; delete it") as caught:
        READERS[name](path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_file_is_corrupt(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    files.write_table(tmp_path / "a.parquet", pd.DataFrame({"x": np.arange(1000.0)}))
    files.write_json(tmp_path / "a.json", {"x": list(range(100))})
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1000)}, {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="delete it"):
        READERS[name](path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found(tmp_path: Path, value: float) -> None:
    files.write_table(tmp_path / "t.parquet", pd.DataFrame({"x": [0.0, 1.0], "y": [0.0, value]}))
    with pytest.raises(UserError, match=r"'y', row 1 \(1 such values\); expected finite"):
        files.read_table(tmp_path / "t.parquet")
    assert len(files.read_table(tmp_path / "t.parquet", ["y"], finite=False)) == 2  # samples of a diverged model


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    files.write_table(tmp_path / "t.parquet", pd.DataFrame({"x": [0.0]}))
    with pytest.raises(UserError, match=r"has no column 'y' \(it has x\)"):
        files.read_table(tmp_path / "t.parquet", ["x", "y"])


@pytest.mark.parametrize("value", [0.0, 0.1])  # the deviation of many 0.1 is rounding, but not zero
def test_what_is_constant_cannot_be_standardised(value: float) -> None:
    found = Moments(["x", "y"])
    found.add(np.stack([np.arange(10_000.0), np.full(10_000, value)], 1))
    with pytest.raises(UserError, match=rf"the column 'y' of moons is constant \({value}\)"):
        found.check_varying("moons")
    result = found.result()
    assert (result["loc"], result["scale"]) == ([4999.5, value], [pytest.approx(10_000 / 12**0.5), 1.0])


def write_folder(path: Path) -> None:
    with files.replacing(path) as temporary:
        temporary.mkdir()
        files.write_table(temporary / "rows.parquet", pd.DataFrame({"x": np.arange(50_000.0)}))


def write_text(path: Path) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text("x" * 400_000, encoding="utf-8")


def copy_file(path: Path) -> None:
    source = path.parent.parent / "source.bin"
    with files.replacing(path) as temporary:
        shutil.copy(source, temporary)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.parquet": lambda path: files.write_table(path, pd.DataFrame({"x": np.arange(50_000.0)})),
    "a.safetensors": lambda path: files.write_tensors(path, {"x": torch.zeros(100_000)}, {}),
    "a.json": lambda path: files.write_json(path, list(range(60_000))),
    "folder": write_folder,
    "a.csv": write_text,
    "copy.bin": copy_file,
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_a_sentence_that_names_the_file(small_disk: Path, name: str) -> None:
    (small_disk.parent / "source.bin").write_bytes(bytes(400_000))
    path = small_disk / name
    files.write_json(small_disk / "kept.json", 1)
    inner = path / "rows.parquet" if name == "folder" else path
    with pytest.raises(UserError, match=rf"^{inner} could not be written \(No space left on device\); free some space"):
        WRITERS[name](path)
    assert leftovers(small_disk) == ["kept.json"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EFBIG])
def test_a_refused_write_is_a_sentence_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'a.json'} could not be written \({os.strerror(number)}\); "):
        files.write_json(tmp_path / "a.json", 1)


def test_an_error_about_an_input_is_none_about_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), files.replacing(tmp_path / "a.json"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere.csv")
    with pytest.raises(IsADirectoryError), files.replacing(tmp_path / "a.json"):
        tmp_path.read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_has_the_mode_of_the_umask(tmp_path: Path, name: str) -> None:
    (tmp_path / "source.bin").write_bytes(b"1")
    (tmp_path / "out").mkdir()
    before = os.umask(0o027)
    try:
        WRITERS[name](tmp_path / "out" / name)
    finally:
        os.umask(before)
    path = tmp_path / "out" / name
    if name != "copy.bin":  # which keeps the mode of its source
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*")} <= {0o640}


def test_output_in_another_encoding_is_escaped() -> None:
    code = "from pipelines.base import console; console.accept_all_characters(); print('\\xd7 \\u2265 \\xe4')"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    assert result.stdout == rb"\xd7 \u2265 \xe4" + b"\n"
