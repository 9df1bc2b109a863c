r"""The ratio of a population to the tempered weights with which its rows were drawn, as a function of the row.

Rows with few distinct importance weights $w$ are drawn in training with $\propto w^\alpha$, so that a model has the
density $p'(x) = \sum_s \pi'_s\, p(x \mid s)$ of tempered classes $s$ of equal weight in place of the population's
$\sum_s \pi_s\, p(x \mid s)$. The tilted density is $p'(x)\, r(x) / Z$ with

$$
r(x) = \sum_s \frac{\pi_s}{\pi'_s}\, P'(s \mid x), \qquad Z = E_{x \sim p'}[r(x)].
$$

$P'$ is estimated by classifiers, and $Z$, which is 1 for exact ones, by samples of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.base.errors import UserError
from pipelines.evaluation.rows import Array, Rows

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingClassifier

CLASSIFIERS, RATE, ROUNDS = 3, 0.05, 1000
CLASSES = 20  # more distinct weights are no classes


@dataclass(frozen=True)
class Tilt:
    """The ratio of a population to tempered weights.

    Attributes:
        shares: Shares of the classes among the training rows.
        tempered: Shares of the classes by the weights of the training.
        full: Shares of the classes in the population.
        posterior: Function that returns the probabilities of the classes given rows, as if their shares were `shares`.
    """

    shares: Array
    tempered: Array
    full: Array
    posterior: Callable[[Array], Array]

    def log_ratio(self, x: Array) -> Array:
        """Return log r of rows `(n, d)`, `(n,)`."""
        found = self.posterior(x) / self.shares
        log_ratio: Array = np.log(found @ self.full) - np.log(found @ self.tempered)
        return log_ratio


def fit(rows: Rows, power: float, seed: int) -> Tilt:
    """Estimate the ratio from training rows.

    Args:
        rows: Training rows, whose weights are tempered.
        power: Power of the weights that restores the population.
        seed: Seed of the classifiers.

    Raises:
        UserError: The rows have no weights, or too many distinct ones.
    """
    weights, found = np.unique(np.ones(len(rows)) if rows.weight is None else rows.weight, return_inverse=True)
    kind = found.astype(np.int64)
    if not 1 < len(weights) <= CLASSES:
        raise UserError(
            f"the training rows have {len(weights)} distinct weights, expected 2 to {CLASSES} for a tilt; set "
            "`tilt: false` in density.mixtures for them."
        )
    count = np.bincount(kind).astype(float)
    classifiers = [_classifier(rows.x, kind, seed + i) for i in range(CLASSIFIERS)]

    def posterior(x: Array) -> Array:
        mean: Array = np.mean([one.predict_proba(x) for one in classifiers], 0)
        return mean

    tempered, full = count * weights, count * weights**power
    return Tilt(count / count.sum(), tempered / tempered.sum(), full / full.sum(), posterior)


def log_constant(log_ratio: Array) -> tuple[float, float]:
    """Return log Z and its standard error, from log r at samples of the model."""
    ratio = np.exp(log_ratio)
    mean = float(ratio.mean())
    return float(np.log(mean)), float(ratio.std(ddof=1) / np.sqrt(len(ratio)) / mean)


def _classifier(x: Array, kind: NDArray[np.int64], seed: int) -> HistGradientBoostingClassifier:
    """Fit a classifier, which stops by the log-loss of held-out rows: the accuracy says nothing of a rare class."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        learning_rate=RATE, max_iter=ROUNDS, early_stopping=True, validation_fraction=0.2, random_state=seed % 2**32
    ).fit(x, kind)
