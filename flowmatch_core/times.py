r"""Laws of the flow times in a loss: samplers with the call of `torch.rand`, by the inverse of a distribution function.

A loss $E_t\, \ell(t)$ under another law of $t$ is another weighting of the times, $\int_0^1 p(t)\, \ell(t)\, dt$; the
minimiser of a regression on a velocity is the same for each positive density, but not what a network of finite size
and a finite number of steps make of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["LateTime", "LogitNormalTime", "StratifiedTime", "TimeLaw", "UniformTime"]


class TimeLaw(ABC):
    """A law of times in [0, 1], given by its quantiles; an instance is a sampler with the call of `torch.rand`."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the times at which the distribution function has the values `u`, in [0, 1]."""

    def __call__(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw `n` independent times."""
        return self.quantile(torch.rand(n, generator=generator, dtype=dtype, device=device))


@final
@dataclass(frozen=True)
class UniformTime(TimeLaw):
    """The uniform law, whose draws are those of `torch.rand`.

    Examples:
        >>> UniformTime().quantile(torch.tensor([0.25]))
        tensor([0.2500])
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Return `u`."""
        return u


@final
@dataclass(frozen=True)
class LateTime(TimeLaw):
    r"""Times with the density $p(t) \propto 1 / (1 - t + \epsilon)$, which is largest at the data.

    $$
    F^{-1}(u) = (1 + \epsilon) \Bigl[1 - \Bigl(\frac{\epsilon}{1 + \epsilon}\Bigr)^u\Bigr]
    $$

    Args:
        eps: The positive $\epsilon$: the density at `t = 1` is $1 + 1 / \epsilon$ times that at `t = 0`.

    Examples:
        >>> LateTime(eps=0.1).quantile(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.7683, 1.0000])
    """

    eps: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps is {self.eps}, but should be positive and finite.")

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times at which the distribution function has the values `u`."""
        return (-(1 + self.eps) * torch.expm1(-math.log1p(1 / self.eps) * u)).clamp(0, 1)  # rounding may exceed 1


@final
@dataclass(frozen=True)
class LogitNormalTime(TimeLaw):
    r"""Times $t = \operatorname{sigmoid}(\xi)$ with $\xi \sim N(0, 1)$, which concentrate around one half.

    References:
        - Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024),
          https://arxiv.org/abs/2403.03206

    Examples:
        >>> LogitNormalTime()(1000, generator=torch.Generator().manual_seed(0)).std() < 0.25    # uniform: 0.29
        tensor(True)
        >>> LogitNormalTime().quantile(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times at which the distribution function has the values `u`."""
        times: Tensor = torch.special.ndtri(u).sigmoid()
        return times

    def __call__(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw `n` independent times from normal numbers, which cost less than quantiles."""
        return torch.randn(n, generator=generator, dtype=dtype, device=device).sigmoid()


@final
@dataclass(frozen=True)
class StratifiedTime:
    r"""Draws of a law with exactly one in each of `n` intervals of equal probability, in random order.

    Each time has the law itself and is independent of the rows of the batch, so that the mean of a loss over the batch
    has the same expectation; its variance is smaller by what the times explain. The times of a batch depend on each
    other.

    Args:
        law: The law.

    Examples:
        >>> t = StratifiedTime(UniformTime())(4, generator=torch.Generator().manual_seed(0))
        >>> (4 * t.sort().values).floor()
        tensor([0., 1., 2., 3.])
    """

    law: TimeLaw

    def __call__(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw `n` times."""
        within = torch.rand(n, generator=generator, dtype=dtype, device=device)
        stratum = torch.randperm(n, generator=generator, device=device)
        return self.law.quantile((stratum + within) / n)
