"""Run and inspect the pipeline: `python -m pipelines.orchestration repro --profile smoke`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.base.errors import UserError
from pipelines.orchestration import runner
from pipelines.orchestration.commands import _workspace, flow, plots, publish, repro, serve, status, ui, validate

COMMANDS = (repro, flow, status, validate, plots, publish, ui, serve)
"""The commands in the order of the help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("FLOWMATCH_HOME", str(Path.cwd() / ".flowmatch"))  # workspaces record in the project
    try:
        return int(options.run(options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except runner.Stopped as stopped:
        print(
            f"stopped by {stopped}; completed stages are kept, {_workspace.how_to_continue(options)}.", file=sys.stderr
        )
        return stopped.status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    whole = argparse.ArgumentParser(prog="python -m pipelines.orchestration", description=__doc__)
    whole.set_defaults(profile="default")  # for the commands that have no such option
    commands = whole.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        text = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return whole


if __name__ == "__main__":
    sys.exit(main())
