"""Start the Prefect side in a process of its own, because Prefect reads its settings when it is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipelines.orchestration import runner


def start(what: str, invocation: str, *, together: bool = False, **arguments: object) -> int:
    """Run a command of `pipelines.orchestration.prefect` on this terminal and return its exit status.

    Args:
        what: Name of the command.
        invocation: Name of the invocation.
        together: See `runner.run_foreground`.
        arguments: Arguments of the command.
    """
    command = [sys.executable, "-m", "pipelines.orchestration.prefect", what, json.dumps(arguments, default=str)]
    runner.raise_on_signals()
    return runner.run_foreground(command, Path.cwd(), runner.environment(invocation), together=together)
