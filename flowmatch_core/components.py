"""A mixture of Gaussians in whose components a conditional flow takes the place of the normal distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributions import constraints

from flowmatch_core._conditions import Condition
from flowmatch_core._flow import check_numbers
from flowmatch_core._standardised import StandardisedFlow
from flowmatch_core.flow import ContinuousFlow, LogDensity
from flowmatch_core.marginals import Marginals
from flowmatch_core.mixture import MixtureFlow

__all__ = ["ComponentFlow", "draw_component"]


def draw_component(
    mixture: MixtureFlow, z: Tensor, cond: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Draw the component of points, and return what the field of a `ComponentFlow` is trained on.

    Args:
        mixture: A mixture of Gaussians.
        z: Standardised points, with shape `(n, d)`.
        cond: Their conditions, with shape `(n, c)`.
        generator: The source of randomness.

    Returns:
        The points $L_k^{-1} (z - B^T c - m_k)$ whitened by a component $k$ drawn from its posterior, in the dtype of
        `z`, and their conditions as `component_condition` returns them.

    Examples:
        >>> mixture = MixtureFlow(torch.ones(2), torch.tensor([[-9.0], [9.0]]), torch.ones(1, 1, 1))
        >>> draw_component(mixture, torch.tensor([[9.5]]))
        (tensor([[0.5000]]), tensor([[0., 1.]]))
    """
    exact = z.to(mixture.means.dtype)
    given = None if cond is None else cond.to(exact.dtype)
    component = torch.multinomial(mixture.log_joint(exact, given).softmax(1), 1, generator=generator)[:, 0]
    u = mixture.whiten(exact, component, given).to(z.dtype)
    return u, component_condition(component, len(mixture.means), u, cond)


def component_condition(component: Tensor, components: int, like: Tensor, cond: Tensor | None = None) -> Tensor:
    """Return conditions `(n, c)` followed by the number of the component as a one-hot vector, `(n, c + k)`.

    Examples:
        >>> component_condition(torch.tensor([1]), 3, torch.zeros(1), torch.tensor([[0.5]]))
        tensor([[0.5000, 0.0000, 1.0000, 0.0000]])
    """
    hot = torch.nn.functional.one_hot(component, components).to(like.dtype)
    return hot if cond is None else torch.cat([cond.to(hot.dtype), hot], 1)


@final
class ComponentFlow(StandardisedFlow):
    r"""The distribution of $x = \mu + s\,(B^T c + m_k + L_k u)$; $k \sim w$, $u$ by a flow given $c$ and $k$.

    $$
    p(x \mid c) = \sum_k w_k\, q\bigl(L_k^{-1} (z - B^T c - m_k) \mid c, k\bigr) \, |L_k|^{-1} \prod_i s_i^{-1},
    \qquad z = (x - \mu) / s
    $$

    With $q = N(0, I)$ it is the mixture. A flow is left to learn how the components differ from Gaussians, which
    `draw_component` shows it.

    Args:
        mixture: The mixture, in standardised units.
        flow: The flow of $u$, whose condition is that of `component_condition`.
        likeliest: The number of components of the largest posterior in the mixture that a log-density is summed over.
            The others are left out, so that the log-density is a lower bound; None sums over all.
        loc: The location $\mu$, which broadcasts to `(d,)`; 0 by default.
        scale: The scale $s$, likewise; 1 by default.
        marginals: A transform of the entries, whose results are the $x$ above; none by default.
        whitening: A matrix that $z$ is multiplied by; see `ContinuousFlow`.
        check: Whether a value that is not finite raises a `ValueError`; the check synchronises with the device.

    Examples:
        >>> mixture = MixtureFlow(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((1, 1, 1), 0.1))
        >>> identity = ContinuousFlow(lambda t, x, cond: torch.zeros_like(x), (1,), cond_shape=(2,))
        >>> flow, x = ComponentFlow(mixture, identity), torch.tensor([[1.0], [-0.5]])
        >>> bool((flow.log_prob(x) - mixture.log_prob(x)).abs().max() < 1e-5)
        True
        >>> flow.sample((3,)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        mixture: MixtureFlow,
        flow: ContinuousFlow,
        likeliest: int | None = 3,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        marginals: Marginals | None = None,
        whitening: Tensor | None = None,
        check: bool = True,
    ) -> None:
        if likeliest is not None and likeliest < 1:
            raise ValueError(f"likeliest is {likeliest}, but should be at least 1, or None.")
        if any(unit is not None for unit in (mixture.loc, mixture.scale, mixture.marginals, mixture.whitening)):
            raise ValueError("mixture has units of its own, but should be in standardised units.")
        if flow.event_shape != mixture.event_shape:
            raise ValueError(
                f"flow has the event shape {tuple(flow.event_shape)}, but should have {tuple(mixture.event_shape)}."
            )
        super().__init__(mixture.event_shape, mixture.cond_shape, (), loc, scale, marginals, whitening)
        self.mixture, self.flow, self.check = mixture, flow, check
        self.components = len(mixture.means)
        self.likeliest = self.components if likeliest is None else min(likeliest, self.components)

    @property
    def support(self) -> constraints.Constraint:
        """The set of all vectors."""
        return constraints.real_vector

    def __repr__(self) -> str:
        return f"ComponentFlow({self.mixture}, {self.flow}, likeliest={self.likeliest})"

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
        lead = self._lead(sample_shape, cond)
        rows, weights = self._vectors(self._condition_rows(cond, lead)), self.mixture.weights
        n = torch.Size(lead).numel()
        if n == 0:
            return self._in_units(weights.new_empty(*lead, *self.event_shape))
        component = torch.multinomial(weights, n, replacement=True, generator=generator)
        u = self.flow.sample((), component_condition(component, self.components, weights, rows), generator)
        return self._in_units(self.mixture.colour(u, component, rows).reshape(*lead, *self.event_shape))

    def log_prob(self, value: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the log-density in nats, or a lower bound; see `likeliest`.

        Args:
            value: The points, with shape `(*batch, d)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: The source of randomness of the probes of hutchinson.

        Returns:
            The log-densities, with shape `(*batch,)`.
        """

        def exact(u: Tensor, given: Tensor) -> LogDensity:
            found = self.flow.log_prob(u, given, generator=generator)
            return LogDensity(found, torch.zeros_like(found), torch.zeros_like(found), 0)

        return self._summed(value, cond, exact).log_prob

    def estimate(
        self, value: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> LogDensity:
        """Return the log-density by a better solve than that of `log_prob`; see `ContinuousFlow.estimate`.

        The errors are the means of those of the components, weighted by their shares of the density.

        Args:
            value: The points, with shape `(*batch, d)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: The source of randomness of the probes of hutchinson.
        """
        return self._summed(value, cond, lambda u, given: self.flow.estimate(u, given, generator=generator))

    def mixture_log_prob(self, value: Tensor, cond: Condition = None) -> Tensor:
        """Return the log-density in nats of the mixture without the flow, with shape `(*batch,)`.

        Args:
            value: The points, with shape `(*batch, d)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
        """
        return self._joint(value, cond).logsumexp(-1)

    def covered(self, value: Tensor, cond: Condition = None) -> Tensor:
        """Return the share of the mixture's density that the likeliest components have, with shape `(*batch,)`.

        Args:
            value: The points, with shape `(*batch, d)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
        """
        return self._joint(value, cond).softmax(-1).topk(self.likeliest, -1).values.sum(-1)

    def _network(self) -> object:
        """Return nothing: no network restricts the precision of points and conditions, as in the mixture."""
        return None

    def _vectors(self, rows: Condition) -> Tensor | None:
        """Return the conditions as rows in the dtype of the mixture."""
        assert rows is None or isinstance(rows, Tensor)
        return None if rows is None else rows.to(self.mixture.means.dtype)

    def _joint(self, value: Tensor, cond: Condition) -> Tensor:
        """Return `MixtureFlow.log_joint` in the units of the data, with shape `(*batch, k)`."""
        z, rows, log_det = self._standardised_rows(value, cond)
        joint = self.mixture.log_joint(z.to(self.mixture.means.dtype), self._vectors(rows))
        return joint.reshape(*log_det.shape, self.components) + log_det[..., None]

    def _summed(self, value: Tensor, cond: Condition, density: Callable[[Tensor, Tensor], LogDensity]) -> LogDensity:
        """Return the log-densities summed over the likeliest components."""
        check_numbers(value, self.check)
        z, rows, log_det = self._standardised_rows(value, cond)
        mixture, z, given = self.mixture, z.to(self.mixture.means.dtype), self._vectors(rows)
        volume = mixture.factors.diagonal(dim1=1, dim2=2).log().sum(1).expand(self.components)
        constant = mixture.weights.log() - mixture.weights.sum().log() - volume
        likeliest = mixture.log_joint(z, given).topk(self.likeliest, 1).indices
        found = []
        for component in likeliest.T:
            u = mixture.whiten(z, component, given)
            found.append(density(u, component_condition(component, self.components, u, given)))
        parts = torch.stack([one.log_prob for one in found], 1) + constant[likeliest]
        share = parts.softmax(1)

        def mean(values: Sequence[Tensor]) -> Tensor:
            return (share * torch.stack(list(values), 1)).sum(1).reshape(log_det.shape)

        return LogDensity(
            parts.logsumexp(1).reshape(log_det.shape).to(log_det.dtype) + log_det,
            mean([one.solver_error for one in found]),
            mean([one.standard_error for one in found]),
            sum(one.nfe for one in found),
        )
