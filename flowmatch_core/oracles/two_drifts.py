"""A random walk whose drift has a hidden sign: successor measures given the sign, without it, and of the mixed walk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmatch_core._tensors import as_time, check_finite
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.oracles._batches import CHUNK, outer, slices
from flowmatch_core.oracles.gaussian_mixture import GaussianMixture
from flowmatch_core.paths import AffinePath, CondOT

__all__ = ["TwoDrifts"]


@dataclass(frozen=True, eq=False)
class TwoDrifts:
    r"""A random walk that drifts along $c$ or along $-c$ for a whole episode.

    $$
    S' = S + \varepsilon c + \sigma\xi, \quad \xi \sim N(0, I), \quad P(\varepsilon = \pm 1) = \tfrac12
    $$

    The sign $\varepsilon$ is the intention of an episode: constant, and not part of the state. Given the sign the
    successor measure, whose first sample is the NEXT state, is a mixture over the number of steps,

    $$
    m(\cdot|s,\varepsilon) = \sum_{k\ge 1} (1-\gamma)\gamma^{k-1} N(s + \varepsilon k c, k\sigma^2 I)
    $$

    Over both signs it has mean $s$ and covariance $\frac{1+\gamma}{(1-\gamma)^2} cc^\top + \frac{1}{1-\gamma}\sigma^2
    I$. A model that is conditioned on the state alone and bootstraps does not learn this law but that of a walk that
    draws its sign again at every step (`mixed`), of covariance $\frac{1}{1-\gamma}(cc^\top + \sigma^2 I)$.

    States have shape `(*rows, d)`, signs `(*rows, 1)`; a sign may be any real number, a multiple of the drift.

    Args:
        drift: The drift $c$ of a step, with shape `(d,)`.
        noise: The standard deviation $\sigma$ of the noise of a step.

    References:
        - Intention-Conditioned Flow Occupancy Models (Zheng et al., 2025), https://arxiv.org/abs/2506.08902

    Examples:
        >>> walk, s = TwoDrifts(drift=torch.ones(1), noise=0.5), torch.zeros(1, 1)
        >>> round(float(walk.successor(s, None, gamma=0.95).second_moment), 2)
        785.0
        >>> round(float(walk.mixed(s, gamma=0.95).second_moment), 2)
        25.0
        >>> walk.successor(s, torch.ones(1, 1), gamma=0.95).mean           # c / (1 - gamma)
        tensor([[20.]])
    """

    drift: Tensor
    noise: float

    def __post_init__(self) -> None:
        if self.drift.ndim != 1:
            raise ValueError(f"drift has shape {tuple(self.drift.shape)}, but should have shape (d,).")
        check_finite("drift", self.drift)
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise is {self.noise}, but should be a finite positive number.")

    def draw_sign(self, rows: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the sign of every episode, with shape `(rows, 1)`."""
        drift = self.drift
        return torch.randint(2, (rows, 1), generator=generator, device=drift.device).to(drift.dtype) * 2 - 1

    def step(self, state: Tensor, sign: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw a next state for every row, with shape `(*rows, d)`."""
        noise = torch.randn(state.shape, generator=generator, dtype=state.dtype, device=state.device)
        return state + sign * self.drift + self.noise * noise

    def mean_sign(self, step: Tensor) -> Tensor:
        r"""Return $E[\varepsilon|S'-S] = \tanh(c^\top (S'-S) / \sigma^2)$ of steps `(*rows, d)`, `(*rows, 1)`."""
        return torch.tanh(step @ self.drift / self.noise**2).unsqueeze(-1)

    def successor(
        self, state: Tensor, sign: Tensor | None, gamma: float, *, tolerance: float = 1e-6
    ) -> GaussianMixture:
        """Return the successor measure of every row, given the sign or, for None, over both.

        The mass gamma^N <= `tolerance` beyond the N-th step is assigned to step N; `mean` and `second_moment` are
        exact for the whole series.
        """
        weights, steps = self._steps(gamma, tolerance)
        signs = [sign] if sign is not None else [state.new_full((1,), value) for value in (1.0, -1.0)]
        means = torch.cat([self._means(state, each, steps) for each in signs], -2)
        moments = [self._moments(state, each * self.drift, 0.0, gamma) for each in signs]
        mean, second_moment = (torch.stack(parts).mean(0) for parts in zip(*moments, strict=True))
        return GaussianMixture(
            weights.repeat(len(signs)) / len(signs),
            means,
            self._covariances(steps.repeat(len(signs))),
            mean=mean,
            second_moment=second_moment,
        )

    def mixed(self, state: Tensor, gamma: float, *, mean_sign: float = 0.0, tolerance: float = 1e-4) -> GaussianMixture:
        """Return the successor measure of the walk that draws its sign again at every step.

        It has N (N + 3) / 2 components, one for every number of steps up to N and of positive signs among them;
        `tolerance` bounds the mass gamma^N beyond the N-th step, which is assigned to that step.

        Args:
            state: The states, with shape `(*rows, d)`.
            gamma: The discount.
            mean_sign: The mean of the signs, in [-1, 1].
            tolerance: The mass that is not resolved.
        """
        if not -1 <= mean_sign <= 1:
            raise ValueError(f"mean_sign is {mean_sign}, but should be in [-1, 1].")
        weights, steps = self._steps(gamma, tolerance)
        k, positive = torch.meshgrid(steps, torch.cat([steps.new_zeros(1), steps]), indexing="ij")
        possible = positive <= k
        k, positive, weights = k[possible], positive[possible], weights[:, None].expand(possible.shape)[possible]
        negative, odds = k - positive, (1 + mean_sign) / 2
        choose = torch.lgamma(k + 1) - torch.lgamma(positive + 1) - torch.lgamma(negative + 1)
        log_odds = torch.xlogy(positive, odds) + torch.xlogy(negative, 1 - odds)
        mean, second_moment = self._moments(state, mean_sign * self.drift, 1 - mean_sign**2, gamma)
        return GaussianMixture(
            weights * (choose + log_odds).exp(),
            self._means(state, state.new_ones(1), positive - negative),
            self._covariances(k),
            mean=mean,
            second_moment=second_moment,
        )

    def velocity_field(self, gamma: float, path: AffinePath = CondOT(), *, tolerance: float = 1e-6) -> VelocityField:
        """Return the exact velocity given the sign as a field `field(t, x, cond)`, with `cond` = `cat([state, sign])`.

        Examples:
            >>> walk = TwoDrifts(drift=torch.ones(1), noise=0.5)
            >>> walk.velocity_field(gamma=0.95)(0.0, torch.zeros(2, 1), torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
            tensor([[ 23.0000],
                    [-17.0000]])
        """
        weights, steps = self._steps(gamma, tolerance)
        d = len(self.drift)
        mixture = GaussianMixture(weights, steps.new_zeros(len(steps), d), self._covariances(steps))

        def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            if cond is None or cond.shape[-1] != d + 1:
                found = None if cond is None else tuple(cond.shape)
                raise ValueError(f"cond had shape {found}, but its rows should hold {d} states and a sign.")
            times = as_time(t, x).expand(len(x))
            velocities = []
            for rows in slices(len(x), max(1, CHUNK // (len(steps) * d))):
                means = self._means(cond[rows, :d], cond[rows, d:], steps)
                velocities.append(mixture.with_means(means).velocity(times[rows], x[rows], path))
            return torch.cat(velocities)

        return field

    def _steps(self, gamma: float, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return the weights and the numbers k = 1, ..., N of steps, both `(N,)`."""
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma was {gamma}, but should be in [0, 1).")
        n = max(1, math.ceil(math.log(tolerance) / math.log(gamma))) if gamma > 0 else 1
        steps = torch.arange(1, n + 1, dtype=self.drift.dtype, device=self.drift.device)
        weights = (1 - gamma) * gamma ** (steps - 1)
        weights[-1] += gamma**n
        return weights, steps

    def _means(self, state: Tensor, sign: Tensor, drifts: Tensor) -> Tensor:
        """Return s + sign n c for the numbers n of drifts, with shape `(*rows, len(drifts), d)`."""
        return state.unsqueeze(-2) + sign.unsqueeze(-1) * outer(drifts, self.drift)

    def _covariances(self, steps: Tensor) -> Tensor:
        identity = torch.eye(len(self.drift), dtype=steps.dtype, device=steps.device)
        return steps[:, None, None] * self.noise**2 * identity

    def _moments(self, state: Tensor, drift: Tensor, mixing: float, gamma: float) -> tuple[Tensor, Tensor]:
        """Return E[X] and E[X X^T] for steps of mean `drift` and covariance `mixing` c c^T + sigma² I.

        With E[T] = 1 / (1 - gamma) and E[T²] = (1 + gamma) / (1 - gamma)².
        """
        first, second = 1 / (1 - gamma), (1 + gamma) / (1 - gamma) ** 2
        moved = drift.expand_as(state)
        identity = torch.eye(len(self.drift), dtype=state.dtype, device=state.device)
        cross = first * outer(state, moved)
        about = first * (mixing * outer(self.drift, self.drift) + self.noise**2 * identity)
        about = about + second * outer(moved, moved)
        return state + first * moved, outer(state, state) + cross + cross.mT + about
