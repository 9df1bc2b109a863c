"""Integrating a velocity field: Runge-Kutta tableaus, a multistep method, and adaptive methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
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
from flowmatch_core.grids import TimeGrid, Uniform

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

DORMAND_PRINCE = Tableau(
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
)
"""The method behind `dopri5_per_sample`; its last stage is the first one of the next step."""

ERROR = tuple(
    fifth - fourth
    for fifth, fourth in zip(
        DORMAND_PRINCE.b,
        (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
        strict=True,
    )
)
"""Its weights less those of the embedded method of order four: the error of a step."""

BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    5: (251 / 720, -1274 / 720, 2616 / 720, -2774 / 720, 1901 / 720),
}
"""The weights of the explicit Adams methods by their number of slopes, the oldest slope first."""

MOULTON: dict[int, tuple[float, ...]] = {
    1: (1 / 2, 1 / 2),
    2: (-1 / 12, 8 / 12, 5 / 12),
    3: (1 / 24, -5 / 24, 19 / 24, 9 / 24),
    5: (27 / 1440, -173 / 1440, 482 / 1440, -798 / 1440, 1427 / 1440, 475 / 1440),
}
"""The weights of the implicit ones, which correct with one more slope, that at the prediction."""

GIVEN_UP = ("steps vanished", "out of steps")
"""The states of an adaptive solve that gave up on some rows."""

ADAPTIVE = ("dopri5", "dopri5_per_sample")

SOLVERS = (*TABLEAUS, "adams3", "adams", *ADAPTIVE)
"""The names of the solvers: fixed-step methods of order 1, 2, 2, 4, 3 and 5, and two adaptive ones of order 5."""


@dataclass(frozen=True)
class Solution:
    """The end of an integration, or of a simulation by `solve_sde` or `discrete.solve_ctmc`.

    Arguments:
        x: The state at the end, with shape `(batch, *event)`; NaN in rows that an unchecked `dopri5_per_sample`
            gave up.
        nfe: How many times the field, or the denoiser, was evaluated.
        status: `finished`; `unchecked`, of a fixed-step solve whose values nobody looked at; or, of an unchecked
            `dopri5_per_sample`, what stopped it in some rows.
        accepted: How many steps an adaptive solver accepted: one number, or `(batch,)` if rows step apart.
        rejected: How many steps it tried in vain, likewise.
        t: The times of `path`, with shape `(steps + 1,)` or `(steps + 1, batch)`; None unless it was saved.
        path: The states at these times, with shape `(steps + 1, batch, *event)`; None unless it was saved.
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
    cond: Tensor | None = None,
    solver: str = "midpoint",
    steps: int = 20,
    grid: TimeGrid = Uniform(),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Integrate :math:`\dot x = v(t, x, c)` from `t0` to `t1`, backward in time if `t1 < t0`.

    Each sample may have its own interval: time is rescaled to :math:`t = t_0 + g(s) (t_1 - t_0)`, :math:`s
    \in [0, 1]`, where :math:`g` is the grid, so that a sample's steps are those of its own interval. The
    field is never evaluated outside it.

    - `euler`, `midpoint`, `heun`, `rk4`: Runge-Kutta methods with fixed steps.
    - `adams3`, `adams`: multistep methods that predict with the last three or five slopes and correct with the
      slope at the prediction: one evaluation a step. `adams3` has one more in all, for few steps; `adams` has
      seven more, for a precise start. They are the cheapest for a field that is smooth in time, but the
      first to explode where steps are too long for a stiff one.
    - `dopri5`: adaptive steps shared by the batch. The error is the largest over all entries (not their
      mean), so every sample meets the tolerance whatever it is solved with.
    - `dopri5_per_sample`: adaptive steps of each sample's own; rows that have arrived cost nothing.

    Except with `dopri5`, the result of a sample does not depend on the rest of its batch.

    Arguments:
        field: The velocity field.
        x: The state at `t0`, with shape `(batch, *event)`.
        t0: The start, a float, 0-d or `(batch,)`.
        t1: The end, a float, 0-d or `(batch,)`.
        cond: The condition handed to the field, with shape `(batch, c)`.
        solver: One of `SOLVERS`.
        steps: The number of steps of a fixed-step method, and of intervals of a saved path.
        grid: Where these steps and intervals end.
        rtol: The relative tolerance of an adaptive method.
        atol: The absolute tolerance of an adaptive method.
        max_steps: How many steps an adaptive method may try in an interval before it gives up.
        save: Whether to keep the path.
        check: Whether to raise a `SolverError` if the result is not finite or `dopri5_per_sample` gave up; `dopri5`
            raises it anyway. For a fixed-step method this waits for the device.

    Example:
        >>> solve(lambda t, x, cond: -x, torch.ones(1, 1), solver="rk4", steps=10).x
        tensor([[0.3679]])
    """
    check_choice("solver", solver, SOLVERS)
    for name, number in (("steps", steps), ("max_steps", max_steps)):
        if number < 1:
            raise ValueError(f"{name} is {number}, but should be at least 1.")
    if x.ndim == 0:
        raise ValueError("x has no dimensions, but should have shape (batch, *event).")
    check_grid(grid, solver)
    check_tolerances(rtol, atol)
    evaluate = CountedField(field, cond)
    start, end = (as_time(t, x) if isinstance(t, Tensor) else float(t) for t in (t0, t1))
    clock = _Clock(grid, start, end - start)
    intervals = steps if save else 1
    status = "unchecked"
    accepted: int | Tensor | None = None
    rejected: int | Tensor | None = None
    if solver == "dopri5":
        path, accepted, rejected = _dopri5(evaluate, x, clock, intervals, rtol, atol, max_steps)
        status = "finished"
    elif solver == "dopri5_per_sample":
        path, status, accepted, rejected = _dopri5_per_sample(evaluate, x, clock, intervals, rtol, atol, max_steps)
    else:
        fixed = _Steps(evaluate, x, clock, steps)
        if solver in TABLEAUS:
            states = _runge_kutta(fixed, x, TABLEAUS[solver])
        else:
            states = _adams(fixed, x) if solver == "adams" else _adams3(fixed, x)
        path = [x]
        for state in states:
            path = [*path, state] if save else [state]
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
    if not save:
        return solution
    return replace(solution, t=clock.times(steps, x), path=torch.stack(path))


def check_grid(grid: TimeGrid, solver: str) -> None:
    """Raise a `ValueError` if the solver places its own steps and a grid other than the uniform one is given."""
    if solver in ADAPTIVE and grid != Uniform():
        raise ValueError(f"grid is {grid}, but should be Uniform() for solver {solver!r}, which places its own steps.")


def check_finite(solver: str, x: Tensor) -> None:
    """Raise a `SolverError` if a row of the end of a solve holds a value that is not finite."""
    finite = flatten_event(torch.isfinite(x)).all(1)
    if not finite.all():
        raise SolverError(
            f"solver {solver!r} ended in values that are not finite in {int((~finite).sum())} "
            f"of {len(x)} samples; look for NaN or exploding velocities in the field, or take more steps."
        )


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise a `ValueError` unless both tolerances are finite, neither is negative and one is positive."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"{name} is {tolerance}, but should be finite and not negative.")
    if rtol == atol == 0:
        raise ValueError("rtol and atol are both 0, but one should be positive.")


def dopri5_options(max_steps: int) -> dict[str, Any]:
    """Return the options of torchdiffeq's `dopri5`: the norm of its error, and its budget of steps."""
    return {
        # the mean square over the batch, torchdiffeq's default, would let a stiff sample hide among easy ones
        "norm": lambda error: error.abs().amax() if error.numel() else error.sum(),
        "max_num_steps": max_steps,
    }


@contextmanager
def dopri5_errors(rtol: float, atol: float, max_steps: int) -> Iterator[None]:
    """Turn torchdiffeq's only signal of a step that vanished or of too many steps into a `SolverError`."""
    try:
        yield
    except AssertionError as error:
        raise SolverError(
            f"solver 'dopri5' gave up ({error}); look for NaN or discontinuities in the field, "
            f"loosen rtol={rtol} and atol={atol}, or raise max_steps={max_steps}."
        ) from error


class CountedField:
    """The field with its condition filled in, its results checked and its evaluations counted."""

    def __init__(self, field: VelocityField, cond: Tensor | None) -> None:
        self.field, self.cond, self.calls = field, cond, 0

    def __call__(self, t: Time, x: Tensor, rows: Tensor | None = None) -> Tensor:
        self.calls += 1
        cond = self.cond if self.cond is None or rows is None else self.cond[rows]
        velocity = self.field(t, x, cond)
        check_shape("the result of field", velocity, x.shape)
        return velocity


class _Clock:
    """The times of a solve: a grid laid over each sample's interval, forward or backward."""

    def __init__(self, grid: TimeGrid, start: Time, span: Time) -> None:
        self.start, self.span = start, span
        self.forward, self.backward = grid, grid.backward()
        if isinstance(span, float):
            self.forward = self.backward = self.backward if span < 0 else self.forward

    def time(self, s: float) -> Time:
        return self.start + self.span * self._fraction(s)

    def rate(self, s: float) -> Time:
        return self._either(self.forward.rate(s), self.backward.rate(s))

    def times(self, steps: int, x: Tensor) -> Tensor:
        even = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
        shifts = [self._fraction(i / steps) - i / steps for i in range(steps + 1)]
        shift = torch.stack([torch.as_tensor(s, dtype=x.dtype, device=x.device) for s in shifts])
        if isinstance(self.span, Tensor) and self.span.ndim:
            even, shift = even[:, None], shift.reshape(steps + 1, -1)
        return self.start + self.span * (even + shift)

    def _fraction(self, s: float) -> Time:
        return self._either(self.forward.time(s), self.backward.time(s))

    def _either(self, forward: float, backward: float) -> Time:
        if self.forward is self.backward or not isinstance(self.span, Tensor):
            return forward
        return forward + (backward - forward) * (self.span < 0).to(self.span.dtype)


class _Steps:
    """Equal steps in `s`, whose slopes are those in time with the rate of the clock beside them."""

    def __init__(self, evaluate: CountedField, x: Tensor, clock: _Clock, steps: int) -> None:
        self.evaluate, self.clock, self.steps = evaluate, clock, steps
        self.size = expand_time(clock.span, x) / steps if isinstance(clock.span, Tensor) else clock.span / steps

    def slope(self, i: float, x: Tensor) -> tuple[float, Tensor]:
        s = i / self.steps
        velocity, rate = self.evaluate(self.clock.time(s), x), self.clock.rate(s)
        return (1.0, expand_time(rate, x) * velocity) if isinstance(rate, Tensor) else (rate, velocity)

    def runge_kutta(
        self, tableau: Tableau, i: int, x: Tensor, first: tuple[float, Tensor] | None = None, stride: int = 1
    ) -> Tensor:
        """Return the state `stride` steps after the i-th, given the slope there if it is known."""
        slopes = [] if first is None else [first]
        for weights, c in list(zip(tableau.a, tableau.c, strict=True))[len(slopes) :]:
            slopes.append(self.slope(i + c * stride, self.advance(x, weights, slopes, stride)))
        return self.advance(x, tableau.b, slopes, stride)

    def advance(
        self, x: Tensor, weights: Sequence[float], slopes: Sequence[tuple[float, Tensor]], stride: int = 1
    ) -> Tensor:
        rated = [weight * rate for weight, (rate, _) in zip(weights, slopes, strict=True)]
        return _advance(x, self.size * stride, rated, [slope for _, slope in slopes])


def _advance(x: Tensor, step: Time, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight == 0:
            continue
        if isinstance(step, Tensor):
            x = torch.addcmul(x, step, slope, value=weight)
        else:
            x = torch.add(x, slope, alpha=step * weight)
    return x


def _runge_kutta(steps: _Steps, x: Tensor, tableau: Tableau) -> Iterator[Tensor]:
    for i in range(steps.steps):
        x = steps.runge_kutta(tableau, i, x)
        yield x


def _adams3(steps: _Steps, x: Tensor) -> Iterator[Tensor]:
    slopes = [steps.slope(0, x)]
    for i in range(steps.steps):
        x = _correct(steps, i, x, slopes)
        slopes = slopes[-3:]
        yield x


def _adams(steps: _Steps, x: Tensor) -> Iterator[Tensor]:
    slopes = [steps.slope(0, x)]
    start = min(4, steps.steps)
    for i in range(0, start, 2):
        stride = min(2, start - i)
        end = steps.runge_kutta(TABLEAUS["rk4"], i, x, slopes[-1], stride)
        ends = [slopes[-1], steps.slope(i + stride, end)]
        if stride == 2:  # the state between them lies on the cubic with these ends and slopes
            middle = steps.advance((x + end) / 2, (1 / 8, -1 / 8), ends, stride)
            slopes.append(steps.slope(i + 1, middle))
            yield middle
        slopes.append(ends[1])
        x = end
        yield x
    for i in range(start, steps.steps):
        x = _correct(steps, i, x, slopes)
        slopes = slopes[-5:]
        yield x


def _correct(steps: _Steps, i: int, x: Tensor, slopes: list[tuple[float, Tensor]]) -> Tensor:
    """Return the state after the i-th step, and add the slope there to those before it."""
    known = len(slopes)
    slopes.append(steps.slope(i + 1, steps.advance(x, BASHFORTH[known], slopes)))
    return steps.advance(x, MOULTON[known], slopes)


def _dopri5(
    evaluate: CountedField, x: Tensor, clock: _Clock, intervals: int, rtol: float, atol: float, max_steps: int
) -> tuple[list[Tensor], int, int]:
    import torchdiffeq  # imports much of scipy

    accepted = rejected = 0

    def rescaled(s: Tensor, state: Tensor) -> Tensor:
        s = s.clamp(0, 1)  # the trial that chooses the first step may look past the end
        return expand_time(clock.span, state) * evaluate(as_time(clock.start + clock.span * s, state), state)

    def accept(*_: object) -> None:
        nonlocal accepted
        accepted += 1

    def reject(*_: object) -> None:
        nonlocal rejected
        rejected += 1

    vars(rescaled).update(callback_accept_step=accept, callback_reject_step=reject)
    grid = torch.linspace(0, 1, intervals + 1, dtype=torch.float64, device=x.device)
    # steps end on the grid: interpolated results would miss the tolerance
    options = {**dopri5_options(max_steps), "step_t": grid[1:]}
    with dopri5_errors(rtol, atol, max_steps):
        path = torchdiffeq.odeint(rescaled, x, grid, rtol=rtol, atol=atol, method="dopri5", options=options)
    return list(path), accepted, rejected


def _dopri5_per_sample(
    evaluate: CountedField, x: Tensor, clock: _Clock, intervals: int, rtol: float, atol: float, max_steps: int
) -> tuple[list[Tensor], str, Tensor, Tensor]:
    """Return the states at the ends of the intervals, how it went, and the steps accepted and rejected in each row."""
    batch, order = len(x), 5
    start, span = (as_time(t, x).expand(batch) for t in (clock.start, clock.span))
    status = "finished"
    accepted = torch.zeros(batch, dtype=torch.int64, device=x.device)
    rejected = torch.zeros_like(accepted)

    def slope(rows: Tensor, s: Tensor, state: Tensor) -> Tensor:
        return expand_time(span[rows], state) * evaluate(start[rows] + span[rows] * s, state, rows)

    def norm(change: Tensor, *states: Tensor) -> Tensor:
        """The largest entry of each row in units of its tolerance; steps are chosen without gradients."""
        tolerance = atol + rtol * torch.stack(states).detach().abs().amax(0)
        ratio = flatten_event(change.detach().abs() / tolerance)
        return ratio.amax(1) if ratio.shape[1] else ratio.sum(1)

    # rows that have arrived or given up leave these tensors
    rows = torch.arange(batch, device=x.device)
    interval, tries, s = torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros_like(start)
    index, reached = [rows], [x]  # entries of the path
    first = slope(rows, s, x)
    step = _first_step(
        norm(x, x), norm(first, x), lambda h: norm(slope(rows, h, x + expand_time(h, x) * first) - first, x)
    )
    while len(rows):
        goal = (interval + 1).to(s.dtype) / intervals
        last = step >= goal - s
        size = torch.where(last, goal - s, step)
        slopes = [first]
        for weights, c in zip(DORMAND_PRINCE.a[1:], DORMAND_PRINCE.c[1:], strict=True):
            state = _advance(x, expand_time(size, x), weights, slopes)
            slopes.append(slope(rows, torch.minimum(s + c * size, goal), state))
        ratio = norm(_advance(torch.zeros_like(x), expand_time(size, x), ERROR, slopes), x, state)
        fits = ratio <= 1
        factor = (0.9 * ratio ** (-1 / order)).clamp(0.2, 10).nan_to_num(0.1)  # a step into NaN may have been too long
        vanished = ~(s + size > s)

        there = fits & last
        taken = fits.reshape(-1, *(1,) * (x.ndim - 1))
        x, first = torch.where(taken, state, x), torch.where(taken, slopes[-1], first)
        s = torch.where(fits, torch.where(last, goal, s + size), s)
        step = size * factor
        accepted[rows] += fits
        rejected[rows] += ~fits
        index.append(((interval + 1) * batch + rows)[there])
        reached.append(x[there])
        interval = interval + there.to(interval.dtype)
        tries = torch.where(there, 0, tries + 1)

        exhausted = tries >= max_steps
        if exhausted.any():
            status = "out of steps"
        if vanished.any():
            status = "steps vanished"
        stays = (interval < intervals) & ~exhausted & ~vanished
        rows, interval, tries, s, step = rows[stays], interval[stays], tries[stays], s[stays], step[stays]
        x, first = x[stays], first[stays]
    path = x.new_full(((intervals + 1) * batch, *x.shape[1:]), math.nan)
    path = path.index_copy(0, torch.cat(index), torch.cat(reached))
    return list(path.reshape(intervals + 1, batch, *x.shape[1:]).unbind()), status, accepted, rejected


def _first_step(size: Tensor, speed: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a careful first step of each row, after Hairer, Nørsett and Wanner (Solving Ordinary Differential
    Equations I, II.4), given the norms of the state and of its slope, and of the change of slope after a step."""
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=1)
    curvature = change(trial) / trial
    steepest = torch.maximum(speed, curvature)
    step = torch.where(steepest <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / steepest) ** (1 / 5))
    return torch.minimum(100 * trial, step)
