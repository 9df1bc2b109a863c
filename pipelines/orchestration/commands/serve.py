"""Retrain on a schedule."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.orchestration import runner
from pipelines.orchestration.commands import _prefect, _workspace
from pipelines.orchestration.commands._ports import HOST, refusal
from pipelines.runs import records

_START_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    _workspace.add_profile(parser)
    parser.add_argument("--port", type=int, default=4200, help="port of the server that is started (default: 4200)")


def run(options: argparse.Namespace) -> int:
    """Serve the scheduled flow until stopped, and without PREFECT_API_URL a server for it."""
    schedule = _workspace.check(options).operation.schedule
    given = {"root": Path.cwd(), "profile": options.profile, "cron": schedule.cron, "timezone": schedule.timezone}
    runner.raise_on_signals()
    try:
        if os.environ.get("PREFECT_API_URL"):
            return _prefect.start("serve", "", together=True, **given)
        with _server(options.port):
            return _prefect.start("serve", "", together=True, **given)
    except runner.Stopped:
        return 0


@contextmanager
def _server(port: int) -> Iterator[None]:
    """Run a Prefect server on this machine's loopback address, and set PREFECT_API_URL for child processes."""
    if refusal(port):
        raise UserError(
            f"port {port} of {HOST} is in use; if a Prefect server answers there, set "
            f"PREFECT_API_URL=http://{HOST}:{port}/api, else choose another one: "
            f"`python -m pipelines.orchestration serve --port {port + 1}`."
        )
    env = runner.environment("") | {"PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api"}
    log = Path(env["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(process, port, log)
        os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
        print(f"Prefect: http://{HOST}:{port} (stop with Ctrl-C)", flush=True)
        yield
    finally:
        runner.kill_groups({process.pid})
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the server answers.

    Raises:
        UserError: It does not.
    """
    import httpx

    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"http://{HOST}:{port}/api/health", timeout=5.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    where = os.path.relpath(log, records.home().parent)
    raise UserError(f"the Prefect server did not start; the reason is in {where}.")
