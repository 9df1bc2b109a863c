"""Official archives: downloaded once for all profiles, resumed where a download stopped, and verified."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.base import files, locks
from pipelines.base.errors import UserError, first_line
from pipelines.base.home import home

if TYPE_CHECKING:
    import httpx

MEGABYTE = 10**6
_ATTEMPTS = 4  # in a row that bring nothing new
_PAUSE_SECONDS = 2.0  # before the second attempt; the pause grows with the attempts
_SILENCE_SECONDS = 30.0  # of a server, after which an attempt ends
_PROGRESS_SECONDS = 5.0  # between two lines on the progress
_LOCK_SECONDS = 86_400.0  # another stage may be downloading the same archive
_RESERVE = 64 * MEGABYTE  # of the disk, which a download leaves free


@dataclass(frozen=True)
class Archive:
    """An archive of real data, as its publisher offers it.

    Attributes:
        name: Name of the file.
        urls: Addresses of the same content, in the order in which they are tried.
        megabytes: Approximate size, for messages.
        licence: Licence of the content.
        checksum: Expected hash such as `md5:9b9c...`; None if none is known, as for archives that a server packs anew.
        local: A copy that the user provides; None to download it.
    """

    name: str
    urls: tuple[str, ...]
    megabytes: int
    licence: str
    checksum: str | None = None
    local: Path | None = None

    @property
    def path(self) -> Path:
        """Where the archive is, or is going to be."""
        return self.local or folder() / self.name

    @property
    def is_here(self) -> bool:
        """Whether the whole archive is on this machine."""
        return self.path.is_file()

    @property
    def identity(self) -> str:
        """What distinguishes its content from that of other archives, without reading it."""
        return self.checksum or " ".join(self.urls)


def folder() -> Path:
    """Return the folder of downloaded archives, which all profiles share."""
    return home() / "archives"


def fetch(archive: Archive, log: Callable[[str], None]) -> Path:
    """Return the path of an archive, which is downloaded unless it is there, and verified.

    An interrupted download leaves a file `.part`, from which the next one goes on.

    Args:
        archive: The archive.
        log: Function that prints a line.

    Raises:
        UserError: The archive cannot be downloaded or stored, or is not the expected one.
    """
    if archive.is_here:
        _verify(archive)
        return archive.path
    with locks.held(archive.path.with_name(f"{archive.name}.lock"), f"the download of {archive.name}", _LOCK_SECONDS):
        if not archive.is_here:
            _download(archive, log)
    return archive.path


def _verify(archive: Archive) -> None:
    """Check the hash of an archive that is there, once for each state of the file.

    Raises:
        UserError: The archive is another one or is damaged.
    """
    path = archive.path
    stat, seen = path.stat(), folder() / f"{archive.name}.verified.json"
    stamp = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, archive.checksum]
    with suppress(OSError, ValueError):
        if json.loads(seen.read_text(encoding="utf-8")) == stamp:
            return
    if problem := _problem(archive, path):
        remedy = "" if archive.local else ", or delete it to download it again"
        raise UserError(f"{path} {problem}; replace it by the archive from {archive.urls[0]}{remedy}.")
    files.write_json(seen, stamp)


def _problem(archive: Archive, path: Path) -> str | None:
    """Return what is wrong with a whole file, or None."""
    if archive.checksum is not None:
        algorithm, expected = archive.checksum.split(":")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        return None if found == expected else f"has the {algorithm} {found}, expected {expected}"
    if archive.name.endswith(".zip") and not zipfile.is_zipfile(path):
        return f"is no whole zip archive ({path.stat().st_size} bytes), expected one of about {archive.megabytes} MB"
    return None


def _download(archive: Archive, log: Callable[[str], None]) -> None:
    """Download an archive from the first of its addresses that has it.

    Raises:
        UserError: No address has it, it is not the expected one, or the disk is full.
    """
    failures = []
    for url in archive.urls:
        part = _Part(archive, url)
        try:
            part.complete(log)
        except _FailedError as error:
            failures.append(f"{urlsplit(url).netloc}: {error}")
            continue
        if problem := _problem(archive, part.path):
            part.discard()
            raise UserError(
                f"the download of {archive.name} from {url} {problem}; run the same command again, which starts anew, "
                f"or put the right file at {archive.path}."
            )
        part.finish()
        log(f"{archive.name} is complete at {archive.path}")
        return
    raise UserError(
        f"{archive.name} (about {archive.megabytes} MB) could not be downloaded ({'; '.join(failures)}); check the "
        f"network and run the same command again, which resumes, or put the file at {archive.path}, or set `mirror` to "
        "a folder with local copies."
    )


class _FailedError(Exception):
    """An address that does not give the whole archive now."""


class _Part:
    """The part of an archive that was downloaded from one address.

    Args:
        archive: The archive.
        url: The address.
    """

    def __init__(self, archive: Archive, url: str) -> None:
        self.archive, self.url = archive, url
        self.path = archive.path.with_name(f"{archive.name}.part")
        self._state = archive.path.with_name(f"{archive.name}.part.json")

    @property
    def size(self) -> int:
        """Number of bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        """Remove what is there."""
        files.remove(self.path)
        files.remove(self._state)

    def finish(self) -> None:
        """Give the complete archive its name."""
        self.path.replace(self.archive.path)
        files.remove(self._state)

    def complete(self, log: Callable[[str], None]) -> None:
        """Download what is missing, in several attempts where a connection breaks.

        Raises:
            _FailedError: The address cannot be reached, refuses, or stops again and again.
            UserError: The disk is full.
        """
        import httpx

        best, vain, reason = self.size, 0, ""
        while vain < _ATTEMPTS:
            if vain:
                time.sleep(_PAUSE_SECONDS * vain)
            try:
                self._attempt(log)
                return
            except httpx.TransportError as error:  # no connection, a broken one, or silence
                reason = first_line(error)
            vain = 0 if self.size > best else vain + 1
            if vain < _ATTEMPTS:
                log(f"{self.archive.name}: the connection broke ({reason}); trying again")
            best = max(best, self.size)
        raise _FailedError(reason)

    def _attempt(self, log: Callable[[str], None]) -> None:
        """Request what is missing and append it.

        Raises:
            httpx.TransportError: The connection broke.
            _FailedError: The server refuses.
            UserError: The disk is full.
        """
        import httpx

        known = self._known()
        if known is None:
            self.discard()
        have = self.size
        headers = {"Accept-Encoding": "identity"}
        if known is not None and have:
            headers |= {"Range": f"bytes={have}-"}
            headers |= {"If-Range": known["version"]} if known["version"] else {}
        client = httpx.Client(follow_redirects=True, timeout=_SILENCE_SECONDS)
        try:
            with client, client.stream("GET", self.url, headers=headers) as answer:
                total = self._total(answer, have)
                if total is not None and total == self.size:  # it was complete but not yet renamed
                    return
                self._check_space(total)
                version = answer.headers.get("etag") or answer.headers.get("last-modified")
                files.write_json(self._state, {"url": self.url, "version": _strong(version), "total": total})
                self._append(answer, total, log)
        except httpx.TransportError:
            raise
        except httpx.HTTPError as error:  # too many redirects
            raise _FailedError(first_line(error)) from None
        if total is not None and self.size != total:
            found = self.size
            self.discard()
            raise _FailedError(f"it sent {found} bytes where it had announced {total}")

    def _known(self) -> dict[str, Any] | None:
        """Return what is known of the part that is there, or None if it cannot be resumed."""
        with suppress(OSError, ValueError):
            known = json.loads(self._state.read_text(encoding="utf-8"))
            if known["url"] == self.url and self.path.is_file():
                return dict(known)
        return None

    def _total(self, answer: httpx.Response, have: int) -> int | None:
        """Return the size of the whole archive, and remove what the answer does not go on from.

        Raises:
            _FailedError: The server refuses.
        """
        length = answer.headers.get("content-length", "")
        announced = int(length) if length.isdecimal() else None
        if answer.status_code == 206:
            given, _, total = answer.headers.get("content-range", "").removeprefix("bytes ").partition("/")
            if given.partition("-")[0] == str(have) and total.isdecimal():
                return int(total)
            self.discard()
            raise _FailedError(f"it answered a request from byte {have} on with bytes {given or 'of an unknown place'}")
        if answer.status_code == 416:  # there is nothing from here on
            total = answer.headers.get("content-range", "").partition("/")[2]
            if total == str(have):
                return have
            self.discard()
            raise _FailedError(f"its file has {total or 'less than'} {have} bytes, fewer than were downloaded")
        if answer.status_code != 200:
            raise _FailedError(f"it answered {answer.status_code} {answer.reason_phrase}".rstrip())
        files.remove(self.path)  # the server sends the whole, because it cannot resume or its file changed
        return announced

    def _check_space(self, total: int | None) -> None:
        """Check that the disk has room for the rest.

        Raises:
            UserError: It has not.
        """
        rest = (self.archive.megabytes * MEGABYTE if total is None else total) - self.size
        free = shutil.disk_usage(self.path.parent).free
        if rest + _RESERVE > free:
            raise UserError(
                f"the download of {self.archive.name} needs {_megabytes(rest)} more in {self.path.parent}, where "
                f"{_megabytes(free)} are free; free some space and run the same command again, which resumes."
            )

    def _append(self, answer: httpx.Response, total: int | None, log: Callable[[str], None]) -> None:
        """Append the body of an answer, with a line on the progress every few seconds."""
        of = f" of {_megabytes(total)}" if total else ""
        at = self.size
        log(
            f"{'resuming' if at else 'downloading'} {self.archive.name}{of} from {urlsplit(str(answer.url)).netloc}"
            + (f", {_megabytes(at)} are here" if at else "")
            + f" (licence: {self.archive.licence})"
        )
        began = told = time.monotonic()
        with files.writing(self.path), self.path.open("ab") as file:
            first = at
            for block in answer.iter_raw():
                file.write(block)
                file.flush()
                at += len(block)
                now = time.monotonic()
                if now - told > _PROGRESS_SECONDS:
                    told = now
                    share = f" ({at / total:.0%})" if total else ""
                    speed = (at - first) / (now - began) / MEGABYTE
                    log(f"{self.archive.name}: {_megabytes(at)}{of}{share}, {speed:.1f} MB/s")


def _strong(version: str | None) -> str | None:
    """Return a version that a server compares byte by byte; a weak one cannot be resumed from."""
    return None if version is None or version.startswith("W/") else version


def _megabytes(size: int) -> str:
    return f"{size / MEGABYTE:,.1f} MB"


@contextmanager
def reading(archive: Archive) -> Iterator[Path]:
    """Yield the path of an archive that is here, and name it where its content cannot be read.

    Raises:
        UserError: It was not downloaded, or its content is damaged.
    """
    import tarfile
    import zlib

    if not archive.is_here:
        raise UserError(
            f"{archive.path} is not here; the stage `prepare` downloads it from {archive.urls[0]}, about "
            f"{archive.megabytes} MB."
        )
    try:
        yield archive.path
    except UserError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        remedy = "replace it" if archive.local else "delete it and run the same command again, which downloads it"
        raise UserError(
            f"{archive.path} cannot be read ({type(error).__name__}: {first_line(error)}), expected the archive from "
            f"{archive.urls[0]}; {remedy}."
        ) from error
