"""The horizon model of an ensemble of one-step models, rolled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from flowmatch_core._units import network_dtype
from flowmatch_core.successor.geometric import geometric
from flowmatch_core.successor.horizon_model import DirectHorizonModel
from flowmatch_core.successor.losses.ensemble import GaussianEnsemble

__all__ = ["EnsembleHorizonModel"]

FAR = 1e6
"""Standardised states farther away than this, and those that are not numbers, are not rolled out further."""


@final
class EnsembleHorizonModel(DirectHorizonModel):
    r"""The horizon model of a `GaussianEnsemble`: a sample is the end of a rollout of T ~ Geometric(1 - gamma) steps.

    Every rollout follows one member, drawn at random, for the step and for the policy: the disagreement of the members
    spreads the samples as it would if one of them were the truth (TS-inf of Chua et al., 2018). A rollout that comes to
    a terminal state stays there. There are samples and values, but no density. An action of `None` is that of the
    policy.

    Args:
        network: The ensemble.
        gamma: The discount, in [0, 1).
        policy: The policy, which maps states `(batch, d)` to actions `(batch, p)`, both in raw units; None for the
            ensemble's own models of it.
        terminal: Whether states may be terminal; if not, the ensemble's probabilities of it are not used.
        loc: The location of the states, with shape `(d,)`.
        scale: The scale of the states, with shape `(d,)`.
        action_loc: The location of the actions, with shape `(p,)`.
        action_scale: The scale of the actions, with shape `(p,)`.
        constant: The values of the components of a state that never change, with shape `(d,)`, NaN for those that do,
            which alone the ensemble describes; see `GeometricHorizonModel`.

    References:
        - Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models (Chua et al., 2018),
          https://arxiv.org/abs/1805.12114

    Examples:
        >>> model = EnsembleHorizonModel(GaussianEnsemble(event_dim=2, cond_dim=3, hidden=(16,)), gamma=0.9)
        >>> s, a, g = torch.zeros(5, 2), torch.zeros(5, 1), torch.Generator().manual_seed(0)
        >>> model.sample(s, a, 7, generator=g).shape
        torch.Size([7, 5, 2])
        >>> model.log_prob(s, s, a)
        Traceback (most recent call last):
        TypeError: an ensemble has no log_prob: its samples are the ends of rollouts.
    """

    def __init__(
        self,
        network: GaussianEnsemble,
        gamma: float,
        *,
        policy: Callable[[Tensor], Tensor] | None = None,
        terminal: bool = False,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        action_loc: Tensor | None = None,
        action_scale: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> None:
        super().__init__(gamma, loc, scale, action_loc, action_scale, constant)
        self.network, self.policy, self.terminal = network, policy, terminal

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `n` independent future states for every row, with shape `(n, batch, d)`."""
        network = self.network
        given = self._condition(state, action)
        given = given.to(network_dtype(network) or given.dtype).repeat(n, 1)
        left = geometric(self.gamma, (len(given),), generator=generator, device=given.device)
        member = torch.randint(network.members, (len(given),), generator=generator, device=given.device)
        with torch.no_grad():
            x, going = given[:, : network.event_dim].clone(), torch.arange(len(given), device=given.device)
            now = self._act(x, member, generator) if action is None else given[:, network.event_dim :]
            while len(going):
                x[going], ended = network.step(x[going], now, member[going], generator=generator)
                left[going] -= 1
                more = (left[going] > 0) & (x[going].abs() < FAR).all(1)
                going = going[more & ~ended if self.terminal else more]
                now = self._act(x[going], member[going], generator) if len(going) else None
        return self._raw(x).reshape(n, *state.shape)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """Raise a `TypeError`: there is no density."""
        raise TypeError("an ensemble has no log_prob: its samples are the ends of rollouts.")

    def _act(self, x: Tensor, member: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Return standardised actions of the policy in standardised states, or None if there are no actions."""
        if not self.network.action_dim:
            return None
        if self.policy is None:
            return self.network.act(x, member, generator=generator)
        action = self.policy(self._raw(x))
        if self.action_loc is not None and self.action_scale is not None:
            action = (action - self.action_loc) / self.action_scale
        return action.to(x.dtype)

    def _raw(self, x: Tensor) -> Tensor:
        return self._whole(x if self.loc is None or self.scale is None else x * self.scale + self.loc)
