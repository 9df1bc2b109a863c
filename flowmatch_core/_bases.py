"""Base distributions: what a flow starts from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from flowmatch_core._flow import BoundFlow, Flow
from flowmatch_core._tensors import check_finite, check_floating, flatten_event, seeded, standard_normal_log_prob

__all__ = ["Base", "base_of"]


class Base(nn.Module, ABC):
    """The distribution of the states at t = 0.

    Args:
        batch_shape: The shape of its batch.
    """

    def __init__(self, batch_shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.batch_shape = torch.Size(batch_shape)

    @abstractmethod
    def draw(self, lead: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw `(*lead, *event)`, where `lead` ends in a batch that the one of the base broadcasts to.

        Args:
            lead: The shape of the draws.
            like: A tensor of the dtype and the device of a base that has none of its own.
            generator: The source of randomness.
        """

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-densities of `(*lead, *event)`, with shape `lead`."""


class _Normal(Base):
    """N(0, s^2 I)."""

    def __init__(self, event_shape: torch.Size, scale: float) -> None:
        super().__init__()
        self.event_shape, self.scale = event_shape, scale

    def draw(self, lead: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (*lead, *self.event_shape)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device) * self.scale

    def log_prob(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - len(self.event_shape)]
        z = flatten_event(x.reshape(math.prod(lead), *self.event_shape)) / self.scale
        return standard_normal_log_prob(z).reshape(lead) - math.prod(self.event_shape) * math.log(self.scale)


class _Empirical(Base):
    """The rows of a data set, each with the same probability."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def draw(self, lead: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.rows[torch.randint(len(self.rows), tuple(lead), generator=generator, device=self.rows.device)]

    def log_prob(self, x: Tensor) -> Tensor:
        raise ValueError(
            f"base is a set of {len(self.rows)} rows, which has no density, but should be a distribution for a "
            "log-density; pass a torch.distributions.Distribution or a flow."
        )


class _Given(Base):
    """A distribution of torch, or another flow."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__(distribution.batch_shape)
        self.distribution = distribution  # a flow is a module, and so are its parameters those of the base
        if isinstance(distribution, BoundFlow):
            self.flow = distribution.flow

    def draw(self, lead: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
        own = len(self.batch_shape)
        draws, batch = torch.Size(lead[: len(lead) - own]), torch.Size(lead[len(lead) - own :])
        source = self.distribution if batch == self.batch_shape else self.distribution.expand(batch)
        if isinstance(source, Flow | BoundFlow):
            return source.rsample(draws, generator=generator)
        with seeded(generator, like.device):
            return source.rsample(draws) if source.has_rsample else source.sample(draws)

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob: Tensor = self.distribution.log_prob(x)
        return log_prob


def base_of(base: Distribution | Tensor | None, scale: float, event_shape: torch.Size) -> Base:
    """Return the base of a flow from its arguments `base` and `base_scale`.

    Examples:
        >>> base_of(None, 2.0, torch.Size([1])).log_prob(torch.zeros(1, 1))  # -log(2) - log(2 pi) / 2
        tensor([-1.6121])
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"base_scale is {scale}, but should be positive and finite.")
    if base is None:
        return _Normal(event_shape, scale)
    if scale != 1:
        raise ValueError(f"base_scale is {scale}, but should be 1 where base is given; give the base this scale.")
    if isinstance(base, Tensor):
        check_floating("base", base)
        if base.ndim == 0 or base.shape[1:] != event_shape or len(base) == 0:
            raise ValueError(f"base has shape {tuple(base.shape)}, but should be of shape (n, *{tuple(event_shape)}).")
        check_finite("base", base)
        return _Empirical(base)
    if not isinstance(base, Distribution):
        raise ValueError(
            f"base is a {type(base).__name__}, but should be a torch.distributions.Distribution, a flow or a tensor "
            "of rows."
        )
    batch = base.batch_shape
    if batch + base.event_shape == event_shape:  # independent entries, such as Normal(zeros(2), ones(2))
        return _Given(Independent(base, len(batch)) if batch else base)
    if base.event_shape != event_shape:
        raise ValueError(
            f"base has the batch shape {tuple(batch)} and the event shape {tuple(base.event_shape)}, but should have "
            f"the event shape of the flow, {tuple(event_shape)}; see torch.distributions.Independent."
        )
    return _Given(base)
