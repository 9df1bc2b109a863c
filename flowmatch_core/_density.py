"""The solve behind every log-density: a path, and the integral of the divergence along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition, condition_parts, map_condition
from flowmatch_core._jacobian import full_precision
from flowmatch_core._tensors import check_choice, expand_time, flatten_event
from flowmatch_core.divergence import DivergenceMethod, divergence, divergence_per_probe, prepared
from flowmatch_core.field import Field, Time, VelocityField, has_closed_form_divergence
from flowmatch_core.solvers import SOLVERS, Solution, TimeGrid, Uniform, solve
from flowmatch_core.solvers.fixed_step import TABLEAUS
from flowmatch_core.solvers.ode import check_grid, check_tolerances

__all__ = ["Rule", "push", "random_phase", "reference_rule", "simpson_weights"]

ROWS_AT_ONCE = 2**14
"""Maximum number of points in one field evaluation of a likelihood, which bounds the memory."""
WARP = 0.5
"""The strength of the random change of the time variable: the largest step is 1 + WARP times the mean one."""


@dataclass(frozen=True)
class Rule:
    """How a path and the integral along it are computed.

    Args:
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        steps: The number of steps of a fixed-step solver.
        grid: Where they end.
        divergence: One of auto, exact and hutchinson.
        rtol: The relative tolerance of an adaptive solver.
        atol: The absolute tolerance of an adaptive solver.
        check: Whether a solve that fails raises a `SolverError`.
    """

    solver: str
    steps: int
    grid: TimeGrid
    divergence: DivergenceMethod
    rtol: float
    atol: float
    check: bool

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, SOLVERS)
        check_choice("divergence", self.divergence, get_args(DivergenceMethod))
        check_grid(self.grid, self.solver)
        check_tolerances(self.rtol, self.atol)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but should be at least 1.")

    def refined(self) -> Rule:
        """Return the rule with twice the steps and a tenth of the tolerances."""
        return replace(self, steps=2 * self.steps, rtol=0.1 * self.rtol, atol=0.1 * self.atol)

    def solve(
        self, field: VelocityField, x: Tensor, cond: Condition, *, backward: bool = False, save: bool = False
    ) -> Solution:
        """Solve from noise to data, or backward."""
        return solve(
            field,
            x,
            t0=1.0 if backward else 0.0,
            t1=0.0 if backward else 1.0,
            cond=cond,
            solver=self.solver,
            steps=self.steps,
            grid=self.grid,
            rtol=self.rtol,
            atol=self.atol,
            save=save,
            check=self.check,
        )


def reference_rule(rule: Rule, dtype: torch.dtype) -> Rule:
    """Return a rule apart from the given one: joint adaptive steps, with the tightest tolerance of the dtype.

    Examples:
        >>> rule = Rule("midpoint", 20, Uniform(), "auto", 1e-5, 1e-5, True)
        >>> reference_rule(rule, torch.float64).rtol
        1e-08
    """
    tolerance = max(1e-8, 8 * torch.finfo(dtype).eps)
    return replace(rule, solver="dopri5", grid=Uniform(), rtol=tolerance, atol=tolerance)


def random_phase(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a phase for `push`, uniform in [0, 2 pi).

    Examples:
        >>> random_phase(torch.zeros(3), torch.Generator().manual_seed(0)).shape
        torch.Size([])
    """
    return 2 * math.pi * torch.rand((), generator=generator, dtype=like.dtype, device=like.device)


def push(
    field: VelocityField,
    x: Tensor,
    cond: Condition,
    rule: Rule,
    *,
    noise: Tensor | None = None,
    each: bool = False,
    backward: bool = False,
    phase: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    r"""Move points from noise to data, or backward, and integrate the divergence along their paths.

    A fixed-step Runge-Kutta method solves a backward path first and integrates the divergences at its points by
    Simpson's rule, all of them evaluated in one batch. Point and integral are solved as one state by any other
    method, and wherever the result needs gradients: a field trained on the quadrature learns to hide divergence
    between its points.

    With a phase $\varphi$ the variable of the solve is $s$ with
    $t = s + w (\sin(2 \pi s + \varphi) - \sin \varphi) / (2 \pi)$. A phase drawn anew for each solve moves all points
    between 0 and 1, so that a field cannot learn where they are.

    Args:
        field: The velocity field.
        x: The points at one end, with shape `(batch, *event)`.
        cond: Their conditions as rows.
        rule: How to solve.
        noise: The probes of hutchinson, with shape `(k, batch, *event)`.
        each: Whether to return the integral of each probe.
        backward: Whether to start from data.
        phase: The phase $\varphi$, without dimensions; None solves in time itself.

    Returns:
        The points at the other end `(batch, *event)`, the integrals from t = 0 to 1 `(k or 1, batch)`, and the number
        of field evaluations for a point.

    Examples:
        >>> rule = Rule("rk4", 16, Uniform(), "auto", 1e-5, 1e-5, True)
        >>> x, integral, _ = push(lambda t, x, cond: x, torch.ones(1, 2), None, rule)
        >>> x.detach(), integral.detach()
        (tensor([[2.7183, 2.7183]]), tensor([[2.]]))
    """
    ends, integrals, calls = [], [], 0
    with full_precision(x):
        field = prepared(field, rule.divergence)
        for first in range(0, max(1, len(x)), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            solving = _Push(
                field,
                _taken(cond, rows),
                rule,
                None if noise is None else noise[:, rows],
                each,
                phase,
            )
            quadrature = backward and phase is None and rule.solver in TABLEAUS and not solving.needs_gradient(x[rows])
            end, integral, called = solving.quadrature(x[rows]) if quadrature else solving.joint(x[rows], backward)
            ends.append(end)
            integrals.append(integral)
            calls = max(calls, called)
    return torch.cat(ends), torch.cat(integrals, 1), calls


@dataclass(frozen=True)
class _Push:
    """The push of one batch of rows; the arguments are those of `push`."""

    field: VelocityField
    cond: Condition
    rule: Rule
    noise: Tensor | None
    each: bool
    phase: Tensor | None

    @property
    def columns(self) -> int:
        return len(self.noise) if self.each and self.noise is not None else 1

    def needs_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        if x.requires_grad or any(part.requires_grad for part in condition_parts(self.cond)):
            return True
        # only an evaluation tells whether a callable holds something that requires gradients
        return call_field(self.field, 1.0, x[:1], _taken(self.cond, slice(1))).requires_grad

    def quadrature(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Solve the path first, then integrate the divergences at its points."""
        solution = self.rule.solve(self.field, x, self.cond, backward=True, save=True)
        assert solution.t is not None and solution.path is not None
        steps, grid = len(solution.t) - 1, self.rule.grid.backward()
        rates = torch.tensor([grid.rate(i / steps) for i in range(steps + 1)], dtype=x.dtype, device=x.device)
        weights = simpson_weights(steps, like=x) * rates
        integral = x.new_zeros(self.columns, len(x))
        if not isinstance(self.field, Field) or (
            self.rule.divergence == "auto" and has_closed_form_divergence(self.field)
        ):
            # node by node: a plain callable may take a time without dimensions only, and some closed forms need rows
            # that share their time and cost as little as a velocity then
            for node, weight in enumerate(weights):
                rate = self.velocity_and_rates(solution.t[node], solution.path[node], self.cond, self.noise)[1]
                integral = integral + weight * rate
            return solution.x, integral, solution.nfe + steps + 1
        everyone, nodes_at_once = torch.arange(len(x), device=x.device), max(1, ROWS_AT_ONCE // max(1, len(x)))
        for first in range(0, steps + 1, nodes_at_once):
            nodes = slice(first, first + nodes_at_once)
            n = len(weights[nodes])
            _, values = self.velocity_and_rates(
                solution.t[nodes].repeat_interleave(len(x)),
                solution.path[nodes].flatten(0, 1),
                _taken(self.cond, everyone.repeat(n)),
                None if self.noise is None else self.noise.repeat(1, n, *(1,) * (x.ndim - 1)),
            )
            integral = integral + torch.stack([weights[nodes] @ row.reshape(n, len(x)) for row in values])
        return solution.x, integral, solution.nfe + steps + 1

    def joint(self, x: Tensor, backward: bool) -> tuple[Tensor, Tensor, int]:
        """Solve the path and the integrals of the divergence along it as one state."""
        columns, everyone = self.columns, torch.arange(len(x), device=x.device)

        def state_velocity(s: Time, state: Tensor, rows: Condition) -> Tensor:
            # a solver may leave out rows: their numbers are the condition of the solve
            cond, noise = self.cond, self.noise
            if rows is not everyone:
                cond = _taken(cond, rows)
                noise = None if noise is None else noise[:, rows]
            t, speed = self.time(s)
            velocity, rates = self.velocity_and_rates(
                t, state[:, :-columns].reshape(len(state), *x.shape[1:]), cond, noise
            )
            slope = torch.cat([flatten_event(velocity), rates.T], 1)
            return slope if speed is None else slope * expand_time(speed, slope)

        state = torch.cat([flatten_event(x), x.new_zeros(len(x), columns)], 1)
        solution = self.rule.solve(state_velocity, state, everyone, backward=backward)
        integral = solution.x[:, -columns:].T
        return solution.x[:, :-columns].reshape(x.shape), -integral if backward else integral, solution.nfe

    def time(self, s: Time) -> tuple[Time, Tensor | None]:
        """Return the time at a value of the variable of the solve, and its derivative, None for 1."""
        if self.phase is None:
            return s, None
        angle = self.phase + 2 * math.pi * s
        t = s + WARP / (2 * math.pi) * (angle.sin() - self.phase.sin())
        return t.clamp(0, 1), 1 + WARP * angle.cos()  # rounding may exceed the interval

    def velocity_and_rates(self, t: Time, x: Tensor, cond: Condition, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the velocity and the divergence, with shape `(columns, batch)`."""
        if self.each:
            return divergence_per_probe(self.field, t, x, cond, self.rule.divergence, noise=noise)
        velocity, rate = divergence(self.field, t, x, cond, self.rule.divergence, noise=noise)
        return velocity, rate[None]


def _taken(cond: Condition, rows: slice | Tensor) -> Condition:
    return map_condition(lambda part: part[rows], cond)


def simpson_weights(intervals: int, like: Tensor) -> Tensor:
    """Return the weights of a quadrature of order four on [0, 1] with `intervals + 1` equidistant nodes.

    Simpson's rule; an odd number of intervals ends in one panel of the 3/8 rule, and a single one uses the trapezoid
    rule.

    Examples:
        >>> simpson_weights(2, like=torch.zeros(1))
        tensor([0.1667, 0.6667, 0.1667])
    """
    weights = like.new_zeros(intervals + 1)
    if intervals == 1:
        return weights + 1 / 2
    even = intervals if intervals % 2 == 0 else intervals - 3
    for i in range(0, even, 2):
        weights[i : i + 3] += like.new_tensor([1, 4, 1]) / 3
    if even < intervals:
        weights[even:] += like.new_tensor([1, 3, 3, 1]) * 3 / 8
    return weights / intervals
