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
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipelines.base import ranks
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.config.params import Params
from pipelines.runs import records
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord, Status


def run(main: Callable[..., None]) -> NoReturn:
    """Run a stage's function as this process and exit.

    The parameters of the function after the first identify the cell; they are command-line options (`--dataset moons`).
    """
    cell = list(inspect.signature(main).parameters)[1:]
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    for name in cell:
        parser.add_argument(f"--{name}", required=True)
    arguments = vars(parser.parse_args())
    module = Path(inspect.getfile(main)).stem
    name = os.environ.get("DVC_STAGE") or "@".join(filter(None, (module, "-".join(arguments[n] for n in cell))))
    sys.exit(_guarded(main, name, arguments))


def _guarded(main: Callable[..., None], name: str, arguments: dict[str, str]) -> int:
    try:
        params = parameters.load()
        _check_cell(params, arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    record = RunRecord.start(name, {**arguments, "profile": params.profile, "seed": params.seed})
    stage = Stage(name, params, record)
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    status: Status = "FAILED"
    message, code = None, 1
    try:
        main(stage, **arguments)
        status, code = "FINISHED", 0
        stage.log(f"done in {time.monotonic() - started:.1f} s")
    except UserError as error:
        message = str(error)
    except (KeyboardInterrupt, SystemExit):
        status, message, code = "KILLED", "stopped before it finished; run the same command to continue.", 130
    except BaseException as error:
        log = records.home() / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        message = f"{type(error).__name__}: {error} (a defect; the traceback is in {log})"
    finally:
        record.finish(status, message)
    if message:
        print(f"{name}: {message}", file=sys.stderr)
    _publish(record)
    return code


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

        live.publish_quietly(record.invocation)
