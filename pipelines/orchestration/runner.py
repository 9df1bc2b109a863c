"""Run one stage as one child process, which can be stopped together with its descendants."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

import psutil

from pipelines.runs import records

How = Literal["ran", "restored", "unchanged"]

GRACE_SECONDS = 5.0  # time for a stage to close its record after SIGTERM
_LEADER_GRACE_SECONDS = 30.0  # time for a scheduler to stop its stages and report it
STOPPING = threading.Event()  # set once: afterwards no stage starts and none is retried
_groups: set[int] = set()
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOCK_TRIES = 5
_MARK_SECONDS = 0.5
_EXITED = re.compile(r"^ERROR: failed to reproduce .* exited with (-?\d+)$")
_SHELL_KILLED = 128  # a shell that waited for a command killed by signal n exits with 128 + n
_LOCKED = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")


class Stopped(BaseException):
    """The exception for a signal that asks this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


class StageFailed(Exception):
    """The exception for a stage that failed; the message is one sentence."""


class StageTimedOut(StageFailed):
    """The exception for a stage that exceeded its time limit."""


class StageStopped(StageFailed):
    """The exception for a stage that was stopped, or not started, because its run is ending."""


@dataclass(frozen=True)
class StageResult:
    """The result of a stage that is up to date.

    Attributes:
        name: Name of the stage.
        how: Whether it ran, was restored from DVC's cache, or was unchanged.
        seconds: Time that it took.
    """

    name: str
    how: How
    seconds: float


def environment(
    invocation: str, *, home: Path | None = None, timeout: float | None = None, cores: int | None = None
) -> dict[str, str]:
    """Return the environment of child processes: this interpreter's commands first, telemetry disabled.

    Args:
        invocation: Name of the invocation.
        home: Folder of records; by default this process's.
        timeout: Time limit of a stage in seconds.
        cores: Number of processes that a stage may run at once.
    """
    here, home = str(Path(sys.executable).parent), home or records.home()
    limits = {"FLOWMATCH_TIMEOUT": timeout and f"{timeout:g}", "FLOWMATCH_CORES": cores and str(cores)}
    return (
        os.environ
        | {name: value for name, value in limits.items() if value}
        | {
            "PATH": os.pathsep.join((here, os.environ.get("PATH", os.defpath))),
            "FLOWMATCH_HOME": str(home),
            "FLOWMATCH_INVOCATION": invocation,
            "PYTHONUNBUFFERED": "1",
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            # A private server stores its state in the project; its first start creates a database.
            "PREFECT_HOME": os.environ.get("PREFECT_HOME") or str(home.parent / ".prefect"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray hides the GPUs from tasks that reserve none
            # Without it, the large short-lived allocations of training grow glibc's heap by half a MiB per step.
            "MALLOC_TOP_PAD_": os.environ.get("MALLOC_TOP_PAD_", str(64 * 2**20)),
        }
    )


async def run_stage(
    name: str,
    root: Path,
    *,
    force: bool = False,
    timeout: float | None = None,
    env: Mapping[str, str],
    log: Callable[[str], object] = print,
) -> StageResult:
    """Bring one stage up to date by DVC, assuming that its dependencies are.

    Args:
        name: Name of the stage.
        root: Folder of the workspace.
        force: Whether to run it even if it has not changed.
        timeout: Time limit in seconds.
        env: Environment variables.
        log: Called with every line that the stage prints.

    Raises:
        StageFailed: The stage failed.
        StageTimedOut: It exceeded `timeout`.
        StageStopped: It was stopped.
    """
    stop = stop_mark(Path(env["FLOWMATCH_HOME"]), env["FLOWMATCH_INVOCATION"])
    # DVC waits for its lock on the repository, but not for locks on paths, which another stage may hold briefly.
    for attempt in range(_LOCK_TRIES):
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                status, lines = await _run(name, root, force, env, log, stop)
        except TimeoutError:
            raise StageTimedOut(
                f"{name} took longer than its {timeout:g} s, the limit that operation.timeout_hours of params.yaml or "
                "meta.prefect.timeout_seconds of dvc.yaml sets."
            ) from None
        if _stopping(stop):
            raise StageStopped(f"{name} was stopped.")
        if status == 0:
            return StageResult(name, _how(lines), time.monotonic() - started)
        if _how(lines) == "ran" or not _LOCKED.search("\n".join(lines)):
            break
        await asyncio.sleep(1 + attempt)
    raise StageFailed(f"{name} failed with exit status {status}: {_error_line(lines)}")


async def _run(
    name: str, root: Path, force: bool, env: Mapping[str, str], log: Callable[[str], object], stop: Path
) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    if force:
        command.append("--force")
    if _stopping(stop):
        raise StageStopped(f"{name} was not started.")
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=root,
        env=dict(env),
        start_new_session=True,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**20,
    )
    _groups.add(process.pid)
    lines: list[str] = []
    watch = asyncio.create_task(_stop_when_marked(process.pid, stop))
    try:
        if STOPPING.is_set():  # stop_all may have run before this group was added
            kill_groups({process.pid})
        assert process.stdout is not None
        async for raw in process.stdout:
            lines.append(raw.decode(errors="replace").rstrip())
            log(lines[-1])
        return await process.wait(), lines
    except BaseException:
        kill_groups({process.pid})
        await process.wait()
        raise
    finally:
        watch.cancel()
        _groups.discard(process.pid)


async def _stop_when_marked(group: int, stop: Path) -> None:
    """Stop a process group when its run is stopped by a process of another machine or of a cluster."""
    while not stop.exists():
        await asyncio.sleep(_MARK_SECONDS)
    kill_groups({group})


def stop_mark(home: Path, invocation: str) -> Path:
    """Return the file whose presence stops the stages of an invocation, wherever they run."""
    return home / "stopped" / (invocation or "unnamed")


def _stopping(mark: Path) -> bool:
    return STOPPING.is_set() or mark.exists()


def _how(lines: Sequence[str]) -> How:
    if any(line.startswith("Running stage") for line in lines):
        return "ran"
    if any("is cached - skipping run" in line for line in lines):
        return "restored"
    return "unchanged"


def _error_line(lines: Sequence[str]) -> str:
    """Return the last line that DVC did not print itself, or that the stage was killed, which left it no last line."""
    found = next((int(match[1]) for line in lines if (match := _EXITED.search(line))), 0)
    killed = -found if found < 0 else found - _SHELL_KILLED
    if killed > 0:
        return f"its process was killed by signal {killed}; a retry or the next run continues from its checkpoint."
    own = [line for line in lines if line and not line.startswith((">", "Running stage", "ERROR: failed to rep"))]
    return (own or lines or ["no output"])[-1].strip()


def run_foreground(command: Sequence[str], root: Path, env: Mapping[str, str], *, together: bool = False) -> int:
    """Run a command on this terminal, in a session that does not receive its Ctrl-C.

    A signal that stops this process stops the command first, which may have to stop its own children, and then whatever
    is left of its group.

    Args:
        command: Command line.
        root: Folder that it runs in.
        env: Environment variables.
        together: Whether to interrupt its whole group, as a terminal does, because it does not stop its own children.

    Returns:
        The exit status.
    """
    process = subprocess.Popen(command, cwd=root, env=dict(env), stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except Stopped:
        if together:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LEADER_GRACE_SECONDS)
        raise
    finally:
        kill_groups({process.pid})
        process.wait()


def raise_on_signals() -> None:
    """Raise `Stopped` on the signals that ask for termination, so that child processes are stopped too."""
    for signum in _ENDING:
        signal.signal(signum, _stop)


def stop_all(mark: Path | None = None) -> None:
    """Stop every running stage and prevent others from starting.

    Args:
        mark: File that also stops the stages which other processes run; see `stop_mark`.
    """
    STOPPING.set()
    if mark:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    kill_groups(set(_groups))


def kill_groups(groups: set[int]) -> None:
    """Terminate process groups, and kill them after a grace period."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signum)
        until = time.monotonic() + GRACE_SECONDS
        while _any_alive(groups):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        else:
            return


def _any_alive(groups: set[int]) -> bool:
    """Return whether a process of the groups is running; a zombie, whose parent has not waited for it yet, is not."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) in groups:
                return True
    return False


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    for each in _ENDING:  # cleaning up takes seconds at most, and a second Ctrl-C must not interrupt it
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(signum)
