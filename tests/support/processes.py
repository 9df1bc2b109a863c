"""Processes whose successor measure is known, and what the tests of their laws share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.oracles import GaussianMixture, LinearGaussianMDP
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.successor import Transitions, td2_cfm_loss, td_cfm_coupled_loss, td_cfm_loss
from tests.support.random import generator, randn, tensor

TD_LOSSES = [td_cfm_loss, td_cfm_coupled_loss, td2_cfm_loss]


def scalar_process(F: float = 0.7, noise: float = 0.6, shift: float = 0.5) -> LinearGaussianMDP:
    """One dimension: A + B K = F, and actions that matter."""
    return LinearGaussianMDP(
        A=tensor([F + 0.8]),
        B=tensor([1.0]),
        c=tensor(shift),
        W=tensor([noise**2]),
        K=tensor([-0.8]),
        k=tensor(0.2),
    )


def transitions(mdp: LinearGaussianMDP, n: int, seed: int = 1) -> Transitions:
    """Off-policy data: states and actions that the policy would not take."""
    state, action = randn(n, len(mdp.c), seed=seed), 1.5 * randn(n, len(mdp.k), seed=seed + 1)
    next_state = mdp.step(state, action, generator=generator(seed + 2))
    return Transitions(state=state, action=action, next_state=next_state, next_action=mdp.policy(next_state))


class Probe:
    """A field plus theta . phi with a theta for each row, whose gradient is that of the row's own loss.

    A condition of one column is a state, of two a state and an action.
    """

    def __init__(self, field: VelocityField, rows: int) -> None:
        self.field, self.rows = field, rows
        self.theta = torch.zeros(rows, 6, dtype=torch.float64, requires_grad=True)

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        assert cond is not None
        with torch.no_grad():
            v = self.field(t, x, cond)
        s, a = cond[:, 0], cond[:, -1]
        phi = torch.stack([torch.ones_like(t), t, x[:, 0], t * x[:, 0], s * x[:, 0], a], -1)
        theta = self.theta.repeat(len(x) // self.rows, 1)
        return v + (theta * phi).sum(-1, keepdim=True)

    def gradients(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.theta)[0] * self.rows


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain on a few states, each of them a point of space.

    Args:
        P: The chances of a step, `(states, states)`.
        places: Where the states are, `(states, d)`.
    """

    P: Tensor
    places: Tensor

    def successor(self, gamma: float) -> Tensor:
        """M = (1 - gamma) (I - gamma P)^-1 P, `(states, states)`."""
        identity = torch.eye(len(self.P), dtype=self.P.dtype)
        M: Tensor = (1 - gamma) * torch.linalg.solve(identity - gamma * self.P, self.P)
        return M

    def field(self, gamma: float, path: AffinePath = CondOT()) -> VelocityField:
        """The exact velocity, for conditions that are the places of states."""
        M = self.successor(gamma)

        def velocity(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
            assert cond is not None
            times, state, v = as_time(t, x).expand(len(x)), self.nearest(cond), torch.zeros_like(x)
            for i in range(len(M)):
                seen = M[i] > 0
                atoms = self.places[seen]
                m = GaussianMixture(M[i][seen], atoms, torch.zeros(len(atoms), 2, 2, dtype=x.dtype))
                here = state == i
                v[here] = m.velocity(times[here], x[here], path)
            return v

        return velocity

    def nearest(self, x: Tensor) -> Tensor:
        """The state that is nearest to every point."""
        return torch.cdist(x, self.places).argmin(1)

    def shares(self, x: Tensor) -> Tensor:
        """The share of the points that are nearest to each state."""
        return torch.bincount(self.nearest(x), minlength=len(self.places)).to(x.dtype) / len(x)

    def transitions(self, start: int, n: int, seed: int = 1, terminal: Tensor | None = None) -> Transitions:
        """One step from one state, as often as given; `terminal` says which states are."""
        chosen = torch.multinomial(self.P[start], n, replacement=True, generator=generator(seed))
        there = self.places[chosen]
        ended = None if terminal is None else terminal[chosen]
        return Transitions(self.places[start].expand(n, -1), None, there, None, terminal=ended)


def circle(n: int, radius: float = 3.0) -> Tensor:
    """Places around the origin, `(n, 2)`."""
    angle = 0.3 + 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return radius * torch.stack([angle.cos(), angle.sin()], -1)


def flip() -> Chain:
    return Chain(tensor([0.0, 1.0], [1.0, 0.0]), circle(2))


def corridor(length: int) -> Chain:
    """Steps to the right, and an end that absorbs."""
    P = torch.diag(torch.ones(length, dtype=torch.float64), 1)
    P[-1, -1] = 1
    return Chain(P, circle(length + 1))


def random_chain(n: int = 5, seed: int = 0) -> Chain:
    P = randn(n, n, seed=seed).mul(1.5).softmax(1)
    return Chain(P, circle(n))
