"""The interface of all flows: a distribution that is a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Flow"]


class Flow(nn.Module, ABC):
    """A generative model with samples, log-probabilities and parameters.

    `ContinuousFlow`, `normalizing.DiscreteTimeFlow` and `discrete.TokenFlow` are flows. A flow is a
    `torch.nn.Module`: `flow.to(device)` moves its network and its location and scale in one call and returns the
    flow, `flow.parameters()` go to an optimiser, and `flow.state_dict()` holds all of them. As with any module, `to`
    changes the network that the flow was given, not a copy of it.

    A flow of a plain callable has no parameters. Its dtype and device, which `to` changes, are those of torch's
    defaults when it was made.

    Examples:
        >>> from flowmatch_core.flow import ContinuousFlow
        >>> from flowmatch_core.networks import MLPField
        >>> flow: Flow = ContinuousFlow(MLPField(event_dim=2), event_shape=(2,)).to(torch.float64)
        >>> flow.sample((10,)).dtype, len(list(flow.parameters()))
        (torch.float64, 7)
    """

    _default: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_default", torch.empty(0), persistent=False)

    @property
    @abstractmethod
    def event_shape(self) -> torch.Size:
        """The shape of one sample."""

    @abstractmethod
    def sample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples, without gradients.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, c)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The samples, with shape `(*sample_shape, *batch, *event)`.
        """

    @abstractmethod
    def log_prob(
        self, value: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the log-density, or the log-probability of tokens, in nats.

        Args:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: The source of randomness of a log-probability that is estimated.

        Returns:
            The log-probabilities, with shape `(*batch,)`.
        """

    def _register_units(self, name: str, value: Tensor | None) -> None:
        """Register a location or a scale: a parameter as such, another tensor as a buffer.

        The buffer is a copy, so that loading a state leaves the given tensor as it is. A tensor that requires
        gradients is kept itself: it is a variable of the caller.
        """
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value if value is None or value.requires_grad else value.clone())
