r"""The regression with two terms that all successor losses share.

$$
\ell(\theta) = (1-\gamma)\,E\,\|f_t(\overrightarrow X_t|S,A;\theta) - u_t\|^2
+ \gamma\,E\,\|f_t(\widehat X_t|S,A;\theta) - \hat u_t\|^2
$$

The direct term regresses on the next state. The bootstrap term regresses, at the same (S, A), on a point and a value
that the method computes from the target network at (S', A'). Both terms use every transition, at the same t and with
independent noises. The network predicts a velocity (flow matching) or the noise (diffusion).

Where S' is terminal the process stays: its successor measure is the point S', and the bootstrap term of that row
regresses on S' itself. Omitting the term would lose the mass gamma.

The discount is a number, or one for each row: a field whose condition contains it (`with_discount`) learns the measures
of all discounts at once. The target is then asked at the row's own discount.

References:
    - Temporal Difference Flows (Farebrother et al., 2025), algorithm 1 and table 4, https://arxiv.org/abs/2503.09817
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._tensors import (
    check_choice,
    check_floating,
    check_object,
    flatten_event,
    noise_like,
    time_like,
    weighted_mean,
)
from flowmatch_core.field import Time, TimeSampler, VelocityField, at_condition, at_times
from flowmatch_core.paths import AffinePath, CondOT, VelocityOf
from flowmatch_core.paths._affine import stack_times
from flowmatch_core.solvers import SOLVERS, Uniform, solve
from flowmatch_core.successor.geometric import check_gamma
from flowmatch_core.successor.transitions import Transitions

__all__ = [
    "Bootstrap",
    "Loss",
    "Prediction",
    "SuccessorLoss",
    "Target",
    "check_path",
    "discount",
    "interpolate",
    "squared_error",
    "two_term",
]

Prediction = Literal["velocity", "noise"]
"""What the network of a method predicts."""

_PURE = 0.01
"""The tolerance of the weights of data and noise, 0 and 1, at t=0; VP and OU have 0.007 of the data there."""


class Loss(NamedTuple):
    """A loss and its terms, scalars.

    With one discount for all rows `total = (1 - gamma) * direct + gamma * bootstrap`. With one for each row these
    factors are the row's and come before the mean over the batch; the terms are the means without them.
    """

    total: Tensor
    direct: Tensor
    bootstrap: Tensor

    @classmethod
    def of(cls, direct: Tensor, bootstrap: Tensor, share: float | Tensor, weight: Tensor | None) -> Loss:
        """Return the loss of the rows of two terms.

        Args:
            direct: The direct term of each row, with shape `(batch,)`.
            bootstrap: The bootstrap term of each row, with shape `(batch,)`.
            share: The share of the second term, the `discount` of the batch: a number, or that of each row.
            weight: The weights of the rows, with shape `(batch,)`; None for ones.
        """
        terms = weighted_mean(direct, weight), weighted_mean(bootstrap, weight)
        if not isinstance(share, Tensor):
            return cls((1 - share) * terms[0] + share * terms[1], *terms)
        total = weighted_mean((1 - share) * direct, weight) + weighted_mean(share * bootstrap, weight)
        return cls(total, *terms)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared norm of the error of each row, summed over dimensions (unlike `cfm_loss`), `(batch,)`."""
    return flatten_event((prediction - target).square()).sum(1)


def check_path(path: AffinePath) -> None:
    """Raise a `ValueError` unless the path starts in N(0, I), the source of the bootstrap and the horizon model."""
    check_object("path", path)
    alpha, sigma = float(path.alpha(0.0)), float(path.sigma(0.0))
    if abs(alpha) > _PURE or abs(sigma - 1) > _PURE:
        raise ValueError(
            f"path was {path}, whose weights of data and noise at t=0 are {alpha:.4g} and {sigma:.4g}, "
            "but should be 0 and 1: a source N(0, I)."
        )


def discount(gamma: float | Tensor, batch: Transitions) -> float | Tensor:
    """Return the share of the bootstrap term, gamma to the power of the steps of the batch, or that of each row.

    Examples:
        >>> s = torch.zeros(1, 2)
        >>> discount(0.5, Transitions(state=s, action=None, next_state=s, next_action=None, direct_state=s, steps=3))
        0.125
    """
    check_gamma(gamma, len(batch))
    share = gamma**batch.steps
    return share.to(batch.state.dtype) if isinstance(share, Tensor) else float(share)


def interpolate(path: AffinePath, prediction: Prediction, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the path's point between noise and data, and the value to regress on there."""
    sample = path.sample(x0, x1, t)
    return sample.x_t, sample.velocity if prediction == "velocity" else x0


@dataclass(frozen=True, eq=False)
class Target:
    """The target network at (S', A') as a method uses it; no gradient reaches it."""

    field: VelocityField
    batch: Transitions
    path: AffinePath
    prediction: Prediction
    steps: int
    solver: str
    generator: torch.Generator | None

    def noise(self) -> Tensor:
        """Draw a new X_0 ~ N(0, I) for every row."""
        return noise_like(self.batch.next_state, self.generator)

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the path's point between noise and data, and the value to regress on there."""
        return interpolate(self.path, self.prediction, x0, x1, t)

    def flow(self, x0: Tensor, t: Time) -> Tensor:
        """Return psi_t(x0 | S', A'), the target's ODE solved from 0 to the t of each row in `steps` equal steps."""
        if self.solver == "ddim":
            return self._ddim(x0, t)
        field = self.field
        if self.prediction != "velocity":
            field = VelocityOf(field, self.path, self.prediction)
        cond = self.batch.next_condition
        return solve(field, x0, t1=t, cond=cond, solver=self.solver, steps=self.steps, check=False).x

    def predict(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the prediction of the network, v_t(x | S', A') or the noise."""
        return call_field(self.field, t, x, self.batch.next_condition, "target")

    def _ddim(self, x: Tensor, t: Time) -> Tensor:
        """Solve by DDIM to the t of each row: a step keeps the noise and the data that the network predicts at x.

        Where alpha = 0 the data are replaced by zero, which neglects alpha E[X] after the step; this does not occur
        on VP, whose alpha is never zero.
        """
        nodes = [t * share for share in Uniform().nodes(self.steps)]
        # coefficients of the times are computed for all steps at once: one by one they cost as much as a network
        coefficients = self.path.step_coefficients(stack_times(nodes, x), self.prediction)
        of_x, of_value = (c.to(x.dtype) for c in coefficients)
        fields = at_times(self.field, nodes[:-1], x)
        for field, start, a, b in zip(fields, nodes[:-1], of_x, of_value, strict=True):
            value = call_field(field, start, x, self.batch.next_condition, "target")
            x = a * x + b * value
        return x


class SuccessorLoss(Protocol):
    """A temporal-difference loss: the regression of `field` on a batch, bootstrapped from `target`.

    Its attribute `prediction` is what `field` and `target` predict.
    """

    __name__: str
    prediction: Prediction

    def __call__(
        self,
        field: VelocityField,
        target: VelocityField,
        batch: Transitions,
        *,
        gamma: float | Tensor,
        path: AffinePath = ...,
        steps: int = ...,
        solver: str = ...,
        time: TimeSampler = ...,
        fused: bool = ...,
        weight: Tensor | None = ...,
        generator: torch.Generator | None = ...,
    ) -> Loss: ...


Bootstrap = Callable[[Target, Tensor], tuple[Tensor, Tensor]]
"""A method: it maps the target and the times to a point for every row and the value to regress on there."""


def two_term(
    *, prediction: Prediction = "velocity", path: AffinePath = CondOT(), steps: int = 10, solver: str = "midpoint"
) -> Callable[[Bootstrap], SuccessorLoss]:
    """Return a decorator that turns the bootstrap of a method into a loss with these defaults.

    The path should start in N(0, I). The target is solved by one of `solvers.SOLVERS` or by `ddim`. `fused`
    evaluates the field once, on both terms' points stacked, instead of twice; the result is the same. `weight`, with
    shape `(batch,)`, multiplies both terms of each transition before the average over the batch.
    """
    defaults = path, steps, solver

    def decorate(bootstrap: Bootstrap) -> SuccessorLoss:
        def loss(
            field: VelocityField,
            target: VelocityField,
            batch: Transitions,
            *,
            gamma: float | Tensor,
            path: AffinePath = defaults[0],
            steps: int = defaults[1],
            solver: str = defaults[2],
            time: TimeSampler = torch.rand,
            fused: bool = True,
            weight: Tensor | None = None,
            generator: torch.Generator | None = None,
        ) -> Loss:
            share = discount(gamma, batch)
            check_path(path)
            check_floating("batch.state", batch.state)
            check_choice("solver", solver, (*SOLVERS, "ddim"))
            t = time_like(batch.state, time, generator)
            noise = noise_like(batch.next_state, generator)
            direct, direct_value = interpolate(path, prediction, noise, batch.visited, t)
            with torch.no_grad():
                if solver != "dopri5_per_sample":  # which evaluates some rows only
                    target = at_condition(target, batch.next_condition)
                point, value = bootstrap(Target(target, batch, path, prediction, steps, solver, generator), t)
                if batch.terminal is not None:
                    stay = interpolate(path, prediction, noise, batch.next_state, t)
                    point, value = batch.where_terminal(stay[0], point), batch.where_terminal(stay[1], value)
            cond = batch.condition
            if fused:
                both = call_field(field, torch.cat([t, t]), torch.cat([direct, point]), torch.cat([cond, cond]))
                at_direct, at_bootstrap = both.chunk(2)
            else:
                at_direct, at_bootstrap = call_field(field, t, direct, cond), call_field(field, t, point, cond)
            errors = squared_error(at_direct, direct_value), squared_error(at_bootstrap, value)
            return Loss.of(*errors, share, weight)

        loss.__name__, loss.__qualname__ = bootstrap.__name__, bootstrap.__qualname__
        loss.__module__, loss.__doc__ = bootstrap.__module__, bootstrap.__doc__
        loss.prediction = prediction  # type: ignore[attr-defined]
        return cast(SuccessorLoss, loss)

    return decorate
