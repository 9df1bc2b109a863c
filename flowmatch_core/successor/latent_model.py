"""The horizon model of a latent-variable network (GAN, VAE)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from flowmatch_core._units import network_dtype
from flowmatch_core.successor.discounts import Discounts
from flowmatch_core.successor.horizon_model import DirectHorizonModel
from flowmatch_core.successor.networks import LatentNetwork

__all__ = ["LatentHorizonModel"]


@final
class LatentHorizonModel(DirectHorizonModel):
    """The horizon model of a network that maps noise to a state; it has samples and values, but no density.

    Examples:
        >>> from flowmatch_core.successor import HorizonVAE
        >>> model = LatentHorizonModel(HorizonVAE(event_dim=2, cond_dim=3), gamma=0.9)
        >>> s, a, g = torch.zeros(5, 2), torch.zeros(5, 1), torch.Generator().manual_seed(0)
        >>> model.sample(s, a, 7, generator=g).shape
        torch.Size([7, 5, 2])
        >>> model.log_prob(s, s, a)
        Traceback (most recent call last):
        TypeError: a model with HorizonVAE has no log_prob: it maps noise to states without a density.
    """

    def __init__(
        self,
        network: LatentNetwork,
        gamma: float,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        action_loc: Tensor | None = None,
        action_scale: Tensor | None = None,
        constant: Tensor | None = None,
        discounts: Discounts | None = None,
    ) -> None:
        super().__init__(gamma, loc, scale, action_loc, action_scale, constant, discounts)
        self.network = network

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `n` independent future states for every row, with shape `(n, batch, d)`."""
        cond = self._condition(state, action)
        cond = cond.to(network_dtype(self.network) or cond.dtype)
        noise = torch.randn(
            n, len(cond), self.network.event_dim, generator=generator, dtype=cond.dtype, device=cond.device
        )
        with torch.no_grad():
            x = self.network.generate(noise.flatten(0, 1), cond.repeat(n, 1)).view_as(noise)
        return self._whole(x if self.loc is None or self.scale is None else x * self.scale + self.loc)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """Raise a `TypeError`: there is no density."""
        name = type(self.network).__name__
        raise TypeError(f"a model with {name} has no log_prob: it maps noise to states without a density.")
