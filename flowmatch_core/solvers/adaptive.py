"""Adaptive solvers: Dormand-Prince with steps shared by the batch or chosen for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowmatch_core._require import required
from flowmatch_core._tensors import as_time, expand_time, flatten_event
from flowmatch_core.solvers._problem import Clock, CountedField, SolverError
from flowmatch_core.solvers.fixed_step import Tableau, advance

__all__ = [
    "ADAPTIVE",
    "DORMAND_PRINCE",
    "ERROR",
    "GIVEN_UP",
    "dopri5",
    "dopri5_errors",
    "dopri5_options",
    "dopri5_per_sample",
]

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
"""The method of `dopri5_per_sample`; its last stage is the first stage of the next step."""

ERROR = tuple(
    fifth - fourth
    for fifth, fourth in zip(
        DORMAND_PRINCE.b,
        (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
        strict=True,
    )
)
"""The weights minus those of the embedded method of order four, which estimate the error of a step."""

GIVEN_UP = ("steps vanished", "out of steps")
"""The statuses of an adaptive solve that failed in some rows."""

ADAPTIVE = ("dopri5", "dopri5_per_sample")


def dopri5_options(max_steps: int) -> dict[str, Any]:
    """Return the options of torchdiffeq's `dopri5`: the error norm and the maximum number of steps."""
    return {
        # torchdiffeq's default, the mean square over the batch, averages away the error of a single stiff sample
        "norm": lambda error: error.abs().amax() if error.numel() else error.sum(),
        "max_num_steps": max_steps,
    }


@contextmanager
def dopri5_errors(rtol: float, atol: float, max_steps: int) -> Iterator[None]:
    """Convert the assertion by which torchdiffeq reports an underflow or too many steps into a `SolverError`."""
    try:
        yield
    except AssertionError as error:
        raise SolverError(
            f"solver 'dopri5' gave up ({error}); look for NaN or discontinuities in the field, "
            f"loosen rtol={rtol} and atol={atol}, or raise max_steps={max_steps}."
        ) from error


def dopri5(
    evaluate: CountedField, x: Tensor, clock: Clock, marks: Sequence[float], rtol: float, atol: float, max_steps: int
) -> tuple[list[Tensor], int, int]:
    """Return the states at the marks, and the numbers of accepted and rejected steps."""
    torchdiffeq = required("torchdiffeq", "torchdiffeq")  # imports much of scipy
    accepted = rejected = 0

    def rescaled(s: Tensor, state: Tensor) -> Tensor:
        s = s.clamp(0, 1)  # the trial step that sets the first step size may exceed the interval
        return expand_time(clock.span, state) * evaluate(as_time(clock.start + clock.span * s, state), state)

    def accept(*_: object) -> None:
        nonlocal accepted
        accepted += 1

    def reject(*_: object) -> None:
        nonlocal rejected
        rejected += 1

    vars(rescaled).update(callback_accept_step=accept, callback_reject_step=reject)
    grid = torch.tensor(marks, dtype=torch.float64, device=x.device)
    # steps end on the marks: interpolated results would miss the tolerance
    options = {**dopri5_options(max_steps), "step_t": grid[1:]}
    with dopri5_errors(rtol, atol, max_steps):
        path = torchdiffeq.odeint(rescaled, x, grid, rtol=rtol, atol=atol, method="dopri5", options=options)
    return list(path), accepted, rejected


def dopri5_per_sample(
    evaluate: CountedField, x: Tensor, clock: Clock, marks: Sequence[float], rtol: float, atol: float, max_steps: int
) -> tuple[list[Tensor], str, Tensor, Tensor]:
    """Return the states at the marks, the status, and the accepted and rejected steps of each row."""
    batch, order, intervals = len(x), 5, len(marks) - 1
    goals = torch.tensor(marks, dtype=x.dtype, device=x.device)
    start, span = (as_time(t, x).expand(batch) for t in (clock.start, clock.span))
    status = "finished"
    accepted = torch.zeros(batch, dtype=torch.int64, device=x.device)
    rejected = torch.zeros_like(accepted)

    def slope(rows: Tensor, s: Tensor, state: Tensor) -> Tensor:
        return expand_time(span[rows], state) * evaluate(start[rows] + span[rows] * s, state, rows)

    def norm(change: Tensor, *states: Tensor) -> Tensor:
        """Return the largest entry of each row in units of its tolerance; no gradient reaches the step sizes."""
        tolerance = atol + rtol * torch.stack(states).detach().abs().amax(0)
        ratio = flatten_event(change.detach().abs() / tolerance)
        return ratio.amax(1) if ratio.shape[1] else ratio.sum(1)

    # finished and failed rows are removed from these tensors
    rows = torch.arange(batch, device=x.device)
    interval, tries, s = torch.zeros_like(rows), torch.zeros_like(rows), torch.zeros_like(start)
    index, reached = [rows], [x]  # the positions and values of the path's entries
    first = slope(rows, s, x)
    step = _first_step(
        norm(x, x), norm(first, x), lambda h: norm(slope(rows, h, x + expand_time(h, x) * first) - first, x)
    )
    while len(rows):
        goal = goals[interval + 1]
        last = step >= goal - s
        size = torch.where(last, goal - s, step)
        slopes = [first]
        for weights, c in zip(DORMAND_PRINCE.a[1:], DORMAND_PRINCE.c[1:], strict=True):
            state = advance(x, expand_time(size, x), weights, slopes)
            slopes.append(slope(rows, torch.minimum(s + c * size, goal), state))
        ratio = norm(advance(torch.zeros_like(x), expand_time(size, x), ERROR, slopes), x, state)
        fits = ratio <= 1
        factor = (0.9 * ratio ** (-1 / order)).clamp(0.2, 10).nan_to_num(0.1)  # after a NaN retry with a shorter step
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
    """Return the first step size of each row.

    After Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, II.4, given the norms of the state,
    of its slope, and of the change of slope after a step.
    """
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=1)
    curvature = change(trial) / trial
    steepest = torch.maximum(speed, curvature)
    step = torch.where(steepest <= 1e-15, (1e-3 * trial).clamp(min=1e-6), (0.01 / steepest) ** (1 / 5))
    return torch.minimum(100 * trial, step)
