"""Gaussian mixtures along an affine path, in closed form."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flowmatch_core._tensors import check_finite
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.oracles._batches import CHUNK, check_covariance, column, slices, time_rows
from flowmatch_core.paths import AffinePath, CondOT

__all__ = ["GaussianMixture"]


class GaussianMixture:
    r"""A Gaussian mixture with exact density, velocity and score along an affine path.

    $$
    m_t(x) = \sum_n w_n N(x; \alpha_t\mu_n, C_n), \qquad C_n = \alpha_t^2\Sigma_n + \sigma_t^2 I
    $$

    $$
    v_t(x) = \sum_n \rho_n(x)\,\bigl[\dot\alpha_t\mu_n
    + (\alpha_t\dot\alpha_t\Sigma_n + \sigma_t\dot\sigma_t I)\,C_n^{-1}(x - \alpha_t\mu_n)\bigr],
    \qquad \rho_n \propto w_n N(x; \alpha_t\mu_n, C_n)
    $$

    One mixture can hold a row per condition, with means of its own. Points have shape `(*samples, *rows, d)`, times
    `(*rows,)` or are a number.

    Args:
        weights: The weights $w_n$, with shape `(n,)`.
        means: The means $\mu_n$, with shape `(*rows, n, d)`.
        covariances: The covariances $\Sigma_n$, with shape `(n, d, d)`.
        mean: The mean, with shape `(*rows, d)`, where the mixture truncates a series whose moments are known.
        second_moment: The second moment, with shape `(*rows, d, d)`, likewise.

    References:
        - Temporal Difference Flows (Farebrother et al., 2025), lemma 1, https://arxiv.org/abs/2503.09817

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> m = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1, 1))
        >>> m.sample(3, generator=g).shape, m.log_prob(torch.zeros(5, 1)).shape
        (torch.Size([3, 1]), torch.Size([5]))
        >>> m.velocity(0.0, torch.ones(5, 1)).flatten()      # at t=0 the velocity is E[X] - x
        tensor([-1., -1., -1., -1., -1.])
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        mean: Tensor | None = None,
        second_moment: Tensor | None = None,
    ) -> None:
        n, d = means.shape[-2:]
        if weights.shape != (n,) or covariances.shape != (n, d, d):
            raise ValueError(
                f"weights and covariances have shapes {tuple(weights.shape)} and {tuple(covariances.shape)}, "
                f"but means of shape {tuple(means.shape)} need ({n},) and ({n}, {d}, {d})."
            )
        for name, value in (("weights", weights), ("means", means), ("covariances", covariances)):
            check_finite(name, value)
        if bool((weights < 0).any()) or abs(float(weights.detach().sum()) - 1) > 1e-3:
            raise ValueError(f"weights is {weights.tolist()}, but should hold probabilities, whose sum is 1.")
        self.weights, self.means, self.covariances = weights, means, covariances
        variances, self._axes = torch.linalg.eigh(covariances)
        check_covariance("covariances", covariances, variances)
        self._variances = variances.clamp_min(
            0.0
        )  # rounding may make the eigenvalues of a singular covariance negative
        self._mean, self._second_moment = mean, second_moment

    def with_means(self, means: Tensor) -> GaussianMixture:
        """Return a mixture with the same weights and covariances and other means, `(*rows, n, d)`."""
        other = copy.copy(self)
        other.means, other._mean, other._second_moment = means, None, None
        return other

    @property
    def mean(self) -> Tensor:
        """The mean E[X], with shape `(*rows, d)`."""
        if self._mean is not None:
            return self._mean
        return torch.einsum("n,...nd->...d", self.weights, self.means)

    @property
    def second_moment(self) -> Tensor:
        """The second moment E[X X^T], with shape `(*rows, d, d)`."""
        if self._second_moment is not None:
            return self._second_moment
        outer = torch.einsum("n,...nd,...ne->...de", self.weights, self.means, self.means)
        return outer + torch.einsum("n,nde->de", self.weights, self.covariances)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` independent samples for every row, with shape `(n, *rows, d)`."""
        rows, (components, d) = self.means.shape[:-2], self.means.shape[-2:]
        device = self.means.device
        chosen = torch.multinomial(self.weights, n * math.prod(rows), replacement=True, generator=generator)
        noise = torch.randn(n, *rows, d, generator=generator, dtype=self.means.dtype, device=device)
        factors = self._axes * self._variances.sqrt().unsqueeze(-2)
        spread = torch.einsum("kde,ke->kd", factors[chosen], noise.reshape(-1, d)).view(n, *rows, d)
        flat = self.means.reshape(-1, components, d)
        row = torch.arange(flat.shape[0], device=device).repeat(n)
        return flat[row, chosen].view(n, *rows, d) + spread

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log m(x) in nats, with shape `(*samples, *rows)`."""
        one, zero = x.new_ones(()), x.new_zeros(())

        def density(x: Tensor, means: Tensor, t: Tensor) -> Tensor:
            return self._joint(x, means, one, zero)[0].logsumexp(-1)

        return self._in_chunks(density, x, one)

    def marginal_log_prob(self, t: Time, x: Tensor, path: AffinePath = CondOT()) -> Tensor:
        """Return log m_t(x), the log-density of the path's marginal at time t, with shape `(*samples, *rows)`."""

        def density(x: Tensor, means: Tensor, t: Tensor) -> Tensor:
            return self._joint(x, means, path.alpha(t), path.sigma(t))[0].logsumexp(-1)

        return self._in_chunks(density, x, time_rows(t, x))

    def velocity(self, t: Time, x: Tensor, path: AffinePath = CondOT()) -> Tensor:
        """Return the path's marginal velocity v_t(x), shaped like `x`; finite at t=0 and t=1."""

        def velocity(x: Tensor, means: Tensor, t: Tensor) -> Tensor:
            alpha, sigma, d_alpha = path.alpha(t), path.sigma(t), path.d_alpha(t)
            joint, offset, variance = self._joint(x, means, alpha, sigma)
            gain = column(alpha * d_alpha) * self._variances + column(path.sigma_d_sigma(t))
            moved = torch.einsum("...ne,nde->...nd", gain / variance * offset, self._axes)
            return torch.einsum("...n,...nd->...d", joint.softmax(-1), column(d_alpha) * means + moved)

        return self._in_chunks(velocity, x, time_rows(t, x))

    def score(self, t: Time, x: Tensor, path: AffinePath = CondOT()) -> Tensor:
        """Return the gradient of log m_t(x) in x, shaped like `x`."""

        def score(x: Tensor, means: Tensor, t: Tensor) -> Tensor:
            joint, offset, variance = self._joint(x, means, path.alpha(t), path.sigma(t))
            return -torch.einsum("...n,...ne,nde->...d", joint.softmax(-1), offset / variance, self._axes)

        return self._in_chunks(score, x, time_rows(t, x))

    def velocity_field(self, path: AffinePath = CondOT()) -> VelocityField:
        """Return the velocity as a field `field(t, x, cond=None)`, which ignores `cond`."""

        def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.velocity(t, x, path)

        return field

    def _joint(self, x: Tensor, means: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log w_n N(x; alpha mu_n, C_n), and x - alpha mu_n and C_n in the eigenbasis of C_n."""
        offset = torch.einsum("...nd,nde->...ne", x.unsqueeze(-2) - column(alpha) * means, self._axes)
        variance = column(alpha) ** 2 * self._variances + column(sigma) ** 2
        variance = variance.clamp_min(
            torch.finfo(x.dtype).eps ** 2
        )  # avoids NaN for atoms at t=1, where the nearest atom gets all weight
        log_normal = -0.5 * (offset**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return self.weights.log() + log_normal, offset, variance

    def _in_chunks(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
        """Return `function(x, means, t)`, evaluated over slices of the leading dimension of at most CHUNK entries."""
        n, d = self.means.shape[-2:]
        shape = np.broadcast_shapes(x.shape[:-1], self.means.shape[:-2], t.shape)
        if not shape:
            return function(x, self.means, t)
        size = max(1, CHUNK // (n * d * math.prod(shape[1:])))
        x, means, t = x.expand(*shape, d), self.means.expand(*shape, n, d), t.expand(shape)
        return torch.cat([function(x[rows], means[rows], t[rows]) for rows in slices(shape[0], size)])
