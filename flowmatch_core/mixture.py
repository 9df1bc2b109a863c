"""Gaussian mixtures around a linear function of the condition, as flows: baselines in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributions import constraints

from flowmatch_core._conditions import Condition, condition_parts
from flowmatch_core._flow import check_numbers
from flowmatch_core._standardised import StandardisedFlow
from flowmatch_core._tensors import check_finite, check_shape
from flowmatch_core.marginals import Marginals

__all__ = ["MixtureFlow"]

CHUNK = 2**22
"""The largest number of pairs of a point and a component in memory."""


@final
class MixtureFlow(StandardisedFlow):
    r"""The distribution of $x = \mu + s\,(B^T c + m_k + L_k \varepsilon)$; $k \sim w$, $\varepsilon \sim N(0, I)$.

    $$
    p(x \mid c) = \sum_k w_k\, N\bigl(z - B^T c;\; m_k,\, L_k L_k^T\bigr) \prod_i s_i^{-1}, \qquad z = (x - \mu) / s
    $$

    One component is a Gaussian, given conditions a linear regression with Gaussian residuals; a component for each
    row of a table, with one factor $h I$ for all, is a kernel density estimate.

    Args:
        weights: The weights $w_k$ of the components, positive, with shape `(k,)`; they are divided by their sum.
        means: The means $m_k$, with shape `(k, d)`.
        factors: The lower-triangular Cholesky factors $L_k$ of the covariances, with shape `(k, d, d)`, or `(1, d, d)`
            for the same one in all components.
        slopes: The slopes $B$ of the mean in the condition, with shape `(c, d)`, or None without conditions.
        loc: The location $\mu$, which broadcasts to `(d,)`; 0 by default.
        scale: The scale $s$, likewise; 1 by default.
        marginals: A transform of the entries, whose results are the $x$ above; none by default.
        whitening: A matrix that $z$ is multiplied by; see `ContinuousFlow`.
        check: Whether a value that is not finite raises a `ValueError`; the check synchronises with the device.

    Examples:
        >>> flow = MixtureFlow(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((1, 1, 1), 0.1))
        >>> flow.log_prob(torch.tensor([[1.0], [-1.0]]))  # log(1/2) - log(0.1) - log(2 pi) / 2
        tensor([0.6905, 0.6905])
        >>> flow.sample((3,)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        factors: Tensor,
        slopes: Tensor | None = None,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        marginals: Marginals | None = None,
        whitening: Tensor | None = None,
        check: bool = True,
    ) -> None:
        if means.ndim != 2 or 0 in means.shape:
            raise ValueError(f"means has shape {tuple(means.shape)}, but should be (components, d).")
        components, d = means.shape
        check_shape("weights", weights, (components,))
        check_shape("factors", factors, (1 if len(factors) == 1 else components, d, d))
        for name, value in (("means", means), ("factors", factors), ("slopes", slopes)):
            if value is not None:
                check_finite(name, value)
        if not bool((weights > 0).all() and weights.isfinite().all()):
            raise ValueError("weights holds values that are not positive and finite, but should hold none.")
        if not bool((factors.diagonal(dim1=1, dim2=2) > 0).all()):
            raise ValueError("factors has a diagonal that is not positive, but should be Cholesky factors.")
        if slopes is not None and (slopes.ndim != 2 or slopes.shape[1] != d):
            raise ValueError(f"slopes has shape {tuple(slopes.shape)}, but should be (conditions, {d}).")
        super().__init__((d,), None if slopes is None else (len(slopes),), (), loc, scale, marginals, whitening)
        self.check = check
        self.weights: Tensor
        self.means: Tensor
        self.factors: Tensor
        self.slopes: Tensor | None
        for name, value in (("weights", weights), ("means", means), ("factors", factors), ("slopes", slopes)):
            self.register_buffer(name, None if value is None else value.clone())

    @property
    def support(self) -> constraints.Constraint:
        """The set of all vectors."""
        return constraints.real_vector

    def __repr__(self) -> str:
        components, d = self.means.shape
        return f"MixtureFlow(components={components}, event_shape=({d},), cond_shape={self.cond_shape})"

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples, without gradients.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, c)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The samples, with shape `(*sample_shape, *batch, d)`.
        """
        self._check_condition(cond)
        lead = self._lead(sample_shape, cond)
        n, (components, d) = math.prod(lead), self.means.shape
        noise = torch.randn(n, d, 1, generator=generator, dtype=self.means.dtype, device=self.means.device)
        if components == 1 or n == 0:
            chosen = torch.zeros(n, dtype=torch.long, device=noise.device)
        else:
            chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        rows = self._condition_rows(cond, lead)
        assert rows is None or isinstance(rows, Tensor)
        return self._in_units(self.colour(noise[..., 0], chosen, rows).reshape(*lead, d))

    def log_prob(self, value: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the log-density in nats.

        Args:
            value: The points, with shape `(*batch, d)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: Not used, because nothing is drawn; part of the interface of `Flow`.

        Returns:
            The log-densities, with shape `(*batch,)`.
        """
        check_numbers(value, self.check)
        self._check_condition(cond)
        z, rows, log_det = self._standardised_rows(value, cond)
        z = z.to(self.means.dtype) - self._shift(rows)
        parts = [self._log_joint(part).logsumexp(1) for part in torch.split(z, max(1, CHUNK // len(self.means)))]
        return torch.cat(parts).reshape(log_det.shape).to(log_det.dtype) + log_det

    def log_joint(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        r"""Return $\log w_k + \log N(z - B^T c; m_k, L_k L_k^T)$ of all components, `(n, k)`.

        Args:
            z: Standardised points, with shape `(n, d)`.
            cond: Their conditions, with shape `(n, c)`.
        """
        return self._log_joint(z - self._shift(cond))

    def whiten(self, z: Tensor, component: Tensor, cond: Tensor | None = None) -> Tensor:
        r"""Return $L_k^{-1} (z - B^T c - m_k)$, `(n, d)`, which is standard normal where $z$ is of component $k$.

        Args:
            z: Standardised points, with shape `(n, d)`.
            component: The number of the component of each, with shape `(n,)`.
            cond: Their conditions, with shape `(n, c)`.
        """
        centred = (z - self._shift(cond) - self.means[component])[..., None]
        white: Tensor = torch.linalg.solve_triangular(self._factors(component), centred, upper=False)[..., 0]
        return white

    def colour(self, u: Tensor, component: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the standardised points that `whiten` maps to `u`, with its shapes."""
        scaled = (self._factors(component) @ u[..., None].to(self.means.dtype))[..., 0]
        return self.means[component] + scaled + self._shift(cond)

    def _network(self) -> object:
        """Return nothing: no network restricts the precision of points and conditions."""
        return None

    def _factors(self, component: Tensor) -> Tensor:
        return self.factors if len(self.factors) == 1 else self.factors[component]

    def _log_joint(self, z: Tensor) -> Tensor:
        """Return `log_joint` of points without the part of the conditions."""
        d = z.shape[1]
        if len(self.factors) == 1:
            points, centres = (self._whitened(rows, self.factors[0]) for rows in (z, self.means))
            distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        else:
            pairs = zip(self.means, self.factors, strict=True)
            distance = torch.stack([self._whitened(z - mean, factor).square().sum(1) for mean, factor in pairs], 1)
        volume = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        weight = self.weights.log() - self.weights.sum().log()
        return weight - volume - distance / 2 - d / 2 * math.log(2 * math.pi)

    @staticmethod
    def _whitened(rows: Tensor, factor: Tensor) -> Tensor:
        """Return the rows multiplied by the inverse of a Cholesky factor."""
        white: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False).T
        return white

    def _shift(self, cond: Tensor | None) -> Tensor | float:
        """Return the part of the mean that depends on the conditions, `(rows, d)`."""
        return 0.0 if self.slopes is None or cond is None else cond.to(self.slopes.dtype) @ self.slopes

    def _check_condition(self, cond: Condition) -> None:
        given = condition_parts(cond)
        if bool(given) != (self.slopes is not None):
            found = tuple(given[0].shape) if given else None
            wanted = "None" if self.slopes is None else f"a tensor that ends in {len(self.slopes)} dimensions"
            raise ValueError(f"cond has shape {found}, but should be {wanted}.")
