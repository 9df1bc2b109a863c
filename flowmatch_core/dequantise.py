"""Dequantisation of discrete levels, such as those of pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_core._tensors import flatten_event

__all__ = ["Dequantiser", "importance_bound"]


@final
@dataclass(frozen=True)
class Dequantiser:
    r"""Uniform dequantisation of levels $k = 0, \dots, K - 1$, with the change of variables to the data.

    $$
    y = \frac{k + u}{K}, \quad u \sim U[0, 1), \qquad
    x = a + (b - a)\, y \quad \text{or} \quad x = \operatorname{logit}(\lambda + (1 - 2 \lambda)\, y)
    $$

    With the log-determinant $\log |dx / dk|$, summed over the dimensions,

    $$
    \log P(k) \geq E_u\bigl[\log p(x) + \log |dx / dk|\bigr],
    $$

    so the negative right-hand side divided by $d \log 2$ is an upper bound on the bits per dimension of the levels,
    for any range of the data: `metrics.bits_per_dim(log_prob + log_det, dims)`.

    References:
        - A Note on the Evaluation of Generative Models (Theis et al., 2016), https://arxiv.org/abs/1511.01844
        - Density Estimation Using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803

    Args:
        levels: The number $K$ of levels.
        low: The lower end $a$ of the data.
        high: The upper end $b$ of the data.
        logit: The margin $\lambda$ of a logit transform, in (0, 1/2), in place of `low` and `high`; None for none.

    Examples:
        >>> x, log_det = Dequantiser(levels=4)(torch.tensor([[0, 3]]), torch.Generator().manual_seed(0))
        >>> x.mul(4).floor(), log_det  # 2 log(1/4)
        (tensor([[0., 3.]]), tensor([-2.7726]))
    """

    levels: int = 256
    low: float = 0.0
    high: float = 1.0
    logit: float | None = None

    def __post_init__(self) -> None:
        if not self.levels >= 1 or self.levels % 1:
            raise ValueError(f"levels is {self.levels}, but should be a whole number from 1.")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low and high are {self.low} and {self.high}, but should be finite, low below high.")
        if self.logit is not None and not 0 < self.logit < 0.5:
            raise ValueError(f"logit is {self.logit}, but should be above 0 and below 0.5.")
        if self.logit is not None and (self.low, self.high) != (0.0, 1.0):
            raise ValueError(f"low and high are {self.low} and {self.high}, but should be left alone with a logit.")

    def __call__(
        self, levels: Tensor, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return the data and the log-determinants, with shapes `(batch, *event)` and `(batch,)`.

        Args:
            levels: The levels, whole numbers from 0 to `levels - 1` of any dtype, with shape `(batch, *event)`.
            generator: The source of randomness.
            dtype: The dtype of the data.
        """
        number = levels if levels.is_floating_point() else levels.long()  # 256 is no number of uint8
        if bool((wrong := ~((number >= 0) & (number < self.levels) & (number.floor() == number))).any()):
            unit = bool(((number >= 0) & (number <= 1)).all())
            hint = f"; multiply pixels in [0, 1] by {self.levels - 1} and round them" if unit else ""
            raise ValueError(
                f"levels holds {number[wrong][0].item():g}, but should hold whole numbers from 0 to "
                f"{self.levels - 1}{hint}."
            )
        u = torch.rand(levels.shape, generator=generator, dtype=dtype, device=levels.device)
        x, centre = self._data(levels.to(dtype) + u), self._data(levels.to(dtype) + 0.5)
        if (lost := self.quantise(centre) != levels).any():
            raise ValueError(
                f"levels holds {levels[lost][0].item():g}, which data of dtype {dtype} cannot tell from the next one; "
                "pass dtype=torch.float64."
            )
        shift = torch.finfo(dtype).eps
        while (lost := self.quantise(x) != levels).any():  # rounded into the next bin
            x = torch.where(lost, x.lerp(centre, min(shift, 1.0)), x)
            shift *= 2
        if self.logit is None:
            slope = torch.full_like(x, math.log((self.high - self.low) / self.levels))
        else:
            # dx/dy = (1 - 2 margin) / (p (1 - p)) with p = sigmoid(x)
            slope = math.log((1 - 2 * self.logit) / self.levels) - F.logsigmoid(x) - F.logsigmoid(-x)
        return x, flatten_event(slope).sum(1)

    def quantise(self, x: Tensor) -> Tensor:
        """Return the levels of data, with dtype int64; values out of range are clamped.

        The levels of dequantised data come back exactly, in any dtype.

        Examples:
            >>> Dequantiser(levels=256, low=-1.0).quantise(torch.tensor([-1.0, 0.0, 1.0, 7.0]))
            tensor([  0, 128, 255, 255])
        """
        if self.logit is None:
            y = (x - self.low) / (self.high - self.low)
        else:
            y = (torch.sigmoid(x) - self.logit) / (1 - 2 * self.logit)
        return (y * self.levels).floor().clamp(0, self.levels - 1).to(torch.int64)

    def _data(self, place: Tensor) -> Tensor:
        """Return the data at `k + u` in `[0, levels]`."""
        y = place / self.levels
        if self.logit is None:
            return self.low + (self.high - self.low) * y
        return torch.logit(self.logit + (1 - 2 * self.logit) * y)


def importance_bound(log_prob: Tensor) -> Tensor:
    r"""Return $\log \frac1n \sum_i p_i$ over the first dimension: a tighter bound from several draws.

    The log-densities are those of `n` dequantisations of the same levels, log-determinants included. The
    expectation grows with `n` from the usual bound to the log-probability itself.

    References:
        - Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Args:
        log_prob: The log-densities, with shape `(n, *batch)`.

    Examples:
        >>> importance_bound(torch.tensor([0.0, 0.0])), importance_bound(torch.tensor([1.0, 3.0]).log())
        (tensor(0.), tensor(0.6931))
    """
    return log_prob.logsumexp(0) - math.log(len(log_prob))
