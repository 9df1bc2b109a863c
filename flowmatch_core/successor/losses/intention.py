r"""Intention-conditioned successor measures: TD²-CFM given a latent variable that an encoder infers.

The data come from policies with an intention that lasts, and a model of (S, A) alone mixes them again at every step of
the bootstrap. So the field has a latent variable in the action, the same at both ends of a transition,

$$
Z \sim q(\cdot|O) = N(\mu(O), \operatorname{diag}\varsigma^2(O)), \quad
(S, [A, Z]) \to (S', [A', Z]),
$$

with the data's own A' and evidence O of the intention, in InFOM (S', A'). The loss is that of TD²-CFM, with the direct
term $\ell_d$ and the bootstrap term $\ell_b$, and the divergence from the prior,

$$
\ell = (1-\gamma)\,\ell_d(Z) + \gamma\,\ell_b(\bar Z) + \beta\,E\,\mathrm{KL}\big(q(\cdot|O)\,\|\,N(0, I)\big).
$$

The bootstrap takes $\bar Z$, which is Z without its gradient, so that the encoder learns from the direct term alone.

At long horizons the direct term teaches the encoder to tell nothing. It compares the field, which is that of the whole
future, with the next state only, and the better Z tells the intention, the farther that future lies from the next
state. On `oracles.TwoDrifts` with c = 1 and $\sigma$ = .5, with the exact field given Z, the direct term of a Z that
tells the sign is below that of a Z that tells nothing at $\gamma$ = .5 (1.48 against 1.87) and above it at .7 (2.87
against 2.05) and .9 (11.7 against 2.8). A decoder of an outcome Y of the intention, such as the step to the next state,
then takes its place:

$$
\ell = (1-\gamma)\,\ell_d(\bar Z) + \gamma\,\ell_b(\bar Z) + \beta\,E\,\mathrm{KL}
- E \log N\big(Y; D(S, A, Z), \operatorname{diag}\tau^2\big).
$$

Given the intention, Y and O should be independent, as two steps of an episode are: then what Z keeps of O is the
intention. A Z that sees Y itself copies it.

References:
    - Intention-Conditioned Flow Occupancy Models (Zheng et al., 2025), https://arxiv.org/abs/2506.08902. There the
      direct term regresses on the current state, and there is no decoder.

Examples:
    >>> import torch
    >>> from flowmatch_core.oracles import TwoDrifts
    >>> g, walk = torch.Generator().manual_seed(0), TwoDrifts(drift=torch.ones(1), noise=0.5)
    >>> s, sign = torch.zeros(64, 1), walk.draw_sign(64, generator=g)
    >>> s1 = walk.step(s, sign, generator=g)
    >>> s2 = walk.step(s1, sign, generator=g)
    >>> batch = Transitions(state=s, action=None, next_state=s1, next_action=None)
    >>> field, encoder = walk.velocity_field(gamma=0.95), IntentionEncoder(evidence_dim=1, latent_dim=1, generator=g)
    >>> loss = intention_loss(field, field, batch, s2 - s1, encoder, gamma=0.95, generator=g)
    >>> parts = 0.05 * loss.direct + 0.95 * loss.bootstrap + 0.01 * loss.divergence
    >>> bool(loss.total.isclose(parts)), float(loss.reconstruction)
    (True, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from flowmatch_core._tensors import check_shape, noise_like, weighted_mean
from flowmatch_core.field import TimeSampler, VelocityField
from flowmatch_core.networks.embeddings import Encoder
from flowmatch_core.networks.layers import draw_weights, linear
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.successor.geometric import check_gamma
from flowmatch_core.successor.losses._latent import divergence_from_prior
from flowmatch_core.successor.losses.bootstrap import discount
from flowmatch_core.successor.losses.mc_cfm import mc_cfm_loss
from flowmatch_core.successor.losses.td2_cfm import td2_cfm_loss
from flowmatch_core.successor.transitions import Transitions, condition

__all__ = ["IntentionDecoder", "IntentionEncoder", "IntentionLoss", "intention_loss"]


class IntentionLoss(NamedTuple):
    """A loss and its terms, scalars; the reconstruction is 0 without a decoder.

    `total = (1 - gamma) * direct + gamma * bootstrap + beta * divergence + reconstruction`
    """

    total: Tensor
    direct: Tensor
    bootstrap: Tensor
    divergence: Tensor
    reconstruction: Tensor


@final
class IntentionEncoder(nn.Module):
    """A perceptron for the mean and the standard deviation of q(z | evidence), with silu.

    Args:
        evidence_dim: The number of dimensions of the evidence.
        latent_dim: The number of dimensions of z.
        hidden: The widths of the hidden layers.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> mean, log_scale = IntentionEncoder(evidence_dim=3, latent_dim=2)(torch.zeros(5, 3))
        >>> mean.shape, log_scale.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        evidence_dim: int,
        latent_dim: int,
        hidden: Sequence[int] = (64, 64),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.body = Encoder(evidence_dim, hidden)
        self.last = linear(self.body.features, 2 * latent_dim)
        draw_weights(self, small=[self.last], generator=generator)

    def forward(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log standard deviation of z, both `(batch, latent_dim)`."""
        mean, log_scale = self.last(self.body(evidence)).chunk(2, -1)
        return mean, log_scale


@final
class IntentionDecoder(nn.Module):
    """A perceptron for the mean of a Gaussian p(y | s, a, z), with silu, and its standard deviations.

    Args:
        cond_dim: The number of dimensions of (s, a, z).
        outcome_dim: The number of dimensions of y.
        hidden: The widths of the hidden layers.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> decoder = IntentionDecoder(cond_dim=3, outcome_dim=2)
        >>> decoder.log_prob(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        cond_dim: int,
        outcome_dim: int,
        hidden: Sequence[int] = (64, 64),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.body = Encoder(cond_dim, hidden)
        self.last = linear(self.body.features, outcome_dim)
        self.log_scale = nn.Parameter(torch.zeros(outcome_dim))
        draw_weights(self, small=[self.last], generator=generator)

    def log_prob(self, outcome: Tensor, cond: Tensor) -> Tensor:
        """Return log p(y | s, a, z) of every row in nats, with shape `(batch,)`."""
        mean: Tensor = self.last(self.body(cond))
        check_shape("outcome", outcome, tuple(mean.shape))
        error = (outcome - mean) * (-self.log_scale).exp()
        return -(error.square() / 2 + self.log_scale + math.log(2 * math.pi) / 2).sum(1)


def intention_loss(
    field: VelocityField,
    target: VelocityField,
    batch: Transitions,
    evidence: Tensor,
    encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    gamma: float,
    beta: float = 0.01,
    decoder: IntentionDecoder | None = None,
    outcome: Tensor | None = None,
    path: AffinePath = CondOT(),
    steps: int = 10,
    solver: str = "midpoint",
    time: TimeSampler = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> IntentionLoss:
    r"""Return the TD²-CFM loss of `field` given the intention, bootstrapped from `target`, with that of the encoder.

    Args:
        field: The field to train, conditioned on `cat([state, action, z])`.
        target: The target network, an average of earlier ones.
        batch: The transitions, with the data's own actions in the next states.
        evidence: What the encoder sees, with shape `(batch, e)`, such as `batch.next_condition`.
        encoder: The encoder to train, such as `IntentionEncoder`: it maps the evidence to the mean and the log standard
            deviation of z, both `(batch, m)`.
        gamma: The discount, one number for all rows.
        beta: The weight $\beta$ of the divergence from the prior.
        decoder: The decoder to train, in which case the encoder learns from it in place of the direct term.
        outcome: What the decoder predicts, with shape `(batch, o)`; the state of the direct term by default.
        path: The path, which should start in N(0, I).
        steps: The number of steps of the bootstrap.
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        time: The law of the times.
        weight: The weights of the transitions, with shape `(batch,)`, ones by default: all terms of a transition are
            multiplied by its weight before the average over the batch.
        generator: The source of randomness.
    """
    check_gamma(gamma)
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta was {beta}, but should be a finite number, not negative.")
    if decoder is None and outcome is not None:
        raise ValueError("outcome was given without a decoder, but only a decoder predicts it; pass both or neither.")
    mean, log_scale = encoder(evidence)
    z = mean + log_scale.exp() * noise_like(mean, generator)
    divergence = weighted_mean(divergence_from_prior(mean, log_scale), weight)
    given = _given(batch, z.detach())
    terms = td2_cfm_loss(
        field,
        target,
        given,
        gamma=gamma,
        path=path,
        steps=steps,
        solver=solver,
        time=time,
        weight=weight,
        generator=generator,
    )
    if decoder is None:
        # the same term as in `terms`, at other noise and times, with the gradient of z
        reached = _given(batch, z)
        direct = mc_cfm_loss(
            field, reached, batch.visited, path=path, time=time, weight=weight, generator=generator
        ).direct
        reconstruction = torch.zeros_like(direct)
    else:
        direct = terms.direct
        predicted = batch.visited if outcome is None else outcome
        reconstruction = -weighted_mean(decoder.log_prob(predicted, condition(batch.condition, z)), weight)
    share = discount(gamma, batch)
    total = (1 - share) * direct + share * terms.bootstrap + beta * divergence + reconstruction
    return IntentionLoss(total, direct, terms.bootstrap, divergence, reconstruction)


def _given(batch: Transitions, z: Tensor) -> Transitions:
    """Return the transitions with z behind the actions of both ends."""

    def behind(action: Tensor | None) -> Tensor:
        return z if action is None else condition(action, z)

    return replace(batch, action=behind(batch.action), next_action=behind(batch.next_action))
