r"""One model of the successor measures of all discounts in a range, conditioned on the discount.

The Bellman equation has one discount on both sides, so that each row of a batch may have its own:

$$
m_\gamma(\cdot|s,a) = (1-\gamma)\,P(\cdot|s,a) + \gamma\,E\,m_\gamma(\cdot|S',A'), \quad \gamma \sim \text{a law on }
[\gamma_{\min}, \gamma_{\max}]
$$

A network learns it with the features of the row's discount in its condition, behind the action, in the direct term and
in the target alike. Pass the discounts of the rows to the loss as `gamma`.

References:
    - Gamma-Nets: Generalizing Value Estimation over Timescale (Sherstan et al., 2020), the same for values,
      https://arxiv.org/abs/1911.07794

Examples:
    >>> from flowmatch_core.networks import MLPField
    >>> from flowmatch_core.successor import Transitions, td2_cfm_loss
    >>> s, g = torch.zeros(64, 2), torch.Generator().manual_seed(0)
    >>> batch, gamma = Transitions(s, None, s, None), UniformDiscounts(0.5, 0.95).sample(64, generator=g)
    >>> field = MLPField(event_dim=2, hidden=(8,), cond_dim=2 + Discounts.FEATURES, generator=g)
    >>> loss = td2_cfm_loss(field, field, with_discount(batch, gamma), gamma=gamma, generator=g)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from flowmatch_core.successor.geometric import check_gamma
from flowmatch_core.successor.transitions import Transitions

__all__ = ["Discounts", "LogUniformDiscounts", "UniformDiscounts", "with_discount"]


@dataclass(frozen=True)
class Discounts(ABC):
    """A law of discounts on [low, high], given by its quantiles.

    Args:
        low: The smallest discount.
        high: The largest discount, below 1.
    """

    FEATURES: ClassVar[int] = 3
    """The number of features of a discount."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"low and high were {self.low} and {self.high}, but should be 0 <= low <= high < 1.")

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the discounts at which the distribution function has the values `u`, in [0, 1]."""

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw `n` independent discounts, in double precision, which 1 - gamma needs near 1."""
        return self.quantile(torch.rand(n, generator=generator, dtype=torch.float64, device=device))

    def check(self, gamma: float) -> None:
        """Raise a `ValueError` unless the discount is in [low, high]."""
        if not self.low <= gamma <= self.high:
            raise ValueError(
                f"gamma was {gamma}, but should be in [{self.low}, {self.high}], the discounts of the training."
            )

    @staticmethod
    def features(gamma: Tensor) -> Tensor:
        r"""Return $[\gamma, 1-\gamma, -\log(1-\gamma)/5]$ of discounts `(*rows,)`, with shape `(*rows, 3)`.

        The last one tells discounts near 1 apart; it is 0.92 at 0.99.

        Examples:
            >>> Discounts.features(torch.tensor([0.5]))
            tensor([[0.5000, 0.5000, 0.1386]])
        """
        return torch.stack([gamma, 1 - gamma, -torch.log1p(-gamma) / 5], -1)


@final
@dataclass(frozen=True)
class UniformDiscounts(Discounts):
    """The uniform law.

    Examples:
        >>> UniformDiscounts(0.5, 0.9).quantile(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.5000, 0.7000, 0.9000])
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Return the discounts at which the distribution function has the values `u`."""
        return (self.low + (self.high - self.low) * u).clamp(self.low, self.high)  # rounding may exceed high


@final
@dataclass(frozen=True)
class LogUniformDiscounts(Discounts):
    r"""The law whose horizon $1/(1-\gamma)$ is uniform on a logarithmic scale, so that long ones are as frequent.

    $$
    1 - \gamma = (1-\gamma_{\min})^{1-u} (1-\gamma_{\max})^u
    $$

    Examples:
        >>> LogUniformDiscounts(0.0, 0.99).quantile(torch.tensor([0.0, 0.5, 1.0]))    # horizons 1, 10, 100
        tensor([0.0000, 0.9000, 0.9900])
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Return the discounts at which the distribution function has the values `u`."""
        first, last = math.log1p(-self.low), math.log1p(-self.high)
        return (-torch.expm1(first + (last - first) * u)).clamp(self.low, self.high)  # rounding may exceed high


def with_discount(batch: Transitions, gamma: Tensor) -> Transitions:
    """Return the batch with the features of the discounts of the rows behind its actions, now and next.

    Standardise the batch before: the features are in no units. Without actions the features take their place, so that
    the condition is the state and the features.

    Args:
        batch: The transitions.
        gamma: The discount of every row, with shape `(batch,)`.

    Examples:
        >>> s, a = torch.zeros(2, 1), torch.ones(2, 1)
        >>> with_discount(Transitions(s, a, s, a), torch.tensor([0.0, 0.5])).condition
        tensor([[0.0000, 1.0000, 0.0000, 1.0000, 0.0000],
                [0.0000, 1.0000, 0.5000, 0.5000, 0.1386]])
    """
    check_gamma(gamma, len(batch))
    features = Discounts.features(gamma).to(batch.state.dtype)

    def extended(action: Tensor | None) -> Tensor:
        return features if action is None else torch.cat([action, features], 1)

    return replace(batch, action=extended(batch.action), next_action=extended(batch.next_action))
