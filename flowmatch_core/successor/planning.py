"""Planning over policies: generalised policy improvement (GPI) by samples of their horizon models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmatch_core._tensors import check_finite, check_floating, check_shape
from flowmatch_core.successor.horizon_model import GeometricHorizonModel

__all__ = ["Plan", "gpi"]

ROWS = 2**16
"""How many samples are solved together; it bounds the memory."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The candidate to follow in every state, with what it was chosen by.

    Args:
        index: The number of the chosen candidate, with shape `(batch,)`.
        value: The estimates of Q, with shape `(batch, N)`.
        error: The standard errors of the differences of `value` to that of candidate 0, with shape `(batch, N)`.
    """

    index: Tensor
    value: Tensor
    error: Tensor


@torch.no_grad()
def gpi(
    model: GeometricHorizonModel,
    reward: Callable[[Tensor], Tensor],
    state: Tensor,
    actions: Tensor,
    w: Tensor | None,
    *,
    samples: int = 128,
    margin: float = 0.0,
    generator: torch.Generator | None = None,
) -> Plan:
    r"""Choose among policies $\pi_w$ the one of the greatest value in every state.

    $$
    \hat Q_i(s) = \frac{1}{1-\gamma}\,\frac1n \sum_{j=1}^n r(X_{ij}), \quad X_{ij} = \psi_1(\epsilon_j | s, a_i, w_i),
    \qquad
    i^* = \operatorname{argmax}_{i\,:\, i = 0 \text{ or } \hat Q_i - \hat Q_0 > m\, \hat\sigma_i} \hat Q_i
    $$

    The noises $\epsilon_j$ are the same for all candidates of a state, so that what they have in common cancels from
    the differences; $\hat\sigma_i$ is the standard error of $\hat Q_i - \hat Q_0$ over the $n$ pairs. Equal candidates
    have equal values, bit for bit, and the order of the candidates changes no value. Of equal values the first is
    chosen.

    To follow the chosen policy for a step and plan anew is GPI: with $|\hat Q_i - Q_i| \le \epsilon$ and $m = 0$ its
    value is at least $\max_w V^{\pi_w} - 2\epsilon/(1-\gamma)$. With a margin $m$, candidate 0 is left only for one
    that is better by a one-sided test: a candidate of the same value is taken with a chance of $1 - \Phi(m)$ in place
    of one half.

    References:
        - Successor Features for Transfer in Reinforcement Learning (Barreto et al., 2017), theorem 1,
          https://arxiv.org/abs/1606.05312
        - Temporal Difference Flows (Farebrother et al., 2025), section 5.3, https://arxiv.org/abs/2503.09817

    Args:
        model: The horizon model of the policies; its field is conditioned on `cat([state, action, w])`.
        reward: The reward, which maps states `(n, d)` to `(n,)`.
        state: The states, with shape `(batch, d)`.
        actions: The first action of every candidate, $\pi_w(s)$, with shape `(batch, N, p)`.
        w: The parameters of the candidates' policies, with shape `(batch, N, q)`; None for a model of one policy, which
            chooses the first action alone. Candidate 0 is the default, the policy made for the task.
        samples: The number $n$ of samples per candidate, at least 2.
        margin: The number $m$ of standard errors by which a candidate must exceed candidate 0; `inf` never leaves it.
        generator: The source of randomness.

    Returns:
        The choices, the values and the standard errors.

    Raises:
        ValueError: There is no candidate, a shape is wrong, or an action, a `w` or a reward is not finite.

    Examples:
        >>> def field(t, x, cond):                                  # X = X_0 + w, whatever the state and the action
        ...     return cond[:, 2:]
        >>> model, g = GeometricHorizonModel(field, (1,), gamma=0.5), torch.Generator().manual_seed(0)
        >>> w = torch.tensor([[[0.0], [2.0], [1.0]]])
        >>> plan = gpi(model, lambda x: x[:, 0], torch.zeros(1, 1), torch.zeros(1, 3, 1), w, generator=g)
        >>> plan.index, plan.value - plan.value[:, :1]
        (tensor([1]), tensor([[0.0000, 4.0000, 2.0000]]))
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}, but should be at least 2.")
    if not margin >= 0:
        raise ValueError(f"margin is {margin}, but should not be negative.")
    given = _candidates(state, actions, w)
    batch, count, _ = given.shape
    row = torch.arange(batch, dtype=given.dtype, device=given.device)[:, None, None].expand(batch, count, 1)
    # equal candidates are evaluated once: the last bits of a product depend on the place of a row in its batch
    distinct, place = torch.unique(torch.cat([row, given], -1).flatten(0, 1), dim=0, return_inverse=True)
    shape = samples, batch, *model.flow.event_shape
    noise = torch.randn(shape, generator=generator, dtype=state.dtype, device=state.device)
    found = []
    for part in distinct.split(max(1, ROWS // samples)):
        rows = part[:, 0].long()
        found.append(_rewards(reward, model.push(noise[:, rows], state[rows], part[:, 1:])))
    rewards = torch.cat(found)[place].reshape(batch, count, samples) / (1 - model.gamma)
    differences = rewards - rewards[:, :1]
    gain, error = differences.mean(-1), differences.std(-1) / math.sqrt(samples)
    index = torch.where(gain > margin * error, gain, 0.0).argmax(1)  # the first of the greatest
    return Plan(index, rewards.mean(-1), error)


def _candidates(state: Tensor, actions: Tensor, w: Tensor | None) -> Tensor:
    """Return the actions with the parameters of the policies appended, with shape `(batch, N, p + q)`."""
    if state.ndim != 2 or not len(state):
        raise ValueError(f"state has shape {tuple(state.shape)}, but should have shape (batch, d), batch >= 1.")
    if actions.ndim != 3 or len(actions) != len(state) or not actions.shape[1]:
        raise ValueError(
            f"actions has shape {tuple(actions.shape)}, but should have shape ({len(state)}, N, p), N >= 1: at least "
            "one candidate for every state."
        )
    check_finite("actions", actions)
    if w is None:
        return actions
    if w.ndim != 3 or w.shape[:2] != actions.shape[:2]:
        raise ValueError(
            f"w has shape {tuple(w.shape)}, but should have shape ({len(actions)}, {actions.shape[1]}, q), as actions."
        )
    check_finite("w", w)
    return torch.cat([actions, w], -1)


def _rewards(reward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the rewards of states `(n, rows, d)`, with shape `(rows, n)`."""
    states = x.transpose(0, 1).flatten(0, 1)
    rewards = reward(states)
    check_shape("the result of reward", rewards, (len(states),))
    check_floating("the result of reward", rewards)
    check_finite("the result of reward", rewards)
    return rewards.reshape(x.shape[1], x.shape[0])
