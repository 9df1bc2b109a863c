r"""β-VAE: a variational autoencoder as horizon model.

$$
\ell(x) = E_{Z \sim q(\cdot|x,S,A)} \|x - G(Z|S,A)\|^2 +
\beta\,\mathrm{KL}\big(q(\cdot|x,S,A)\,\|\,N(0, I)\big)
$$

for the states $x$ of both terms. Divided by $\beta$ this is the negative evidence lower bound of the decoder $N(G(Z),
\frac\beta2 I)$. Samples are its means $G(Z)$, so they lack the variance $\beta/2$, and every bootstrap step loses it
again: a measure whose variance is not far above $\beta/2$ collapses to its mean.

References:
    - Temporal Difference Flows (Farebrother et al., 2025), appendix C.3.4, https://arxiv.org/abs/2503.09817
    - beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al., 2017),
      https://openreview.net/forum?id=Sy2fzU9gl
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_core._tensors import noise_like
from flowmatch_core.networks.layers import draw_weights
from flowmatch_core.successor.losses._latent import divergence_from_prior, two_states, two_terms
from flowmatch_core.successor.losses.bootstrap import Loss
from flowmatch_core.successor.networks import ConditionalMLP, LatentNetwork
from flowmatch_core.successor.transitions import Transitions

__all__ = ["HorizonVAE", "vae_loss"]


@final
class HorizonVAE(LatentNetwork):
    """An encoder and a decoder, residual perceptrons modulated by the condition, with mish.

    Args:
        event_dim: The number of dimensions of a state, and of its code.
        cond_dim: The number of dimensions of a condition.
        width: The width of all hidden layers.
        blocks: The number of residual blocks of each.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> mean, log_scale = HorizonVAE(event_dim=2, cond_dim=3).encode(torch.zeros(5, 2), torch.zeros(5, 3))
        >>> mean.shape, log_scale.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        event_dim: int,
        cond_dim: int,
        width: int = 256,
        blocks: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(event_dim)
        self.encoder = ConditionalMLP(event_dim, 2 * event_dim, cond_dim, width, blocks, F.mish)
        self.decoder = ConditionalMLP(event_dim, event_dim, cond_dim, width, blocks, F.mish)
        draw_weights(self, small=[self.encoder.last], generator=generator)

    def encode(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation of q(z | x, cond), both `(batch, event_dim)`."""
        mean, log_scale = self.encoder(x, cond).chunk(2, -1)
        return mean, log_scale

    def generate(self, noise: Tensor, cond: Tensor) -> Tensor:
        """Return the mean of the decoder, with shape `(batch, event_dim)`."""
        state: Tensor = self.decoder(noise, cond)
        return state


def vae_loss(
    field: HorizonVAE,
    target: HorizonVAE,
    batch: Transitions,
    *,
    gamma: float | Tensor,
    beta: float = 0.5,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Loss:
    r"""Return the β-VAE loss of `field`, bootstrapped from the decoder of `target`.

    Args:
        field: The network to train.
        target: The target network, an average of earlier ones.
        batch: The transitions.
        gamma: The discount, or that of each transition, with shape `(batch,)`.
        beta: The weight $\beta$ of the divergence from the prior.
        weight: The weights of the transitions, with shape `(batch,)`, ones by default: both terms of a transition are
            multiplied by its weight before the average over the batch.
        generator: The source of randomness.

    Examples:
        >>> s, g = torch.zeros(64, 2), torch.Generator().manual_seed(0)
        >>> batch = Transitions(state=s, action=None, next_state=s, next_action=None)
        >>> vae = HorizonVAE(event_dim=2, cond_dim=2, generator=g)
        >>> loss = vae_loss(vae, vae, batch, gamma=0.9, generator=g)
        >>> bool(loss.total.isclose(0.1 * loss.direct + 0.9 * loss.bootstrap))
        True
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta was {beta}, but should be a finite positive number.")
    states, cond = two_states(target, batch, generator)
    mean, log_scale = field.encode(states, cond)
    code = mean + log_scale.exp() * noise_like(states, generator)
    error = (states - field.generate(code, cond)).square().sum(1)
    return two_terms(error + beta * divergence_from_prior(mean, log_scale), gamma, batch, weight)
