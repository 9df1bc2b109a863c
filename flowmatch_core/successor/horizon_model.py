"""A generative model of where a policy goes: samples, likelihoods and values of its successor measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from flowmatch_core.field import VelocityField
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.solvers import TimeGrid, Uniform
from flowmatch_core.successor.geometric import check_gamma
from flowmatch_core.successor.transitions import condition

__all__ = ["GeometricHorizonModel", "HorizonModel"]


class HorizonModel(nn.Module, ABC):
    r"""A model of $X = S_T$, $T \sim \mathrm{Geometric}(1-\gamma)$ on 1, 2, 3, ..., given (s, a).

    The first sample is the NEXT state. All arguments and results are in raw units. With `loc` and `scale`
    the network works on standardised states: x and the state in its condition are `(. - loc) / scale`, as
    `Transitions.standardise` makes them for training. Actions stay as they are; `None` means the policy's,
    for a network conditioned on the state alone.
    """

    has_density: ClassVar[bool]
    """Whether the model has a `log_prob`."""

    def __init__(self, gamma: float, loc: Tensor | None, scale: Tensor | None) -> None:
        super().__init__()
        check_gamma(gamma)
        if (loc is None) != (scale is None):
            raise ValueError("loc and scale should be given both or neither, but one of them was None.")
        self.gamma = gamma

    @abstractmethod
    def _units(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the location and the scale of the states, each with shape `(d,)`, or None."""

    @abstractmethod
    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`n` independent future states for every row, `(n, batch, d)`."""

    @abstractmethod
    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """log m(x | s, a) in nats, in raw units, `(batch,)`; a `TypeError` for a model without `has_density`."""

    def value(
        self,
        reward: Callable[[Tensor], Tensor],
        state: Tensor,
        action: Tensor | None,
        n: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Q(s, a) = E[r(X)] / (1 - gamma) over `n` samples, `(batch,)`; `reward`: (..., d) -> (...)."""
        return reward(self.sample(state, action, n, generator=generator)).mean(0) / (1 - self.gamma)

    def _condition(self, state: Tensor, action: Tensor | None) -> Tensor:
        loc, scale = self._units()
        if loc is not None and scale is not None:
            state = (state - loc) / scale
        return condition(state, action)


@final
class GeometricHorizonModel(HorizonModel):
    r"""The horizon model of a velocity field: a `ContinuousFlow` for every (s, a).

    The field is one trained by a flow-matching loss, or `VelocityOf(network, path, "noise")` around the network
    of a diffusion loss. The likelihood carries the change of variables of `loc` and `scale`.

    Reference: Janner et al., Gamma-Models, NeurIPS 2020.

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
    ) -> None:
        super().__init__(gamma, loc, scale)
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
        """`n` independent future states for every row, `(n, batch, d)`.

        Without `check` some may not be finite; otherwise a path that leaves the finite numbers is a `SolverError`.
        """
        return self.flow.sample((n,), cond=self._condition(state, action), generator=generator, check=check)

    def particles(
        self, state: Tensor, action: Tensor | None, n: int, steps: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`n` samples of every row on their way: where they are at t = 0, 1/steps, ..., 1, by the midpoint rule.

        In raw units, `(steps + 1, n, batch, d)`. A path that leaves the finite numbers is not an error here.
        """
        cond = self._condition(state, action)
        return self.flow.trajectory((n,), cond, generator, solver="midpoint", steps=steps, grid=Uniform(), check=False)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        """log m(x | s, a) in nats, in raw units, `(batch,)`."""
        return self.flow.log_prob(x, cond=self._condition(state, action))
