"""Archives from a server on the loopback interface: whole, resumed, refused, wrong, and with a full disk."""

import hashlib
import io
import resource
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.base import downloads
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError
from pipelines.datasets import _archives
from tests.support.archives import tarred
from tests.support.web import Script, serving, without_proxies

CONTENT = np.random.default_rng(0).bytes(1 << 20)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
HALF = len(CONTENT) // 2 + 11


@pytest.fixture
def script() -> Script:
    return Script(CONTENT)


@pytest.fixture
def server(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / "home"))
    without_proxies(monkeypatch)
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.0)
    with serving(script) as address:
        yield address


def archive(*urls: str, checksum: str | None = MD5, name: str = "data.tar.gz") -> Archive:
    return Archive(name, urls, 1, "CC0", checksum)


def left() -> list[str]:
    """Files that are left of a download, beside its lock."""
    return sorted(path.name for path in downloads.folder().glob("*") if path.suffix != ".lock")


def refusal(given: Archive, *parts: str) -> str:
    with pytest.raises(UserError) as error:
        downloads.fetch(given, print)
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_an_archive_is_downloaded_once(
    server: str, script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_PROGRESS_SECONDS", 0.0)
    given = archive(f"{server}/redirect/file")
    assert not given.is_here
    path = downloads.fetch(given, print)
    assert (path.read_bytes(), left()) == (CONTENT, ["data.tar.gz"])
    told = capsys.readouterr().out
    assert "downloading data.tar.gz of 1.0 MB from 127.0.0.1" in told
    assert "(licence: CC0)" in told
    assert "data.tar.gz: 1.0 MB of 1.0 MB (100%)" in told
    assert downloads.fetch(given, print) == path
    assert script.asked == [None]


@pytest.mark.parametrize("version", ['"one"', None, 'W/"weak"'])
def test_a_connection_that_breaks_is_resumed(
    server: str, script: Script, version: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    script.stops, script.version = [HALF, HALF // 2], version
    assert downloads.fetch(archive(f"{server}/file"), print).read_bytes() == CONTENT
    assert script.asked == [None, f"bytes={HALF}-", f"bytes={HALF + HALF // 2}-"]
    assert capsys.readouterr().out.count("trying again") == 2


def test_a_server_that_stops_again_and_again_leaves_a_part_from_which_the_next_try_goes_on(
    server: str, script: Script
) -> None:
    script.stops = [HALF, *[0] * 4]
    given = archive(f"{server}/file")
    refusal(given, "data.tar.gz", "127.0.0.1", "same command again, which resumes", str(given.path))
    assert left() == ["data.tar.gz.part", "data.tar.gz.part.json"]
    assert not given.is_here
    script.asked.clear()
    assert downloads.fetch(given, print).read_bytes() == CONTENT
    assert script.asked == [f"bytes={HALF}-"]


def test_a_server_that_cannot_resume_starts_anew(server: str, script: Script) -> None:
    script.stops, script.ranges = [HALF], False
    assert downloads.fetch(archive(f"{server}/file"), print).read_bytes() == CONTENT


def test_a_server_that_cannot_resume_and_always_stops_is_given_up(server: str, script: Script) -> None:
    script.stops, script.ranges = [HALF] * 100, False
    refusal(archive(f"{server}/file"), "same command again")
    assert len(script.asked) < 10


def test_a_file_that_changed_is_downloaded_anew(server: str, script: Script) -> None:
    given = archive(f"{server}/file")
    script.stops, script.content = [HALF, *[0] * 4], bytes(len(CONTENT))
    refusal(given)
    script.content, script.version = CONTENT, '"two"'
    assert downloads.fetch(given, print).read_bytes() == CONTENT


def test_a_part_of_another_address_is_not_continued(server: str, script: Script) -> None:
    script.stops, script.content = [HALF, *[0] * 4], bytes(len(CONTENT))
    refusal(archive(f"{server}/other"))
    script.content = CONTENT
    assert downloads.fetch(archive(f"{server}/file"), print).read_bytes() == CONTENT


def test_a_server_that_announces_too_little_ends_in_a_sentence(server: str, script: Script) -> None:
    script.announced = len(CONTENT) - 5
    given = archive(f"{server}/file")
    refusal(given, "data.tar.gz", f"expected {MD5[4:]}")
    assert left() == []
    script.announced = None
    assert downloads.fetch(given, print).read_bytes() == CONTENT


def test_a_server_that_announces_too_much_has_sent_all_the_same(server: str, script: Script) -> None:
    script.announced = len(CONTENT) * 2
    assert downloads.fetch(archive(f"{server}/file"), print).read_bytes() == CONTENT
    script.ranges = False
    other = archive(f"{server}/file", name="other")
    refusal(other, "same command again")
    assert not other.is_here


def test_a_server_that_goes_on_from_another_place_is_refused(server: str, script: Script) -> None:
    script.stops, script.start = [HALF], HALF + 1
    refusal(archive(f"{server}/file"), f"from byte {HALF} on with bytes {HALF + 1}-")
    assert left() == []


def test_a_wrong_checksum_leaves_nothing(server: str, script: Script) -> None:
    script.content = CONTENT[::-1]
    given = archive(f"{server}/file")
    found = hashlib.md5(script.content).hexdigest()
    refusal(given, f"has the md5 {found}, expected {MD5[4:]}", f"{server}/file", str(given.path))
    assert left() == []
    script.content = CONTENT
    assert downloads.fetch(given, print).read_bytes() == CONTENT


def test_a_zip_of_unknown_hash_is_refused_when_it_is_cut(server: str, script: Script) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("__MACOSX/._rows.txt", "resource fork")
        file.writestr("inside/rows.txt", "1 2 3")
    script.content = packed.getvalue()[:-30]
    given = archive(f"{server}/file", checksum=None, name="rows.zip")
    refusal(given, "no whole zip archive")
    assert left() == []
    script.content = packed.getvalue()
    downloads.fetch(given, print)
    with _archives.member(given, "rows.txt") as inside:
        assert inside.read() == b"1 2 3"
    for name in ("columns.txt", "ows.txt"):
        with pytest.raises(UserError, match=rf"has no file {name}, expected it there"), _archives.member(given, name):
            pass


@pytest.mark.parametrize("mode", ["gz", ""])
def test_a_member_of_a_tar_is_read_without_the_others(tmp_path: Path, mode: str) -> None:
    local = tmp_path / "data.tar.gz"
    tarred(local, {"data/power/._data.npy": b"fork", "data/power/data.npy": b"rows", "z": CONTENT}, mode=mode)
    given = replace(archive("http://nowhere"), local=local)
    with _archives.member(given, "power/data.npy") as inside:
        assert inside.read() == b"rows"
    local.write_bytes(local.read_bytes()[: 1 << 19])
    with pytest.raises(UserError, match=r"cannot be read.*replace it") as error, _archives.member(given, "q"):
        pass
    assert str(local) in str(error.value)
    local.unlink()
    with pytest.raises(UserError, match="is not here; the stage `prepare`"), _archives.member(given, "q"):
        pass


def test_the_next_address_is_tried(server: str) -> None:
    given = archive(f"{server}/missing", f"{server}/loop", f"{server}/file")
    assert downloads.fetch(given, print).read_bytes() == CONTENT


def test_addresses_that_all_fail_are_named(server: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    given = archive(f"{nobody}/file", f"{server}/missing", f"{server}/loop")
    refusal(given, "404", "redirects", "about 1 MB", "check the network", "set `mirror`")
    assert left() == []


def test_a_disk_without_room_is_named_before_the_download(
    server: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = downloads.shutil.disk_usage
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(path)._replace(free=1 << 20))
    refusal(archive(f"{server}/file"), "needs 1.0 MB more", "1.0 MB are free", "free some space")
    assert left() == []


def test_a_disk_that_fills_while_downloading_is_named_and_the_next_try_resumes(server: str, script: Script) -> None:
    given = archive(f"{server}/file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        refusal(given, "data.tar.gz.part could not be written", "free some space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not given.is_here
    assert downloads.fetch(given, print).read_bytes() == CONTENT
    assert script.asked == [None, f"bytes={HALF}-"]


def test_a_download_that_was_killed_before_its_last_step_is_finished(server: str, script: Script) -> None:
    script.stops = [HALF, *[0] * 4]
    given = archive(f"{server}/file")
    refusal(given)
    given.path.with_name("data.tar.gz.part").write_bytes(CONTENT)
    assert downloads.fetch(given, print).read_bytes() == CONTENT
    assert left() == ["data.tar.gz"]


def test_stages_that_need_the_same_archive_download_it_once(server: str, script: Script) -> None:
    given = archive(f"{server}/file")
    threads = [threading.Thread(target=downloads.fetch, args=(given, print)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert script.asked == [None]
    assert given.path.read_bytes() == CONTENT


def test_a_copy_that_the_user_brought_is_verified_once(server: str, tmp_path: Path, script: Script) -> None:
    local = tmp_path / "brought"
    local.write_bytes(CONTENT[1:])
    given = replace(archive(f"{server}/file"), local=local)
    refusal(given, str(local), "expected", MD5[4:], f"{server}/file")
    local.write_bytes(CONTENT)
    assert downloads.fetch(given, print) == local
    assert script.asked == []
    hashed = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: hashed.set())
        assert downloads.fetch(given, print) == local
    assert not hashed.is_set()
