"""A composition of invertible layers as a probability distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from flowmatch_core._conditions import Condition, condition_parts
from flowmatch_core._flow import check_numbers
from flowmatch_core._standardised import StandardisedFlow
from flowmatch_core._tensors import broadcast, seeded, standard_normal_log_prob
from flowmatch_core.marginals import Marginals
from flowmatch_core.normalizing._base import Architecture
from flowmatch_core.normalizing._zuko import zuko

__all__ = ["DiscreteTimeFlow"]


@final
class DiscreteTimeFlow(StandardisedFlow):
    r"""The distribution of $x = \mu + s\, (f_K \circ \dots \circ f_1)(z)$ with $z \sim N(0, I)$.

    $$
    \log p(x) = \log N(z; 0, I) - \sum_k \log \left| \det \frac{\partial f_k}{\partial z_{k-1}} \right|
    - \sum \log |s|
    $$

    It has the methods of a `ContinuousFlow`, and is trained by minimising `-flow.log_prob(x).mean()`. The layers are
    zuko's or transforms that are compatible with them.

    References:
        - Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
        - Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2021),
          https://arxiv.org/abs/1912.02762

    Args:
        kind: The architecture, such as `MAF()`.
        event_dim: The number of dimensions of `x`.
        cond_dim: The number of dimensions of the condition, 0 for none.
        loc: The location $\mu$, which broadcasts to `(event_dim,)`; 0 by default. Most architectures need
            standardised data, and some are invertible only near the origin. Give it and `scale` in float64 where the
            data are far from 0; see `ContinuousFlow`.
        scale: The scale $s$, likewise; 1 by default.
        marginals: Transforms of the columns to normal ones, before `loc` and `scale`; see `ContinuousFlow`.
        whitening: A matrix that the standardised `x` is multiplied by; see `ContinuousFlow`.
        check: Whether a value that is not finite raises a `ValueError`; the check synchronises with the device.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> from flowmatch_core.normalizing import MAF
        >>> flow = DiscreteTimeFlow(MAF(transforms=2), event_dim=2, cond_dim=3)
        >>> flow.sample((10,), cond=torch.zeros(5, 3)).shape
        torch.Size([10, 5, 2])
        >>> flow.log_prob(torch.zeros(5, 2), cond=torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    has_rsample = True

    def __init__(
        self,
        kind: Architecture,
        event_dim: int,
        cond_dim: int = 0,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        marginals: Marginals | None = None,
        whitening: Tensor | None = None,
        check: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if event_dim < 1:
            raise ValueError(f"event_dim is {event_dim}, but should be at least 1.")
        if cond_dim < 0:
            raise ValueError(f"cond_dim is {cond_dim}, but should be at least 0.")
        loc, scale = (
            broadcast(name, torch.full((), default) if unit is None else unit, (event_dim,)).clone()
            for name, unit, default in (("loc", loc, 0.0), ("scale", scale, 1.0))
        )
        super().__init__((event_dim,), (cond_dim,), (), loc, scale, marginals, whitening)
        self.kind, self.event_dim, self.cond_dim, self.check = kind, event_dim, cond_dim, check
        zuko()
        with seeded(torch.default_generator if generator is None else generator, torch.device("cpu")):
            self.transform = kind.build(event_dim, cond_dim)

    @property
    def support(self) -> constraints.Constraint:
        """The set of all vectors."""
        return constraints.real_vector

    def __repr__(self) -> str:
        return f"DiscreteTimeFlow({self.kind}, event_dim={self.event_dim}, cond_dim={self.cond_dim})"

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
            The samples, with shape `(*sample_shape, *batch, event_dim)`.
        """
        with torch.no_grad():
            return self.rsample(sample_shape, cond, generator)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples with gradients; arguments and result are those of `sample`."""
        z, transform, lead = self._noise(sample_shape, cond, generator)
        x: Tensor = transform.inv(z)
        return self._in_units(x).reshape(*lead, self.event_dim)

    def rsample_and_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and their log-densities by one pass; gradients flow through both.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, c)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The samples `(*sample_shape, *batch, event_dim)`, those of `rsample`, and their log-densities
            `(*sample_shape, *batch)`.
        """
        z, transform, lead = self._noise(sample_shape, cond, generator)
        if len(z) == 0:  # zuko cannot sum over no rows
            return self._in_units(z).reshape(*lead, self.event_dim), z.sum(1).reshape(lead)
        y, volume = transform.inv.call_and_ladj(z)
        x, log_det = self._in_units_with_log_det(y)
        log_prob: Tensor = standard_normal_log_prob(z) - volume + log_det
        return x.reshape(*lead, self.event_dim), log_prob.reshape(lead)

    def log_prob(self, value: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the log-density in nats.

        Args:
            value: The points, with shape `(*batch, event_dim)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: Not used, because nothing is drawn; part of the interface of `Flow`.

        Returns:
            The log-densities, with shape `(*batch,)`.
        """
        check_numbers(value, self.check)
        self._check_condition(cond)
        y, rows, log_det = self._standardised_rows(value, cond)
        if len(y) == 0:  # zuko cannot sum over no rows
            return log_det
        z, volume = self.transform(rows).call_and_ladj(y)
        log_prob: Tensor = (volume + standard_normal_log_prob(z)).reshape(log_det.shape) + log_det
        return log_prob

    def _network(self) -> nn.Module:
        return self.transform

    def _noise(
        self, sample_shape: Sequence[int], cond: Condition, generator: torch.Generator | None
    ) -> tuple[Tensor, Any, tuple[int, ...]]:
        """Return noise as rows, the transform from data to noise, and the shape of the draws."""
        self._check_condition(cond)
        lead = self._lead(sample_shape, cond)
        like = self._like(cond)
        z = torch.randn((math.prod(lead), self.event_dim), generator=generator, dtype=like.dtype, device=like.device)
        return z, self.transform(self._condition_rows(cond, lead)), lead

    def _check_condition(self, cond: Condition) -> None:
        given = condition_parts(cond)
        if bool(given) != (self.cond_dim > 0):
            found = tuple(given[0].shape) if given else None
            wanted = f"a tensor that ends in {self.cond_dim} dimensions" if self.cond_dim else "None"
            raise ValueError(f"cond has shape {found}, but should be {wanted}.")
