"""Run DVC's graph as a Prefect flow: Prefect schedules and retries stages, DVC decides which run and caches results.

It runs in its own process (`python -m pipelines.orchestration.prefect run '{"root": "."}'`) with the variables of
`runner.environment`, because Prefect reads its settings when it is imported, and because its server must not receive
the Ctrl-C before the flow has reported it.

Prefect stores the parameters of flows, so they are names and numbers only: the environment of a stage, which may hold
passwords, is read where the stage runs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.futures import PrefectFuture, as_completed
from prefect.schedules import Cron
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.types.entrypoint import EntrypointType

from pipelines.base import layout
from pipelines.base.device import resolve
from pipelines.base.errors import UserError
from pipelines.base.redact import redact
from pipelines.config import operation, params
from pipelines.config.operation import Operation
from pipelines.config.yaml_files import read_yaml
from pipelines.orchestration import clusters, notices, promotion, results, runner, workspace
from pipelines.orchestration.runner import StageFailed, StageResult, StageStopped, StageTimedOut
from pipelines.orchestration.slots import Slots
from pipelines.runs import graph, live, records, store
from pipelines.runs.graph import Node

_STATES = {"ran": "Completed", "restored": "RestoredFromRunCache", "unchanged": "Unchanged"}
_FINAL = ("TimedOut", "Stopped")  # failures that are not retried


@dataclass(frozen=True)
class Setting:
    """What all stages of a run share; plain values, because the workers of a cluster receive a copy.

    Attributes:
        root: Folder of the workspace.
        home: Folder of records.
        invocation: Name of the invocation.
        force: Whether to run stages that have not changed.
        timeout: Time limit of a stage in seconds.
        cores: Number of processes that a stage may run at once; None does not limit it.
        slots: Limits on the number of stages at once.
        gpus: Value of CUDA_VISIBLE_DEVICES for each slot of the tag `gpu`; None leaves it as it is.
    """

    root: str
    home: str
    invocation: str
    force: bool
    timeout: float
    cores: int | None
    slots: Slots
    gpus: tuple[str | None, ...]

    async def run(self, node: Node, log: Callable[[str], object]) -> StageResult:
        """Run a stage when there is a slot for it."""
        timeout = node.hints.get("timeout_seconds", self.timeout)
        async with self.slots.taken(node.hints.get("tags", [])) as held:
            env = runner.environment(self.invocation, home=Path(self.home), timeout=timeout, cores=self.cores)
            gpu = self.gpus[held["gpu"]] if "gpu" in held else None
            if gpu is not None:
                env["CUDA_VISIBLE_DEVICES"] = gpu
            root = Path(self.root)
            return await runner.run_stage(node.name, root, force=self.force, timeout=timeout, env=env, log=log)


def should_retry(task: object, run: object, state: State[Any]) -> bool:
    """Return whether to retry a failed stage; one that was stopped or exceeded its time limit is not retried."""
    return state.name not in _FINAL


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=should_retry)
async def dvc_stage(node: Node, changed: bool, upstream: list[StageResult], setting: Setting) -> State[StageResult]:
    """Bring one stage up to date, without a process if neither it nor a stage before it has changed."""
    result = StageResult(node.name, "unchanged", 0.0)
    if changed or setting.force or any(before.how != "unchanged" for before in upstream):
        try:
            result = await setting.run(node, get_run_logger().info)
        except StageTimedOut as error:
            return Failed(name="TimedOut", message=str(error))
        except StageStopped as error:
            return Failed(name="Stopped", message=str(error))
    return Completed(name=_STATES[result.how], data=result)


@flow(name="flowmatch", persist_result=False)
def pipeline(
    root: str, targets: list[str], force: bool, workers: int | None, device: str
) -> State[list[dict[str, Any]]]:
    """Run every stage as a task that waits for its dependencies, and show the results as a table and a page."""
    here, invocation, settings = Path(root), records.invocation(), operation.read(Path(root) / "params.yaml")
    setting = _setting(here, invocation, force, workers, device, settings)
    started, stop = time.time(), runner.stop_mark(Path(setting.home), invocation)
    stop.unlink(missing_ok=True)  # of an earlier run under the same name
    with live.live(here, invocation) as outcome:
        try:
            rows = _run_stages(here, targets, setting)
        except BaseException:
            runner.stop_all(stop)
            raise
        failure = _failure(rows)
        outcome.status = "FAILED" if failure else "FINISHED"
    link = store.address(records.home(), invocation)
    create_table_artifact(key="stages", table=rows, description="Result of each stage")
    create_markdown_artifact(key="run", markdown=_page(here, rows, failure, link, time.time() - started))
    notices.report(settings.notify, _profile(here), failure, link)
    return Failed(message=failure, data=rows) if failure else Completed(data=rows)


def _run_stages(here: Path, targets: Sequence[str], setting: Setting) -> list[dict[str, Any]]:
    nodes, changed = graph.compare(here, targets)
    futures: dict[str, PrefectFuture[Any]] = {}
    for node in nodes.values():
        configured = dvc_stage.with_options(
            name=node.name,
            task_run_name=node.name,
            tags=node.hints.get("tags", []),
            retries=node.hints.get("retries", 0),
            retry_delay_seconds=node.hints.get("retry_delay_seconds", 5),
        )
        upstream: Any = [futures[dep] for dep in node.deps]
        futures[node.name] = configured.submit(node, node.name in changed, upstream, setting)
    ready = 0
    for future in as_completed(list(futures.values())):
        future.wait()  # at once; only then does the future have the state with its result
        if future.state.is_completed():
            ready += 1
            if future.state.name != _STATES["unchanged"]:
                get_run_logger().info(f"{ready} of {len(futures)} stages are up to date")
    done = {name for name, future in futures.items() if future.state.is_completed()}
    return [_row(nodes[name], future.state, done) for name, future in futures.items()]


def _row(node: Node, state: State[Any], ready: Collection[str]) -> dict[str, Any]:
    """Return the row of a stage in the table of stages, `ready` being those that are up to date."""
    seconds, message = None, ""
    if state.is_completed():
        seconds = round(state.result().seconds, 1)
    elif state.name == "NotReady":  # Prefect names the task that failed by its id
        message = f"it needs {', '.join(name for name in node.deps if name not in ready)}"
    else:
        message = (state.message or "").removeprefix("Task run encountered an exception ").removeprefix("StageFailed: ")
    return {"stage": node.name, "state": state.name, "seconds": seconds, "message": message}


def _failure(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the stages that are not up to date, with the reason of the first, as one sentence."""
    bad = [row for row in rows if row["seconds"] is None]
    if not bad:
        return None
    cause = next((row for row in bad if row["state"] != "NotReady"), bad[0])
    return f"{', '.join(row['stage'] for row in bad)} not up to date: {cause['message']}"


def _page(here: Path, rows: Sequence[dict[str, Any]], failure: str | None, link: str, seconds: float) -> str:
    """Return the page that an operator reads first, as Markdown."""
    counts = {state: sum(row["state"] == state for row in rows) for state in {row["state"]: None for row in rows}}
    report = (here / layout.page(layout.REPORT)).absolute()
    lines = [
        f"# {'Failed' if failure else 'Every stage is up to date'}",
        "",
        *([failure, ""] if failure else []),
        "| | |",
        "| --- | --- |",
        f"| stages | {', '.join(f'{count} {state}' for state, count in counts.items())} |",
        f"| duration | {seconds:.0f} s |",
        f"| workspace | `{here.absolute()}` |",
        f"| report | [{report.name}]({report.as_uri()}), `{report}` |",
        f"| MLflow | [run]({link}) |",
    ]
    return "\n".join(lines)


def _profile(here: Path) -> str:
    return str(read_yaml(here / "params.yaml").get("profile", "default"))


def _setting(
    here: Path, invocation: str, force: bool, workers: int | None, device: str, settings: Operation
) -> Setting:
    """Return what the stages of a run share."""
    elsewhere = "://" in (settings.cluster or "")
    chosen = workers or settings.workers
    total = chosen if chosen or elsewhere else _default_workers()
    gpus = _gpus(settings, device)
    return Setting(
        root=str(here.absolute()),
        home=str(records.home()),
        invocation=invocation,
        force=force,
        timeout=settings.timeout,
        cores=None if total is None else max(1, (os.cpu_count() or 1) // total),
        slots=Slots(str(records.home() / "slots"), total, {"gpu": len(gpus)} if gpus else {}),
        gpus=gpus,
    )


def _default_workers() -> int:
    return min(4, os.cpu_count() or 1)


def _gpus(settings: Operation, name: str) -> tuple[str | None, ...]:
    """Return the GPUs that stages share, as values of CUDA_VISIBLE_DEVICES; without a GPU none.

    Raises:
        UserError: params.yaml names a device that does not exist, or one device beside a list of them.
    """
    if name == "cpu":
        return ()
    if settings.gpus is not None and name.startswith("cuda:"):
        raise UserError(
            f"params.yaml: device is {name!r} and operation.gpus is {list(settings.gpus)}; "
            "expected one of them: set device to cuda, or operation.gpus to null."
        )
    numbers = settings.gpus
    if numbers is None:
        found = resolve(name)
        if found.type != "cuda":
            return ()
        if found.index is not None:
            return (None,)
        import torch

        numbers = tuple(range(torch.cuda.device_count()))
    visible = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return tuple(visible[number] if number < len(visible) else str(number) for number in numbers)


def run(
    root: Path,
    targets: Sequence[str] = (),
    force: bool = False,
    workers: int | None = None,
    device: str = "auto",
) -> State[Any]:
    """Run the flow on a prepared workspace with tracking, and return its state.

    Args:
        root: Folder of the workspace.
        targets: Stages to run with their dependencies; all by default.
        force: Whether to run stages that have not changed.
        workers: Maximum number of parallel stages; by default that of params.yaml.
        device: Device of params.yaml.

    Raises:
        UserError: Stages cannot run on the cluster or the devices that params.yaml names.
    """
    settings = operation.read(root / "params.yaml")
    _gpus(settings, device)
    for logger in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(logger).addFilter(_without_traceback)
    tasks: Any = ThreadPoolTaskRunner()
    if settings.cluster:
        clusters.check(settings.cluster)
        tasks = clusters.task_runner(settings.cluster, workers or settings.workers or _default_workers())
    name = f"{_profile(root)} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    named = pipeline.with_options(flow_run_name=name, task_runner=tasks)
    with temporary_settings({PREFECT_API_URL: _server_of(settings.cluster)}):
        state: State[Any] = named(str(root), list(targets), force, workers, device, return_state=True)
    return state


def _server_of(cluster: str | None) -> str | None:
    """Return the address of Prefect's server; for a cluster, whose workers would start their own, start one.

    Raises:
        UserError: There is an address, and no server answers there.
    """
    known: str | None = PREFECT_API_URL.value()
    if known:
        _check_server(known, "make flow")
    if known or cluster is None:
        return known
    server = SubprocessASGIServer()
    server.start()  # it stops when this process exits, after Prefect's threads have sent their last messages
    return server.api_url


@flow(name="flowmatch-retrain", flow_run_name="retrain-{profile}", persist_result=False)
def retrain(root: str = ".", profile: str = "default") -> State[Any]:
    """Run the pipeline on the project's current files, in a separate folder; this is the scheduled flow.

    Args:
        root: Folder of the project.
        profile: Name of the profile.
    """
    from pipelines.orchestration import preflight

    project = Path(root).absolute()
    os.environ.setdefault("FLOWMATCH_HOME", str(project / ".flowmatch"))
    os.chdir(project)
    try:
        with workspace.held(project, profile, apart=True) as here:
            settings = params.load(here / "params.yaml")
            preflight.check(settings)
            state = run(here, device=settings.device)
            if not state.is_completed():
                results.write_partial(here, records.invocation())
                return Failed(message=state.message)
            open_question = promote(here, settings.operation)
    except UserError as error:
        notify = operation.read(project / "params.yaml").notify
        notices.report(notify, profile, str(error), "No stage was started.")
        return Failed(message=str(error))
    if open_question:
        notices.report(settings.operation.notify, profile, open_question, "See `make promote`.")
        return Failed(message=open_question)
    return Completed()


def promote(here: Path, settings: Operation) -> str | None:
    """Decide the champions of the models that a run trained, and show the decisions as a table.

    Args:
        here: Folder of the run.
        settings: The section `operation`.

    Returns:
        What the operator has to decide, as one sentence; None if nothing.
    """
    if not settings.promote.enabled:
        return None
    try:
        decisions = promotion.decide_apart(here, records.invocation())
    except UserError as error:
        return f"every stage is up to date, but the champions are not decided: {error}"
    if decisions:
        rows = [decision.row() for decision in decisions]
        create_table_artifact(key="promotion", table=rows, description="Champion of each model that was trained")
    undecided = [f"{decision.model}: {decision.reason}" for decision in decisions if decision.outcome == "undecided"]
    return f"every stage is up to date, but {'; '.join(undecided)}." if undecided else None


def serve(root: Path, profile: str, cron: str, timezone: str) -> bool:
    """Run `retrain` on a schedule until stopped.

    A run that is due while another one runs is cancelled: the next one does the same work.

    Raises:
        UserError: No Prefect server answers.
    """
    _check_server(os.environ.get("PREFECT_API_URL", ""), "make serve")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Prefect pauses the schedule when it is interrupted
    with suppress(KeyboardInterrupt):
        retrain.serve(
            name=profile,
            schedule=Cron(cron, timezone=timezone),
            parameters={"root": str(root), "profile": profile},
            description="Run the pipeline on the project's current files, in a separate folder.",
            global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            limit=2,  # a second one is taken from the queue only to be cancelled by the limit above
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    return True


def _check_server(address: str, command: str) -> None:
    """Raise an error if no Prefect server answers at an address; without one the command starts its own."""
    import httpx

    try:
        httpx.get(f"{address}/health", timeout=10.0).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL):
        raise UserError(
            f"no Prefect server answers at PREFECT_API_URL={redact(address)!r}; start it (`prefect server start`), "
            f"or unset PREFECT_API_URL, and `{command}` starts one."
        ) from None


def _without_traceback(record: logging.LogRecord) -> bool:
    """Remove the traceback of a failed stage from a log record, because Prefect's frames do not help its reader."""
    if record.exc_info and isinstance(record.exc_info[1], StageFailed | None):  # None: it returned its failed state
        record.exc_info = None
    return True


def _run(**given: Any) -> bool:
    return run(**given).is_completed()


def main(what: str, arguments: str) -> int:
    """Run a command of this module and return its exit status."""
    given = json.loads(arguments)
    given["root"] = Path(given["root"])
    commands: dict[str, Callable[..., bool]] = {"run": _run, "serve": serve}
    runner.raise_on_signals()
    try:
        return 0 if commands[what](**given) else 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except runner.Stopped as stopped:
        return stopped.status


if __name__ == "__main__":
    from pipelines.orchestration import prefect  # by its name, under which other processes find its tasks

    sys.exit(prefect.main(*sys.argv[1:]))
