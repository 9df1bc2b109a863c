r"""The two-term regression that every successor loss is an instance of.

.. math:: \ell(\theta) = (1-\gamma)\,E\,\|v_t(\overrightarrow X_t|S,A;\theta) - u_t\|^2
    + \gamma\,E\,\|v_t(\widehat X_t|S,A;\theta) - \hat u_t\|^2

The direct term regresses on the next state. The bootstrap term regresses, still at (S, A), on a point and a
velocity that the method makes from the target network at (S', A'). Both terms see every transition, at the
same t and with independent noises.

Reference: Farebrother et al., Temporal Difference Flows, ICML 2025, Algorithm 1 and Table 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flowmatch_core.fields import Time, VelocityField
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.solvers import solve
from flowmatch_core.successor.transitions import Transitions

TimeSampler = Callable[..., Tensor]
"""What has the call of `torch.rand`: `sampler(n, generator=, dtype=, device=)` gives `n` times in [0, 1]."""


class Loss(NamedTuple):
    """The scalars of ``total = (1 - gamma) * direct + gamma * bootstrap``."""

    total: Tensor
    direct: Tensor
    bootstrap: Tensor


def logit_normal(
    n: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """t = sigmoid(xi), xi ~ N(0, 1): more times around one half than near noise and data, ``(n,)``.

    >>> logit_normal(1000, generator=torch.Generator().manual_seed(0)).std() < 0.25    # uniform: 0.29
    tensor(True)
    """
    return torch.randn(n, generator=generator, dtype=dtype, device=device).sigmoid()


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw of N(0, I), of x's shape, dtype and device."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def time_like(x: Tensor, sampler: TimeSampler, generator: torch.Generator | None) -> Tensor:
    """A time for every row of x, ``(batch,)``."""
    return sampler(len(x), generator=generator, dtype=x.dtype, device=x.device)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared Euclidean norm of the error (a sum over dimensions, unlike `cfm_loss`), averaged over the batch."""
    if prediction.shape != target.shape:
        raise ValueError(f"field returned shape {tuple(prediction.shape)}, but should return {tuple(target.shape)}.")
    return (prediction - target).square().flatten(1).sum(1).mean()


@dataclass(frozen=True, eq=False)
class Target:
    """The target network at (S', A'), with all that a method may ask of it; never differentiated."""

    field: VelocityField
    batch: Transitions
    path: AffinePath
    steps: int
    solver: str
    generator: torch.Generator | None

    def noise(self) -> Tensor:
        """A fresh X_0 ~ N(0, I) for every row."""
        return noise_like(self.batch.next_state, self.generator)

    def flow(self, x0: Tensor, t: Time) -> Tensor:
        """psi_t(x0 | S', A'): the target's ODE from 0 to each row's own t, in ``steps`` equal steps."""
        cond = self.batch.next_condition
        return solve(self.field, x0, t1=t, cond=cond, solver=self.solver, steps=self.steps, check=False).x

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """v_t(x | S', A')."""
        return self.field(t, x, self.batch.next_condition)


class SuccessorLoss(Protocol):
    """A temporal-difference loss: the regression of ``field`` on a batch, bootstrapped from ``target``."""

    def __call__(
        self,
        field: VelocityField,
        target: VelocityField,
        batch: Transitions,
        *,
        gamma: float,
        path: AffinePath = ...,
        steps: int = ...,
        solver: str = ...,
        time: TimeSampler = ...,
        fused: bool = ...,
        generator: torch.Generator | None = ...,
    ) -> Loss: ...


def two_term(bootstrap: Callable[[Target, Tensor], tuple[Tensor, Tensor]]) -> SuccessorLoss:
    """Make a loss of a method's bootstrap: a function of the target and the times to a point and a velocity.

    The path needs alpha_0 = 0 and sigma_0 = 1, so that its source is N(0, I). ``fused`` evaluates the field
    once, on both terms' points stacked, instead of twice; the result is the same.
    """

    def loss(
        field: VelocityField,
        target: VelocityField,
        batch: Transitions,
        *,
        gamma: float,
        path: AffinePath = CondOT(),
        steps: int = 10,
        solver: str = "midpoint",
        time: TimeSampler = torch.rand,
        fused: bool = True,
        generator: torch.Generator | None = None,
    ) -> Loss:
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma was {gamma}, but should be in [0, 1).")
        t = time_like(batch.state, time, generator)
        direct = path.sample(noise_like(batch.next_state, generator), batch.next_state, t)
        with torch.no_grad():
            point, velocity = bootstrap(Target(target, batch, path, steps, solver, generator), t)
        cond = batch.condition
        if fused:
            both = field(torch.cat([t, t]), torch.cat([direct.x_t, point]), torch.cat([cond, cond]))
            at_direct, at_bootstrap = both.chunk(2)
        else:
            at_direct, at_bootstrap = field(t, direct.x_t, cond), field(t, point, cond)
        direct_term = squared_error(at_direct, direct.velocity)
        bootstrap_term = squared_error(at_bootstrap, velocity)
        return Loss((1 - gamma) * direct_term + gamma * bootstrap_term, direct_term, bootstrap_term)

    loss.__name__, loss.__qualname__ = bootstrap.__name__, bootstrap.__qualname__
    loss.__module__, loss.__doc__ = bootstrap.__module__, bootstrap.__doc__
    return loss
