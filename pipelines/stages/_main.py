"""Run a stage as a process.

An error that a user can fix ends in one sentence and exit status 1; any other error is a defect, whose traceback is
written to the log file.
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipelines.base import console, device, files, locks, memory, ranks
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.config.params import Params
from pipelines.runs import inputs, records
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord, Status
from pipelines.runs.usage import Usage
from pipelines.runs.watchdog import Watchdog

_LOCK_SECONDS = 20.0  # a stage whose starter was killed needs some of them to end


def run(main: Callable[..., None]) -> NoReturn:
    """Run a stage's function as this process and exit.

    The parameters of the function after the first identify the cell; they are command-line options (`--dataset moons`).
    """
    console.accept_all_characters()
    cell = list(inspect.signature(main).parameters)[1:]
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    for name in cell:
        parser.add_argument(f"--{name}", required=True)
    arguments = vars(parser.parse_args())
    module = Path(inspect.getfile(main)).stem
    name = os.environ.get("DVC_STAGE") or "@".join(filter(None, (module, "-".join(arguments[n] for n in cell))))
    sys.exit(guarded(main, name, arguments))


def guarded(main: Callable[..., None], name: str, arguments: dict[str, str]) -> int:
    """Run a stage's function as the only process of its name in this folder, and return the exit status.

    Args:
        main: Function of the stage.
        name: Name of the stage.
        arguments: What identifies the cell, by name.
    """
    lock = locks.FOLDER / f"{name.replace('/', ':')}.lock"
    alone = locks.held(lock, f"stage {name}", _LOCK_SECONDS) if ranks.is_first() else nullcontext()
    try:
        with alone:
            return _attempt(main, name, arguments)
    except UserError as error:
        _tell(str(error))
        return 1


def _attempt(main: Callable[..., None], name: str, arguments: dict[str, str]) -> int:
    """Run the stage, close its record and return the exit status.

    Raises:
        UserError: The parameters are invalid, or there can be no record.
    """
    needed = inputs.of(name, arguments)
    before = needed.state()
    params = parameters.load()
    device.limit_threads(params.threads)
    memory.keep()
    _check_cell(params, arguments)
    settings = params.model_dump(mode="json", exclude_unset=True)
    record = RunRecord.start(name, {**arguments, "profile": params.profile, "seed": params.seed}, settings)
    stage = Stage(name, params, record)
    watchdog = Watchdog(record)
    signal.signal(signal.SIGTERM, _stop)
    watchdog.start()
    started = time.monotonic()
    status: Status = "FAILED"
    message, code = None, 1
    try:
        with files.writing(Path.cwd()), Usage(record):
            main(stage, **arguments)
        needed.verify(before)
        status, code = "FINISHED", 0
        stage.log(f"done in {time.monotonic() - started:.1f} s")
    except UserError as error:
        message = str(error)
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):  # a pipe breaks when its reader was killed
        code = 130
        status, message = watchdog.reason or ("KILLED", "stopped before it finished; run the same command to continue.")
    except BaseException as error:
        message = f"{type(error).__name__}: {error} (a defect; {_write_traceback(name)})"
    watchdog.stop()
    if not _close(record, status, message):
        return 1
    if status == "FINISHED":  # publishing takes seconds, and DVC reads the parameters afterwards
        try:
            needed.verify(before)
        except UserError as error:
            _close(record, "FAILED", str(error))
            return 1
    return code


def _close(record: RunRecord, status: Status, message: str | None) -> bool:
    """Close the record, print the message and publish; return whether the record could be written."""
    written = True
    try:
        record.finish(status, message)
    except UserError as error:  # the disk is full, most often after the stage has said so
        written, message = False, message or str(error)
    if message:
        _tell(f"{record.record.stage}: {message}")
    if written:
        _publish(record)
    return written


def _write_traceback(name: str) -> str:
    """Write the traceback of the present exception to the log folder and return where it is."""
    log = records.home() / "logs" / f"{name}.log"
    try:
        with files.replacing(log) as temporary:
            temporary.write_text(traceback.format_exc(), encoding="utf-8")
    except UserError as error:
        return f"no traceback: {error}"
    return f"the traceback is in {log}"


def _tell(message: str) -> None:
    with suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


def _check_cell(params: Params, cell: Mapping[str, str]) -> None:
    """Raise an error for a data set, an environment or an experiment that params.yaml does not define."""
    for kind, entries in (
        ("dataset", params.datasets),
        ("environment", params.environments),
        ("experiment", params.experiments),
    ):
        if kind in cell and cell[kind] not in entries:
            raise UserError(f"params.yaml has no {kind} {cell[kind]!r}, only {', '.join(entries)}.")


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _publish(record: RunRecord) -> None:
    """Publish the record, which no orchestrator does under a bare `dvc repro`."""
    if "FLOWMATCH_INVOCATION" not in os.environ and ranks.is_first():
        from pipelines.runs import live

        live.publish_quietly(record.invocation, record.record.stage)
