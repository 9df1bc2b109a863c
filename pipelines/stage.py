"""The context that every stage runs in: parameters, seeds, log, record and outputs.

A stage's file holds a function of a `Stage` and the names of its cell, and ends in `run(main)`. What can go wrong for a
user ends in one sentence and exit status 1; anything else is a defect, whose traceback goes to the log file.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pipelines import params as parameters
from pipelines import records, store
from pipelines.errors import UserError
from pipelines.params import Params
from pipelines.records import RunRecord, Status

if TYPE_CHECKING:
    import numpy as np
    import torch

DATA = Path("data")
SKIPPED = "skipped.json"  # stands in the place of the networks of a method that is not run, and says why


def derived_seed(base: int, *key: object) -> int:
    """A seed that depends on the base seed and the key, and on nothing else.

    >>> derived_seed(0, "prepare", "moons") == derived_seed(0, "prepare", "moons") != derived_seed(0, "prepare", "ring")
    True
    """
    text = "/".join(str(part) for part in (base, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


@dataclass(frozen=True)
class Stage:
    """What a stage is given."""

    name: str
    params: Params
    record: RunRecord

    def seed(self, *key: object) -> int:
        """The seed of a key (see `derived_seed`)."""
        return derived_seed(self.params.seed, *key)

    def rng(self, *key: object) -> np.random.Generator:
        """NumPy's generator for a key."""
        import numpy as np

        return np.random.default_rng(self.seed(*key))

    def generator(self, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
        """Torch's generator for a key."""
        import torch

        return torch.Generator(device).manual_seed(self.seed(*key))

    def log(self, message: str) -> None:
        """One line for whoever watches."""
        print(f"{self.name}: {message}", flush=True)

    def metrics(self, values: Mapping[str, float]) -> None:
        """Numbers that describe the whole run of the stage."""
        self.record.metrics(dict(values))

    @contextmanager
    def output(self, path: Path) -> Iterator[Path]:
        """An output file or folder: made under a temporary name, renamed when it is whole."""
        with store.replacing(path) as temporary:
            yield temporary
        self.log(f"wrote {path}")


def run(main: Callable[..., None]) -> NoReturn:
    """Run a stage's function as this process.

    The function's parameters after the first are the names of its cell, taken from the command line
    (`--dataset moons`).
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
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    status: Status = "FAILED"
    message, code = None, 1
    try:
        main(Stage(name, params, record), **arguments)
        status, code = "FINISHED", 0
        print(f"{name}: done in {time.monotonic() - started:.1f} s", flush=True)
    except UserError as error:
        message = str(error)
    except (KeyboardInterrupt, SystemExit):
        status, message, code = "KILLED", "stopped before it was done; run the same command to go on.", 130
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
    """Refuse a data set, an environment or an experiment that params.yaml does not have."""
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
    """Under a bare `dvc repro` nobody else copies the record to the tracker."""
    if "FLOWMATCH_INVOCATION" not in os.environ:
        from pipelines.orchestration import tracking

        tracking.publish_quietly(record.invocation)
