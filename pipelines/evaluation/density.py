"""Score every density model of a data set on its rows, with the sampling floor of each distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowmatch_core import metrics
from pipelines import datasets
from pipelines.base import device, files, layout, metric_keys, seeding
from pipelines.config.params import DensityEvaluation, Params
from pipelines.evaluation import cells, tilt
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.density_sampling import draw_at, sampler
from pipelines.evaluation.likelihood import likelihoods, mixture
from pipelines.evaluation.rows import Array, Moments, Prepared, Rows, conditions, rng_of
from pipelines.evaluation.tilt import Tilt
from pipelines.models import density, saved
from pipelines.runs import records
from pipelines.runs.context import Stage

DEGENERATE = "columns are linear functions of one another, so that the density has no limit and an NLL says little."

DRAWS = 20_000  # values for the constant of a tilt

LEAST = 0.01  # difference of log-densities in nats that rounding may make

MIXTURES = ("gaussian_mixture", "large_mixture")
"""Losses of mixtures of Gaussians, with which the other densities are compared by row."""

TRAINED = (density.FLOW, density.NORMALIZING, density.COMPONENTS)
"""Kinds of models whose seeds are worth a mixture; the others have a closed form."""


class Scored(NamedTuple):
    """What one model scores.

    Attributes:
        numbers: Metrics by name.
        log_prob: Log-densities of the rows by part.
        warning: Sentence, where the error of the solver is too large or it failed.
    """

    numbers: dict[str, Any]
    log_prob: dict[str, Array]
    warning: str | None


class Reference(NamedTuple):
    """The mixture of Gaussians that the other densities of a data set are compared with.

    Attributes:
        method: Its method.
        log_prob: Log-densities of the test rows.
    """

    method: str
    log_prob: Array


@final
@dataclass(frozen=True)
class Scorer:
    """The scores of the models of a data set.

    Attributes:
        params: Contents of params.yaml.
        dataset: Name of the data set.
        device: Device of the models.
        prepared: The prepared data set.
        scored: Rows whose likelihood is computed, by part.
        moments: Moments of the training rows, which are the units of the distances.
        test: Test rows of the distances.
        other: Validation rows of their floor, whose conditions the samples have.
    """

    params: Params
    dataset: str
    device: torch.device
    prepared: Prepared
    scored: dict[str, Rows]
    moments: Moments
    test: Rows
    other: Rows

    @classmethod
    def of(cls, params: Params, dataset: str, chosen: torch.device) -> Scorer:
        """Read the rows of a data set."""
        settings, prepared = _settings(params, dataset), Prepared.read(layout.prepared(dataset))
        test, val = prepared.part("test"), prepared.part("val")
        scored = {"test": _some(test, settings.likelihood_rows, rng_of(params, dataset, "test"))}
        others = [limit for limit in (settings.likelihood_rows, settings.other_rows) if limit is not None]
        scored["val"] = _some(val, min(others, default=None), rng_of(params, dataset, "val"))
        count = min([len(scored["test"]), *others])
        scored["train"], moments = prepared.training(count, rng_of(params, dataset, "train"))
        samples = params.density.sample_for(params.datasets[dataset]).samples
        size = min(settings.rows, samples, len(test), len(val))
        drawn = (
            test.draw(size, rng_of(params, dataset, "distances")),
            conditions(params, dataset, val).take(slice(size)),
        )
        return cls(params, dataset, chosen, prepared, scored, moments, *drawn)

    def __call__(self, cell: Cell, send: Callable[[str], None]) -> Scored:
        """Return the scores of a model; send them, and progress where it takes long, as lines."""
        method, seed = cell
        file = layout.network(layout.models(self.dataset, method), seed)
        found = likelihoods(file, self.scored, _settings(self.params, self.dataset), self.device, f"{cell}: ", send)
        warning = found["test"].warning
        if warning is not None:
            send(f"{cell}: {warning}")
        log_prob = {part: one.log_prob for part, one in found.items()}
        numbers = {**self.nll(log_prob), "nll_solver_error": float(np.sqrt((found["test"].error ** 2).mean()))}
        numbers |= {"nfe": found["test"].nfe, "parameters": density.parameters(file)}
        numbers |= self.distances(self.in_turn([self.samples(cell)]))
        numbers |= self._over_own_mixture(file, log_prob["test"])
        if (step := saved.meta(file).get("chosen_step")) is not None:
            numbers["chosen_step"] = step
        send("  ".join([str(cell), *(f"{name} {value:.5g}" for name, value in numbers.items())]))
        return Scored({"method": method, "seed": seed, **numbers}, log_prob, warning)

    def nll(self, log_prob: Mapping[str, Array]) -> dict[str, float]:
        """Return the negative log-likelihoods of the parts with their standard errors."""
        numbers = {}
        for part, values in log_prob.items():
            name = "nll" if part == "test" else f"nll_{part}"
            numbers[name], numbers[f"{name}_standard_error"] = self.scored[part].mean(-values)
        return numbers

    def _over_own_mixture(self, file: Path, log_prob: Array) -> dict[str, float]:
        """Return the gain of a flow inside the components of a mixture over that mixture, by test row."""
        found = mixture(file, self.scored["test"], self.device)
        if found is None:
            return {}
        gain, error = self.scored["test"].mean(log_prob - found[0])
        return {"mixture_gain": gain, "mixture_gain_standard_error": error, "mixture_covered": found[1]}

    def samples(self, cell: Cell) -> Rows:
        """Return the samples of a model."""
        seed = metric_keys.free("seed", [*self.prepared.columns, *self.prepared.conditions.names])
        names = [*self.prepared.columns, *self.prepared.conditions.names, seed]
        table = files.read_table(layout.sampled(layout.samples(self.dataset), cell.method), names)
        return self.prepared.rows(table[table[seed] == cell.seed])

    def draws(self, members: Sequence[Cell]) -> Array:
        """Return values drawn from some models in equal parts: more than the distances take, `DRAWS` together."""
        generator = seeding.generator(self.params.seed, "draws", self.dataset, device=self.device)
        count, val = math.ceil(DRAWS / len(members)), self.prepared.part("val")
        at = val.take(rng_of(self.params, self.dataset, "draws").integers(len(val), size=count))
        with torch.no_grad():
            found = [draw_at(sampler(self.params, self.dataset, cell, self.device), at, generator) for cell in members]
        return torch.cat(found).double().cpu().numpy()

    def in_turn(self, samples: Sequence[Rows]) -> Rows:
        """Return as many samples as the distances take, from each model in turn."""
        turn = np.arange(len(self.test))
        x = np.stack([rows.x[: len(turn)] for rows in samples])[turn % len(samples), turn]
        return replace(samples[0].take(slice(len(turn))), x=x)  # the conditions are the same for all models

    @cached_property
    def tilt(self) -> Tilt | None:
        """Return the ratio of the population to the weights of the training rows, or None if these restore it."""
        power = self.prepared.provenance["weight_power"]
        if power == 1:
            return None
        total = self.prepared.provenance["rows"]["train"]
        rows, _ = self.prepared.training(total, rng_of(self.params, self.dataset, "tilt"))
        seed = seeding.derived_seed(self.params.seed, "tilt", self.dataset)
        return tilt.fit(rows, power, seed)

    def distances(self, rows: Rows) -> dict[str, float]:
        """Return the distances of rows to the test rows.

        Those in standardised units are between pairs of values and condition vectors; the raw one is of values alone.
        """
        generator = seeding.generator(self.params.seed, "evaluate", self.dataset)
        x, y = (self._standardised(part) for part in (rows, self.test))
        raw, true = (torch.from_numpy(part.x - self.moments.loc) for part in (rows, self.test))
        projections = _settings(self.params, self.dataset).projections
        return {
            "emd": float(metrics.emd(x, y)),
            "emd_raw": float(metrics.emd(raw, true)),
            "sliced_wasserstein": float(metrics.sliced_wasserstein(x, y, projections, generator=generator)),
        }

    def _standardised(self, rows: Rows) -> Tensor:
        z = (rows.x - self.moments.loc) / self.moments.scale
        return torch.from_numpy(np.concatenate([z, rows.cond], 1))

    def closed_form(self, density_of: Callable[[Rows], Array | None]) -> dict[str, float]:
        """Return the negative log-likelihoods of the parts under a known density, or nothing if there is none."""
        found = {part: density_of(rows) for part, rows in self.scored.items()}
        known = {part: values for part, values in found.items() if values is not None}
        return self.nll(known) if len(known) == len(found) else {}


def evaluate(stage: Stage, dataset: str) -> None:
    """Score the models of a data set: likelihood with its solver error, and distances with their floors."""
    params, entry = stage.params.density, stage.params.datasets[dataset]
    chosen = device.use(stage.params.device, stage.params.threads)
    scorer = Scorer.of(stage.params, dataset, chosen)
    every = [Cell(method, seed) for method in params.methods_for(entry) for seed in params.seeds_for(entry, method)]
    scores = cells.each(stage, scorer, every, chosen)
    found = pd.DataFrame([one.numbers for one in scores.values()])
    rows = [
        pd.DataFrame({"row": np.arange(len(one.log_prob["test"])), **cell._asdict(), "log_prob": one.log_prob["test"]})
        for cell, one in scores.items()
    ]
    with stage.output(layout.evaluations(dataset)) as folder:
        files.write_table(layout.cells(folder), found)
        files.write_table(layout.log_prob(folder), pd.concat(rows, ignore_index=True))
    summary = _summary(found, scorer, scores)
    settings = entry.settings()
    kind, floor = scorer.prepared.provenance["kind"], scorer.distances(scorer.other)
    floor |= scorer.closed_form(lambda part: datasets.log_prob(kind, settings, part.x))
    summary["floor"] = {**floor}
    gaussian = scorer.closed_form(scorer.moments.log_prob)
    if gaussian:
        summary[metric_keys.REFERENCE] = _with_bits(gaussian, scorer.prepared)
    else:
        summary["floor"]["warnings"] = [DEGENERATE]
    with stage.output(layout.metrics(dataset)) as temporary:
        files.write_json(temporary, summary)
    _record(stage, scorer, [one.numbers for one in scores.values()], floor)


def _summary(found: pd.DataFrame, scorer: Scorer, scores: Mapping[Cell, Scored]) -> dict[str, dict[str, Any]]:
    """Return means over seeds by method, standard deviations if there are several, and mixtures of the seeds."""
    summary: dict[str, dict[str, Any]] = {}
    reference = _reference(scores, scorer)
    for method, group in found.groupby("method", sort=False):
        here = {cell: one for cell, one in scores.items() if cell.method == method}
        own = {name for one in here.values() for name in one.numbers} - {"method", "seed"}  # some have more than others
        numbers = {name: float(group[name].mean()) for name in group.columns if name in own}
        if len(group) > 1:
            numbers |= {f"{name}_std": float(group[name].std()) for name in ("nll", "emd", "sliced_wasserstein")}
            numbers["nll_seed_error"] = numbers["nll_std"] / math.sqrt(len(group))
        summary[str(method)] = {
            **_with_bits(numbers, scorer.prepared),
            **_over_mixture(str(method), _mean(here), scorer, reference),
            "warnings": _warnings(here, numbers, scorer),
        }
        first = layout.network(layout.models(scorer.dataset, str(method)), next(iter(here)).seed)
        if len(here) > 1 and saved.meta(first).get("kind", density.FLOW) in TRAINED:
            summary[f"{method} x{len(here)}"] = _with_bits(_mixture(here, scorer, reference), scorer.prepared)
    for name, row in scorer.params.density.mixtures.items():
        here = {cell: one for cell, one in scores.items() if cell.method in row.methods}
        if {cell.method for cell in here} != set(row.methods):
            continue
        tilted = scorer.tilt if row.tilt else None
        if tilted is not None or not row.tilt:
            summary[name] = _with_bits(_mixture(here, scorer, reference, tilted), scorer.prepared)
    return summary


def _reference(scores: Mapping[Cell, Scored], scorer: Scorer) -> Reference | None:
    """Return the mixture of Gaussians of the lowest validation NLL, if there is one."""
    methods = scorer.params.density.methods
    names = dict.fromkeys(cell.method for cell in scores if methods[cell.method].loss.name in MIXTURES)
    found = {name: {cell: one for cell, one in scores.items() if cell.method == name} for name in names}
    if not found:
        return None
    best = min(found, key=lambda name: float(np.mean([one.numbers["nll_val"] for one in found[name].values()])))
    return Reference(best, _mean(found[best]))


def _over_mixture(method: str, log_prob: Array, scorer: Scorer, reference: Reference | None) -> dict[str, Any]:
    """Return the gain of a density over the best mixture of Gaussians, by test row."""
    if reference is None or method == reference.method:
        return {}
    gain, error = scorer.scored["test"].mean(log_prob - reference.log_prob)
    return {"over_mixture": gain, "over_mixture_standard_error": error, "over_mixture_of": reference.method}


def _mean(scores: Mapping[Cell, Scored]) -> Array:
    """Return the mean over seeds of the log-density of each test row."""
    mean: Array = np.mean([one.log_prob["test"] for one in scores.values()], 0)
    return mean


def _mixed(scores: Mapping[Cell, Scored], part: str) -> Array:
    """Return the log-density of each row of a part under the mixture of the seeds with equal weights."""
    mixed: Array = np.logaddexp.reduce([one.log_prob[part] for one in scores.values()]) - math.log(len(scores))
    return mixed


def _mixture(
    scores: Mapping[Cell, Scored], scorer: Scorer, reference: Reference | None, tilted: Tilt | None = None
) -> dict[str, Any]:
    """Return the scores of the mixture of some models with equal weights, and its gain over their mean.

    Args:
        scores: Scores of the models.
        scorer: Rows of the data set.
        reference: Mixture of Gaussians that it is compared with.
        tilted: Ratio that the mixture is multiplied by. The distances remain those of the mixture's samples.
    """
    mixed = {part: _mixed(scores, part) for part in scorer.scored}
    methods, samples = list(dict.fromkeys(cell.method for cell in scores)), [scorer.samples(cell) for cell in scores]
    numbers: dict[str, Any] = {"mixture_of": ", ".join(methods)}
    numbers["parameters"] = sum(one.numbers["parameters"] for one in scores.values())
    numbers["nfe"] = sum(one.numbers["nfe"] for one in scores.values())
    if tilted is not None:
        constant, numbers["log_constant_error"] = tilt.log_constant(tilted.log_ratio(scorer.draws(list(scores))))
        numbers["log_constant"] = constant
        mixed = {part: values + tilted.log_ratio(scorer.scored[part].x) - constant for part, values in mixed.items()}
    gain, error = scorer.scored["test"].mean(mixed["test"] - _mean(scores))
    numbers |= {**scorer.nll(mixed), **scorer.distances(scorer.in_turn(samples))}
    numbers |= _over_mixture("", mixed["test"], scorer, reference)
    return {**numbers, "gain": gain, "gain_standard_error": error}


def _warnings(scores: Mapping[Cell, Scored], numbers: Mapping[str, float], scorer: Scorer) -> list[str]:
    """Return sentences about the numbers of a method that are no measure of the data's density."""
    found = [one.warning for one in scores.values() if one.warning is not None][:1]
    test, gaussian = scorer.scored["test"], scorer.moments.log_prob(scorer.scored["test"])
    if gaussian is not None:
        gap, error = test.mean(gaussian - np.mean([one.log_prob["test"] for one in scores.values()], 0))
        if gap > max(error, LEAST):
            found.append(
                f"it is worse than one Gaussian, whose test NLL is {test.mean(-gaussian)[0]:.4g} instead of "
                f"{numbers['nll']:.4g} (difference {gap:.2g} ± {error:.2g})."
            )
    gap = numbers["nll"] - numbers["nll_train"]
    error = math.hypot(numbers["nll_standard_error"], numbers["nll_train_standard_error"])
    if gap > max(4 * error, 0.1 * len(scorer.prepared.columns)):
        found.append(
            f"it is far better on training rows than on test rows (NLL {numbers['nll_train']:.4g} against "
            f"{numbers['nll']:.4g}): it has memorised rows, which fewer steps, a smaller network or more rows avoid."
        )
    return found


def _with_bits(numbers: Mapping[str, Any], prepared: Prepared) -> dict[str, Any]:
    """Return the metrics, with bits per dimension where the rows are dequantised integers."""
    bins, dims = prepared.provenance["discrete_bins"], len(prepared.columns)
    if bins is None or "nll" not in numbers:
        return dict(numbers)
    log_prob = torch.tensor(-numbers["nll"], dtype=torch.float64)
    return {**numbers, "bits_per_dim": float(metrics.bits_per_dim(log_prob, dims, 1 / bins))}


def _record(stage: Stage, scorer: Scorer, found: Sequence[Mapping[str, Any]], floor: Mapping[str, Any]) -> None:
    """Record the numbers of each cell."""
    dataset, prepared = scorer.dataset, scorer.prepared
    stage.record.tag("score_metric", "nll")
    stage.record.data(dataset, "evaluation", prepared.folder, prepared.provenance)
    scored = []
    for row in found:
        numbers = {name: value for name, value in row.items() if name not in ("method", "seed")}
        numbers["nll_per_dim"] = row["nll"] / len(prepared.columns)
        numbers["emd_over_floor"] = row["emd"] / (floor["emd"] or math.nan)
        numbers |= {f"{name}_floor": value for name, value in floor.items() if isinstance(value, float)}
        model = files.md5(layout.network(layout.models(dataset, row["method"]), row["seed"]))
        scored.append(records.Cell(dataset, row["method"], row["seed"], metrics=numbers, model=model))
    stage.record.cells(scored)


def _settings(params: Params, dataset: str) -> DensityEvaluation:
    return params.density.evaluate_for(params.datasets[dataset])


def _some(rows: Rows, limit: int | None, rng: np.random.Generator) -> Rows:
    """Return at most so many rows, chosen at random, in their order."""
    return rows if limit is None else rows.take(np.sort(rng.permutation(len(rows))[:limit]))
