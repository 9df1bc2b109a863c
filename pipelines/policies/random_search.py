"""Linear policies by augmented random search (Mania et al. 2018, arXiv 1803.07055, version V2-t)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.environments import Array
from pipelines.environments._actor import FARTHEST, Actor
from pipelines.environments._suite import Domain


@dataclass(frozen=True)
class RandomSearch:
    r"""Augmented random search for a matrix M of the policy $\mathrm{clip}(M z, -1, 1)$ of standardised observations.

    An iteration follows the policies $M \pm \nu \delta_i$ from one common start and takes the step
    $M \leftarrow M + \frac{\alpha}{b\,\sigma_R} \sum_i (r_i^+ - r_i^-)\,\delta_i$ over the b directions with the
    largest $\max(r_i^+, r_i^-)$, where $\sigma_R$ is the standard deviation of their 2b returns.

    Attributes:
        maximised: Component of the state whose sum is the return: other than a reward, a speed has a slope everywhere.
        action_repeat: Control steps that an action lasts.
        iterations: Number of steps.
        directions: Number of directions in an iteration.
        top: Number b of directions that count.
        step: Step size $\alpha$.
        noise: Size $\nu$ of the perturbations.
        length: Control steps of a rollout.
        every: Iterations between two candidates.
    """

    maximised: str = "vx"
    action_repeat: int = 2
    iterations: int = 200
    directions: int = 32
    top: int = 8
    step: float = 0.02
    noise: float = 0.03
    length: int = 400
    every: int = 20

    def candidates(self, domain: Domain, seed: int) -> Iterator[Actor]:
        """Yield the policy of every few iterations."""
        rng = np.random.default_rng(seed)
        states, actions = len(domain.state_names), len(domain.action_names)
        matrix, moments = np.zeros((actions, states)), Moments(states)
        for iteration in range(1, self.iterations + 1):
            direction = rng.standard_normal((self.directions, actions, states))
            tried = matrix + self.noise * np.concatenate([direction, -direction])
            plus, minus = self._returns(domain, tried, moments, rng).reshape(2, -1)
            top = np.argsort(-np.maximum(plus, minus))[: self.top]
            spread = np.concatenate([plus[top], minus[top]]).std() or 1.0
            slope = np.einsum("i,iao->ao", plus[top] - minus[top], direction[top]) / (self.top * spread)
            matrix = matrix + self.step * slope
            if iteration % self.every == 0:
                yield Actor(moments.loc, moments.scale, ((matrix, np.zeros(actions)),))

    def _returns(self, domain: Domain, matrices: Array, moments: Moments, rng: np.random.Generator) -> Array:
        """Return the sum over a rollout of each of the linear policies from a common start, and count what they see."""
        loc, scale = moments.loc, moments.scale

        def act(state: Array) -> Array:
            standard = np.clip((state - loc) / scale, -FARTHEST, FARTHEST)
            action: Array = np.clip(np.einsum("nao,no->na", matrices, standard), -1, 1)
            return action

        states, *_ = domain.roll(act, len(matrices), self.length // self.action_repeat, rng, alike=True)
        seen = states[:, 1:].reshape(-1, states.shape[2])
        moments.add(seen)
        total: Array = states[:, 1:, domain.state_names.index(self.maximised)].sum(1)
        return total


class Moments:
    """Running mean and standard deviation of observations; 0 and 1 before there are any."""

    def __init__(self, size: int) -> None:
        self.count, self.loc, self.square = 0, np.zeros(size), np.zeros(size)

    @property
    def scale(self) -> Array:
        """Standard deviation, 1 for a component that has not moved."""
        found = np.sqrt(self.square / max(self.count, 1))
        return np.where(found > 1e-8, found, 1.0)

    def add(self, rows: Array) -> None:
        """Count rows (n, size), by the pairwise update of mean and sum of squares."""
        count, loc = self.count + len(rows), rows.mean(0)
        apart = loc - self.loc
        self.square = self.square + ((rows - loc) ** 2).sum(0) + apart**2 * self.count * len(rows) / count
        self.loc = self.loc + apart * len(rows) / count
        self.count = count
