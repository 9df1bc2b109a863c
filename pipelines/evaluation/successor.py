"""Score every successor model of an environment at the same start states, with the sampling floor of each score.

Where there is no reference, because nobody followed the policy, the score is the residual of the Bellman equation.

The score of a seed is a mean over start states; the reported score is the mean over seeds with a 95 % t interval. The
spread over start states is in the table of cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import device, files, layout, metric_keys, seeding
from pipelines.config.catalog import ORACLE
from pipelines.config.params import Params
from pipelines.environments import Array, Process
from pipelines.evaluation import cells, models, scores, truth
from pipelines.evaluation.cells import Cell
from pipelines.evaluation.scores import SampleScore
from pipelines.evaluation.truth import Reward, Starts
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
    """Score the models of an environment: EMD, value error, likelihood and sensitivity, or the Bellman residual."""
    evaluator = SuccessorEvaluator(stage.params, environment)
    settings, entry = stage.params.successor, evaluator.entry
    seeds = settings.seeds_in(entry) if evaluator.score is not None else ()
    found = {Cell("floor", seed): evaluator.floor(seed) for seed in seeds}
    floor = scores.over_seeds({cell.seed: score.numbers for cell, score in found.items()}) if found else {}
    densities, skipped = dict[str, bool](), dict[str, dict[str, str]]()
    if not found:
        skipped["floor"] = {"skipped": evaluator.provenance["fidelity"]}
    for method in settings.methods:
        first, *_ = settings.seeds_for(entry, method)
        model = evaluator.load(method, first, settings.sample.solver, settings.sample.steps)
        if isinstance(model, Untrained):
            skipped[method] = {"skipped": model.reason}
        else:
            densities[method] = model.has_density
    every = [Cell(method, seed) for method in densities for seed in settings.seeds_for(entry, method)]
    found |= cells.each(stage, partial(_score, evaluator=evaluator, floor=floor.get("emd")), every, evaluator.device)
    with stage.output(layout.evaluations(environment)) as folder:
        tables = [score.table for score in found.values()]
        files.write_table(layout.cells(folder), pd.concat(tables, ignore_index=True) if tables else pd.DataFrame())
        if evaluator.score is not None:
            files.write_table(layout.truth(folder), truth.table(evaluator.score.truth, evaluator.start.names))
    numbers, warnings = dict[str, dict[int, dict[str, float]]](), dict[str, str]()
    for cell, score in found.items():
        numbers.setdefault(cell.method, {})[cell.seed] = score.numbers
        if score.warning is not None:
            warnings.setdefault(cell.method, score.warning)
    summary = {method: scores.over_seeds(seeds) for method, seeds in numbers.items()}
    for method, row in summary.items():
        if floor:  # that of a point measure is zero
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
    stage.record.tag("score_metric", "emd" if floor else scores.BELLMAN)
    stage.record.data(environment, "evaluation", layout.collected(environment), provenance)
    scored = []
    for method, seeds in found.items():
        if method == "floor":
            continue
        for seed, row in seeds.items():
            numbers = {name.replace("nll", "nll_per_dim"): value for name, value in row.items()}
            if floor:
                numbers |= {"emd_over_floor": row["emd"] / (floor["emd"] or math.nan)}
            numbers |= {f"{name}_floor": floor[name] for name in ("emd", "mse_v") if name in floor}
            file = layout.network(layout.models(environment, method), seed)
            model = files.md5(file) if file.exists() else None  # the closed form has no file
            scored.append(records.Cell(environment, method, seed, metrics=numbers, model=model))
    stage.record.cells(scored)


def _score(cell: Cell, send: Callable[[str], None], *, evaluator: SuccessorEvaluator, floor: float | None) -> Score:
    score = evaluator.model(*cell)
    if score.warning is not None:
        send(f"{cell}: {score.warning}")
    here = scores.over_seeds({cell.seed: score.numbers})
    far = f", diverged: {here['outside']:.1%} of the samples are far outside the data" * here["diverged"]
    name, low = ("EMD", floor) if floor is not None else ("Bellman residual", here[f"{scores.BELLMAN}_floor"])
    send(f"{cell}: {name} {here['emd' if floor is not None else scores.BELLMAN]:.4f} (floor {low:.4f}){far}")
    return score


class SuccessorEvaluator:
    """The evaluation of one environment's models; it is pickled as its arguments and reads the truth again.

    Attributes:
        start: Start states, with their rollouts.
        again: Another logged future of each start state, whose distance to the first is the floor of a log, or None.
        score: The comparison with the truth, or None if there is no reference.
    """

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
        self.again = truth.neighbours(folder, self.device)
        self.exchanged = truth.counterfactuals(folder, self.device)
        self.samples = self.successor.sample.samples
        self.unit = truth.unit(self.provenance, self.device)
        self.score: SampleScore | None = None
        if built.truth != "no reference":
            true = self.true(self.start, self.samples, "evaluate", environment)
            scale = truth.scale(self.provenance, self.device) if built.standardised else None
            self.score = SampleScore(true, *self._value(built, folder), self.entry.gamma, self.unit, scale)

    def _value(self, built: Process, folder: Path) -> tuple[Reward | None, Array | None]:
        """Return the reward, and its true value at every start state."""
        name, gamma = self.entry.reward, self.entry.gamma
        if name is None:
            return None, None
        state, action = (t.double().cpu().numpy() for t in (self.start.state, self.start.action))
        exact = built.exact_values(state, action, gamma).get(name)
        value = truth.returns(folder, name, gamma) if exact is None else exact
        return truth.reward_of(built, name, folder), value

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
        """Score true samples in place of a model's, new ones for each seed, so that the floor has an interval.

        Those of a log are of another logged future, because a process that is random repeats no future.
        """
        x = self.true(self.again or self.start, self.samples, "floor", self.environment, seed)
        more = {}
        if self.mdp is not None:
            assert self.score is not None
            scored = self.score.truth[: self.successor.evaluate.likelihood_rows]
            exact = self.mdp.successor(self.start.state, self.start.action, self.entry.gamma).log_prob(scored)
            more["nll"] = -exact.double().mean(0).cpu().numpy() / scored.shape[-1]
        return self._score("floor", seed, x, more)

    def model(self, method: str, seed: int) -> Score:
        """Score the model of a method and a seed.

        Its scores are those of its samples, its likelihood, its sensitivity, and its samples with other solver steps.
        """
        model = self._loaded(method, seed, self.successor.sample.solver, self.successor.sample.steps)
        path = layout.sampled(layout.samples(self.environment), method)
        column = metric_keys.free("seed", self.start.names)
        table = files.read_table(path, [*self.start.names, column], finite=False)  # a diverged model may give NaN
        rows = table.loc[table[column] == seed, self.start.names].to_numpy()
        x = self.start.state.new_tensor(rows).reshape(self.samples, *self.start.state.shape)
        if self.score is None:
            return self._score(method, seed, x, self._residual(model, x, seed))
        likelihood, warning = self._likelihood(method, seed, self.score.truth) if model.has_density else ({}, None)
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
                numbers |= {f"{name}_steps{steps}": found[name] for name in ("emd", "mse_v") if name in found}
        return score._replace(numbers=numbers)

    def true_mean(self, at: Starts) -> Tensor:
        """Return the mean of the true successor measure, (starts, d)."""
        return truth.true_mean(at, self.mdp, self.entry.gamma)

    def _residual(self, model: HorizonModel, x: Tensor, seed: int) -> dict[str, Array]:
        """Return the distance between samples and the model's bootstrap at each start, and that of two bootstraps."""
        at, twice = self.start, list[Tensor]()
        for which in ("bootstrap", "again"):
            key = (which, self.environment, seed)
            generator = seeding.generator(self.params.seed, *key, device=self.device)
            later = models.sample(model, at.states[:, 1], at.actions[:, 1], self.samples, generator)
            twice.append(truth.bootstrap(at, later, self.entry.gamma, generator))
        return {
            scores.BELLMAN: scores.distances(x, twice[0], self.unit),
            f"{scores.BELLMAN}_floor": scores.distances(twice[1], twice[0], self.unit),
        }

    def _likelihood(self, method: str, seed: int, true: Tensor) -> tuple[dict[str, Array], str | None]:
        settings = self.successor.evaluate
        steps = max(1, settings.steps // 2)  # `estimate` takes twice as many
        model = self._loaded(method, seed, settings.solver, steps)
        return scores.likelihood(model, true[: settings.likelihood_rows], self.start)

    def _loaded(self, method: str, seed: int, solver: str, steps: int) -> HorizonModel:
        """Return an existing model with other solver steps."""
        model = self.load(method, seed, solver, steps)
        assert not isinstance(model, Untrained), model.reason
        return model

    def _score(self, method: str, seed: int, x: Tensor, more: dict[str, Array], warning: str | None = None) -> Score:
        values = {**(self.score(x) if self.score is not None else {}), **more}
        numbers = {**scores.means(values), "outside": truth.outside(x, self.provenance)}
        return Score(numbers, scores.table(method, seed, values), warning)
