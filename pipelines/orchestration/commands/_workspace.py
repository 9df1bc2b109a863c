"""What several commands do with the folder of a profile."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import psutil

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.config.params import Params
from pipelines.orchestration import results, workspace
from pipelines.runs import graph, records


def positive(word: str) -> int:
    """Return the number of an option that is at least 1."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a profile."""
    parser.add_argument(
        "--profile", default="default", help="a file of pipelines/config/profiles/ (default: params.yaml as it is)"
    )


def add_stages(parser: argparse.ArgumentParser) -> None:
    """Add the options that select stages."""
    parser.add_argument("targets", nargs="*", help="stages, run with their dependencies (default: all)")
    parser.add_argument("--force", action="store_true", help="also run stages that have not changed")


@contextmanager
def held(options: argparse.Namespace) -> Iterator[Path]:
    """Yield the profile's folder, up to date and locked, after validating its parameters."""
    check(options)
    with workspace.held(Path.cwd(), options.profile) as here:
        yield here


def check(options: argparse.Namespace) -> Params:
    """Return the parameters of the profile, validated."""
    root = Path.cwd()
    for name in ("dvc.yaml", "params.yaml"):
        if not (root / name).exists():
            raise UserError(f"there is no {name} in {root}; run from the project's root.")
    raw, left_out = workspace.parameters(root, options.profile)
    for sentence in left_out:
        print(f"profile {options.profile}: {sentence}", file=sys.stderr)
    return parameters.parse(raw, Path("params.yaml"))


def run_changed(options: argparse.Namespace, execute: Callable[[Path, str, argparse.Namespace], int]) -> int:
    """Run what has changed in the profile's folder, and say how it ended.

    Args:
        options: Options of the command.
        execute: Runs the stages in a folder under the name of an invocation, and returns the exit status.

    Returns:
        The exit status of the command.
    """
    with held(options) as here:
        if not has_work(here, options):
            return 0
        invocation = records.name_of(psutil.Process())
        return report_outcome(execute(here, invocation, options), here, invocation, options)


def has_work(here: Path, options: argparse.Namespace) -> bool:
    """Return whether a stage has changed, after checking what would fail in a stage; else point to the report."""
    nodes, changed = graph.compare(here, options.targets)
    if not nodes:
        raise UserError(f"{here / 'dvc.yaml'} defines no stage; restore it: `git checkout dvc.yaml`.")
    if options.force or not changed.isdisjoint(nodes):
        from pipelines.orchestration import preflight

        with chdir(here):  # its paths are relative to the folder that the stages run in
            preflight.check(parameters.load())
        return True
    print(f"nothing has changed: all {len(nodes)} stages are up to date.")
    point_to_report(here)
    return False


def report_outcome(status: int, here: Path, invocation: str, options: argparse.Namespace) -> int:
    """Print the path of the report, or of what there is of it, and the command to continue; return the exit status."""
    if status == 0:
        shutil.rmtree(here / layout.PARTIAL, ignore_errors=True)
        point_to_report(here)
        return 0
    failed = [record for record in records.read(records.home() / "runs" / invocation) if record.status != "FINISHED"]
    names = ", ".join(record.stage for record in failed) or "a stage"
    print(
        f"{names} failed; completed stages are kept, so fix the cause and {how_to_continue(options)}.",
        file=sys.stderr,
    )
    if not options.targets:
        results.write_partial(here, invocation)
    return 1


def point_to_report(here: Path) -> None:
    """Print the path of the report, if there is one."""
    if (here / layout.page(layout.REPORT)).exists():
        print(os.path.relpath(here / layout.page(layout.REPORT)))


def how_to_continue(options: argparse.Namespace) -> str:
    """Return the end of a sentence about a run that did not complete."""
    if options.command == "try":
        return "continue with the same command"
    command = "make flow" if options.command == "flow" else "make repro"
    profile = "" if options.profile == "default" else f" PROFILE={options.profile}"
    return f"continue with `{command}{profile}`"


def what_is_left(options: argparse.Namespace) -> str:
    """Return the end of a sentence about a command that a signal stopped."""
    if options.command in ("sample", "score"):
        return "nothing was written"
    return f"completed stages are kept, {how_to_continue(options)}"
