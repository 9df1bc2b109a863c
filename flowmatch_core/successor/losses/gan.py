r"""GAN: a relativistic adversarial horizon model with zero-centred gradient penalties (R3GAN).

$$
\ell_D(x) = \zeta(D(\tilde X) - D(x)) + \tfrac\lambda2 \|\nabla D(x)\|^2 +
\tfrac\lambda2 \|\nabla D(\tilde X)\|^2, \qquad
\ell_G(x) = \zeta(D(x) - D(\tilde X)), \qquad \tilde X = G(Z|S,A), \quad \zeta(a) = \log(1 + e^a)
$$

for the states $x$ of both terms. The loss is the sum of both, each with the parameters of the other network held
fixed, so its gradient is that of the game and one optimiser trains both networks. The weight $\lambda$ may decrease
linearly during training.

References:
    - Temporal Difference Flows (Farebrother et al., 2025), appendix C.3.3, https://arxiv.org/abs/2503.09817
    - The GAN is dead; long live the GAN! A Modern GAN Baseline (Huang et al., 2024), https://arxiv.org/abs/2501.05441
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_core._tensors import noise_like
from flowmatch_core.networks.layers import draw_weights
from flowmatch_core.successor.losses._latent import two_states, two_terms
from flowmatch_core.successor.losses.bootstrap import Loss
from flowmatch_core.successor.networks import ConditionalMLP, LatentNetwork
from flowmatch_core.successor.transitions import Transitions

__all__ = ["HorizonGAN", "gan_loss"]


@final
class HorizonGAN(LatentNetwork):
    """A generator and a critic, residual perceptrons modulated by the condition, with leaky ReLU.

    Args:
        event_dim: The number of dimensions of a state, and of the noise.
        cond_dim: The number of dimensions of a condition.
        width: The width of all hidden layers.
        blocks: The number of residual blocks of each.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> HorizonGAN(event_dim=2, cond_dim=3).generate(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 2])
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
        self.sampler = ConditionalMLP(event_dim, event_dim, cond_dim, width, blocks, _leaky)
        self.critic = ConditionalMLP(event_dim, 1, cond_dim, width, blocks, _leaky)
        draw_weights(self, generator=generator)

    def generate(self, noise: Tensor, cond: Tensor) -> Tensor:
        """Return the states of the generator, with shape `(batch, event_dim)`."""
        state: Tensor = self.sampler(noise, cond)
        return state


def gan_loss(
    field: HorizonGAN,
    target: HorizonGAN,
    batch: Transitions,
    *,
    gamma: float | Tensor,
    penalty: float | tuple[float, float] = (0.05, 0.005),
    progress: float = 0.0,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Loss:
    r"""Return the adversarial loss of `field`, bootstrapped from the generator of `target`.

    Args:
        field: The generator and critic to train.
        target: The target network, an average of earlier ones.
        batch: The transitions.
        gamma: The discount, or that of each transition, with shape `(batch,)`.
        penalty: The weight $\lambda$ of the gradient penalties, or its values at the start and at the end of
            training, interpolated linearly.
        progress: The fraction of training that is done, in [0, 1].
        weight: The weights of the transitions, with shape `(batch,)`, ones by default: both terms of a transition are
            multiplied by its weight before the average over the batch.
        generator: The source of randomness.

    Examples:
        >>> s, g = torch.zeros(64, 2), torch.Generator().manual_seed(0)
        >>> batch = Transitions(state=s, action=None, next_state=s, next_action=None)
        >>> gan = HorizonGAN(event_dim=2, cond_dim=2, generator=g)
        >>> loss = gan_loss(gan, gan, batch, gamma=0.9, generator=g)
        >>> bool(loss.total.isclose(0.1 * loss.direct + 0.9 * loss.bootstrap))
        True
    """
    strength = _penalty_at(penalty, progress)
    real, cond = two_states(target, batch, generator)
    made = field.generate(noise_like(real, generator), cond)
    real, fake = real.requires_grad_(), made.detach().requires_grad_()
    of_real, of_fake = field.critic(real, cond)[:, 0], field.critic(fake, cond)[:, 0]
    slopes = torch.autograd.grad(of_real.sum() + of_fake.sum(), (real, fake), create_graph=True)
    steepness = slopes[0].square().sum(1) + slopes[1].square().sum(1)
    critic = F.softplus(of_fake - of_real) + strength / 2 * steepness
    # the parameters of the critic get no gradient from the loss of the generator
    frozen = {name: parameter.detach() for name, parameter in field.critic.named_parameters()}
    of_made: Tensor = torch.func.functional_call(field.critic, frozen, (made, cond))[:, 0]
    return two_terms(critic + F.softplus(of_real.detach() - of_made), gamma, batch, weight)


def _penalty_at(penalty: float | tuple[float, float], progress: float) -> float:
    ends = penalty if isinstance(penalty, tuple) else (penalty, penalty)
    if len(ends) != 2 or not all(0 <= end < float("inf") for end in ends):
        raise ValueError(
            f"penalty was {penalty}, but should be a finite number that is not negative, or two of them: at the start "
            "of training and at its end."
        )
    if not 0 <= progress <= 1:
        raise ValueError(f"progress was {progress}, but should be in [0, 1].")
    start, end = ends
    return start + progress * (end - start)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
