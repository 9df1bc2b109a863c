"""The ODE solver: integrate a velocity field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import as_time, check_choice, check_floating, check_object, flatten_event
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.solvers._problem import (
    Clock,
    CountedField,
    SolverError,
    check_finite,
    check_output_times,
    output_marks,
    step_ends,
)
from flowmatch_core.solvers.adaptive import ADAPTIVE, GIVEN_UP, dopri5, dopri5_per_sample
from flowmatch_core.solvers.fixed_step import TABLEAUS, Adams, adams, adams3, runge_kutta
from flowmatch_core.solvers.grids import TimeGrid, Uniform

__all__ = ["SOLVERS", "Solution", "check_grid", "check_tolerances", "solve"]

SOLVERS = (*TABLEAUS, "adams3", "adams", *ADAPTIVE)
"""The names of the solvers: fixed-step methods of order 1, 2, 2, 4, 3 and 5, and two adaptive ones of order 5."""


@dataclass(frozen=True)
class Solution:
    """The end of an integration, or of a simulation by `solve_sde` or `discrete.solve_ctmc`.

    Args:
        x: The state at the end, with shape `(batch, *event)`; NaN in rows where an unchecked `dopri5_per_sample`
            failed.
        nfe: The number of evaluations of the field, or of the denoiser.
        status: `finished`; `unchecked` for a fixed-step solve whose values were not checked; or, for an unchecked
            `dopri5_per_sample`, the reason why it failed in some rows.
        accepted: The number of accepted steps of an adaptive solver, one number, or `(batch,)` if each row has its
            own.
        rejected: The number of rejected steps, likewise.
        t: The times of `path`: `times` where they were given, else those between the steps, with shape `(steps + 1,)`
            or `(steps + 1, batch)`; None unless it was saved.
        path: The states at these times, with shape `(len(t), batch, *event)`; None unless it was saved.
    """

    x: Tensor
    nfe: int
    status: str = "unchecked"
    accepted: int | Tensor | None = None
    rejected: int | Tensor | None = None
    t: Tensor | None = None
    path: Tensor | None = None


def solve(
    field: VelocityField,
    x: Tensor,
    *,
    t0: Time = 0.0,
    t1: Time = 1.0,
    times: Sequence[float] | Tensor | None = None,
    cond: Condition = None,
    solver: str = "midpoint",
    steps: int = 20,
    grid: TimeGrid = Uniform(),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Integrate $\dot x = v(t, x, c)$ from `t0` to `t1`, backward in time if `t1 < t0`.

    Each sample may have its own interval: time is rescaled to $t = t_0 + g(s) (t_1 - t_0)$, $s \in [0, 1]$, where $g$
    is the grid, and the steps of a sample divide its own interval. The field is never evaluated outside it.

    The states at given times are kept with `times`, at the order or tolerance of the solver: a Runge-Kutta step that
    contains one of them is divided there, an adaptive step ends there, and a multistep method integrates its slopes
    up to there, without further evaluations.

    - `euler`, `midpoint`, `heun`, `rk4`: Runge-Kutta methods with fixed steps from each node of the grid to the next.
    - `adams3`, `adams`: multistep methods that predict with the last three or five slopes and correct with the
      slope at the prediction: one evaluation per step. `adams3` takes one more in all and suits few steps; `adams`
      takes seven more for an accurate start. They are the cheapest for a field that is smooth in time, but the least
      stable for a stiff field.
    - `dopri5`: adaptive steps shared by the batch. The error is the maximum over all entries, not their mean, so
      every sample meets the tolerance.
    - `dopri5_per_sample`: adaptive steps of each sample; finished rows cost nothing.

    Except with `dopri5`, the result of a sample does not depend on the rest of its batch.

    Args:
        field: The velocity field.
        x: The state at `t0`, with shape `(batch, *event)`.
        t0: The start, a float, 0-d or `(batch,)`.
        t1: The end, a float, 0-d or `(batch,)`.
        times: The output times in place of `t0` and `t1`, which are their ends: two or more that increase or
            decrease.
        cond: The condition handed to the field, a tensor or a mapping of tensors whose first dimension is the batch.
        solver: One of `SOLVERS`.
        steps: The number of steps of a fixed-step method, and of intervals of a saved path.
        grid: Where these steps and intervals end.
        rtol: The relative tolerance of an adaptive method.
        atol: The absolute tolerance of an adaptive method.
        max_steps: The maximum number of steps of an adaptive method in an interval.
        save: Whether to keep the path.
        check: Whether to raise a `SolverError` if the result is not finite or `dopri5_per_sample` failed; `dopri5`
            raises it anyway. For a fixed-step method the check synchronises with the device.

    Examples:
        >>> solve(lambda t, x, cond: -x, torch.ones(1, 1), solver="rk4", steps=10).x
        tensor([[0.3679]])
        >>> solution = solve(lambda t, x, cond: -x, torch.ones(1, 1), solver="rk4", times=torch.linspace(0, 1, 3))
        >>> solution.t, solution.path.squeeze()
        (tensor([0.0000, 0.5000, 1.0000]), tensor([1.0000, 0.6065, 0.3679]))
    """
    check_choice("solver", solver, SOLVERS)
    for name, number in (("steps", steps), ("max_steps", max_steps)):
        if number < 1:
            raise ValueError(f"{name} is {number}, but should be at least 1.")
    if x.ndim == 0:
        raise ValueError("x has no dimensions, but should have shape (batch, *event).")
    check_floating("x", x)
    check_grid(grid, solver)
    check_tolerances(rtol, atol)
    outputs = None if times is None else check_output_times(times, t0, t1, save)
    if outputs is not None:
        t0, t1 = outputs[0], outputs[-1]
    start, end = (as_time(t, x) if isinstance(t, Tensor) else float(t) for t in (t0, t1))
    evaluate, clock = CountedField(field, cond), Clock(grid, start, end - start)
    marks = output_marks(clock, steps, save, outputs)
    status = "unchecked"
    accepted: int | Tensor | None = None
    rejected: int | Tensor | None = None
    if solver == "dopri5":
        path, accepted, rejected = dopri5(evaluate, x, clock, marks, rtol, atol, max_steps)
        status = "finished"
    elif solver == "dopri5_per_sample":
        path, status, accepted, rejected = dopri5_per_sample(evaluate, x, clock, marks, rtol, atol, max_steps)
    elif solver in TABLEAUS:
        ends, kept = step_ends(steps, marks), set(marks)
        states = runge_kutta(evaluate, x, clock, ends, TABLEAUS[solver])
        path = [x, *(state for s, state in zip(ends[1:], states, strict=True) if s in kept)]
    else:
        method = Adams(evaluate, x, clock, steps, marks)
        path = [x, *(adams(method, x) if solver == "adams" else adams3(method, x))]
    if check:
        if status in GIVEN_UP:
            failed = flatten_event(path[-1].isnan()).any(1).sum()
            raise SolverError(
                f"solver {solver!r} gave up in {int(failed)} of {len(x)} samples ({status}); look for NaN or "
                f"discontinuities in the field, loosen rtol={rtol} and atol={atol}, or raise max_steps={max_steps}."
            )
        check_finite(solver, path[-1])
        status = "finished"
    solution = Solution(path[-1], evaluate.calls, status, accepted, rejected)
    if not save and outputs is None:
        return solution
    t = clock.times(marks, x) if outputs is None else torch.tensor(outputs, dtype=x.dtype, device=x.device)
    return replace(solution, t=t, path=torch.stack(path))


def check_grid(grid: TimeGrid, solver: str) -> None:
    """Raise a `ValueError` if a grid other than `Uniform()` is given to an adaptive solver."""
    check_object("grid", grid)
    if solver in ADAPTIVE and grid != Uniform():
        raise ValueError(
            f"grid is {grid}, but should be Uniform() for solver {solver!r}, which places its own steps; for the "
            "states at given times call solve(..., times=)."
        )


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise a `ValueError` unless both tolerances are finite, neither is negative and one is positive."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"{name} is {tolerance}, but should be finite and not negative.")
    if rtol == atol == 0:
        raise ValueError("rtol and atol are both 0, but one should be positive.")
