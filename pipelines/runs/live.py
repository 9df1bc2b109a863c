"""Publish records while stages run and when they end; tracking errors never fail a run."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.base.errors import first_line
from pipelines.base.redact import redact
from pipelines.runs import records, snapshots
from pipelines.runs.records import Status
from pipelines.runs.tracking import Tracker

_LOCK_SECONDS = 120.0


@dataclass
class Outcome:
    """How an orchestrated run ended: KILLED until the caller sets another status."""

    status: Status = "KILLED"


@contextmanager
def live(workspace: Path, invocation: str, every: float = 3.0) -> Iterator[Outcome]:
    """Publish periodically while stages run, and complete the invocation when they end.

    Args:
        workspace: Folder that the stages run in.
        invocation: Name of the invocation.
        every: Seconds between two publications.

    Yields:
        The outcome, whose status the caller sets.
    """
    done = threading.Event()
    reported: list[str] = []

    def watch() -> None:
        while not done.wait(every):
            with _swallow_errors(reported):
                publish(invocation)

    with _swallow_errors(reported):
        snapshots.settle(workspace)
        snapshots.begin(invocation, workspace)
    thread = threading.Thread(target=watch, name="publisher", daemon=True)
    thread.start()
    outcome = Outcome()
    try:
        yield outcome
    finally:
        done.set()
        thread.join()
        with _swallow_errors(reported):
            snapshots.end(invocation, workspace, outcome.status)
            publish(invocation)


def publish_quietly(invocation: str, stage: str) -> None:
    """Publish at the end of a stage that no orchestrator started; errors are printed and do not fail the stage."""
    with _swallow_errors([]):
        if ".dvc/tmp/" in Path.cwd().as_posix():  # the copy of a DVC experiment, which is deleted when it ends
            snapshots.during(invocation, Path.cwd(), stage)
        publish(invocation)


def publish(invocation: str | None = None) -> None:
    """Copy records to MLflow.

    Args:
        invocation: Name of the invocation; None selects all that are not complete in MLflow.
    """
    from filelock import FileLock

    home = records.home()
    if invocation is None:
        for workspace in {record.workspace for found in records.by_invocation(home).values() for record in found}:
            snapshots.settle(home.parent / workspace)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "publish.lock", timeout=_LOCK_SECONDS):
        names = [invocation] if invocation else _invocations(home)
        tracker = Tracker(home)
        for name in names:
            tracker.publish(name)


@contextmanager
def _swallow_errors(reported: list[str]) -> Iterator[None]:
    """Print the first tracking error as one line and continue; tracking errors never fail a run."""
    try:
        yield
    except Exception as error:
        if not reported:
            retry = "run `python -m pipelines.orchestration publish` to retry"
            print(f"tracking: not published ({redact(first_line(error))}); {retry}.", file=sys.stderr)
        reported.append(str(error))


def _invocations(home: Path) -> list[str]:
    """Return all invocations with records or snapshots, oldest first, because lineage refers to earlier ones."""
    traces = [*(home / "runs").glob("*"), *(home / "snapshots").glob("*.json")]
    first: dict[str, float] = {}
    for trace in traces:
        name = trace.name.removesuffix(".json")
        first[name] = min(first.get(name, math.inf), trace.stat().st_mtime)
    return sorted(first, key=lambda name: first[name])
