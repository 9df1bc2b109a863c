"""Serve the MLflow pages of all runs on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.orchestration import runner
from pipelines.orchestration.commands import publish
from pipelines.runs import records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--port", type=int, default=5000)


def run(options: argparse.Namespace) -> int:
    """Publish, and serve until stopped."""
    publish.run(options)
    from pipelines.runs import tracking

    print(f"MLflow: http://127.0.0.1:{options.port} (stop with Ctrl-C)", flush=True)
    runner.raise_on_signals()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking.uri(records.home())]
    command += ["--host", "127.0.0.1", "--port", str(options.port), "--workers", "1"]
    env = runner.environment("") | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    try:
        return runner.run_foreground(command, Path.cwd(), env)
    except runner.Stopped:
        return 0
