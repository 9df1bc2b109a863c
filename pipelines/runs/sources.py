"""Fingerprints of the files outside the project that data sets and environments read.

DVC compares only files of the project. `data/sources/<entry>.json` stands for the external files of an entry of
`params.yaml`, so that the entry's first stage can depend on them. A plugin names its files by a function
`sources(settings, mirror) -> dict[str, Path | Archive]`: a name that does not depend on where the file lies, and its
path, or an archive that the stage `prepare` downloads and verifies.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.base import files, layout, plugins
from pipelines.base.downloads import Archive
from pipelines.base.errors import UserError
from pipelines.config.params import DatasetEntry, EnvironmentEntry, Params
from pipelines.runs import records

_SETTLED_SECONDS = 2.0  # a younger file may change again within one tick of the file system's clock


def find(params: Params) -> dict[str, Mapping[str, Path | Archive]]:
    """Return the external files of every data set and environment, by entry and by name.

    Raises:
        UserError: A file or folder is missing; the message names the key of the entry.
    """
    found: dict[str, Mapping[str, Path | Archive]] = {}
    sections: Mapping[str, Mapping[str, DatasetEntry | EnvironmentEntry]] = {
        "datasets": params.datasets,
        "environments": params.environments,
    }
    for section, entries in sections.items():
        for name, entry in entries.items():
            hook = getattr(plugins.load(entry.family, entry.kind), "sources", None)
            try:
                found[name] = {} if hook is None else hook(entry.settings(), params.mirror)
            except UserError as error:
                raise UserError(f"params.yaml: {section}.{name}: {error}") from None
    return found


def downloads(params: Params) -> list[str]:
    """Return a sentence on every archive that a run is going to download."""
    found: dict[Archive, list[str]] = {}
    for entry, paths in find(params).items():
        for path in paths.values():
            if isinstance(path, Archive) and not path.is_here:
                found.setdefault(path, []).append(entry)
    return [
        f"{', '.join(entries)}: {archive.name} (about {archive.megabytes} MB, {archive.licence}) will be downloaded "
        f"from {archive.urls[0]}."
        for archive, entries in found.items()
    ]


def refresh(root: Path, params: Params) -> None:
    """Write the fingerprints of a project that differ from those on disk, and remove those of former entries.

    Args:
        root: Folder that the stages run in.
        params: Its parameters.

    Raises:
        UserError: An external file is missing or cannot be read.
    """
    with chdir(root):
        hashes = _Hashes.load()
        wanted = {layout.source(name): _fingerprint(paths, hashes) for name, paths in find(params).items()}
        hashes.save()
        for folder in (layout.SOURCES, *layout.GATHERED):  # that of a section without entries stays empty
            folder.mkdir(parents=True, exist_ok=True)
        for path, fingerprint in wanted.items():
            if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != fingerprint:
                files.write_json(path, fingerprint)
        for path in set(layout.SOURCES.glob("*.json")) - wanted.keys():
            path.unlink()


def _fingerprint(paths: Mapping[str, Path | Archive], hashes: _Hashes) -> dict[str, int | str]:
    """Return the number, the size and the hash of files; nothing if there are none.

    An archive counts by what is known of its content, so that its download changes nothing.
    """
    if not paths:
        return {}
    whole, size = hashlib.sha256(), 0
    for name, path in sorted(paths.items()):
        length, content = _content(path, hashes)
        whole.update(f"{name}\0{length}\0{content}\n".encode())
        size += length
    return {"files": len(paths), "bytes": size, "sha256": whole.hexdigest()}


def _content(source: Path | Archive, hashes: _Hashes) -> tuple[int, str]:
    """Return the size and the hash of a file, or what is known of an archive without reading it."""
    if isinstance(source, Path):
        return hashes.of(source)
    known = source.checksum is not None or source.local is None
    return (0, source.identity) if known else hashes.of(source.path)


@dataclass
class _Hashes:
    """Content hashes of files by path, size, modification time and inode, so that a file is read once."""

    known: dict[str, list[int | str]]
    added: dict[str, list[int | str]] = field(default_factory=dict)

    @classmethod
    def load(cls) -> _Hashes:
        with suppress(OSError, ValueError):  # lost or damaged: the files are read again
            return cls(dict(json.loads(_store().read_text(encoding="utf-8"))))
        return cls({})

    def save(self) -> None:
        if self.added:
            kept = {path: row for path, row in self.known.items() if Path(path).exists()}
            files.write_json(_store(), kept | self.added)

    def of(self, path: Path) -> tuple[int, str]:
        """Return the size of a file and the SHA-256 of its content."""
        key = str(path.absolute())
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            row = self.known.get(key)
            if row is not None and row[:3] == stamp:
                return stat.st_size, str(row[3])
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}), expected a file of a data set or an environment; "
                "make it readable or take it out of its folder."
            ) from None
        if time.time_ns() - stat.st_mtime_ns > _SETTLED_SECONDS * 1e9:
            self.added[key] = [*stamp, content]
        return stat.st_size, content


def _store() -> Path:
    return records.home() / "hashes.json"
