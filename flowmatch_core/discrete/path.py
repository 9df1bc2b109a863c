"""The mixture path between noise and data tokens, and the jump rates that generate it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape
from flowmatch_core.discrete.categorical import TokenDistribution, check_prediction
from flowmatch_core.discrete.schedules import PolynomialSchedule, Schedule, token_time
from flowmatch_core.discrete.sources import Source
from flowmatch_core.field import Time

__all__ = ["MixturePath"]


@final
@dataclass(frozen=True)
class MixturePath:
    r"""The path on which each position is noise or data, independently of the others.

    $$
    p_t(x^i \mid x_0, x_1) = (1 - \kappa_t)\,\delta_{x_0^i}(x^i) + \kappa_t\,\delta_{x_1^i}(x^i) .
    $$

    References:
        - Discrete Flow Matching (Gat et al., 2024), https://arxiv.org/abs/2407.15595
        - Generative Flows on Discrete State-Spaces (Campbell et al., 2024), https://arxiv.org/abs/2402.04997

    Args:
        source: Where the tokens start.
        schedule: The schedule $\kappa_t$.

    Examples:
        >>> from flowmatch_core.discrete import MaskSource
        >>> path = MixturePath(MaskSource(5))
        >>> x1 = torch.tensor([[0, 1, 2, 3, 4]])
        >>> path.sample(path.source.sample(x1.shape), x1, 1.0)
        tensor([[0, 1, 2, 3, 4]])
    """

    source: Source
    schedule: Schedule = field(default_factory=PolynomialSchedule)

    def sample(self, x0: Tensor, x1: Tensor, t: Time, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw $x_t \sim p_t(\cdot \mid x_0, x_1)$.

        Args:
            x0: The states at `t = 0`, with shape `(batch, *event)`.
            x1: The data, with the same shape.
            t: The time.
            generator: The source of randomness.
        """
        check_shape("x0", x0, x1.shape)
        noise = self.schedule.noise(token_time(t, x1))
        uniform = torch.rand(x1.shape, generator=generator, dtype=noise.dtype, device=x1.device)
        return torch.where(uniform < noise, x0, x1)

    def rate(self, t: Tensor) -> Tensor:
        r"""Return the rate $\lambda_t = \dot\kappa_t / (1 - \kappa_t)$ at which noise turns to data.

        It diverges as `t` approaches 1; at `t = 1` it is a large finite number.
        """
        noise = self.schedule.noise(t)
        return self.schedule.d_kappa(t) / noise.clamp(min=torch.finfo(noise.dtype).tiny ** 0.5)

    def velocity(self, prediction: TokenDistribution, t: Time, x: Tensor) -> Tensor:
        r"""Return the rates of all jumps, $u_t^i(y, x) = \lambda_t (p_{1|t}^i(y \mid x) - \delta_{x^i}(y))$.

        The result holds a number for every state at every position. Neither the sampler nor a loss uses it.

        Args:
            prediction: The result of a denoiser at `t` and `x`.
            t: The time, below 1.
            x: The states, with shape `(batch, *event)`.

        Returns:
            The rates, with shape `(batch, *event, states)` and sum zero over the states.
        """
        check_prediction(prediction, x, self.source.vocabulary)
        values = prediction.probabilities().values
        rates = values.new_zeros(*x.shape, self.source.states)
        rates[..., : self.source.vocabulary] = values
        rates = rates.scatter_add(-1, x[..., None], -values.sum(-1, keepdim=True))
        rates = rates * self.rate(token_time(t, x))[..., None]
        return rates.masked_fill(self.source.is_data(x)[..., None], 0.0)
