r"""Shared by the losses with a latent variable: those of GAN and VAE, and of intentions.

Those of GAN and VAE have the direct and the bootstrap term of the other losses, with the loss $\ell$ of one state in
place of a regression:

$$
\ell(\theta) = (1-\gamma)\,E\,\ell(S'|S,A;\theta) + \gamma\,E\,\ell(\widehat X|S,A;\theta), \quad
\widehat X = G(Z|S',A';\bar\theta), \quad Z \sim N(0, I)
$$

"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._tensors import noise_like
from flowmatch_core.successor.losses.bootstrap import Loss, discount
from flowmatch_core.successor.networks import LatentNetwork
from flowmatch_core.successor.transitions import Transitions

__all__ = ["divergence_from_prior", "two_states", "two_terms"]


def divergence_from_prior(mean: Tensor, log_scale: Tensor) -> Tensor:
    r"""Return $\mathrm{KL}(N(\mu, \operatorname{diag}\varsigma^2)\,\|\,N(0, I))$ of every row in nats, `(batch,)`.

    $$
    \tfrac12 \sum_i (\mu_i^2 + \varsigma_i^2 - 1 - \log\varsigma_i^2)
    $$

    Examples:
        >>> divergence_from_prior(torch.ones(1, 2), torch.zeros(1, 2))
        tensor([1.])
    """
    return (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1) / 2


def two_states(target: LatentNetwork, batch: Transitions, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return the states of both terms, the next states before those of the target, and (S, A), each `(2 batch, .)`.

    Where S' is terminal the state of the bootstrap is S' itself.
    """
    with torch.no_grad():
        later = target.generate(noise_like(batch.next_state, generator), batch.next_condition)
        states = torch.cat([batch.visited, batch.where_terminal(batch.next_state, later)])
    return states, torch.cat([batch.condition, batch.condition])


def two_terms(rows: Tensor, gamma: float | Tensor, batch: Transitions, weight: Tensor | None) -> Loss:
    """Return the loss, given the losses of the rows of `two_states`, with shape `(2 batch,)`, and their weights."""
    direct, bootstrap = rows.chunk(2)
    return Loss.of(direct, bootstrap, discount(gamma, batch), weight)
