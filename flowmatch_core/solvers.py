"""Integrating a velocity field: Runge-Kutta methods as tableaus, one loop, and an adaptive method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchdiffeq
from torch import Tensor

from flowmatch_core.fields import (
    Time,
    VelocityField,
    as_time,
    check_choice,
    check_shape,
    expand_time,
    flatten_event,
)

__all__ = ["SOLVERS", "Solution", "SolverError", "Tableau", "solve"]


class SolverError(FloatingPointError):
    """An integration that met a value that is not finite or could not reach its tolerance."""


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage times `c`, rows of stage weights `a`, final weights `b`."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau(a=((),), b=(1,), c=(0,)),
    "midpoint": Tableau(a=((), (1 / 2,)), b=(0, 1), c=(0, 1 / 2)),
    "heun": Tableau(a=((), (1,)), b=(1 / 2, 1 / 2), c=(0, 1)),
    "rk4": Tableau(
        a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0, 1 / 2, 1 / 2, 1),
    ),
}

SOLVERS = (*TABLEAUS, "dopri5")
"""The names of the solvers: fixed-step methods of order 1, 2, 2 and 4, and one adaptive method of order 5."""

MAX_ADAPTIVE_STEPS = 10_000


@dataclass(frozen=True)
class Solution:
    """The end of an integration.

    Arguments:
        x: The state at the end, with shape `(batch, *event)`.
        nfe: How many times the field was evaluated.
        t: The times of `path`, with shape `(steps + 1,)` or `(steps + 1, batch)`; None unless it was saved.
        path: The states at these times, with shape `(steps + 1, batch, *event)`; None unless it was saved.
    """

    x: Tensor
    nfe: int
    t: Tensor | None = None
    path: Tensor | None = None


def solve(
    field: VelocityField,
    x: Tensor,
    *,
    t0: Time = 0.0,
    t1: Time = 1.0,
    cond: Tensor | None = None,
    solver: str = "midpoint",
    steps: int = 20,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Integrate :math:`\dot x = v(t, x, c)` from `t0` to `t1`, backward in time if `t1 < t0`.

    Each sample may have its own interval: time is rescaled to :math:`t = t_0 + s (t_1 - t_0)`, :math:`s \in
    [0, 1]`, so a sample's step is its :math:`(t_1 - t_0)` over `steps`. A fixed-step result of a sample
    does not depend on the rest of its batch. The steps of `dopri5` are shared by the batch, but its error
    is the largest over all entries (not their mean), so every sample meets the tolerance whatever it is
    solved with. The field is never evaluated outside the interval.

    Arguments:
        field: The velocity field.
        x: The state at `t0`, with shape `(batch, *event)`.
        t0: The start, a float, 0-d or `(batch,)`.
        t1: The end, a float, 0-d or `(batch,)`.
        cond: The condition handed to the field, with shape `(batch, c)`.
        solver: One of `SOLVERS`.
        steps: The number of steps of a fixed-step method, and of intervals of a saved path.
        rtol: The relative tolerance of `dopri5`.
        atol: The absolute tolerance of `dopri5`.
        save: Whether to keep the path.
        check: Whether to raise a `SolverError` if the result is not finite, which waits for the device.

    Example:
        >>> solve(lambda t, x, cond: -x, torch.ones(1, 1), solver="rk4", steps=10).x
        tensor([[0.3679]])
    """
    check_choice("solver", solver, SOLVERS)
    if steps < 1:
        raise ValueError(f"steps is {steps}, but should be at least 1.")
    if x.ndim == 0:
        raise ValueError("x has no dimensions, but should have shape (batch, *event).")
    evaluate = _Counted(field, cond)
    start, end = (as_time(t, x) if isinstance(t, Tensor) else float(t) for t in (t0, t1))
    span = end - start
    if solver == "dopri5":
        path = _dopri5(evaluate, x, start, span, steps if save else 1, rtol, atol)
    else:
        path = _runge_kutta(evaluate, x, start, span, TABLEAUS[solver], steps, save)
    if check:
        finite = flatten_event(torch.isfinite(path[-1])).all(1)
        if not finite.all():
            raise SolverError(
                f"solver {solver!r} ended in values that are not finite in {int((~finite).sum())} "
                f"of {len(x)} samples; look for NaN or exploding velocities in the field, or take more steps."
            )
    if not save:
        return Solution(x=path[-1], nfe=evaluate.calls)
    grid = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
    if isinstance(span, Tensor) and span.ndim:
        grid = grid[:, None]
    return Solution(x=path[-1], nfe=evaluate.calls, t=start + span * grid, path=torch.stack(path))


class _Counted:
    """The field with its condition filled in, its results checked and its evaluations counted."""

    def __init__(self, field: VelocityField, cond: Tensor | None) -> None:
        self.field, self.cond, self.calls = field, cond, 0

    def __call__(self, t: Time, x: Tensor) -> Tensor:
        self.calls += 1
        velocity = self.field(t, x, self.cond)
        check_shape("the result of field", velocity, x.shape)
        return velocity


def _runge_kutta(
    evaluate: _Counted, x: Tensor, start: Time, span: Time, tableau: Tableau, steps: int, save: bool
) -> list[Tensor]:
    path = [x]
    step = expand_time(span, x) / steps if isinstance(span, Tensor) else span / steps
    for i in range(steps):
        slopes: list[Tensor] = []
        for weights, c in zip(tableau.a, tableau.c, strict=True):
            slopes.append(evaluate(start + span * ((i + c) / steps), _advance(x, step, weights, slopes)))
        x = _advance(x, step, tableau.b, slopes)
        if save or i == steps - 1:
            path.append(x)
    return path


def _advance(x: Tensor, step: Time, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight == 0:
            continue
        if isinstance(step, Tensor):
            x = torch.addcmul(x, step, slope, value=weight)
        else:
            x = torch.add(x, slope, alpha=step * weight)
    return x


def _dopri5(
    evaluate: _Counted, x: Tensor, start: Time, span: Time, intervals: int, rtol: float, atol: float
) -> list[Tensor]:
    def rescaled(s: Tensor, state: Tensor) -> Tensor:
        s = s.clamp(0, 1)  # the trial that chooses the first step may look past the end
        return expand_time(span, state) * evaluate(as_time(start + span * s, state), state)

    grid = torch.linspace(0, 1, intervals + 1, dtype=torch.float64, device=x.device)
    options = {
        # the mean square over the batch, torchdiffeq's default, would let a stiff sample hide among easy ones
        "norm": lambda error: error.abs().amax(),
        # steps end on the grid: interpolated results would miss the tolerance
        "step_t": grid[1:],
        "max_num_steps": MAX_ADAPTIVE_STEPS,
    }
    try:
        path = torchdiffeq.odeint(rescaled, x, grid, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # torchdiffeq's only signal of a step that vanished or of too many steps
        raise SolverError(
            f"solver 'dopri5' gave up ({error}); look for NaN or discontinuities in the field, "
            f"or loosen rtol={rtol} and atol={atol}."
        ) from error
    return list(path)
