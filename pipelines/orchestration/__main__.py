"""Run and inspect the pipeline: `python -m pipelines.orchestration repro --profile smoke`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.orchestration import runner, workspace
from pipelines.runs import graph, records


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("FLOWMATCH_HOME", str(Path.cwd() / ".flowmatch"))  # workspaces record in the project
    try:
        return int(globals()[f"_{options.command}"](options))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except runner.Stopped as stopped:
        print(f"stopped by {stopped}; completed stages are kept, {_continue(options)}.", file=sys.stderr)
        return stopped.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.orchestration", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--profile",
            default="default",
            help="a file of pipelines/config/profiles/ (default: params.yaml as it is)",
        )
        return command

    for name, text in (
        ("repro", "run changed stages by dvc repro"),
        ("flow", "run changed stages in parallel as a Prefect flow"),
    ):
        command = add(name, text)
        command.add_argument("targets", nargs="*", help="stages, run with their dependencies (default: all)")
        command.add_argument("--force", action="store_true", help="also run stages that have not changed")
        if name == "flow":
            command.add_argument(
                "--workers", type=_positive, help="maximum number of parallel stages (default: cores, at most 4)"
            )
    add("status", "list the stages and whether they have changed")
    add("validate", "check params.yaml with the profile, without running a stage")
    add("publish", "publish records of runs without an orchestrator to MLflow")
    add("ui", "serve the MLflow pages of all runs on this machine").add_argument("--port", type=int, default=5000)
    add("serve", "retrain on a schedule").add_argument(
        "--cron", default="0 3 * * *", help="schedule as a cron expression (default: %(default)s)"
    )
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _prepare(options: argparse.Namespace) -> Path:
    """Prepare the profile's folder and return it, after validating its parameters."""
    root = Path.cwd()
    for name in ("dvc.yaml", "params.yaml"):
        if not (root / name).exists():
            raise UserError(f"there is no {name} in {root}; run from the project's root.")
    here = workspace.prepare(root, options.profile)
    parameters.load(here / "params.yaml")
    return here


def _repro(options: argparse.Namespace) -> int:
    here = _prepare(options)
    if not _has_work(here, options):
        return 0
    from pipelines.runs import live

    command = [
        sys.executable,
        "-m",
        "dvc",
        "repro",
        *(["--force"] if options.force else []),
        *options.targets,
    ]
    invocation = records.name_of(psutil.Process())
    runner.raise_on_signals()
    with live.live(here, invocation) as outcome:
        status = runner.run_foreground(command, here, runner.environment(invocation))
        outcome.status = "FAILED" if status else "FINISHED"
    return _report_outcome(status, here, invocation, options)


def _flow(options: argparse.Namespace) -> int:
    here = _prepare(options)
    if not _has_work(here, options):
        return 0
    invocation = records.name_of(psutil.Process())
    status = _by_prefect(
        "run",
        invocation,
        root=here,
        targets=options.targets,
        force=options.force,
        workers=options.workers,
        device=parameters.load(here / "params.yaml").device,
    )
    return _report_outcome(status, here, invocation, options)


def _serve(options: argparse.Namespace) -> int:
    _prepare(options)
    return _by_prefect("serve", "", root=Path.cwd(), profile=options.profile, cron=options.cron)


def _by_prefect(what: str, invocation: str, **arguments: object) -> int:
    command = [sys.executable, "-m", "pipelines.orchestration.prefect", what, json.dumps(arguments, default=str)]
    runner.raise_on_signals()
    return runner.run_foreground(command, Path.cwd(), runner.environment(invocation))


def _status(options: argparse.Namespace) -> int:
    here = _prepare(options)
    changed = graph.dirty(here)
    for name in graph.load(here):
        print(f"{'changed' if name in changed else 'up to date':10}  {name}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from pipelines.orchestration import preflight

    preflight.check(parameters.load(_prepare(options) / "params.yaml"))
    print(f"params.yaml is valid for profile {options.profile}.")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from pipelines.runs import live, tracking

    live.publish()
    print(f"published to {tracking.uri(records.home())}")
    return 0


def _ui(options: argparse.Namespace) -> int:
    _publish(options)
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


def _has_work(here: Path, options: argparse.Namespace) -> bool:
    nodes = graph.load(here, options.targets)
    if options.force or not graph.dirty(here).isdisjoint(nodes):
        from pipelines.orchestration import preflight

        preflight.check(parameters.load(here / "params.yaml"))
        return True
    print(f"nothing has changed: all {len(nodes)} stages are up to date.")
    _point_to_report(here)
    return False


def _report_outcome(status: int, here: Path, invocation: str, options: argparse.Namespace) -> int:
    """Print the path of the report, or the failed stages and the command to continue; return the status."""
    if status == 0:
        _point_to_report(here)
        return 0
    failed = [record for record in records.read(records.home() / "runs" / invocation) if record.status != "FINISHED"]
    names = ", ".join(record.stage for record in failed) or "a stage"
    print(
        f"{names} failed; completed stages are kept, so fix the cause and {_continue(options)}.",
        file=sys.stderr,
    )
    return status


def _point_to_report(here: Path) -> None:
    if (here / layout.page(layout.REPORT)).exists():
        print(os.path.relpath(here / layout.page(layout.REPORT)))


def _continue(options: argparse.Namespace) -> str:
    command = "make flow" if options.command == "flow" else "make repro"
    profile = "" if options.profile == "default" else f" PROFILE={options.profile}"
    return f"continue with `{command}{profile}`"


if __name__ == "__main__":
    sys.exit(main())
