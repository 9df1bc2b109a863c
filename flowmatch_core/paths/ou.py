"""The path of the Ornstein-Uhlenbeck process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.paths._affine import time_tensor
from flowmatch_core.paths._variance_preserving import VariancePreserving

__all__ = ["OU"]


@final
@dataclass(frozen=True)
class OU(VariancePreserving):
    r"""The Ornstein-Uhlenbeck process $dx = -x\,ds + \sqrt{2}\,dB_s$ of the data, run backward.

    With $s = S (1 - t)$, from the horizon $S$ at `t = 0` to the data at `t = 1`:

    $$
    \alpha_t = e^{-S (1 - t)}, \quad \sigma_t = \sqrt{1 - e^{-2 S (1 - t)}}
    $$

    As a flow in $s$ the process has the velocity $-(x + \nabla \log p)$; in `t` that is
    $v_t(x) = S (x + \nabla \log p_t(x))$. It is `VP` with a constant rate of $2 S$; the remarks there about $t = 0$
    and $t = 1$ hold here.

    References:
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456

    Args:
        horizon: The duration $S$ of the process; the weight of the data at `t = 0` is $\alpha_0 = e^{-S}$.

    Examples:
        >>> OU(horizon=2.0).alpha(torch.tensor([0.0, 1.0]))
        tensor([0.1353, 1.0000])
    """

    horizon: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.horizon < float("inf"):
            raise ValueError(f"horizon is {self.horizon}, but should be positive and finite.")

    def noise_since_data(self, t: Time) -> Tensor:
        return 2 * self.horizon * (1 - time_tensor(t))

    def noise_rate(self, t: Time) -> Tensor:
        return torch.full_like(time_tensor(t), 2 * self.horizon)

    def time_of_noise(self, noise: Tensor) -> Tensor:
        return 1 - noise / (2 * self.horizon)
