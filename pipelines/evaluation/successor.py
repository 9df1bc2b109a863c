"""Score every successor model of an environment at the same start states, with the sampling floor of each score.

The score of a seed is a mean over start states; the reported score is the mean over seeds with a 95 % t interval. The
spread over start states is in the table of cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from flowmatch_core.successor import GeometricHorizonModel, HorizonModel
from pipelines import environments
from pipelines.base import device, files, layout
from pipelines.config.catalog import ORACLE
from pipelines.environments import Array
from pipelines.evaluation import models, scores, truth
from pipelines.evaluation.truth import Starts
from pipelines.models.untrained import Untrained
from pipelines.runs.context import Stage
from pipelines.runs.records import Cell

SENSITIVITY_SAMPLES = 256  # per start state; few are enough, because both sides of a difference share their noise


def evaluate(stage: Stage, environment: str) -> None:
    """Score the models of an environment: EMD, value error, likelihood and sensitivity."""
    evaluator = SuccessorEvaluator(stage, environment)
    settings = stage.params.successor
    for seed in settings.seeds_in(evaluator.entry):
        evaluator.floor(seed)
    floor = scores.over_seeds(evaluator.numbers["floor"])
    densities, skipped = dict[str, bool](), dict[str, dict[str, str]]()
    for method in settings.methods:
        for seed in settings.seeds_for(evaluator.entry, method):
            model = evaluator.load(method, seed, settings.sample.solver, settings.sample.steps)
            if isinstance(model, Untrained):
                skipped[method] = {"skipped": model.reason}
                break
            densities[method] = model.has_density
            numbers = evaluator.model(model, method, seed)
            here = scores.over_seeds({seed: numbers})
            far = f", diverged: {here['outside']:.1%} of the samples are far outside the data" * here["diverged"]
            stage.log(f"{method} seed {seed}: EMD {numbers['emd']:.4f} (floor {floor['emd']:.4f}){far}")
    with stage.output(layout.evaluations(environment)) as folder:
        files.write_table(layout.cells(folder), pd.concat(evaluator.cells, ignore_index=True))
        files.write_table(layout.truth(folder), truth.table(evaluator.truth, evaluator.start.names))
    summary = {method: scores.over_seeds(seeds) for method, seeds in evaluator.numbers.items()}
    for method, cell in summary.items():
        # the floor of a point measure is zero
        cell["emd_over_floor"] = cell["emd"] / floor["emd"] if floor["emd"] else math.nan
        cell |= {"has_density": densities[method]} if method in densities else {}
        cell |= {"warning": evaluator.warnings[method]} if method in evaluator.warnings else {}
    with stage.output(layout.metrics(environment)) as temporary:
        files.write_json(temporary, {**summary, **skipped})
    _record(stage, environment, evaluator, floor)


def _record(stage: Stage, environment: str, evaluator: SuccessorEvaluator, floor: Mapping[str, float]) -> None:
    """Record the numbers of each cell; a likelihood is per dimension here, which its name says."""
    stage.record.tag("score_metric", "emd")
    stage.record.data(environment, "evaluation", layout.collected(environment), evaluator.provenance)
    cells = []
    for method, seeds in evaluator.numbers.items():
        if method == "floor":
            continue
        for seed, scored in seeds.items():
            numbers = {name.replace("nll", "nll_per_dim"): value for name, value in scored.items()}
            numbers |= {"emd_over_floor": scored["emd"] / (floor["emd"] or math.nan)}
            numbers |= {f"{name}_floor": floor[name] for name in ("emd", "mse_v")}
            file = layout.network(layout.models(environment, method), seed)
            model = files.md5(file) if file.exists() else None  # the closed form has no file
            cells.append(Cell(environment, method, seed, metrics=numbers, model=model))
    stage.record.cells(cells)


class SuccessorEvaluator:
    """The evaluation of one environment's models.

    Attributes:
        numbers: Scores by method and seed.
        cells: Scores at each start state, one table per method and seed.
        warnings: Sentence by method whose likelihood is not solved well enough.
    """

    def __init__(self, stage: Stage, environment: str) -> None:
        self.stage, self.environment = stage, environment
        self.entry, self.successor = stage.params.environments[environment], stage.params.successor
        self.device = device.use(stage.params.device, stage.params.threads)
        folder = layout.collected(environment)
        self.provenance = files.read_json(layout.provenance(folder))
        built = environments.build(self.entry.kind, self.entry.settings())
        oracle = built.oracle()
        self.mdp = None if oracle is None else oracle.to(self.device, torch.float32)
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
        self.numbers: dict[str, dict[int, dict[str, float]]] = {}
        self.cells: list[pd.DataFrame] = []
        self.warnings: dict[str, str] = {}

    def true(self, at: Starts, n: int, *key: object) -> Tensor:
        """Return true samples, (n, starts, d)."""
        return truth.truth(at, self.mdp, self.entry.gamma, n, self.stage.generator(*key, device=self.device))

    def load(self, method: str, seed: int, solver: str, steps: int) -> HorizonModel | Untrained:
        """Return a model, or the reason why there is none."""
        return models.load(self.stage.params, self.environment, method, seed, self.device, solver, steps)

    def draw(self, model: HorizonModel, at: Starts, n: int, *key: object) -> Tensor:
        """Return samples of a model, (n, starts, d)."""
        return models.sample(model, at.state, at.action, n, self.stage.generator(*key, device=self.device))

    def floor(self, seed: int) -> None:
        """Score true samples in place of a model's, new ones for each seed, so that the floor has an interval."""
        x = self.true(self.start, self.samples, "floor", self.environment, seed)
        more = {}
        if self.mdp is not None:
            scored = self.truth[: self.successor.evaluate.likelihood_rows]
            exact = self.mdp.successor(self.start.state, self.start.action, self.entry.gamma).log_prob(scored)
            more["nll"] = -exact.double().mean(0).cpu().numpy() / scored.shape[-1]
        self._keep("floor", seed, x, more)

    def model(self, model: HorizonModel, method: str, seed: int) -> dict[str, float]:
        """Score a model and return its scores.

        They are those of its samples, its likelihood, its sensitivity, and its samples with other solver steps.
        """
        path = layout.sampled(layout.samples(self.environment), method)
        table = files.read_table(path, [*self.start.names, "seed"], finite=False)  # a diverged model may give NaN
        rows = table.loc[table["seed"] == seed, self.start.names].to_numpy()
        x = self.start.state.new_tensor(rows).reshape(self.samples, *self.start.state.shape)
        numbers = self._keep(method, seed, x, self._likelihood(method, seed) if model.has_density else {})
        if not x.isfinite().all():  # other samples would diverge too, and an adaptive solver might not terminate
            return numbers

        def mean(at: Starts) -> Tensor:
            return self.draw(model, at, SENSITIVITY_SAMPLES, "sensitivity", self.environment, seed).mean(0)

        slopes = scores.sensitivity(mean, self.true_mean, self.start, self.exchanged)
        numbers |= {f"sensitivity_{name}": slope for name, slope in slopes.items()}
        if isinstance(model, GeometricHorizonModel) and self.successor.methods[method].loss.name != ORACLE:
            for steps in self.successor.evaluate.solver_steps.get(self.environment, ()):
                other = self._loaded(method, seed, self.successor.sample.solver, steps)
                # The key gives the same noise as that of the samples above.
                values = self.score(self.draw(other, self.start, self.samples, "sample", self.environment, seed))
                found = scores.means(values)
                numbers |= {f"emd_steps{steps}": found["emd"], f"mse_v_steps{steps}": found["mse_v"]}
        return numbers

    def true_mean(self, at: Starts) -> Tensor:
        """Return the mean of the true successor measure, (starts, d)."""
        return truth.true_mean(at, self.mdp, self.entry.gamma)

    def _likelihood(self, method: str, seed: int) -> dict[str, Array]:
        settings = self.successor.evaluate
        steps = max(1, settings.steps // 2)  # `estimate` takes twice as many
        model = self._loaded(method, seed, settings.solver, steps)
        found, warning = scores.likelihood(model, self.truth[: settings.likelihood_rows], self.start)
        if warning is not None:
            self.warnings.setdefault(method, warning)
            self.stage.log(f"{method} seed {seed}: {warning}")
        return found

    def _loaded(self, method: str, seed: int, solver: str, steps: int) -> HorizonModel:
        """Return an existing model with other solver steps."""
        model = self.load(method, seed, solver, steps)
        assert not isinstance(model, Untrained), model.reason
        return model

    def _keep(self, method: str, seed: int, x: Tensor, more: dict[str, Array]) -> dict[str, float]:
        values = {**self.score(x), **more}
        self.cells.append(scores.table(method, seed, values))
        numbers = {**scores.means(values), "outside": truth.outside(x, self.provenance)}
        return self.numbers.setdefault(method, {}).setdefault(seed, numbers)
