"""The data of a temporal-difference loss: one step of a process, and the policy's action where it arrived."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transitions:
    r"""A batch of :math:`(s, a, s', a')` with :math:`a' = \pi(s')`; actions of ``None`` mean the policy's.

    Shapes: states ``(batch, d)``, actions ``(batch, p)``. The conditions are what a field is given:
    ``cat([state, action])``, or the state alone.

    >>> batch = Transitions(state=torch.zeros(5, 2), action=torch.ones(5, 1),
    ...                     next_state=torch.ones(5, 2), next_action=torch.zeros(5, 1))
    >>> batch.condition[0], batch.next_condition[0]
    (tensor([0., 0., 1.]), tensor([1., 1., 0.]))
    """

    state: Tensor
    action: Tensor | None
    next_state: Tensor
    next_action: Tensor | None

    def __post_init__(self) -> None:
        if self.next_state.shape != self.state.shape:
            raise ValueError(
                f"next_state had shape {tuple(self.next_state.shape)}, "
                f"but should have state's shape {tuple(self.state.shape)}."
            )
        shape, next_shape = (None if a is None else tuple(a.shape) for a in (self.action, self.next_action))
        if shape != next_shape:
            raise ValueError(f"next_action had shape {next_shape}, but should have action's shape {shape}.")

    @property
    def condition(self) -> Tensor:
        """What the field is conditioned on: the state and action now."""
        return condition(self.state, self.action)

    @property
    def next_condition(self) -> Tensor:
        """What the bootstrap is conditioned on: the state and action one step later."""
        return condition(self.next_state, self.next_action)

    def standardise(self, loc: Tensor, scale: Tensor) -> Transitions:
        """The same batch with ``(state - loc) / scale`` in place of both states; actions stay as they are."""
        return replace(self, state=(self.state - loc) / scale, next_state=(self.next_state - loc) / scale)


def condition(state: Tensor, action: Tensor | None) -> Tensor:
    """``cat([state, action])``, or the state alone where the action is None."""
    return state if action is None else torch.cat([state, action], -1)
