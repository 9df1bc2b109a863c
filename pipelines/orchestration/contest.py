"""Score two models of the same data on the same held-out rows, and test whether one is better.

Lower scores are better. Both models are scored in one process, with the same noise, on pairs: the test rows of a data
set, or the start states of an environment. The score of a model is the mean over its networks, one for each seed.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from flowmatch_core.intervals import t_interval
from pipelines import environments
from pipelines.base import device, files, layout, seeding
from pipelines.base.errors import UserError
from pipelines.config.params import Params
from pipelines.evaluation import models, scores, truth
from pipelines.evaluation.likelihood import likelihoods
from pipelines.evaluation.rows import Prepared
from pipelines.models import saved, successor
from pipelines.models.conditions import Conditions

Array = NDArray[np.float64]
Keys = NDArray[np.uint64]
Networks = Mapping[int, Path]
"""Files of a model's networks by seed."""


@dataclass(frozen=True)
class Scores:
    """The scores of a model; lower is better.

    Attributes:
        values: Score on each row or start state, the mean over networks, (pairs,).
        error: Bound on the error of their mean that the solver makes.
    """

    values: Array
    error: float = 0.0

    @property
    def mean(self) -> float | None:
        """Mean score, or None if there is none or one is not a finite number."""
        if not self.values.size or not np.isfinite(self.values).all():
            return None
        return float(np.sort(self.values).mean())


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger is better than the champion.

    Attributes:
        better: Whether it is better beyond the error.
        reason: Clause that says why.
        difference: Mean score of the champion minus that of the challenger; None if one is not a number.
        bound: One-sided lower confidence bound of the difference, less the errors of the solver.
    """

    better: bool
    reason: str
    difference: float | None = None
    bound: float | None = None


def compare(challenger: Scores, champion: Scores | None, level: float, pairs: int) -> Verdict:
    """Test whether a challenger is better than the champion on the rows or start states that both were scored on.

    It is better if there is no champion, or if the lower bound of the one-sided paired t test of the champion's scores
    minus its own exceeds what the solvers' errors may hide. A tie keeps the champion. A score that is not a finite
    number never wins.

    Args:
        challenger: Scores of the challenger.
        champion: Scores of the champion, in the same order of rows; None if there is no champion.
        level: Confidence of the test; a challenger that is as good as the champion wins with probability 1 - level.
        pairs: Minimum number of pairs.
    """
    count = len(challenger.values)
    if bad := int((~np.isfinite(challenger.values)).sum()):
        return Verdict(False, f"the challenger's score is not a finite number on {bad} of {count} pairs")
    if champion is None:
        return Verdict(True, "there was no champion")
    if count < pairs:
        return Verdict(False, f"only {count} pairs to compare on, expected at least {pairs}")
    if bad := int((~np.isfinite(champion.values)).sum()):
        return Verdict(True, f"the champion's score is not a finite number on {bad} of {count} pairs")
    gain = np.sort(champion.values - challenger.values)  # sorted, so that the order of rows has no effect at all
    interval = t_interval(gain, 2 * level - 1)  # each of its ends is a one-sided bound at `level`
    bound = interval.low - challenger.error - champion.error
    if interval.mean == 0:
        return Verdict(False, "equally good", 0.0, bound)
    better, beyond = interval.mean > 0, bound > 0
    how = f"{abs(interval.mean):.3g} {'better' if better else 'worse'}, one-sided bound {bound:.3g}"
    return Verdict(beyond, f"{how}: not beyond the error" if better and not beyond else how, interval.mean, bound)


class Contest(ABC):
    """The held-out rows or start states on which the models of one method are scored.

    Attributes:
        metric: Name of the score.
        digest: Hash of the rows.
        note: Clause about the rows, such as that some were left out, or an empty string.
    """

    metric: ClassVar[str]
    digest: str
    note: str = ""

    def score(self, networks: Networks) -> Scores:
        """Return the scores of a model, which are the same bits each time."""
        found = [self._score(file, number) for number, (_, file) in enumerate(sorted(networks.items()))]
        values, errors = np.stack([one.values for one in found]), [one.error for one in found]
        return Scores(values.mean(0), float(np.mean(errors)))

    @abstractmethod
    def _score(self, file: Path, number: int) -> Scores:
        """Return the scores of one network; the first networks of both models get the same noise, and so on."""


@final
class DensityContest(Contest):
    """Negative log-likelihood of test rows that neither model was trained on.

    Args:
        workspace: Folder of the run whose test rows are taken.
        params: Parameters of the run.
        dataset: Name of the data set.
        known: Keys of the training rows of the champion, which are left out.

    Attributes:
        training: Keys of the training rows of the run.
    """

    metric = "nll"

    def __init__(self, workspace: Path, params: Params, dataset: str, known: Keys | None = None) -> None:
        self.settings = params.density.evaluate_for(params.datasets[dataset])
        self.device = device.use(params.device, params.threads)
        prepared = Prepared.read(workspace / layout.prepared(dataset))
        names = [*prepared.columns, *prepared.conditions.names]
        test = prepared.table("test")
        rows, keys = prepared.rows(test), row_keys(test[names])
        self.training = row_keys(prepared.table("train")[names])
        seen = np.isin(keys, self.training if known is None else np.union1d(self.training, known))
        if seen.any():
            self.note = f"{int(seen.sum())} of {len(keys)} test rows are left out, because a model was trained on them"
        # In the order of their keys, so that the order of the table has no effect.
        chosen = np.flatnonzero(~seen)[np.argsort(keys[~seen], kind="stable")][: self.settings.likelihood_rows]
        self.rows = rows.take(chosen)
        self.digest = _digest(keys[chosen].tobytes())

    def _score(self, file: Path, number: int) -> Scores:
        if not len(self.rows):
            return Scores(np.empty(0))
        described = saved.meta(file).get("conditions", ())  # a champion may standardise them otherwise
        rows = replace(self.rows, cond=Conditions(tuple(described)).encode(self.rows.table))
        found = likelihoods(file, {"test": rows}, self.settings, self.device)["test"]
        weight = 1.0 if self.rows.weight is None else self.rows.weight / self.rows.weight.mean()
        return Scores(-found.log_prob * weight, float(found.error.mean()))


@final
class SuccessorContest(Contest):
    """EMD between samples of a model and the truth at each start state of the evaluation.

    The rollouts of the evaluation are drawn apart from the training data, with a seed of their own.

    Args:
        workspace: Folder of the run whose evaluation rollouts are taken.
        params: Parameters of the run.
        environment: Name of the environment.
    """

    metric = "emd"

    def __init__(self, workspace: Path, params: Params, environment: str) -> None:
        self.base, self.environment, self.settings = params.seed, environment, params.successor.sample
        self.device = device.use(params.device, params.threads)
        entry, folder = params.environments[environment], workspace / layout.collected(environment)
        built = environments.build(entry.kind, entry.settings())
        self.policy, oracle = models.policy(built), built.oracle()
        mdp = None if oracle is None else oracle.to(self.device, torch.float64)
        self.start = truth.read(folder, self.device)
        self.unit = truth.unit(files.read_json(layout.provenance(folder)), self.device)
        generator = self._generator("evaluate", environment)
        self.truth = truth.truth(self.start, mdp, entry.gamma, self.settings.samples, generator)
        self.digest = _digest(row_keys(files.read_table(layout.evaluation(folder))).tobytes())

    def _score(self, file: Path, number: int) -> Scores:
        model = successor.load(file, self.device, self.settings.solver, self.settings.steps, self.policy)
        generator = self._generator("sample", self.environment, number)
        x = models.sample(model, self.start.state, self.start.action, self.settings.samples, generator)
        return Scores(scores.distances(x, self.truth, self.unit))

    def _generator(self, *key: object) -> torch.Generator:
        return seeding.generator(self.base, *key, device=self.device)


def check_comparable(challenger: Networks, champion: Networks) -> None:
    """Check that two models describe rows of the same form, with the same discount.

    Raises:
        UserError: They do not, or a file is damaged.
    """
    ours = _form(next(iter(challenger.values())))
    for file in champion.values():
        for name, value in _form(file).items():
            if value != ours[name] and None not in (value, ours[name]):  # older files do not have every description
                raise UserError(f"it has the {name} {value}, the challenger {ours[name]}")


def weights(networks: Networks) -> str:
    """Return a hash of the files of a model's networks, equal for the same model."""
    parts = (f"{seed} {_digest(files.read_bytes(file))}\n" for seed, file in sorted(networks.items()))
    return _digest("".join(parts).encode())


def row_keys(table: pd.DataFrame) -> Keys:
    """Return a hash of each row, by which rows are recognised in another table."""
    return np.asarray(pd.util.hash_pandas_object(table, index=False), np.uint64)


def _form(file: Path) -> dict[str, object]:
    """Return what two models must have in common to be compared; None where a file does not say it."""
    meta = saved.meta(file)
    network, given = meta.get("network", {}), meta.get("conditions")
    return {
        "number of columns": network.get("event_dim"),
        "number of conditions": None if given else network.get("cond_dim"),  # words may be others now
        "columns": meta.get("columns", meta.get("state_names")),
        "conditions": None if given is None else [(one["name"], one["kind"]) for one in given],
        "actions": meta.get("action_names"),
        "discount": meta.get("gamma"),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
