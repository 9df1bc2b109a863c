"""Serve the MLflow pages of all runs on this machine."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.base.redact import redact
from pipelines.orchestration import runner
from pipelines.orchestration.commands import publish
from pipelines.orchestration.commands._ports import HOST, refusal
from pipelines.runs import records, store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--port", type=int, default=5000)


def run(options: argparse.Namespace) -> int:
    """Publish, and serve until stopped; of an MLflow server, which has pages already, print the address."""
    home = records.home()
    where = store.uri(home)
    if store.is_server(where):
        print(f"MLflow: {redact(where)} (a server with pages of its own)")
        return 0
    _check_port(options.port)
    publish.run(options)
    page = store.runs_page(f"http://{HOST}:{options.port}", store.open_existing(home).experiment)
    runner.raise_on_signals()
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(options.port), "--workers", "1"]
    env = runner.environment("") | {
        "MLFLOW_BACKEND_STORE_URI": where,  # other users of the machine can read a command line
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": store.artifacts(home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    ended = threading.Event()
    threading.Thread(target=_announce, args=(page, options.port, ended), daemon=True).start()
    try:
        return runner.run_foreground(command, Path.cwd(), env)
    except runner.Stopped:
        return 0
    finally:
        ended.set()


def _announce(page: str, port: int, ended: threading.Event) -> None:
    """Print the address once it is served, which takes MLflow seconds."""
    while not ended.wait(0.2):
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            print(f"MLflow: {page} (stop with Ctrl-C)", flush=True)
            return


def _check_port(port: int) -> None:
    """Raise an error if another process listens on a port."""
    if error := refusal(port):
        raise UserError(
            f"port {port} of {HOST} cannot be used ({error}); stop what uses it, or name another one by "
            "`make ui PORT=5001`."
        )
