"""Send results to DVC's remote, fetch them, and remove what nothing uses from the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.base.errors import UserError, first_line
from pipelines.base.redact import redact
from pipelines.runs import graph

Settings = Mapping[str, Any]


def remotes(root: Path) -> Settings:
    """Return DVC's settings for the remotes of a project, with absolute paths, for use in other folders.

    Raises:
        UserError: The project has no default remote.
    """
    with graph.repository(root) as repo:
        name = repo.config["core"].get("remote")
        if name is None:
            raise UserError(
                "DVC has no default remote, expected a place for results; run "
                "`dvc remote add --default store <folder or URL>` and commit .dvc/config."
            )
        return {"core": {"remote": name}, "remote": dict(repo.config["remote"])}


def push(root: Path, settings: Settings) -> None:
    """Upload the outputs of a folder with the run cache.

    Args:
        root: The project or the folder of a profile.
        settings: Answer of `remotes` for the project.

    Raises:
        UserError: The remote cannot be used.
    """
    with graph.repository(root, settings) as repo, _remote_errors():
        repo.push(run_cache=True)


def pull(root: Path, settings: Settings, targets: Sequence[str] = ()) -> None:
    """Download the outputs of a folder, and put them in place.

    Args:
        root: The project or the folder of a profile.
        settings: Answer of `remotes` for the project.
        targets: Stages or `.dvc` files; all by default.

    Raises:
        UserError: The remote cannot be used, or does not have an output.
    """
    with graph.repository(root, settings) as repo, _remote_errors():
        repo.pull(list(targets) or None, run_cache=not targets)


def add(root: Path, path: Path) -> None:
    """Track a file or folder of a project by a `.dvc` file beside it."""
    with graph.repository(root) as repo, _quietly():
        repo.add([str(path.relative_to(root))])


def collect_garbage(root: Path, others: Sequence[Path]) -> int:
    """Remove what neither a project nor other folders with the same cache use from it; return the number of bytes.

    A lost description of a folder does not stop it: without it the cached files of that folder are of no use.
    """
    with graph.repository(root) as repo, _quietly():
        cache = Path(repo.cache.local.path)
        before = _size(cache)
        repo.gc(workspace=True, repos=[str(other) for other in others], force=True)
        return before - _size(cache)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Reasons(logging.Handler):
    """Collect what DVC logs: the reasons of an error, and one line for every file."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the first line of what went wrong."""
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(first_line(error if isinstance(error, Exception) else Exception(record.getMessage())))


@contextmanager
def _quietly() -> Iterator[_Reasons]:
    """Keep DVC from printing, and yield what it would have printed."""
    reasons = _Reasons()
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    before = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [reasons]
    try:
        yield reasons
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers


@contextmanager
def _remote_errors() -> Iterator[None]:
    """Report an error of a remote as one sentence; each kind of remote raises errors of its own library."""
    from dvc.exceptions import CheckoutError, DownloadError

    with _quietly() as reasons:
        try:
            yield
        except (CheckoutError, DownloadError) as error:
            raise UserError(
                f"the remote lacks results that dvc.lock or a .dvc file names ({_why(error, reasons)}); "
                "run `make push` where they were made, or make them again by `make repro`."
            ) from None
        except Exception as error:
            if "unsaved files" in str(error):  # of no class of its own
                raise UserError(
                    f"{' '.join(str(error).splitlines()[1:])} has changes that are in no cache, expected results that "
                    "dvc.lock names; remove or move it, then run this again."
                ) from None
            raise UserError(
                f"DVC's remote cannot be used ({_why(error, reasons)}); check its address by `dvc remote list` "
                "and the credentials in the environment, then run this again."
            ) from None


def _why(error: Exception, reasons: _Reasons) -> str:
    """Return the message of an error and the first one that DVC logged, without credentials."""
    return redact(": ".join([first_line(error).rstrip(".:"), *reasons.lines[:1]]).rstrip(".:"))
