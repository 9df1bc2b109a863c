"""The interface of all flows: a distribution that is a module, and a flow bound to its conditions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from flowmatch_core._conditions import (
    Condition,
    CondShape,
    bind_condition,
    condition_batch,
    condition_parts,
    condition_rows,
)
from flowmatch_core._tensors import as_shape, check_floating, check_shape

__all__ = ["BoundFlow", "Flow", "Moments"]

MOMENT_SAMPLES = 10_000
"""The number of draws behind `mean` and `variance`."""


class Moments(NamedTuple):
    """The mean and the variance of every entry, estimated from samples, both `(*batch, *event)`."""

    mean: Tensor
    variance: Tensor


class _Moments(Distribution):
    """The moments of a distribution by Monte Carlo."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def _moments(self) -> Moments:
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """The mean of `moments` with 10,000 draws from a generator of a fixed seed, so that it can be repeated."""
        return self._moments().mean

    @property
    def variance(self) -> Tensor:
        """The variance of every entry, estimated like `mean`."""
        return self._moments().variance


class Flow(nn.Module, _Moments, ABC):
    """A generative model with samples, log-probabilities and parameters.

    `ContinuousFlow`, `normalizing.DiscreteTimeFlow` and `discrete.TokenFlow` are flows. A flow is a
    `torch.nn.Module`: `flow.to(device)` moves its network and its location and scale in one call and returns the
    flow, `flow.parameters()` go to an optimiser, and `flow.state_dict()` holds all of them. As with any module, `to`
    changes the network that the flow was given, not a copy of it. A move to another dtype leaves the location and the
    scale in theirs, so that `flow.float()` does not round the units of the data.

    A flow is a `torch.distributions.Distribution`, too. Its methods take conditions of any shape: a tensor
    `(*batch, *cond)`, such as vectors, images or integer labels, or a mapping of such tensors. `given` binds them.

    A flow of a plain callable has no parameters. Its dtype and device, which `to` changes, are those of torch's
    defaults when it was made.

    Args:
        event_shape: The shape of one sample.
        cond_shape: The shape of one condition, or a shape for each name of a mapping. Where it is not declared, the
            first dimension of a condition is the batch; a floating-point tensor with one dimension is one vector.
        batch_shape: The shape of the batch of the flow itself, without conditions.

    Examples:
        >>> from flowmatch_core.flow import ContinuousFlow
        >>> from flowmatch_core.networks import MLPField
        >>> flow: Flow = ContinuousFlow(MLPField(event_dim=2), event_shape=(2,)).to(torch.float64)
        >>> flow.sample((10,)).dtype, len(list(flow.parameters()))
        (torch.float64, 7)
    """

    _default: Tensor

    def __init__(
        self, event_shape: Sequence[int], cond_shape: CondShape = None, batch_shape: Sequence[int] = ()
    ) -> None:
        super().__init__()
        event = as_shape("event_shape", event_shape)
        Distribution.__init__(self, torch.Size(batch_shape), event, validate_args=False)
        self.cond_shape = cond_shape
        self.register_buffer("_default", torch.empty(0), persistent=False)

    @abstractmethod
    def sample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples, without gradients.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, *cond)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The samples, with shape `(*sample_shape, *batch, *event)`.
        """

    @abstractmethod
    def log_prob(self, value: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the log-density, or the log-probability of tokens, in nats.

        Args:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, *cond)`; the batches of both broadcast.
            generator: The source of randomness of a log-probability that is estimated.

        Returns:
            The log-probabilities, with shape `(*batch,)`.
        """

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples with gradients; arguments and result are those of `sample`."""
        self._refuse("rsample")

    def rsample_and_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and their log-densities together; gradients flow through both.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, *cond)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The samples `(*sample_shape, *batch, *event)` and their log-densities `(*sample_shape, *batch)`.
        """
        self._refuse("rsample_and_log_prob")

    def given(self, cond: Condition) -> BoundFlow:
        """Return the flow bound to its conditions, which are its batch; see `BoundFlow`.

        Args:
            cond: The conditions, with shape `(*batch, *cond)`.
        """
        return BoundFlow(self, cond)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BoundFlow:
        """Return the flow with another shape of the batch, for `torch.distributions` that need one."""
        return BoundFlow(self, None, batch_shape)

    def entropy(self, samples: int = 1000, cond: Condition = None, generator: torch.Generator | None = None) -> Tensor:
        """Return a Monte Carlo estimate of the entropy in nats, with shape `(*batch,)`; gradients flow through it.

        Args:
            samples: The number of draws for every condition.
            cond: The conditions, with shape `(*batch, *cond)`.
            generator: The source of randomness.
        """
        return -self.rsample_and_log_prob((samples,), cond, generator)[1].mean(0)

    def moments(
        self, samples: int = MOMENT_SAMPLES, cond: Condition = None, generator: torch.Generator | None = None
    ) -> Moments:
        """Return the mean and the variance of samples, without gradients.

        Args:
            samples: The number of draws for every condition, at least 2.
            cond: The conditions, with shape `(*batch, *cond)`.
            generator: The source of randomness.
        """
        if not self.has_rsample:
            self._refuse("moments")
        x = self.sample((samples,), cond, generator)
        return Moments(x.mean(0), x.var(0))

    def _moments(self) -> Moments:
        return self.moments(generator=self._seeded())

    def _seeded(self) -> torch.Generator:
        return torch.Generator(next(self.parameters(), self._default).device).manual_seed(0)

    def _refuse(self, method: str) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} has no {method}, because its values are categories.")

    def _batch(self, cond: Condition, lead: Sequence[int] = ()) -> torch.Size:
        """Return the shape of the batch of the flow, of its conditions and of values with the batch `lead`."""
        batch = condition_batch(cond, self.cond_shape, lead)
        try:
            return torch.Size(torch.broadcast_shapes(lead, batch, self.batch_shape))  # type: ignore[no-untyped-call]
        except RuntimeError:
            name, found = ("value", lead) if cond is None else ("cond", batch)
            own = f" and {tuple(self.batch_shape)} of the base" if self.batch_shape else ""
            raise ValueError(
                f"{name} has a batch of shape {tuple(found)}, but should have one that broadcasts with "
                f"{tuple(lead)} of value{own}; cond_shape declares the shape of one condition."
            ) from None

    def _lead(self, sample_shape: Sequence[int], cond: Condition) -> tuple[int, ...]:
        """Return the shape of the draws without that of an event."""
        return (*as_shape("sample_shape", sample_shape), *self._batch(cond))

    def _rows(self, value: Tensor, cond: Condition) -> tuple[Tensor, Condition, torch.Size]:
        """Return the points and the conditions as rows, and the shape of their batch."""
        lead = value.shape[: max(0, value.ndim - len(self.event_shape))]
        check_shape("value", value, (*lead, *self.event_shape))
        lead = self._batch(cond, lead)
        x = value.expand((*lead, *self.event_shape)).reshape(math.prod(lead), *self.event_shape)
        return x, self._condition_rows(cond, lead), lead

    def _condition_rows(self, cond: Condition, lead: Sequence[int]) -> Condition:
        return condition_rows(cond, lead, self.cond_shape)

    def _like(self, cond: Condition) -> Tensor:
        """Return a tensor whose dtype and device are those of the samples."""
        known: tuple[Tensor, ...] = (*condition_parts(cond), *self.parameters(), self._default)
        return next(tensor for tensor in known if tensor.is_floating_point())


def check_numbers(value: Tensor, check: bool) -> None:
    """Raise a `ValueError` unless the rows of a value are of a floating-point dtype and, with `check`, finite.

    Examples:
        >>> check_numbers(torch.tensor([0.0, math.nan]), check=True)
        Traceback (most recent call last):
        ValueError: value holds 1 numbers that are not finite, but should hold none; leave them out, or set \
check=False to get NaN.
    """
    check_floating("value", value)
    if check and not bool((finite := value.isfinite()).all()):
        raise ValueError(
            f"value holds {int((~finite).sum())} numbers that are not finite, but should hold none; leave them out, "
            "or set check=False to get NaN."
        )


class BoundFlow(_Moments):
    """A flow bound to its conditions: a `torch.distributions.Distribution` whose batch is that of the conditions.

    It works with `torch.distributions`, for example `Independent` and `MixtureSameFamily`. It holds the flow itself,
    whose parameters it shares.

    Args:
        flow: The flow.
        cond: The conditions, with shape `(*batch, *cond)`, or None.
        batch_shape: The shape of the batch, to which that of the conditions broadcasts; that of the conditions by
            default.

    Examples:
        >>> from flowmatch_core.flow import ContinuousFlow
        >>> flow = ContinuousFlow(lambda t, x, cond: cond.expand_as(x), event_shape=(1,))  # N(c, 1)
        >>> bound = flow.given(torch.tensor([[0.0], [3.0]]))
        >>> bound.batch_shape, bound.sample((5,)).shape
        (torch.Size([2]), torch.Size([5, 2, 1]))
        >>> bound.log_prob(torch.zeros(4, 1, 1)).shape
        torch.Size([4, 2])
    """

    def __init__(self, flow: Flow, cond: Condition = None, batch_shape: Sequence[int] | None = None) -> None:
        self.flow, self._cond = flow, bind_condition(cond, flow._batch(cond), flow.cond_shape)
        if batch_shape is not None:
            self._cond = self._cond.expand(as_shape("batch_shape", batch_shape))
        super().__init__(flow._batch(self._cond), flow.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether gradients reach the samples of `rsample`."""
        return self.flow.has_rsample

    @property
    def support(self) -> constraints.Constraint | None:
        """The set of all values of one sample."""
        return self.flow.support

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.flow}, batch_shape={tuple(self.batch_shape)})"

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BoundFlow:
        """Return the flow with its batch expanded to another shape."""
        return type(self)(self.flow, self._cond, batch_shape)

    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw samples, without gradients, with shape `(*sample_shape, *batch, *event)`."""
        return self.flow.sample(sample_shape, self._cond, generator)

    def rsample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw samples with gradients, with shape `(*sample_shape, *batch, *event)`."""
        return self.flow.rsample(sample_shape, self._cond, generator)

    def log_prob(self, value: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the log-probabilities of values whose batch broadcasts with that of the conditions."""
        return self.flow.log_prob(value, self._cond, generator=generator)

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and their log-densities together; gradients flow through both."""
        return self.flow.rsample_and_log_prob(sample_shape, self._cond, generator)

    def entropy(self, samples: int = 1000, generator: torch.Generator | None = None) -> Tensor:
        """Return a Monte Carlo estimate of the entropy in nats, with shape `(*batch,)`."""
        return self.flow.entropy(samples, self._cond, generator)

    def moments(self, samples: int = MOMENT_SAMPLES, generator: torch.Generator | None = None) -> Moments:
        """Return the mean and the variance of samples, without gradients."""
        return self.flow.moments(samples, self._cond, generator)

    def _moments(self) -> Moments:
        return self.moments(generator=self.flow._seeded())
