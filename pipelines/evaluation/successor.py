"""Score every successor model of an environment at the same start states, with the sampling floor of each score.

The score of a seed is a mean over start states; the reported score is the mean over seeds with a 95 % t interval. The
spread over start states is in the table of cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import device, files, layout, seeding
from pipelines.config.catalog import ORACLE
from pipelines.config.params import Params
from pipelines.environments import Array
from pipelines.evaluation import cells, models, scores, truth
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.truth import Starts
from pipelines.models.untrained import Untrained
from pipelines.runs import records
from pipelines.runs.context import Stage

SENSITIVITY_SAMPLES = 256  # per start state; few are enough, because both sides of a difference share their noise


class Score(NamedTuple):
    """The scores of a model of one seed, or of the truth in its place.

    Attributes:
        numbers: Means over start states.
        table: Scores at each start state.
        warning: Sentence where the likelihood is not solved well enough.
    """

    numbers: dict[str, float]
    table: pd.DataFrame
    warning: str | None = None


def evaluate(stage: Stage, environment: str) -> None:
    """Score the models of an environment: EMD, value error, likelihood and sensitivity."""
    evaluator = SuccessorEvaluator(stage.params, environment)
    settings, entry = stage.params.successor, evaluator.entry
    found = {Cell("floor", seed): evaluator.floor(seed) for seed in settings.seeds_in(entry)}
    floor = scores.over_seeds({cell.seed: score.numbers for cell, score in found.items()})
    densities, skipped = dict[str, bool](), dict[str, dict[str, str]]()
    for method in settings.methods:
        first, *_ = settings.seeds_for(entry, method)
        model = evaluator.load(method, first, settings.sample.solver, settings.sample.steps)
        if isinstance(model, Untrained):
            skipped[method] = {"skipped": model.reason}
        else:
            densities[method] = model.has_density
    every = [Cell(method, seed) for method in densities for seed in settings.seeds_for(entry, method)]
    found |= cells.each(stage, partial(_score, evaluator=evaluator, floor=floor["emd"]), every, evaluator.device)
    with stage.output(layout.evaluations(environment)) as folder:
        tables = [score.table for score in found.values()]
        files.write_table(layout.cells(folder), pd.concat(tables, ignore_index=True))
        files.write_table(layout.truth(folder), truth.table(evaluator.truth, evaluator.start.names))
    numbers, warnings = dict[str, dict[int, dict[str, float]]](), dict[str, str]()
    for cell, score in found.items():
        numbers.setdefault(cell.method, {})[cell.seed] = score.numbers
        if score.warning is not None:
            warnings.setdefault(cell.method, score.warning)
    summary = {method: scores.over_seeds(seeds) for method, seeds in numbers.items()}
    for method, row in summary.items():
        # the floor of a point measure is zero
        row["emd_over_floor"] = row["emd"] / floor["emd"] if floor["emd"] else math.nan
        row |= {"has_density": densities[method]} if method in densities else {}
        row |= {"warning": warnings[method]} if method in warnings else {}
    with stage.output(layout.metrics(environment)) as temporary:
        files.write_json(temporary, {**summary, **skipped})
    _record(stage, environment, evaluator.provenance, numbers, floor)


def _record(
    stage: Stage,
    environment: str,
    provenance: Mapping[str, Any],
    found: Mapping[str, Mapping[int, Mapping[str, float]]],
    floor: Mapping[str, float],
) -> None:
    """Record the numbers of each cell; a likelihood is per dimension here, which its name says."""
    stage.record.tag("score_metric", "emd")
    stage.record.data(environment, "evaluation", layout.collected(environment), provenance)
    scored = []
    for method, seeds in found.items():
        if method == "floor":
            continue
        for seed, row in seeds.items():
            numbers = {name.replace("nll", "nll_per_dim"): value for name, value in row.items()}
            numbers |= {"emd_over_floor": row["emd"] / (floor["emd"] or math.nan)}
            numbers |= {f"{name}_floor": floor[name] for name in ("emd", "mse_v")}
            file = layout.network(layout.models(environment, method), seed)
            model = files.md5(file) if file.exists() else None  # the closed form has no file
            scored.append(records.Cell(environment, method, seed, metrics=numbers, model=model))
    stage.record.cells(scored)


def _score(cell: Cell, send: Callable[[str], None], *, evaluator: SuccessorEvaluator, floor: float) -> Score:
    score = evaluator.model(*cell)
    if score.warning is not None:
        send(f"{cell}: {score.warning}")
    here = scores.over_seeds({cell.seed: score.numbers})
    far = f", diverged: {here['outside']:.1%} of the samples are far outside the data" * here["diverged"]
    send(f"{cell}: EMD {here['emd']:.4f} (floor {floor:.4f}){far}")
    return score


class SuccessorEvaluator:
    """The evaluation of one environment's models; it is pickled as its arguments and reads the truth again."""

    def __init__(self, params: Params, environment: str) -> None:
        self.params, self.environment = params, environment
        self.entry, self.successor = params.environments[environment], params.successor
        self.device = device.use(params.device, params.threads)
        folder = layout.collected(environment)
        self.provenance = files.read_json(layout.provenance(folder))
        built = environments.build(self.entry.kind, self.entry.settings())
        oracle = built.oracle()
        self.mdp = None if oracle is None else oracle.to(self.device, torch.float64)
        self.start = truth.read(folder, self.device)
        self.exchanged = truth.counterfactuals(folder, self.device)
        self.samples = self.successor.sample.samples
        self.truth = self.true(self.start, self.samples, "evaluate", environment)
        gamma, reward = self.entry.gamma, self.entry.reward
        state, action = (t.double().cpu().numpy() for t in (self.start.state, self.start.action))
        value = built.exact_values(state, action, gamma).get(reward)
        if value is None:
            along = truth.rewards(built, reward, self.start.states[:, 1:])
            value = (along * gamma ** torch.arange(along.shape[1]).numpy()).sum(1)
        self.score = scores.SampleScore(self.truth, built, reward, value, gamma)

    def __reduce__(self) -> tuple[type[SuccessorEvaluator], tuple[Params, str]]:
        return SuccessorEvaluator, (self.params, self.environment)

    def true(self, at: Starts, n: int, *key: object) -> Tensor:
        """Return true samples, (n, starts, d)."""
        return truth.truth(
            at, self.mdp, self.entry.gamma, n, seeding.generator(self.params.seed, *key, device=self.device)
        )

    def _generator(self, *key: object) -> torch.Generator:
        return seeding.generator(self.params.seed, *key, device=self.device)

    def load(self, method: str, seed: int, solver: str, steps: int) -> HorizonModel | Untrained:
        """Return a model, or the reason why there is none."""
        return models.load(self.params, self.environment, method, seed, self.device, solver, steps)

    def draw(self, model: HorizonModel, at: Starts, n: int, *key: object) -> Tensor:
        """Return samples of a model, (n, starts, d)."""
        return models.sample(
            model, at.state, at.action, n, seeding.generator(self.params.seed, *key, device=self.device)
        )

    def floor(self, seed: int) -> Score:
        """Score true samples in place of a model's, new ones for each seed, so that the floor has an interval."""
        x = self.true(self.start, self.samples, "floor", self.environment, seed)
        more = {}
        if self.mdp is not None:
            scored = self.truth[: self.successor.evaluate.likelihood_rows]
            exact = self.mdp.successor(self.start.state, self.start.action, self.entry.gamma).log_prob(scored)
            more["nll"] = -exact.double().mean(0).cpu().numpy() / scored.shape[-1]
        return self._score("floor", seed, x, more)

    def model(self, method: str, seed: int) -> Score:
        """Score the model of a method and a seed.

        Its scores are those of its samples, its likelihood, its sensitivity, and its samples with other solver steps.
        """
        model = self._loaded(method, seed, self.successor.sample.solver, self.successor.sample.steps)
        path = layout.sampled(layout.samples(self.environment), method)
        table = files.read_table(path, [*self.start.names, "seed"], finite=False)  # a diverged model may give NaN
        rows = table.loc[table["seed"] == seed, self.start.names].to_numpy()
        x = self.start.state.new_tensor(rows).reshape(self.samples, *self.start.state.shape)
        likelihood, warning = self._likelihood(method, seed) if model.has_density else ({}, None)
        score = self._score(method, seed, x, likelihood, warning)
        if not x.isfinite().all():  # other samples would diverge too, and an adaptive solver might not terminate
            return score

        def mean(at: Starts) -> Tensor:
            return self.draw(model, at, SENSITIVITY_SAMPLES, "sensitivity", self.environment, seed).mean(0)

        slopes = scores.sensitivity(mean, self.true_mean, self.start, self.exchanged)
        numbers = score.numbers | {f"sensitivity_{name}": slope for name, slope in slopes.items()}
        if isinstance(model, GeometricHorizonModel) and self.successor.methods[method].loss.name != ORACLE:
            for steps in self.successor.evaluate.solver_steps.get(self.environment, ()):
                other = self._loaded(method, seed, self.successor.sample.solver, steps)
                # The key gives the same noise as that of the samples above.
                values = self.score(self.draw(other, self.start, self.samples, "sample", self.environment, seed))
                found = scores.means(values)
                numbers |= {f"emd_steps{steps}": found["emd"], f"mse_v_steps{steps}": found["mse_v"]}
        return score._replace(numbers=numbers)

    def true_mean(self, at: Starts) -> Tensor:
        """Return the mean of the true successor measure, (starts, d)."""
        return truth.true_mean(at, self.mdp, self.entry.gamma)

    def _likelihood(self, method: str, seed: int) -> tuple[dict[str, Array], str | None]:
        settings = self.successor.evaluate
        steps = max(1, settings.steps // 2)  # `estimate` takes twice as many
        model = self._loaded(method, seed, settings.solver, steps)
        return scores.likelihood(model, self.truth[: settings.likelihood_rows], self.start)

    def _loaded(self, method: str, seed: int, solver: str, steps: int) -> HorizonModel:
        """Return an existing model with other solver steps."""
        model = self.load(method, seed, solver, steps)
        assert not isinstance(model, Untrained), model.reason
        return model

    def _score(self, method: str, seed: int, x: Tensor, more: dict[str, Array], warning: str | None = None) -> Score:
        values = {**self.score(x), **more}
        numbers = {**scores.means(values), "outside": truth.outside(x, self.provenance)}
        return Score(numbers, scores.table(method, seed, values), warning)
