"""The data of a temporal-difference loss: transitions, with the policy's action in the next state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowmatch_core._units import check_pair
from flowmatch_core.successor.geometric import check_gamma, log_discount

__all__ = ["Transitions", "condition", "n_step"]


@dataclass(frozen=True, eq=False)
class Transitions:
    r"""A batch of transitions $(s, a, s', a')$ with $a' = \pi(s')$.

    The condition of a field is `cat([state, action])`, or the state alone where the action is None, that is the
    policy's.

    In a terminal state the process stays; the end of an episode by a time limit is not terminal. `n_step` makes
    batches with several steps. `batch[rows]` is a batch of some of the rows, such as those that a replay buffer draws.

    Args:
        state: The states, with shape `(batch, d)`.
        action: The actions, with shape `(batch, p)`, or None.
        next_state: The next states, with shape `(batch, d)`; with `steps` = n the n-th ones.
        next_action: The actions of the policy there, with shape `(batch, p)`, or None.
        terminal: Whether the next state is terminal, boolean, with shape `(batch,)`; None for nowhere.
        direct_state: With several steps, the state that the direct term regresses on, with shape `(batch, d)`.
        steps: The number of steps between the states.

    Examples:
        >>> batch = Transitions(state=torch.zeros(5, 2), action=torch.ones(5, 1),
        ...                     next_state=torch.ones(5, 2), next_action=torch.zeros(5, 1))
        >>> batch.condition[0], batch.next_condition[0]
        (tensor([0., 0., 1.]), tensor([1., 1., 0.]))
    """

    state: Tensor
    action: Tensor | None
    next_state: Tensor
    next_action: Tensor | None
    terminal: Tensor | None = None
    direct_state: Tensor | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        for name, value in (("next_state", self.next_state), ("direct_state", self.direct_state)):
            if value is not None and value.shape != self.state.shape:
                raise ValueError(
                    f"{name} had shape {tuple(value.shape)}, but should have state's shape {tuple(self.state.shape)}."
                )
        shape, next_shape = (None if a is None else tuple(a.shape) for a in (self.action, self.next_action))
        if shape != next_shape:
            raise ValueError(f"next_action had shape {next_shape}, but should have action's shape {shape}.")
        if self.terminal is not None:
            _check_terminal(self.terminal, tuple(self.state.shape[:1]))
        if self.steps < 1 or (self.steps > 1) != (self.direct_state is not None):
            raise ValueError(
                f"steps was {self.steps} and direct_state was{' not' * (self.direct_state is not None)} None, "
                "but should be at least 2 with a direct_state, or 1 without."
            )

    def __len__(self) -> int:
        return len(self.state)

    def __getitem__(self, rows: Tensor | slice) -> Transitions:
        """Return a batch of some of the rows.

        Args:
            rows: A slice, the numbers of the rows, or a boolean mask of them.

        Examples:
            >>> data = Transitions(torch.arange(3.0)[:, None], None, torch.zeros(3, 1), None)
            >>> data[torch.tensor([2, 0])].state.flatten()
            tensor([2., 0.])
        """
        if not (isinstance(rows, slice) or (isinstance(rows, Tensor) and rows.ndim == 1)):
            raise ValueError(f"rows is {rows!r}, but should be a slice or a tensor of one dimension; pass a slice.")

        def take(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[rows]

        return replace(
            self,
            state=self.state[rows],
            action=take(self.action),
            next_state=self.next_state[rows],
            next_action=take(self.next_action),
            terminal=take(self.terminal),
            direct_state=take(self.direct_state),
        )

    @property
    def condition(self) -> Tensor:
        """What the field is conditioned on: the state and action now."""
        return condition(self.state, self.action)

    @property
    def next_condition(self) -> Tensor:
        """What the bootstrap is conditioned on: the state and action one step (or `steps`) later."""
        return condition(self.next_state, self.next_action)

    @property
    def visited(self) -> Tensor:
        """The state that the direct term regresses on: the next one, or the one drawn among the next `steps`."""
        return self.next_state if self.direct_state is None else self.direct_state

    def where_terminal(self, value: Tensor, otherwise: Tensor) -> Tensor:
        """Return the rows of `value` where s' is terminal, and of `otherwise` elsewhere, both `(batch, d)`."""
        return otherwise if self.terminal is None else torch.where(self.terminal[:, None], value, otherwise)

    def standardise(
        self,
        loc: Tensor,
        scale: Tensor,
        action_loc: Tensor | None = None,
        action_scale: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Transitions:
        """Return the batch with `(state - loc) / scale` in place of all states, and likewise of the actions.

        Args:
            loc: The location of the states, with shape `(d,)`; in float64 where they are far from 0.
            scale: Their scale, with shape `(d,)`.
            action_loc: The location of the actions, with shape `(p,)`; None leaves actions as they are.
            action_scale: Their scale, with shape `(p,)`.
            dtype: The dtype of the result, that of the network; by default that of the arithmetic.

        Examples:
            >>> s, a = torch.tensor([[6e6 + 0.5]]).double(), torch.tensor([[300.0]])
            >>> loc, scale = torch.tensor([6e6]).double(), torch.tensor([0.25]).double()
            >>> batch = Transitions(s, a, s, a)
            >>> batch.standardise(loc, scale, a[0], a[0] / 3, dtype=torch.float32).condition
            tensor([[2., 0.]])
        """
        check_pair(action_loc, action_scale, "action_")

        def cast(value: Tensor) -> Tensor:
            return value if dtype is None else value.to(dtype)

        def action(value: Tensor | None) -> Tensor | None:
            if value is not None and action_loc is not None and action_scale is not None:
                value = (value - action_loc) / action_scale
            return None if value is None else cast(value)

        direct = None if self.direct_state is None else cast((self.direct_state - loc) / scale)
        return replace(
            self,
            state=cast((self.state - loc) / scale),
            action=action(self.action),
            next_state=cast((self.next_state - loc) / scale),
            next_action=action(self.next_action),
            direct_state=direct,
        )


def n_step(
    states: Tensor,
    actions: Tensor | None,
    gamma: float | Tensor,
    *,
    terminal: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Transitions:
    r"""Make n-step transitions from windows $S_0, A_0, \dots, S_n, A_n$ of the policy's episodes.

    $$
    m = (1-\gamma) \sum_{k=1}^n \gamma^{k-1} P^k + \gamma^n P^n m
    $$

    The direct term regresses on $S_K$, $P(K = k) \propto \gamma^{k-1}$, with the weight $1 - \gamma^n$, and the
    bootstrap starts from $S_n$. It is exact only for on-policy data, except for the first action, which may be any.
    After a terminal state a window stays in it.

    References:
        - A Distributional Analogue to the Successor Representation (Wiltzer et al., 2024),
          https://arxiv.org/abs/2402.08530

    Args:
        states: The windows, `(batch, n + 1, d)`.
        actions: Their actions, `(batch, n + 1, p)`; None for a field that is conditioned on states alone.
        gamma: The discount of one step, or that of each window, `(batch,)`.
        terminal: Whether $S_1, \dots, S_n$ are terminal, `(batch, n)`.
        generator: The source of randomness of K.

    Examples:
        >>> windows = torch.arange(8.0).reshape(2, 4, 1)                          # two windows of three steps
        >>> batch = n_step(windows, None, 0.9, generator=torch.Generator().manual_seed(0))
        >>> batch.steps, batch.state.flatten(), batch.next_state.flatten()
        (3, tensor([0., 4.]), tensor([3., 7.]))
    """
    if states.ndim != 3 or states.shape[1] < 2:
        raise ValueError(f"states had shape {tuple(states.shape)}, but should have shape (batch, n + 1, d), n >= 1.")
    if actions is not None and actions.shape[:2] != states.shape[:2]:
        raise ValueError(
            f"actions had shape {tuple(actions.shape)}, but should begin with {tuple(states.shape[:2])} as states do."
        )
    batch, n = len(states), states.shape[1] - 1
    check_gamma(gamma, batch)
    u = torch.rand(batch, generator=generator, dtype=torch.float64, device=states.device)
    k = (1 + torch.floor(torch.log1p(-u * (1 - gamma**n)) / log_discount(gamma)).long()).clamp(max=n)
    last = torch.full_like(k, n)
    ended = None
    if terminal is not None:
        _check_terminal(terminal, (batch, n))
        last = (1 + (~terminal).long().cumprod(1).sum(1)).clamp(max=n)
        ended = terminal.any(1)
    row = torch.arange(batch, device=states.device)
    return Transitions(
        state=states[:, 0],
        action=None if actions is None else actions[:, 0],
        next_state=states[row, last],
        next_action=None if actions is None else actions[row, last],
        terminal=ended,
        direct_state=states[row, torch.minimum(k, last)] if n > 1 else None,
        steps=n,
    )


def condition(state: Tensor, action: Tensor | None) -> Tensor:
    """Return `cat([state, action])`, or the state alone where the action is None."""
    return state if action is None else torch.cat([state, action], -1)


def _check_terminal(terminal: Tensor, shape: tuple[int, ...]) -> None:
    if terminal.shape != shape or terminal.dtype != torch.bool:
        raise ValueError(
            f"terminal had shape {tuple(terminal.shape)} and dtype {terminal.dtype}, "
            f"but should have shape {shape} and dtype torch.bool."
        )
