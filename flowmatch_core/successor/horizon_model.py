"""Generative models of the successor measure of a policy: samples, likelihoods and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from flowmatch_core._conditions import BoundCondition, bind_condition
from flowmatch_core._units import UnitsModule, check_pair
from flowmatch_core.field import VelocityField
from flowmatch_core.flow import ContinuousFlow, LogDensity
from flowmatch_core.solvers import TimeGrid, Uniform
from flowmatch_core.successor.geometric import check_gamma
from flowmatch_core.successor.transitions import condition

__all__ = ["GeometricHorizonModel", "HorizonModel"]


class HorizonModel(UnitsModule, ABC):
    r"""A model of $X = S_T$, $T \sim \mathrm{Geometric}(1-\gamma)$ on 1, 2, 3, ..., given (s, a).

    The first sample is the NEXT state. All arguments and results are in raw units. With `loc` and `scale` the network
    works on standardised states: x and the state in its condition are `(. - loc) / scale`, as in
    `Transitions.standardise`, and so are actions with `action_loc` and `action_scale`. An action of `None` is that of
    the policy, for a network conditioned on the state alone. A model is a `torch.nn.Module`: `to`, `parameters` and
    `state_dict` include the network, the locations and the scales, which keep their dtype; see `ContinuousFlow`.
    """

    UNITS = ("loc", "scale", "action_loc", "action_scale", "constant")
    action_loc: Tensor | None
    action_scale: Tensor | None
    constant: Tensor | None

    has_density: ClassVar[bool]
    """Whether the model has a `log_prob`."""

    def __init__(
        self,
        gamma: float,
        loc: Tensor | None,
        scale: Tensor | None,
        action_loc: Tensor | None = None,
        action_scale: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_gamma(gamma)
        check_pair(loc, scale)
        check_pair(action_loc, action_scale, "action_")
        self.gamma = gamma
        self._register_units("action_loc", action_loc)
        self._register_units("action_scale", action_scale)
        self._register_units("constant", constant)

    def _units(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the location and the scale of the states, each with shape `(d,)`, or None as it is here."""
        return None, None

    @abstractmethod
    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `n` independent future states for every row, with shape `(n, batch, d)`."""

    @abstractmethod
    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """Return log m(x | s, a) in nats, in raw units, with shape `(batch,)`; a `TypeError` if not `has_density`."""

    def estimate(self, x: Tensor, state: Tensor, action: Tensor | None) -> LogDensity:
        """Return `log_prob` with estimates of its error; without error by default, where nothing is solved."""
        log_prob = self.log_prob(x, state, action)
        zero = torch.zeros_like(log_prob)
        return LogDensity(log_prob, zero, zero, 0)

    def value(
        self,
        reward: Callable[[Tensor], Tensor],
        state: Tensor,
        action: Tensor | None,
        n: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate Q(s, a) = E[r(X)] / (1 - gamma) from `n` samples.

        Args:
            reward: The reward, which maps states `(..., d)` to `(...)`.
            state: The states, with shape `(batch, d)`.
            action: The actions, with shape `(batch, p)`, or None.
            n: The number of samples per row.
            generator: The source of randomness.

        Returns:
            The values, with shape `(batch,)`.
        """
        return reward(self.sample(state, action, n, generator=generator)).mean(0) / (1 - self.gamma)

    def _condition(self, state: Tensor, action: Tensor | None) -> Tensor:
        loc, scale = self._units()
        state = self._varying(state)
        if loc is not None and scale is not None:
            state = (state - loc) / scale
        if action is not None and self.action_loc is not None and self.action_scale is not None:
            action = (action - self.action_loc) / self.action_scale
        return condition(state, action)

    def _varying(self, state: Tensor) -> Tensor:
        """Return the components of states that are not constant."""
        return state if self.constant is None else state[..., self.constant.isnan()]

    def _whole(self, varying: Tensor) -> Tensor:
        """Return states with all components, from those that are not constant."""
        if self.constant is None:
            return varying
        whole = self.constant.to(varying.dtype).repeat(*varying.shape[:-1], 1)
        whole[..., self.constant.isnan()] = varying
        return whole


class DirectHorizonModel(HorizonModel, ABC):
    """A horizon model whose network draws standardised states itself, without a flow and without a density."""

    has_density = False
    loc: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        gamma: float,
        loc: Tensor | None,
        scale: Tensor | None,
        action_loc: Tensor | None,
        action_scale: Tensor | None,
        constant: Tensor | None,
    ) -> None:
        super().__init__(gamma, loc, scale, action_loc, action_scale, constant)
        self._register_units("loc", loc)
        self._register_units("scale", scale)

    def _units(self) -> tuple[Tensor | None, Tensor | None]:
        return self.loc, self.scale


@final
class GeometricHorizonModel(HorizonModel):
    r"""The horizon model of a velocity field: a `ContinuousFlow` for every (s, a).

    The field is one trained by a flow-matching loss, or `VelocityOf(network, path, "noise")` of the network of a
    diffusion loss. The likelihood includes the change of variables of `loc` and `scale`.

    Args:
        field: The velocity field, conditioned on `cat([state, action])` or on the state alone.
        event_shape: The shape of a state, `(d,)`.
        gamma: The discount, in [0, 1).
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        steps: The number of steps of a fixed-step solver.
        grid: Where these steps end.
        loc: The location of the states, with shape `(d,)`.
        scale: The scale of the states, with shape `(d,)`.
        action_loc: The location of the actions, with shape `(p,)`; None where the field takes them as they are.
        action_scale: The scale of the actions, with shape `(p,)`.
        constant: The values of the components of a state that never change, with shape `(d,)`, NaN for those that do.
            The model describes the latter alone: `event_shape`, `loc`, `scale` and the density are theirs. States have
            all components, in arguments and samples.

    References:
        - Gamma-Models: Generative Temporal Difference Learning for Infinite-Horizon Prediction (Janner et al., 2020),
          https://arxiv.org/abs/2010.14496

    Examples:
        >>> from flowmatch_core.oracles import LinearGaussianMDP
        >>> I = torch.eye(1)
        >>> mdp = LinearGaussianMDP(A=I, B=I, c=torch.ones(1), W=I, K=-I, k=torch.zeros(1))     # s' ~ N(1, 1)
        >>> model = GeometricHorizonModel(mdp.velocity_field(gamma=0.75), event_shape=(1,), gamma=0.75)
        >>> s, g = torch.zeros(5, 1), torch.Generator().manual_seed(0)
        >>> model.sample(s, None, 7, generator=g).shape, model.log_prob(s, s, None).shape
        (torch.Size([7, 5, 1]), torch.Size([5]))
        >>> model.value(lambda x: torch.ones(x.shape[:-1]), s, None, 7, generator=g)            # 1 / (1 - gamma)
        tensor([4., 4., 4., 4., 4.])
    """

    has_density = True

    def __init__(
        self,
        field: VelocityField,
        event_shape: Sequence[int],
        gamma: float,
        solver: str = "midpoint",
        steps: int = 10,
        *,
        grid: TimeGrid = Uniform(),
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        action_loc: Tensor | None = None,
        action_scale: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> None:
        super().__init__(gamma, loc, scale, action_loc, action_scale, constant)
        self.flow = ContinuousFlow(field, event_shape, solver, steps, grid=grid, loc=loc, scale=scale)

    @property
    def loc(self) -> Tensor | None:
        """The location of the states, with shape `(d,)`."""
        return self.flow.loc

    @property
    def scale(self) -> Tensor | None:
        """The scale of the states, with shape `(d,)`."""
        return self.flow.scale

    def _units(self) -> tuple[Tensor | None, Tensor | None]:
        return self.loc, self.scale

    def sample(
        self,
        state: Tensor,
        action: Tensor | None,
        n: int,
        *,
        generator: torch.Generator | None = None,
        check: bool = True,
    ) -> Tensor:
        """Draw `n` independent future states for every row, with shape `(n, batch, d)`.

        With `check` a path with values that are not finite raises a `SolverError`.
        """
        return self._whole(self.flow.sample((n,), cond=self._bound(state, action), generator=generator, check=check))

    def push(self, noise: Tensor, state: Tensor, action: Tensor | None, *, check: bool = True) -> Tensor:
        """Return the future states that the flow makes of noise, those of `sample` for the same noise.

        Args:
            noise: Draws of N(0, I), with shape `(*lead, batch, d)`, `d` without the constant components.
            state: The states, with shape `(batch, d)`.
            action: The actions, with shape `(batch, p)`, or None.
            check: Whether a path with values that are not finite raises a `SolverError`.

        Returns:
            The future states, with shape `(*lead, batch, d)`.
        """
        path = self.flow.trajectory(cond=self._bound(state, action), x0=noise, check=check)
        return self._whole(path[-1])

    def particles(
        self, state: Tensor, action: Tensor | None, n: int, steps: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `n` samples of every row with their states at t = 0, 1/steps, ..., 1, by the midpoint rule.

        In raw units, with shape `(steps + 1, n, batch, d)`; see `ContinuousFlow.trajectory`. Values are not checked.
        """
        cond, grid = self._bound(state, action), Uniform()
        path = self.flow.trajectory((n,), cond, generator, solver="midpoint", steps=steps, grid=grid, check=False)
        return self._whole(path)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """Return log m(x | s, a) in nats, in raw units, with the shape to which the batches of both broadcast."""
        return self.flow.log_prob(self._varying(x), cond=self._bound(state, action))

    def estimate(self, x: Tensor, state: Tensor, action: Tensor | None) -> LogDensity:
        """Return the log-density by twice the steps, and its change; see `ContinuousFlow.estimate`."""
        return self.flow.estimate(self._varying(x), cond=self._bound(state, action))

    def _bound(self, state: Tensor, action: Tensor | None) -> BoundCondition:
        cond = self._condition(state, action)
        return bind_condition(cond, cond.shape[:-1], cond.shape[-1:])
