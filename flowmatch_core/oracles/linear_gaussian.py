"""Successor measures of linear-Gaussian Markov decision processes, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from flowmatch_core._tensors import as_time, check_finite
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.oracles._batches import CHUNK, check_covariance, outer, slices
from flowmatch_core.oracles.gaussian_mixture import GaussianMixture
from flowmatch_core.paths import AffinePath, CondOT

__all__ = ["LinearGaussianMDP"]


@dataclass(frozen=True, eq=False)
class LinearGaussianMDP:
    r"""Linear dynamics with Gaussian noise under a linear policy: successor measure and values.

    $$
    s' = A s + B a + c + w, \quad w \sim N(0, W), \quad a = K s + k
    $$

    With $F = A + BK$ and $f = Bk + c$, the n-th next state is Gaussian,

    $$
    \mu_1 = A s + B a + c, \; \Sigma_1 = W, \qquad
    \mu_{n+1} = F\mu_n + f, \; \Sigma_{n+1} = F\Sigma_n F^\top + W
    $$

    and the successor measure, whose first sample is the NEXT state, is
    $m(\cdot|s,a) = \sum_{n\ge 1} (1-\gamma)\gamma^{n-1} N(\mu_n, \Sigma_n)$.

    States have shape `(*rows, d)`, actions `(*rows, p)`. An action of `None` is that of the policy.

    Args:
        A: The matrix of the state, with shape `(d, d)`.
        B: The matrix of the action, with shape `(d, p)`.
        c: The drift, with shape `(d,)`.
        W: The covariance of the noise, with shape `(d, d)`.
        K: The matrix of the policy, with shape `(p, d)`.
        k: The offset of the policy, with shape `(p,)`.

    Examples:
        >>> I = torch.eye(2)
        >>> mdp = LinearGaussianMDP(A=0.9 * I, B=I, c=torch.zeros(2), W=0.01 * I, K=-0.1 * I, k=torch.zeros(2))
        >>> m = mdp.successor(torch.ones(5, 2), None, gamma=0.5)
        >>> m.mean[0]                                            # (1 - 0.5) 0.8 / (1 - 0.5 * 0.8)
        tensor([0.6667, 0.6667])
        >>> m.sample(7, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([7, 5, 2])
    """

    A: Tensor
    B: Tensor
    c: Tensor
    W: Tensor
    K: Tensor
    k: Tensor

    def __post_init__(self) -> None:
        d, p = self.A.shape[-1], self.B.shape[-1]
        expected = {"A": (d, d), "B": (d, p), "c": (d,), "W": (d, d), "K": (p, d), "k": (p,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                found = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} had shape {found}, but with {d} states and {p} actions it should be {shape}.")
            check_finite(name, getattr(self, name))
        check_covariance("W", self.W, torch.linalg.eigvalsh(self.W))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LinearGaussianMDP:
        """Return the process with its tensors on another device or of another dtype."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, dtype) for f in fields(self)})

    def policy(self, state: Tensor) -> Tensor:
        """Return the action K s + k, with shape `(*rows, p)`."""
        return linear(state, self.K, self.k)

    def step(self, state: Tensor, action: Tensor | None, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw a next state for every row, with shape `(*rows, d)`."""
        mean = self._next_mean(state, action)
        variances, axes = torch.linalg.eigh(self.W)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + linear(noise * variances.clamp_min(0.0).sqrt(), axes)

    def successor(
        self, state: Tensor, action: Tensor | None, gamma: float, *, tolerance: float = 1e-6
    ) -> GaussianMixture:
        """Return the successor measure of every row.

        The mass gamma^N <= `tolerance` beyond the N-th step is assigned to the stationary law, or to step N if there
        is none; `mean` and `second_moment` are exact for the whole series.
        """
        powers, offsets, mixture = self._table(gamma, tolerance)
        first = self._next_mean(state, action)
        means = torch.einsum("nde,...e->...nd", powers, first) + offsets
        mean, second_moment = self._moments(first, gamma)
        return GaussianMixture(mixture.weights, means, mixture.covariances, mean=mean, second_moment=second_moment)

    def velocity_field(
        self,
        gamma: float,
        path: AffinePath = CondOT(),
        *,
        tolerance: float = 1e-6,
    ) -> VelocityField:
        """Return the exact velocity as a field `field(t, x, cond)`, in place of a trained network.

        `cond` is `cat([state, action])`, or the state alone for the action of the policy.

        Examples:
            >>> I = torch.eye(1)
            >>> mdp = LinearGaussianMDP(A=I, B=I, c=torch.ones(1), W=I, K=-I, k=torch.zeros(1))
            >>> mdp.velocity_field(gamma=0.9)(0.0, torch.full((3, 1), -2.0), torch.zeros(3, 1)).mean()
            tensor(3.0000)
        """
        powers, offsets, mixture = self._table(gamma, tolerance)
        (n, d), p = offsets.shape, self.B.shape[-1]

        def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            if cond is None or cond.shape[-1] not in (d, d + p):
                found = None if cond is None else tuple(cond.shape)
                raise ValueError(f"cond had shape {found}, but its rows should hold {d} states or {d} + {p} actions.")
            first = self._next_mean(cond[:, :d], cond[:, d:] if cond.shape[-1] > d else None)
            times = as_time(t, x).expand(len(x))
            velocities = []
            for rows in slices(len(x), max(1, CHUNK // (n * d))):
                means = torch.einsum("nde,be->bnd", powers, first[rows]) + offsets
                velocities.append(mixture.with_means(means).velocity(times[rows], x[rows], path))
            return torch.cat(velocities)

        return field

    def value_linear(
        self, state: Tensor, action: Tensor | None, gamma: float, *, weight: Tensor, offset: float = 0.0
    ) -> Tensor:
        """Return Q of the reward r(x) = weight · x + offset, with shape `(*rows,)`."""
        return (self._moments(self._next_mean(state, action), gamma)[0] @ weight + offset) / (1 - gamma)

    def value_quadratic(self, state: Tensor, action: Tensor | None, gamma: float, *, matrix: Tensor) -> Tensor:
        """Return Q of the reward r(x) = x^T matrix x, with shape `(*rows,)`."""
        second_moment = self._moments(self._next_mean(state, action), gamma)[1]
        return torch.einsum("de,...de->...", matrix, second_moment) / (1 - gamma)

    def value_bump(self, state: Tensor, action: Tensor | None, gamma: float, *, goal: Tensor, spread: Tensor) -> Tensor:
        r"""Return Q of the reward $r(x) = \exp(-\frac12 (x-g)^\top\Lambda^{-1}(x-g))$, `(*rows,)`.

        The expectation is a convolution: the density at the goal $g$ of the mixture with covariances increased by
        $\Lambda$, times the integral of the reward.
        """
        m = self.successor(state, action, gamma)
        widened = GaussianMixture(m.weights, m.means, m.covariances + spread)
        integral: Tensor = torch.linalg.det(2 * math.pi * spread).sqrt()
        return widened.log_prob(goal.expand(state.shape)).exp() * integral / (1 - gamma)

    def _next_mean(self, state: Tensor, action: Tensor | None) -> Tensor:
        action = self.policy(state) if action is None else action
        return linear(state, self.A, self.c) + linear(action, self.B)

    def _closed_loop(self) -> tuple[Tensor, Tensor]:
        return self.A + self.B @ self.K, self.B @ self.k + self.c

    def _table(self, gamma: float, tolerance: float) -> tuple[Tensor, Tensor, GaussianMixture]:
        """Return the maps mu_n = powers_n mu_1 + offsets_n and the mixture of N(0, Sigma_n), including the tail."""
        F, f = self._closed_loop()
        radius = _spectral_radius(F, gamma)
        steps = max(1, math.ceil(math.log(tolerance) / math.log(gamma))) if gamma > 0 else 1
        identity = torch.eye(len(F), dtype=F.dtype, device=F.device)
        powers, offsets, covariances = [identity], [torch.zeros_like(f)], [self.W]
        for _ in range(steps - 1):
            powers.append(F @ powers[-1])
            offsets.append(F @ offsets[-1] + f)
            covariances.append(F @ covariances[-1] @ F.mT + self.W)
        weights = (1 - gamma) * gamma ** torch.arange(steps, dtype=F.dtype, device=F.device)
        if radius < 1:
            powers.append(torch.zeros_like(F))
            offsets.append(torch.linalg.solve(identity - F, f))
            covariances.append(_discounted_lyapunov(F, self.W, 1.0))
            weights = torch.cat([weights, weights.new_tensor([gamma**steps])])
        else:
            weights[-1] += gamma**steps
        zeros = torch.zeros_like(torch.stack(offsets))
        return (
            torch.stack(powers),
            torch.stack(offsets),
            GaussianMixture(weights, zeros, torch.stack(covariances)),
        )

    def _moments(self, first: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Return E[X] and E[X X^T] given mu_1 of every row, as exact sums of geometric series."""
        F, f = self._closed_loop()
        _spectral_radius(F, gamma)
        identity = torch.eye(len(F), dtype=F.dtype, device=F.device)
        start = (first + gamma / (1 - gamma) * f).unsqueeze(-1)
        u = torch.linalg.solve(identity - gamma * F, start).squeeze(-1)
        cross = gamma * outer(u @ F.mT, f.expand_as(u))
        tail = gamma / (1 - gamma) * (outer(f, f) + self.W)
        source = self.W + outer(first, first) + cross + cross.mT + tail
        return (1 - gamma) * u, (1 - gamma) * _discounted_lyapunov(F, source, gamma)


def _spectral_radius(F: Tensor, gamma: float) -> float:
    """Return the spectral radius of F; raise a `ValueError` where the second moment is infinite for gamma."""
    radius = float(torch.linalg.eigvals(F).abs().max())
    bound = 1.0 if radius <= 1 else 1 / radius**2
    if not 0 <= gamma < bound:
        raise ValueError(
            f"gamma was {gamma}, but should be in [0, {bound:.6g}), "
            f"where the second moment is finite (A + B K has spectral radius {radius:.6g})."
        )
    return radius


def _discounted_lyapunov(F: Tensor, source: Tensor, gamma: float) -> Tensor:
    """Return the U with U - gamma F U F^T = source, with shape `(*rows, d, d)`."""
    operator = torch.eye(F.numel(), dtype=F.dtype, device=F.device) - gamma * torch.kron(F, F)
    solution: Tensor = torch.linalg.solve(operator, source.flatten(-2).unsqueeze(-1))
    return solution.view_as(source)
