"""Try, sample and score models, and run and inspect the pipeline: `python -m pipelines repro --profile smoke`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.base import console, files
from pipelines.base.errors import UserError
from pipelines.orchestration import runner
from pipelines.orchestration.commands import (
    _workspace,
    compare,
    flow,
    gc,
    plots,
    promote,
    publish,
    pull,
    push,
    repro,
    sample,
    score,
    serve,
    status,
    try_,
    ui,
    validate,
)

COMMANDS = (
    try_,
    sample,
    score,
    repro,
    flow,
    status,
    validate,
    publish,
    promote,
    compare,
    plots,
    ui,
    serve,
    push,
    pull,
    gc,
)
"""The commands in the order of the help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    console.accept_all_characters()
    options = parser().parse_args(arguments)
    os.environ.setdefault("FLOWMATCH_HOME", str(Path.cwd() / ".flowmatch"))  # workspaces record in the project
    try:
        with files.writing(Path.cwd()):
            return int(options.run(options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except runner.Stopped as stopped:
        print(f"stopped by {stopped}; {_workspace.what_is_left(options)}.", file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # the reader of the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    whole = argparse.ArgumentParser(prog="python -m pipelines", description=__doc__)
    whole.set_defaults(profile="default")  # for the commands that have no such option
    commands = whole.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        text = (module.__doc__ or "").splitlines()[0]
        name = module.__name__.rpartition(".")[2].rstrip("_")  # `try` is a keyword
        command = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return whole


if __name__ == "__main__":
    sys.exit(main())
