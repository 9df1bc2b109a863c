r"""Horizon models that turn noise into a state at once, without a path: what the GAN and the VAE share.

Their losses have the two terms of the others, with the loss of one state $x$ in place of a regression:

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

__all__ = ["two_states", "weigh"]


def two_states(target: LatentNetwork, batch: Transitions, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The states of both terms, next states above those of the target, and their conditions (S, A), `(2 batch, .)`.

    Where S' is terminal the process stays, and the bootstrap's state is S' itself.
    """
    with torch.no_grad():
        later = target.generate(noise_like(batch.next_state, generator), batch.next_condition)
        states = torch.cat([batch.visited, batch.where_terminal(batch.next_state, later)])
    return states, torch.cat([batch.condition, batch.condition])


def weigh(rows: Tensor, gamma: float, batch: Transitions) -> Loss:
    """The loss of the rows of `two_states`, `(2 batch,)`."""
    weight = discount(gamma, batch)
    direct, bootstrap = (term.mean() for term in rows.chunk(2))
    return Loss.of(direct, bootstrap, weight)
