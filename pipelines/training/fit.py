"""Train one network per seed in parallel, and write models, loss curves and timing."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowmatch_core.marginals import Marginals
from pipelines.base import device, files, layout, metric_keys, ranks, workers
from pipelines.base.seeding import derived_seed
from pipelines.config.params import Fit
from pipelines.models import saved
from pipelines.runs import records
from pipelines.runs.context import Stage
from pipelines.runs.records import Cell, CellKey
from pipelines.training import checkpoints, distributed, loop
from pipelines.training.loop import Progress

if TYPE_CHECKING:
    import pandas as pd


VALIDATIONS = {"val_loss": "val/loss", "tune_val_loss": "val/tune_loss"}
"""Names of validation losses in the record of a run."""


@dataclass(frozen=True)
class Tuning:
    """The second phase of a training.

    Attributes:
        terms: Function that returns the terms of the loss at a step.
        fit: Training settings of the phase.
        validation: Checks by which the network is chosen, the first one before the first step.
        seek: Moves data that are read in order to a step.
    """

    terms: loop.Step
    fit: Fit
    validation: loop.Validation
    seek: Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """A network to train, the terms of its loss, and the description stored with its weights.

    Attributes:
        network: Network on its training device.
        terms: Function that returns the terms of the loss at a step.
        loc: Mean of the data, `(columns,)`.
        scale: Standard deviation of the data, `(columns,)`.
        meta: Description that rebuilds the network.
        seek: Moves data that are read in order to a step, when training begins or resumes.
        memory: State that the terms carry between steps, apart from the network.
        validation: Checks by which the network is chosen.
        marginals: Transforms of the columns before the standardisation.
        whitening: Matrix that the standardised rows are multiplied by.
        tuning: Second phase of the training.
    """

    network: nn.Module
    terms: loop.Step
    loc: Tensor
    scale: Tensor
    meta: Mapping[str, Any]
    seek: Callable[[int], None] = lambda step: None
    memory: nn.Module | None = None
    validation: loop.Validation | None = None
    marginals: Marginals | None = None
    whitening: Tensor | None = None
    tuning: Tuning | None = None

    def train(
        self, fit: Fit, generator: torch.Generator, checkpoint: Path, report: Callable[[Progress], None]
    ) -> loop.Trained:
        """Train the network in one phase or two; see `loop.train` and `loop.tuned`."""
        first = loop.train(
            self.network, self.terms, fit, generator, checkpoint, report, self.seek, self.memory, self.validation
        )
        second = self.tuning
        if second is None:
            return first

        def train_on(network: nn.Module, told: Callable[[Progress], None]) -> loop.Trained:
            file = checkpoints.of_tuning(checkpoint)
            return loop.train(
                network, second.terms, second.fit, generator, file, told, second.seek, validation=second.validation
            )

        return loop.tuned(first, train_on, report)


@dataclass(frozen=True)
class Fitted:
    """A model that is fitted without gradient steps, in the place of a `Task`.

    Attributes:
        network: Fitted model.
        losses: Its losses by name, `loss` and `val_loss`.
        seconds: Time of the fit.
        loc: Mean of the data, `(columns,)`.
        scale: Standard deviation of the data, `(columns,)`.
        meta: Description that rebuilds the model.
        marginals: Transforms of the columns before the standardisation.
        whitening: Matrix that the standardised rows are multiplied by.
    """

    network: nn.Module
    losses: Mapping[str, float]
    seconds: float
    loc: Tensor
    scale: Tensor
    meta: Mapping[str, Any]
    marginals: Marginals | None = None
    whitening: Tensor | None = None

    def train(
        self, fit: Fit, generator: torch.Generator, checkpoint: Path, report: Callable[[Progress], None]
    ) -> loop.Trained:
        """Report the fit as a training of one step."""
        report(Progress(1, 1, self.losses, 1 / self.seconds, self.seconds))
        return loop.Trained(self.network, [{"step": 1, **self.losses}], self.seconds)


@dataclass(frozen=True)
class Job(ABC):
    """A training job, picklable because each seed may have its own process.

    Attributes:
        data: Data set or environment.
        method: Name of the method in `params.yaml`.
        fit: Training settings.
    """

    data: str
    method: str
    fit: Fit

    @property
    def quick(self) -> bool:
        """Whether a seed takes no longer than the start of a process of its own."""
        return False

    @abstractmethod
    def task(self, device: torch.device) -> Task | Fitted:
        """Create the task of one seed, or fit its model, with torch's global generator seeded."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what determines the result besides `fit`; a checkpoint of another configuration is not resumed."""

    @abstractmethod
    def inputs(self) -> list[Path]:
        """Return the files that determine the result; a checkpoint of other contents is not resumed."""


def fit_seeds(stage: Stage, job: Job, seeds: tuple[int, ...]) -> None:
    """Train one network per seed, and write the models, the loss curve and the final losses of the method."""
    chosen = device.resolve(stage.params.device)
    config = {
        **job.config(),
        "fit": job.fit.model_dump(mode="json"),
        "seed": stage.params.seed,
        "device": str(chosen),
        "threads": stage.params.threads,
    }
    state = checkpoints.folder(stage.name, config, job.inputs())
    stage.record.tag("device", str(chosen))
    settings = {key: value for key, value in config.items() if key not in ("seed", "device")}
    stage.record.params({**settings, "processes": ranks.world()})
    data = job.inputs()[0].parent
    stage.record.data(job.data, "training", data, files.read_json(layout.provenance(data)))
    own = {key: value for key, value in settings.items() if key not in ("dataset", "environment")}  # the cell's data
    # The prefix puts them after data, method and seed in MLflow's comparison, which shows the first that differ.
    stage.record.cells([Cell(job.data, job.method, seed, records.flat(own, "train.")) for seed in seeds])
    with distributed.group(chosen):
        if ranks.is_first():
            checkpoints.enter(state, stage.record.invocation, records.forced())
        distributed.agree("params.yaml, code or data", [int(state.name, 16) % 2**48], chosen)
        summaries = {seed: kept for seed in seeds if (kept := checkpoints.finished(state, seed)) is not None}
        missing = [seed for seed in seeds if seed not in summaries]
        distributed.agree("the finished seeds", [seed in summaries for seed in seeds], chosen)
        if summaries:
            stage.log(f"seeds {list(summaries)} are finished; their networks are in {state}")
        stage.log(f"seeds {missing} on {chosen}; checkpoints in {state}")
        work = partial(_fit_one, base=stage.params.seed, job=job, device=str(chosen), state=state)
        alone = job.quick or chosen.type != "cpu" or ranks.world() > 1
        trained = workers.side_by_side(
            work,
            missing,
            _reporter(stage, job, seeds),
            processes=1 if alone else workers.limit(stage.params.threads),
            threads=stage.params.threads,
            label="seed {}",
        )
    if not ranks.is_first():
        return
    summaries |= dict(zip(missing, trained, strict=True))
    for seed, summary in summaries.items():
        if summary["chosen_step"] is not None:
            done = summary["curve"][-1]["step"]
            stage.log(f"seed {seed}: the network of step {summary['chosen_step']} is kept, after {done} steps")
    models = layout.models(job.data, job.method)
    with stage.output(models) as folder:
        folder.mkdir()
        for seed in seeds:
            shutil.copy(layout.network(state, seed), folder)
    stage.record.artifact(models)
    stage.record.tag("flowmatch.model", f"{job.data}.{job.method}")  # name in the model registry
    _write_logs(stage, job, {seed: summaries[seed] for seed in seeds})
    checkpoints.settle(state)


def _fit_one(
    seed: int, report: Callable[[Progress], None], *, base: int, job: Job, device: str, state: Path
) -> dict[str, Any]:
    # The keys do not contain the method, so all methods start from the same weights.
    torch.manual_seed(derived_seed(base, "weights", job.data, seed))
    task = job.task(torch.device(device))
    generator = torch.Generator(device).manual_seed(derived_seed(base, "batches", job.data, seed))
    checkpoint = checkpoints.of_seed(state, seed)
    trained = task.train(job.fit, generator, checkpoint, report)
    summary: dict[str, Any] = {"curve": trained.curve, "seconds": trained.seconds, "chosen_step": trained.chosen_step}
    if ranks.is_first():
        meta = {**task.meta, "seed": seed, "chosen_step": trained.chosen_step}
        file = layout.network(state, seed)
        saved.save(file, trained.network, task.loc, task.scale, meta, task.marginals, task.whitening)
        summary = checkpoints.finish(state, seed, summary)
    return summary


def _reporter(stage: Stage, job: Job, seeds: tuple[int, ...]) -> Callable[[int, Progress], None]:
    """Return a reporter that records every row, and logs one every two seconds and the last one."""
    last = dict.fromkeys(seeds, 0.0)

    def report(seed: int, row: Progress) -> None:
        terms = {VALIDATIONS.get(name, f"train/{name}"): value for name, value in row.terms.items()}
        stage.record.series(row.step, terms, CellKey(job.data, job.method, seed))
        if row.seconds - last[seed] >= loop.LINE_SECONDS or row.step == row.steps:
            last[seed] = row.seconds
            stage.log(f"seed {seed}  {row}")

    return report


def _write_logs(stage: Stage, job: Job, summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the loss curve (mean over seeds, then each seed) and the final losses; times go only to the record."""
    import pandas as pd

    tables = {seed: pd.DataFrame(summary["curve"]).set_index("step") for seed, summary in summaries.items()}
    mean = pd.concat(tables).groupby(level="step").mean()
    curve = mean.join([table.add_suffix(metric_keys.seed_key("", seed)) for seed, table in tables.items()])
    with stage.output(layout.curve(job.data, job.method)) as temporary:
        curve.to_csv(temporary, float_format="%.6g")
    final = {seed: _final(tables[seed], summary["chosen_step"]) for seed, summary in summaries.items()}
    means = {str(name): float(value) for name, value in pd.DataFrame(final).mean(axis=1).items()}
    each = {metric_keys.seed_key(name, seed): value for seed, values in final.items() for name, value in values.items()}
    with stage.output(layout.final_losses(job.data, job.method)) as temporary:
        files.write_json(temporary, {**means, **each})
    stage.record.cells([_cell(job, seed, tables[seed], summaries[seed], final[seed]) for seed in summaries])


def _cell(job: Job, seed: int, curve: pd.DataFrame, summary: Mapping[str, Any], final: Mapping[str, float]) -> Cell:
    """Return the numbers of the training of one seed."""
    seconds = summary["seconds"]
    metrics = {f"train/{name}": value for name, value in final.items()}
    metrics |= {"train/seconds": seconds, "train/steps_per_second": int(curve.index[-1]) / seconds}
    model = files.md5(layout.network(layout.models(job.data, job.method), seed))
    return Cell(job.data, job.method, seed, metrics=metrics, model=model, trained=True)


def _final(curve: pd.DataFrame, chosen_step: int | None) -> dict[str, float]:
    """Return the means over the last tenth of a curve or of each phase, and the step of the network, if chosen."""
    tuned = curve["tune_loss"].notna() if "tune_loss" in curve else curve.index < 0
    phases = [phase for phase in (curve[~tuned], curve[tuned]) if len(phase)]
    ends = [phase.iloc[-max(1, len(phase) // 10) :].mean().dropna() for phase in phases]
    final = {f"final_{name}": float(value) for end in ends for name, value in end.items()}
    return final if chosen_step is None else {**final, "chosen_step": chosen_step}
