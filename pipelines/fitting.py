"""What the two training stages share: seeds side by side, their models, curves and timing as outputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines import checkpoints, models, store, training
from pipelines.params import Fit
from pipelines.seeds import side_by_side
from pipelines.stage import DATA, Stage, derived_seed
from pipelines.training import Progress


@dataclass(frozen=True)
class Task:
    """A network to be trained, the terms of its loss, and what is stored beside its weights.

    `seek` takes data that are read in an order to the place of a step, when training begins or goes on. `memory` is
    what the terms carry from step to step, apart from the network.
    """

    network: nn.Module
    terms: training.Step
    loc: Tensor
    scale: Tensor
    meta: Mapping[str, Any]
    seek: Callable[[int], None] = lambda step: None
    memory: nn.Module | None = None


class Job(Protocol):
    """Makes the task of one seed in the process that trains it, so it is picklable; torch's generator is seeded."""

    def __call__(self, device: torch.device) -> Task: ...


def fit_seeds(
    stage: Stage,
    data: str,
    method: str,
    job: Job,
    fit: Fit,
    seeds: tuple[int, ...],
    config: Mapping[str, Any],
    inputs: list[Path],
) -> None:
    """Train one network a seed and write `data/models/<data>/<method>/` and `data/logs/<data>/<method>.*`.

    Arguments:
        config, inputs: all that decides the result; a checkpoint of anything else is not resumed.
    """
    device = training.device(stage.params.device)
    config = {
        **config,
        "fit": fit.model_dump(mode="json"),
        "seed": stage.params.seed,
        "device": str(device),
        "threads": stage.params.threads,
    }
    state = checkpoints.folder(stage.name, config, inputs)
    stage.log(f"seeds {list(seeds)} on {device}; checkpoints in {state}")
    stage.record.params(config)
    work = partial(_fit_one, data=data, base=stage.params.seed, job=job, fit=fit, device=str(device), state=state)
    report = _reporter(stage, seeds)
    processes = None if device.type == "cpu" else 1
    summaries = side_by_side(work, seeds, report, processes, stage.params.threads)
    with stage.output(DATA / "models" / data / method) as folder:
        folder.mkdir()
        for seed in seeds:
            shutil.copy(state / f"seed{seed}.safetensors", folder)
    stage.record.artifact(DATA / "models" / data / method)
    stage.record.tag("flowmatch.model", f"{data}.{method}")  # the tracker registers it under this name
    _write_logs(stage, DATA / "logs" / data / method, dict(zip(seeds, summaries, strict=True)))
    checkpoints.clear(stage.name)


def _fit_one(
    seed: int,
    tell: Callable[[Progress], None],
    *,
    data: str,
    base: int,
    job: Job,
    fit: Fit,
    device: str,
    state: Path,
) -> dict[str, Any]:
    model, summary = state / f"seed{seed}.safetensors", state / f"seed{seed}.json"
    if not summary.exists():
        # The method is not part of the keys: all methods start from the same weights.
        torch.manual_seed(derived_seed(base, "weights", data, seed))
        task = job(torch.device(device))
        generator = torch.Generator(device).manual_seed(derived_seed(base, "batches", data, seed))
        checkpoint = state / f"seed{seed}.checkpoint"
        trained = training.train(task.network, task.terms, fit, generator, checkpoint, tell, task.seek, task.memory)
        models.save(model, trained.network, task.loc, task.scale, {**task.meta, "seed": seed})
        store.write_json(summary, {"curve": trained.curve, "seconds": trained.seconds})
    result: dict[str, Any] = store.read_json(summary)
    return result


def _reporter(stage: Stage, seeds: tuple[int, ...]) -> Callable[[int, Progress], None]:
    """Every row goes to the record, a line every two seconds and the last one to the log."""
    last = dict.fromkeys(seeds, 0.0)

    def report(seed: int, row: Progress) -> None:
        stage.record.series(row.step, {store.seed_key(name, seed): value for name, value in row.terms.items()})
        if row.seconds - last[seed] >= training.LINE_SECONDS or row.step == row.steps:
            last[seed] = row.seconds
            stage.log(f"seed {seed}  {row}")

    return report


def _write_logs(stage: Stage, path: Path, summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """The loss curve (mean over seeds, then each seed) as CSV, its end as JSON; the time goes to the record alone."""
    import pandas as pd

    tables = {seed: pd.DataFrame(summary["curve"]).set_index("step") for seed, summary in summaries.items()}
    mean = pd.concat(tables).groupby(level="step").mean()
    curve = mean.join([table.add_suffix(store.seed_key("", seed)) for seed, table in tables.items()])
    with stage.output(path.with_suffix(".csv")) as temporary:
        curve.to_csv(temporary, float_format="%.6g")
    end = curve.iloc[-max(1, len(curve) // 10) :].mean()
    final = {f"final_{name}": float(value) for name, value in end.items()}
    with stage.output(path.with_suffix(".json")) as temporary:
        store.write_json(temporary, final)
    seconds = [summary["seconds"] for summary in summaries.values()]
    stage.metrics({**final, "seconds": sum(seconds) / len(seconds)})
    stage.metrics({"steps_per_second": int(curve.index[-1]) * len(seconds) / sum(seconds)})
