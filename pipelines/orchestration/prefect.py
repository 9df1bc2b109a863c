"""Run DVC's graph as a Prefect flow: Prefect schedules and retries stages, DVC decides which run and caches results.

It runs in its own process (`python -m pipelines.orchestration.prefect run '{"root": "."}'`) with the variables of
`runner.environment`, because Prefect reads its settings when it is imported, and because its server must not receive
the Ctrl-C before the flow has reported it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed

from pipelines.base.device import resolve
from pipelines.base.errors import UserError
from pipelines.config import params as parameters
from pipelines.orchestration import promotion, runner, workspace
from pipelines.orchestration.runner import StageFailed, StageResult
from pipelines.runs import graph, live, records
from pipelines.runs.graph import Node

_STATES = {"ran": "Completed", "restored": "RestoredFromRunCache", "unchanged": "Unchanged"}


class Slots:
    """Limits on the number of stages that run at once: in total, and for each tag such as `gpu`."""

    def __init__(self, total: int, tagged: Mapping[str, int]) -> None:
        self._total = threading.Semaphore(total)
        self._tagged = {tag: threading.Semaphore(count) for tag, count in tagged.items()}

    @asynccontextmanager
    async def taken(self, tags: Sequence[str]) -> AsyncIterator[None]:
        """Hold slots; acquire tagged slots before the general one, to avoid holding it while waiting."""
        async with AsyncExitStack() as stack:
            for slot in (*(self._tagged[tag] for tag in sorted(tags) if tag in self._tagged), self._total):
                while not slot.acquire(blocking=False):  # each task has its own thread and event loop
                    await asyncio.sleep(0.2)
                stack.callback(slot.release)
            yield


class Tally:
    """A counter of the stages that are up to date."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._lock = total, 0, threading.Lock()

    def add(self) -> None:
        """Count one more stage."""
        with self._lock:
            self._done += 1

    def __str__(self) -> str:
        return f"{self._done} of {self._total} stages are up to date"


def should_retry(task: object, run: object, state: object) -> bool:
    """Return whether to retry a failed stage; a stage that was stopped is not retried."""
    return not runner.STOPPING.is_set()


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=should_retry)
async def dvc_stage(
    node: Node,
    root: Path,
    changed: bool,
    force: bool,
    upstream: list[StageResult],
    slots: Slots,
    tally: Tally,
    env: dict[str, str],
) -> State[StageResult]:
    """Bring one stage up to date, without a process if neither it nor a stage before it has changed."""
    result = StageResult(node.name, "unchanged", 0.0)
    if changed or force or any(before.how != "unchanged" for before in upstream):
        timeout = node.hints.get("timeout_seconds")
        log = get_run_logger().info
        async with slots.taken(node.hints.get("tags", [])):
            result = await runner.run_stage(node.name, root, force=force, timeout=timeout, env=env, log=log)
    tally.add()
    if result.how != "unchanged":
        get_run_logger().info(f"{node.name} {result.how}; {tally}")
    return Completed(name=_STATES[result.how], data=result)


@flow(name="flowmatch", validate_parameters=False, persist_result=False)
def pipeline(
    root: Path, targets: Sequence[str], force: bool, slots: Slots, env: dict[str, str]
) -> State[list[dict[str, Any]]]:
    """Run every stage as a task that waits for its dependencies, and create a table of the results."""
    changed = graph.dirty(root)
    futures: dict[str, PrefectFuture[Any]] = {}
    nodes = graph.load(root, targets)
    tally = Tally(len(nodes))
    try:
        for node in nodes.values():
            configured = dvc_stage.with_options(
                name=node.name,
                task_run_name=node.name,
                tags=node.hints.get("tags", []),
                retries=node.hints.get("retries", 0),
                retry_delay_seconds=node.hints.get("retry_delay_seconds", 5),
            )
            upstream: Any = [futures[dep] for dep in node.deps]
            futures[node.name] = configured.submit(node, root, node.name in changed, force, upstream, slots, tally, env)
        rows = [_row(name, future) for name, future in futures.items()]
    except BaseException:
        runner.stop_all()
        raise
    create_table_artifact(key="stages", table=rows, description="Result of each stage")
    bad = [row["stage"] for row in rows if row["seconds"] is None]
    if bad:
        return Failed(message=f"{', '.join(bad)} not up to date", data=rows)
    return Completed(data=rows)


def _row(name: str, future: PrefectFuture[Any]) -> dict[str, Any]:
    future.wait()
    state = future.state
    if state.is_completed():
        return {
            "stage": name,
            "state": state.name,
            "seconds": round(state.result().seconds, 1),
            "message": "",
        }
    return {"stage": name, "state": state.name, "seconds": None, "message": state.message or ""}


def run(
    root: Path,
    targets: Sequence[str] = (),
    force: bool = False,
    workers: int | None = None,
    device: str = "auto",
) -> bool:
    """Run the flow on a prepared workspace with tracking; return whether every stage is up to date.

    Args:
        root: Folder of the workspace.
        targets: Stages to run with their dependencies; all by default.
        force: Whether to run stages that have not changed.
        workers: Maximum number of parallel stages; by default the number of cores, at most 4.
        device: Device of params.yaml; one stage at a time uses a GPU, several share a CPU.
    """
    invocation = records.invocation()
    tagged = {"gpu": 1} if resolve(device).type == "cuda" else {}
    slots = Slots(workers or min(4, os.cpu_count() or 1), tagged)
    for name in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(name).addFilter(_without_traceback)
    with live.live(root, invocation) as outcome:
        env = runner.environment(invocation)
        state: State[Any] = pipeline(root, targets, force, slots, env, return_state=True)
        outcome.status = "FINISHED" if state.is_completed() else "FAILED"
    return state.is_completed()


@flow(name="flowmatch-retrain")
def retrain(root: Path, profile: str) -> None:
    """Run the pipeline on the project's current files, in a separate folder; this is the scheduled flow."""
    runner.raise_on_signals()
    with workspace.held(root, profile, apart=True) as here:
        complete = run(here, device=parameters.load(here / "params.yaml").device)
    if not complete:
        raise StageFailed("a stage failed; see the table of stages.")
    open_question = promote(here)
    if open_question:
        raise StageFailed(open_question)


def promote(here: Path) -> str | None:
    """Decide the champions of the models that a run trained, and show the decisions as a table.

    Args:
        here: Folder of the run.

    Returns:
        What the operator has to decide, as one sentence; None if nothing.
    """
    if not parameters.load(here / "params.yaml").operation.promote.enabled:
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


def serve(root: Path, profile: str, cron: str) -> bool:
    """Run `retrain` on a schedule until stopped.

    Raises:
        UserError: There is no Prefect server to store the schedule.
    """
    import httpx

    server = os.environ.get("PREFECT_API_URL", "")
    try:
        httpx.get(f"{server}/health", timeout=10.0).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL):
        raise UserError(
            f"no Prefect server answers at PREFECT_API_URL={server!r}, and a schedule needs one; "
            "run `prefect server start` in another terminal and set PREFECT_API_URL=http://127.0.0.1:4200/api."
        ) from None
    arguments = {"root": str(root), "profile": profile}
    retrain.serve(name=f"retrain-{profile}", cron=cron, parameters=arguments, limit=1)
    return True


def _without_traceback(record: logging.LogRecord) -> bool:
    """Remove the traceback of a failed stage from a log record, because Prefect's frames do not help its reader."""
    if record.exc_info and isinstance(record.exc_info[1], StageFailed):
        record.exc_info = None
    return True


def _main(what: str, arguments: str) -> int:
    given = json.loads(arguments)
    given["root"] = Path(given["root"])
    commands: dict[str, Callable[..., bool]] = {"run": run, "serve": serve}
    runner.raise_on_signals()
    try:
        return 0 if commands[what](**given) else 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except runner.Stopped as stopped:
        return stopped.status


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
