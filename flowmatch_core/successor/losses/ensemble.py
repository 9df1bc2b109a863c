r"""Ensemble: probabilistic one-step models and policies, by maximum likelihood.

A member k has a Gaussian model of the step, the probability that the next state is terminal, and a Gaussian model of
the policy:

$$
S' - S \sim N(\mu_k(S, A), \Sigma_k(S, A)), \quad P(S' \text{ is terminal}) = p_k(S, A), \quad
A' \sim N(\nu_k(S'), \Lambda_k(S'))
$$

with diagonal covariances. There is no bootstrap: the successor measure comes from rolling a member out
(`EnsembleHorizonModel`), so that its errors add up along the horizon.

References:
    - Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan et al., 2017),
      https://arxiv.org/abs/1612.01474
    - Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models (Chua et al., 2018),
      https://arxiv.org/abs/1805.12114
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_core._tensors import check_floating, check_shape, noise_like, weighted_mean
from flowmatch_core.networks.layers import draw_weights, linear
from flowmatch_core.successor.losses.bootstrap import Loss
from flowmatch_core.successor.transitions import Transitions, condition

__all__ = ["GaussianEnsemble", "ensemble_loss"]

LOW, HIGH = math.log(1e-3), math.log(10.0)
"""Bounds on the logarithm of a standard deviation, in units of the standardised states and actions."""


@final
class GaussianEnsemble(nn.Module):
    """Networks of the members of an ensemble, for standardised states and actions.

    A member has a perceptron for the step and, if there are actions, one for the policy. Each gives the mean and the
    standard deviation of a diagonal Gaussian; the standard deviation is between 0.001 and 10, because the likelihood of
    deterministic dynamics has no upper bound.

    Args:
        event_dim: The number d of dimensions of a state.
        cond_dim: The number of dimensions of a state and an action, or d without actions.
        members: The number of members.
        hidden: The widths of the hidden layers, none for models that are linear.
        generator: The source of randomness of the initial weights.

    Examples:
        >>> network = GaussianEnsemble(event_dim=2, cond_dim=3, members=4, hidden=(16,))
        >>> member = torch.tensor([0, 3, 3])
        >>> state, terminal = network.step(torch.zeros(3, 2), torch.zeros(3, 1), member)
        >>> state.shape, terminal.dtype, network.act(state, member).shape
        (torch.Size([3, 2]), torch.bool, torch.Size([3, 1]))
    """

    def __init__(
        self,
        event_dim: int,
        cond_dim: int,
        members: int = 5,
        hidden: Sequence[int] = (200, 200, 200),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"members is {members}, but should be at least 1.")
        if cond_dim < event_dim:
            raise ValueError(f"cond_dim is {cond_dim}, but should be at least event_dim, which is {event_dim}.")
        self.event_dim, self.action_dim, self.members = event_dim, cond_dim - event_dim, members
        self.steps = nn.ModuleList(_perceptron(cond_dim, hidden, 2 * event_dim + 1) for _ in range(members))
        policies = members if self.action_dim else 0
        self.policies = nn.ModuleList(_perceptron(event_dim, hidden, 2 * self.action_dim) for _ in range(policies))
        ends = [network[-1] for network in (*self.steps, *self.policies) if isinstance(network, nn.Sequential)]
        draw_weights(self, small=ends, generator=generator)

    def step(
        self, state: Tensor, action: Tensor | None, member: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw the next state of every row by the member of the row, and whether it is terminal.

        Args:
            state: The states, with shape `(batch, d)`.
            action: The actions, with shape `(batch, p)`, or None.
            member: The number of the member of every row, with shape `(batch,)`.
            generator: The source of randomness.

        Returns:
            The states, with shape `(batch, d)`, and booleans, with shape `(batch,)`.
        """
        raw = _by_member(self.steps, condition(state, action), member)
        chance = torch.rand(len(raw), generator=generator, dtype=raw.dtype, device=raw.device)
        return state + _draw(raw[:, 1:], generator), chance < raw[:, 0].sigmoid()

    def act(self, state: Tensor, member: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw an action of the policy in every state `(batch, d)` by the member of the row, `(batch, p)`."""
        return _draw(_by_member(self.policies, state, member), generator)

    def log_prob(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Return the log-likelihoods of the steps and of the policy's actions, each with shape `(members, batch)`.

        A step is the next state, and whether it is terminal if the batch says so.
        """
        rows, change = batch.condition, batch.next_state - batch.state
        steps = []
        for network in self.steps:
            raw = network(rows)
            step = _log_normal(raw[:, 1:], change)
            if batch.terminal is not None:
                step = step + F.logsigmoid(torch.where(batch.terminal, raw[:, 0], -raw[:, 0]))
            steps.append(step)
        if batch.next_action is None:
            return torch.stack(steps), change.new_zeros(self.members, len(change))
        actions = [_log_normal(network(batch.next_state), batch.next_action) for network in self.policies]
        return torch.stack(steps), torch.stack(actions)


def ensemble_loss(
    field: GaussianEnsemble,
    batch: Transitions,
    *,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Loss:
    """Return the negative log-likelihood of the transitions and of the policy's actions, the mean over the members.

    All members see the same transitions and differ by their initial weights. The bootstrap term is 0, so `total` equals
    `direct`.

    Args:
        field: The ensemble to train.
        batch: The transitions, of one step, standardised.
        weight: The weights of the transitions, with shape `(batch,)`, ones by default: the loss of each row is
            multiplied by its weight before the average over the batch.
        generator: Not used; the loss draws nothing.

    Examples:
        >>> s, g = torch.zeros(64, 2), torch.Generator().manual_seed(0)
        >>> batch = Transitions(state=s, action=None, next_state=s, next_action=None)
        >>> loss = ensemble_loss(GaussianEnsemble(event_dim=2, cond_dim=2, generator=g), batch)
        >>> bool(loss.total == loss.direct), float(loss.bootstrap)
        (True, 0.0)
    """
    if batch.steps != 1:
        raise ValueError(f"batch has steps {batch.steps}, but should have 1: the ensemble models single steps.")
    check_shape("batch.condition", batch.condition, (len(batch), field.event_dim + field.action_dim))
    check_floating("batch.state", batch.state)
    steps, actions = field.log_prob(batch)
    total = -weighted_mean((steps + actions).mean(0), weight)
    return Loss(total, total, torch.zeros_like(total))


def _perceptron(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    sizes, layers = [inputs, *hidden, outputs], list[nn.Module]()
    for one, next_one in itertools.pairwise(sizes):
        layers += [linear(one, next_one), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _by_member(networks: nn.ModuleList, rows: Tensor, member: Tensor) -> Tensor:
    """Return the output of the network of each row's member."""
    parts = [(member == k).nonzero()[:, 0] for k in range(len(networks))]
    outputs = torch.cat([network(rows[part]) for network, part in zip(networks, parts, strict=True)])
    return torch.empty_like(outputs).index_copy_(0, torch.cat(parts), outputs)


def _gaussian(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the logarithm of the standard deviation."""
    mean, log_std = raw.chunk(2, 1)
    log_std = HIGH - F.softplus(HIGH - log_std)
    return mean, LOW + F.softplus(log_std - LOW)


def _draw(raw: Tensor, generator: torch.Generator | None) -> Tensor:
    mean, log_std = _gaussian(raw)
    return mean + log_std.exp() * noise_like(mean, generator)


def _log_normal(raw: Tensor, x: Tensor) -> Tensor:
    mean, log_std = _gaussian(raw)
    return -(((x - mean) / log_std.exp()).square() / 2 + log_std + math.log(2 * math.pi) / 2).sum(1)
