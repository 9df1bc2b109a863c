"""A velocity field as a probability distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from flowmatch_core._flow import Flow
from flowmatch_core._jacobian import full_precision
from flowmatch_core._tensors import (
    broadcast,
    check_choice,
    check_shape,
    condition_rows,
    flatten_event,
    standard_normal_log_prob,
)
from flowmatch_core.divergence import (
    DivergenceMethod,
    divergence,
    divergence_per_probe,
    prepared,
    rademacher,
)
from flowmatch_core.field import Time, VelocityField, has_closed_form_divergence
from flowmatch_core.solvers import SOLVERS, Solution, TimeGrid, Uniform, solve
from flowmatch_core.solvers.fixed_step import TABLEAUS
from flowmatch_core.solvers.ode import check_grid, check_tolerances

__all__ = ["ContinuousFlow", "Flow", "LogDensity"]

ROWS_AT_ONCE = 2**14
"""Maximum number of points in one field evaluation of a likelihood, which bounds the memory."""


@dataclass(frozen=True)
class LogDensity:
    """A log-density with estimates of its error.

    Args:
        log_prob: The log-density in nats.
        solver_error: The change when the steps are halved. Once the grid resolves the field, it exceeds the error of
            the solver that remains (about `1 / (2**p - 1)` of it for a method of order `p`).
        standard_error: The standard error over the probes of hutchinson; zero if the divergence is exact, NaN for a
            single probe.
        nfe: The number of field evaluations per point in all.
    """

    log_prob: Tensor
    solver_error: Tensor
    standard_error: Tensor
    nfe: int


class ContinuousFlow(Flow, Distribution):
    r"""The distribution at the end of the flow of a velocity field.

    It is the law of $x = \mu + s\, \psi_1(x_0)$, where $x_0 \sim N(0, \sigma_0^2 I)$ and $\psi$ is the flow:

    $$
    \log p(x) = \log N(x_0; 0, \sigma_0^2 I) - \int_0^1 \nabla \cdot v(t, x_t, c)\, dt - \sum \log |s|
    $$

    For a likelihood, a fixed-step Runge-Kutta method solves the path $x_t$ backward first; the divergence is then
    evaluated at its `steps + 1` points in one batch and integrated by Simpson's rule, with a quarter of the
    divergences of a joint solve. The other methods solve point and integral as one state. `adams` takes one field
    evaluation per step for both, which makes `solver="adams", grid=Warped()` the cheapest likelihood: half the time
    of `rk4` at 1e-3 or 1e-4 nats. Gradients reach the parameters of the field, `x` and `cond`. Autocast is disabled
    inside a likelihood.

    References:
        - Neural Ordinary Differential Equations (Chen et al., 2018), https://arxiv.org/abs/1806.07366
        - FFJORD: Free-form Continuous Dynamics (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367

    Args:
        field: The velocity field, of the standardised variable $(x - \mu) / s$.
        event_shape: The shape of one `x`.
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        steps: The number of steps of a fixed-step solver.
        divergence: One of auto, exact and hutchinson. The probes of hutchinson stay the same along a path.
        grid: Where these steps end.
        probes: The number of probes of hutchinson.
        loc: The location $\mu$, which broadcasts to the event shape; 0 by default.
        scale: The scale $s$, likewise; 1 by default.
        base_scale: The scale $\sigma_0$ of the noise, as `path.sigma(0)` of the path of the field.
        rtol: The relative tolerance of an adaptive solver.
        atol: The absolute tolerance of an adaptive solver.
        check: Whether a solve that fails raises a `SolverError`; the check synchronises with the device.

    Examples:
        >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4")  # N(0, e^2 I)
        >>> flow.sample((1000,), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([1000, 2])
        >>> flow.log_prob(torch.zeros(1, 2))  # -2 - log(2 pi)
        tensor([-3.8379])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True
    field: VelocityField
    loc: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        field: VelocityField,
        event_shape: Sequence[int],
        solver: str = "midpoint",
        steps: int = 20,
        divergence: DivergenceMethod = "auto",
        *,
        grid: TimeGrid = Uniform(),
        probes: int = 1,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        base_scale: float = 1.0,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        check: bool = True,
    ) -> None:
        check_choice("solver", solver, SOLVERS)
        check_choice("divergence", divergence, get_args(DivergenceMethod))
        check_grid(grid, solver)
        check_tolerances(rtol, atol)
        for name, number in (("steps", steps), ("probes", probes)):
            if number < 1:
                raise ValueError(f"{name} is {number}, but should be at least 1.")
        if not base_scale > 0:
            raise ValueError(f"base_scale is {base_scale}, but should be positive.")
        for name, tensor in (("loc", loc), ("scale", scale)):
            if tensor is not None:
                broadcast(name, tensor, event_shape)
        if scale is not None and not (scale > 0).all():
            raise ValueError("scale holds values that are not positive, but should be positive.")
        Flow.__init__(self)
        Distribution.__init__(self, event_shape=torch.Size(event_shape), validate_args=False)
        self.field, self.solver, self.steps, self.grid = field, solver, steps, grid
        self.divergence, self.probes = divergence, probes
        self.base_scale, self.rtol, self.atol, self.check = base_scale, rtol, atol, check
        self._register_units("loc", loc)
        self._register_units("scale", scale)

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one `x`."""
        return self._event_shape

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        shape = tuple(self.event_shape)
        return (
            f"ContinuousFlow(event_shape={shape}, solver={self.solver!r}, steps={self.steps}, grid={self.grid}, "
            f"divergence={self.divergence!r})"
        )

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        check: bool | None = None,
    ) -> Tensor:
        """Draw samples, without gradients.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, c)`; each gets `sample_shape` draws.
            generator: The source of randomness.
            check: Whether a solve that fails raises a `SolverError`; by default the setting of the flow.

        Returns:
            The samples, with shape `(*sample_shape, *batch, *event)`.
        """
        with torch.no_grad():
            return self.rsample(sample_shape, cond, generator, check=check)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        check: bool | None = None,
    ) -> Tensor:
        """Draw samples with gradients; arguments and result are those of `sample`."""
        noise = self._noise(sample_shape, cond, generator)
        x0, rows = self._rows(noise, cond)
        return self._in_units(self._solve(self.field, x0, rows, check=check).x.reshape(noise.shape))

    @torch.no_grad()
    def trajectory(
        self,
        sample_shape: Sequence[int] = (),
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        x0: Tensor | None = None,
        solver: str | None = None,
        steps: int | None = None,
        grid: TimeGrid | None = None,
        check: bool | None = None,
    ) -> Tensor:
        """Draw samples and return their states from noise to data, without gradients.

        Args:
            sample_shape: The shape of the draws, as in `sample`.
            cond: The conditions, with shape `(*batch, c)`; each gets `sample_shape` draws.
            generator: The source of randomness.
            x0: The noise to start from in place of a draw, in standardised units, with shape `(*batch, *event)`.
            solver: One of `flowmatch_core.solvers.SOLVERS`; by default that of the flow.
            steps: The number of steps, or of intervals of an adaptive solver; by default that of the flow.
            grid: Where the steps end in time; by default that of the flow.
            check: Whether a solve that fails raises a `SolverError`; by default the setting of the flow.

        Returns:
            The states at the times `grid.nodes(steps)`, with shape `(steps + 1, *sample_shape, *batch, *event)`, in
            the units of the data. The last one is what `sample` returns for the same solver, steps and grid.

        Examples:
            >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4", loc=torch.ones(2))
            >>> flow.trajectory((1000,), steps=4, generator=torch.Generator().manual_seed(0)).shape
            torch.Size([5, 1000, 2])
        """
        if x0 is None:
            x0 = self._noise(sample_shape, cond, generator)
        elif tuple(sample_shape):
            raise ValueError(f"sample_shape is {tuple(sample_shape)}, but should be () where x0 is given.")
        start, rows = self._rows(x0, cond)
        path = self._solve(self.field, start, rows, save=True, check=check, solver=solver, steps=steps, grid=grid).path
        assert path is not None  # as it was saved
        return self._in_units(path.reshape(len(path), *x0.shape))

    def log_prob(
        self, value: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the log-density in nats.

        Args:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: The source of randomness of the probes of hutchinson.

        Returns:
            The log-densities, with shape `(*batch,)`.
        """
        return self._log_prob(value, cond, self._probe_noise(value, generator))[0].squeeze(0)

    def estimate(
        self, value: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> LogDensity:
        """Return the log-density computed with twice the steps, and estimates of its error.

        An adaptive solver takes a tolerance a tenth as large instead of twice the steps. Both solves use the same
        probes, so that the solver's error does not contain the noise of hutchinson; the log-density is the mean over
        the probes.

        Args:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: The source of randomness of the probes of hutchinson.

        Examples:
            >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4", steps=8)
            >>> estimate = flow.estimate(torch.zeros(1, 2))
            >>> estimate.nfe, bool(estimate.solver_error < 1e-4)
            (122, True)
        """
        noise = self._probe_noise(value, generator)
        coarse, calls = self._log_prob(value, cond, noise, each=True)
        fine, more_calls = self._log_prob(value, cond, noise, each=True, refined=True)
        log_prob = fine.mean(0)
        spread = torch.zeros_like(log_prob)
        if self.divergence == "hutchinson":
            spread = fine.std(0) / math.sqrt(len(fine)) if len(fine) > 1 else torch.full_like(log_prob, math.nan)
        return LogDensity(log_prob, (log_prob - coarse.mean(0)).abs(), spread, calls + more_calls)

    def _log_prob(
        self, value: Tensor, cond: Tensor | None, noise: Tensor | None, each: bool = False, refined: bool = False
    ) -> tuple[Tensor, int]:
        """Return the log-densities, `(probes or 1, *batch)`, and the number of field evaluations per point."""
        x1, rows = self._rows(value, cond)
        if self.loc is not None:
            x1 = x1 - self.loc
        if self.scale is not None:
            x1 = x1 / self.scale
        solve_both = self._quadrature if self.solver in TABLEAUS else self._joint
        parts, calls = [], 0
        with full_precision(x1):
            field = prepared(self.field, self.divergence)
            for first in range(0, max(1, len(x1)), ROWS_AT_ONCE):
                some = slice(first, first + ROWS_AT_ONCE)
                some_rows = None if rows is None else rows[some]
                some_noise = None if noise is None else noise[:, some]
                x0, integral, called = solve_both(field, x1[some], some_rows, some_noise, each, refined)
                calls = max(calls, called)
                z = flatten_event(x0) / self.base_scale
                parts.append(standard_normal_log_prob(z) - integral)
        log_prob = torch.cat(parts, 1) - math.prod(self.event_shape) * math.log(self.base_scale)
        if self.scale is not None:
            log_prob = log_prob - self.scale.log().expand(self.event_shape).sum()
        return log_prob.reshape(len(log_prob), *value.shape[: value.ndim - len(self.event_shape)]), calls

    def _quadrature(
        self, field: VelocityField, x: Tensor, cond: Tensor | None, noise: Tensor | None, each: bool, refined: bool
    ) -> tuple[Tensor, Tensor, int]:
        """Solve the path first, then integrate the divergences at its points."""
        solution = self._solve(field, x, cond, backward=True, refined=refined, save=True)
        assert solution.t is not None and solution.path is not None
        steps, grid = len(solution.t) - 1, self.grid.backward()
        rates = torch.tensor([grid.rate(i / steps) for i in range(steps + 1)], dtype=x.dtype, device=x.device)
        weights = _simpson_weights(steps, like=x) * rates
        integral = x.new_zeros(self._columns(noise, each), len(x))
        if self.divergence == "auto" and has_closed_form_divergence(field):
            # node by node: some closed forms need rows that share their time, and cost as little as a velocity then
            for node, weight in enumerate(weights):
                rate = self._divergence(field, solution.t[node], solution.path[node], cond, None, each)[1]
                integral = integral + weight * rate
            return solution.x, integral, solution.nfe + steps + 1
        nodes_at_once = max(1, ROWS_AT_ONCE // max(1, len(x)))
        for first in range(0, steps + 1, nodes_at_once):
            nodes = slice(first, first + nodes_at_once)
            n = len(weights[nodes])
            _, values = self._divergence(
                field,
                solution.t[nodes].repeat_interleave(len(x)),
                solution.path[nodes].flatten(0, 1),
                None if cond is None else cond.repeat(n, 1),
                None if noise is None else noise.repeat(1, n, *(1,) * len(self.event_shape)),
                each,
            )
            integral = integral + torch.stack([weights[nodes] @ row.reshape(n, len(x)) for row in values])
        return solution.x, integral, solution.nfe + steps + 1

    def _joint(
        self, field: VelocityField, x: Tensor, cond: Tensor | None, noise: Tensor | None, each: bool, refined: bool
    ) -> tuple[Tensor, Tensor, int]:
        """Solve the path and the integrals of the divergence along it as one state."""
        columns, width = self._columns(noise, each), 0 if cond is None else cond.shape[1]
        # the probes of a row are passed as part of its condition, because a solver may leave out rows
        probes = x.new_empty(len(x), 0) if noise is None else noise.transpose(0, 1).flatten(1)
        given = probes if cond is None else torch.cat([cond, probes], 1)

        def joint(t: Time, state: Tensor, given: Tensor | None) -> Tensor:
            assert given is not None
            point = state[:, :-columns].reshape(len(state), *self.event_shape)
            signs = None
            if noise is not None:
                signs = given[:, width:].reshape(len(given), len(noise), *self.event_shape).transpose(0, 1)
            velocity, rates = self._divergence(field, t, point, None if cond is None else given[:, :width], signs, each)
            return torch.cat([flatten_event(velocity), rates.T], 1)

        state = torch.cat([flatten_event(x), x.new_zeros(len(x), columns)], 1)
        solution = self._solve(joint, state, given, backward=True, refined=refined)
        return solution.x[:, :-columns].reshape(x.shape), -solution.x[:, -columns:].T, solution.nfe

    def _columns(self, noise: Tensor | None, each: bool) -> int:
        return len(noise) if each and noise is not None else 1

    def _divergence(
        self, field: VelocityField, t: Time, x: Tensor, cond: Tensor | None, noise: Tensor | None, each: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity and the divergence, with shape `(columns, batch)`."""
        if each:
            return divergence_per_probe(field, t, x, cond, self.divergence, noise=noise)
        velocity, rate = divergence(field, t, x, cond, self.divergence, noise=noise)
        return velocity, rate[None]

    def _solve(
        self,
        field: VelocityField,
        x: Tensor,
        cond: Tensor | None,
        backward: bool = False,
        refined: bool = False,
        save: bool = False,
        check: bool | None = None,
        solver: str | None = None,
        steps: int | None = None,
        grid: TimeGrid | None = None,
    ) -> Solution:
        steps = self.steps if steps is None else steps
        rtol, atol = (0.1 * tolerance if refined else tolerance for tolerance in (self.rtol, self.atol))
        return solve(
            field,
            x,
            t0=1.0 if backward else 0.0,
            t1=0.0 if backward else 1.0,
            cond=cond,
            solver=self.solver if solver is None else solver,
            steps=2 * steps if refined else steps,
            grid=self.grid if grid is None else grid,
            rtol=rtol,
            atol=atol,
            save=save,
            check=self.check if check is None else check,
        )

    def _probe_noise(self, value: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if self.divergence != "hutchinson":
            return None
        return rademacher(self._rows(value, None)[0], self.probes, generator)

    def _noise(self, sample_shape: Sequence[int], cond: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return draws of the base distribution, with shape `(*sample_shape, *batch, *event)`."""
        like = self._like(cond)
        lead = (*sample_shape, *(() if cond is None else cond.shape[:-1]))
        noise = torch.randn((*lead, *self.event_shape), generator=generator, dtype=like.dtype, device=like.device)
        return noise * self.base_scale

    def _in_units(self, x: Tensor) -> Tensor:
        """Return standardised states in the units of the data."""
        if self.scale is not None:
            x = x * self.scale
        return x if self.loc is None else x + self.loc

    def _rows(self, value: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        lead = value.shape[: value.ndim - len(self.event_shape)]
        check_shape("value", value, (*lead, *self.event_shape))
        return value.reshape(math.prod(lead), *self.event_shape), condition_rows(cond, lead)

    def _like(self, cond: Tensor | None) -> Tensor:
        """Return a tensor whose dtype and device are those of the samples."""
        known = (tensor for tensor in (self.loc, self.scale, cond) if tensor is not None and tensor.is_floating_point())
        return next(known, next(self.parameters(), self._default))


def _simpson_weights(intervals: int, like: Tensor) -> Tensor:
    """Return the weights of a quadrature of order four on [0, 1] with `intervals + 1` equidistant nodes.

    Simpson's rule; an odd number of intervals ends in one panel of the 3/8 rule, and a single one uses the trapezoid
    rule.

    Examples:
        >>> _simpson_weights(2, like=torch.zeros(1))
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
