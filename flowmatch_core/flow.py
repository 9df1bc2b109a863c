"""A velocity field as a probability distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from flowmatch_core._bases import base_of
from flowmatch_core._call import check_field
from flowmatch_core._conditions import Condition, CondShape
from flowmatch_core._density import Rule, push, reference_rule
from flowmatch_core._flow import BoundFlow, Flow, Moments, check_numbers
from flowmatch_core._standardised import StandardisedFlow
from flowmatch_core._tensors import as_shape, check_choice
from flowmatch_core.divergence import DivergenceMethod, rademacher
from flowmatch_core.field import VelocityField
from flowmatch_core.marginals import Marginals
from flowmatch_core.solvers import TimeGrid, Uniform

__all__ = ["BoundContinuousFlow", "BoundFlow", "ContinuousFlow", "Flow", "FlowTransform", "LogDensity", "Moments"]

Reference = Literal["refined", "dopri5"]
"""What the solve of a flow is compared with; see `ContinuousFlow.estimate`."""


@dataclass(frozen=True)
class LogDensity:
    """A log-density with estimates of its error.

    Args:
        log_prob: The log-density in nats.
        solver_error: The difference of two solves. If the steps are halved, it exceeds the error of the finer solve
            once the grid resolves the field (that is about `1 / (2**p - 1)` of it for a method of order `p`).
        standard_error: The standard error over the probes of hutchinson; zero if the divergence is exact, NaN for a
            single probe.
        nfe: The number of field evaluations per point in all.
    """

    log_prob: Tensor
    solver_error: Tensor
    standard_error: Tensor
    nfe: int

    def warning(self) -> str | None:
        """Return a sentence if the error of the solver may exceed the standard error of the mean over the points.

        The error of the mean is at most the mean of `solver_error`.

        Examples:
            >>> rough = LogDensity(torch.tensor([-1.0, -1.2]), torch.tensor([3.0, 4.0]), torch.zeros(2), 60)
            >>> rough.warning()
            'the solver error of the log-density, 3.5 nats, exceeds the standard error of its mean, 0.1 nats; take \
more steps.'
        """
        values, errors = self.log_prob.detach().double(), self.solver_error.detach().double()
        solver, mean = float(errors.mean()), float(values.std() / math.sqrt(values.numel()))
        if not solver > mean:
            return None
        return (
            f"the solver error of the log-density, {solver:.3g} nats, exceeds the standard error of its mean, "
            f"{mean:.3g} nats; take more steps."
        )


class ContinuousFlow(StandardisedFlow):
    r"""The distribution at the end of the flow of a velocity field.

    It is the law of $x = \mu + s\, \psi_1(x_0)$, where $x_0 \sim p_0$, by default $N(0, \sigma_0^2 I)$, and $\psi$ is
    the flow:

    $$
    \log p(x) = \log p_0(x_0) - \int_0^1 \nabla \cdot v(t, x_t, c)\, dt - \sum \log |s|
    $$

    For a likelihood without gradients, a fixed-step Runge-Kutta method solves the path $x_t$ backward first; the
    divergence is then evaluated at its `steps + 1` points, in one batch where the field is a `Field`, and integrated
    by Simpson's rule, with a quarter of the divergences of a joint solve. With gradients, and by the other methods,
    point and integral are solved as one state: a field trained on the quadrature learns to hide divergence between
    its points. `adams` takes one field evaluation per step for both, which makes `solver="adams", grid=Warped()` the
    cheapest likelihood to evaluate: half the time of `rk4` at 1e-3 or 1e-4 nats. Train on `nll_loss`. Gradients reach
    the parameters of the field, `x` and `cond`. Autocast is disabled inside a likelihood.

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
        loc: The location $\mu$, which broadcasts to the event shape; 0 by default. Give it and `scale` in float64
            where the data are far from 0: points and samples are then in float64, while the field is evaluated in the
            dtype of its parameters. MPS has no float64: units in float32 there.
        scale: The scale $s$, likewise; 1 by default.
        marginals: Transforms of the entries of `x` to normal ones, before `loc` and `scale`: the field is one of
            $(T(x) - \mu) / s$, and the density has the log-determinant of $T$.
        whitening: A matrix that the flattened $(T(x) - \mu) / s$ is multiplied by, `(d, d)` and invertible, such as
            that of `partial_whitening`; none by default.
        base: The distribution $p_0$ of the states at t = 0, in standardised units: a
            `torch.distributions.Distribution` of the event shape or of independent entries, another flow, also one
            bound to its conditions, or a tensor of rows `(n, *event)` to draw from, which has no density. Its batch
            is that of the flow. A flow and rows move with `to`, other distributions stay on their device.
            Distributions of torch draw from the global generators, which are seeded from `generator` and restored.
        base_scale: The scale $\sigma_0$ of the noise without `base`, as `path.sigma(0)` of the path of the field.
        cond_shape: The shape of one condition; that which the field declares by default, see `Flow`.
        rtol: The relative tolerance of an adaptive solver.
        atol: The absolute tolerance of an adaptive solver.
        check: Whether a solve that fails raises a `SolverError`, and a value that is not finite a `ValueError`; the
            check synchronises with the device.

    Examples:
        >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4")  # N(0, e^2 I)
        >>> flow.sample((1000,), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([1000, 2])
        >>> flow.log_prob(torch.zeros(1, 2))  # -2 - log(2 pi)
        tensor([-3.8379])
    """

    has_rsample = True
    field: VelocityField

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
        marginals: Marginals | None = None,
        whitening: Tensor | None = None,
        base: Distribution | Tensor | None = None,
        base_scale: float = 1.0,
        cond_shape: CondShape = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        check: bool = True,
    ) -> None:
        check_field(field)
        Rule(solver, steps, grid, divergence, rtol, atol, check)  # checks them
        if probes < 1:
            raise ValueError(f"probes is {probes}, but should be at least 1.")
        event = as_shape("event_shape", event_shape)
        start = base_of(base, base_scale, event)
        declared: CondShape = getattr(field, "cond_shape", None) if cond_shape is None else cond_shape
        super().__init__(event, declared, start.batch_shape, loc, scale, marginals, whitening)
        self.field, self.solver, self.steps, self.grid = field, solver, steps, grid
        self.divergence, self.probes = divergence, probes
        self.base, self.rtol, self.atol, self.check = start, rtol, atol, check

    @property
    def support(self) -> constraints.Constraint:
        """The set of all tensors of the event shape."""
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
        cond: Condition = None,
        generator: torch.Generator | None = None,
        *,
        check: bool | None = None,
    ) -> Tensor:
        """Draw samples, without gradients.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, *cond)`; each gets `sample_shape` draws.
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
        cond: Condition = None,
        generator: torch.Generator | None = None,
        *,
        check: bool | None = None,
    ) -> Tensor:
        """Draw samples with gradients; arguments and result are those of `sample`."""
        noise = self._noise(sample_shape, cond, generator)
        x0, rows, _ = self._rows(self._cast(noise), cond)
        rule = self._rule if check is None else replace(self._rule, check=check)
        return self._in_units(rule.solve(self.field, x0, rows).x.reshape(noise.shape))

    def rsample_and_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and their log-densities by one solve; gradients flow through both.

        Points and log-densities are solved as one state, so the difference to `log_prob` is that of two solvers. Use
        it where a divergence from the flow to a known density is minimised.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, *cond)`; each gets `sample_shape` draws.
            generator: The source of randomness, also of the probes of hutchinson.

        Returns:
            The samples `(*sample_shape, *batch, *event)`, those of `rsample`, and their log-densities
            `(*sample_shape, *batch)`.

        Examples:
            >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4")  # N(0, e^2 I)
            >>> x, log_prob = flow.rsample_and_log_prob((1000,), generator=torch.Generator().manual_seed(0))
            >>> bool((log_prob - flow.log_prob(x)).abs().max() < 1e-5)
            True
        """
        noise = self._noise(sample_shape, cond, generator)
        start = self.base.log_prob(noise)
        x0, rows, lead = self._rows(self._cast(noise), cond)
        z, integral, _ = push(self.field, x0, rows, self._rule, noise=self._probe_noise(x0, generator))
        x, log_det = self._in_units_with_log_det(z.reshape(noise.shape))
        return x, start - integral[0].reshape(lead) + log_det

    @torch.no_grad()
    def trajectory(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
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
            cond: The conditions, with shape `(*batch, *cond)`; each gets `sample_shape` draws.
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
        start, rows, lead = self._rows(self._cast(x0), cond)
        rule = replace(
            self._rule,
            solver=self.solver if solver is None else solver,
            steps=self.steps if steps is None else steps,
            grid=self.grid if grid is None else grid,
            check=self.check if check is None else check,
        )
        path = rule.solve(self.field, start, rows, save=True).path
        assert path is not None  # as it was saved
        return self._in_units(path.reshape(len(path), *lead, *self.event_shape))

    def log_prob(self, value: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the log-density in nats.

        Args:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, *cond)`; the batches of both broadcast.
            generator: The source of randomness of the probes of hutchinson.

        Returns:
            The log-densities, with shape `(*batch,)`.
        """
        check_numbers(value, self.check)
        z, rows, log_det = self._standardised_rows(value, cond)
        return self._log_prob(z, rows, log_det, self._rule, self._probe_noise(z, generator))[0][0]

    def estimate(
        self,
        value: Tensor,
        cond: Condition = None,
        *,
        reference: Reference = "refined",
        generator: torch.Generator | None = None,
    ) -> LogDensity:
        """Return the log-density by a better solve than that of `log_prob`, and estimates of its error.

        - `refined` repeats the solve with twice the steps; an adaptive solver takes a tolerance a tenth as large.
        - `dopri5` solves point and integral as one state by adaptive steps of the tightest tolerance that the dtype
          allows. It shares no step, quadrature or grid with the flow, and so checks any of them.

        `solver_error` is the difference of the two solves: by `dopri5`, the error of `log_prob`. They use the same
        probes, so that it does not contain the noise of hutchinson; the log-density is the mean over the probes.

        Args:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, *cond)`; the batches of both broadcast.
            reference: One of refined and dopri5.
            generator: The source of randomness of the probes of hutchinson.

        Examples:
            >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4", steps=8)
            >>> estimate = flow.estimate(torch.zeros(1, 2))
            >>> estimate.nfe, bool(estimate.solver_error < 1e-4)
            (122, True)
            >>> bool(flow.estimate(torch.zeros(1, 2), reference="dopri5").solver_error < 1e-4)
            True
        """
        check_choice("reference", reference, get_args(Reference))
        check_numbers(value, self.check)
        z, rows, log_det = self._standardised_rows(value, cond)
        noise, rule = self._probe_noise(z, generator), self._rule
        better = rule.refined() if reference == "refined" else reference_rule(rule, z.dtype)
        coarse, calls = self._log_prob(z, rows, log_det, rule, noise, each=True)
        fine, more_calls = self._log_prob(z, rows, log_det, better, noise, each=True)
        log_prob = fine.mean(0)
        spread = torch.zeros_like(log_prob)
        if self.divergence == "hutchinson":
            spread = fine.std(0) / math.sqrt(len(fine)) if len(fine) > 1 else torch.full_like(log_prob, math.nan)
        return LogDensity(log_prob, (log_prob - coarse.mean(0)).abs(), spread, calls + more_calls)

    @property
    def transform(self) -> FlowTransform:
        """The map from noise to data; `given(cond).transform` is that of a condition."""
        return FlowTransform(self)

    def given(self, cond: Condition) -> BoundContinuousFlow:
        """Return the flow bound to its conditions, which are its batch; see `BoundFlow`.

        Args:
            cond: The conditions, with shape `(*batch, *cond)`.

        Examples:
            >>> flow = ContinuousFlow(lambda t, x, cond: cond.expand_as(x), event_shape=(1,))  # N(c, 1)
            >>> flow.given(torch.tensor([[0.0], [3.0]])).log_prob(torch.zeros(1))
            tensor([-0.9189, -5.4189])
        """
        return BoundContinuousFlow(self, cond)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BoundContinuousFlow:
        """Return the flow with another shape of the batch, for `torch.distributions` that need one."""
        return BoundContinuousFlow(self, None, batch_shape)

    @property
    def _rule(self) -> Rule:
        return Rule(self.solver, self.steps, self.grid, self.divergence, self.rtol, self.atol, self.check)

    def _network(self) -> VelocityField:
        return self.field

    def _log_prob(
        self, z: Tensor, rows: Condition, log_det: Tensor, rule: Rule, noise: Tensor | None, each: bool = False
    ) -> tuple[Tensor, int]:
        """Return the log-densities of rows, `(probes or 1, *lead)`, and the number of field evaluations per point.

        Args:
            z: The standardised points as rows.
            rows: The conditions as rows.
            log_det: The log-determinants of the standardisation, with shape `lead`.
            rule: How to solve.
            noise: The probes of hutchinson.
            each: Whether to return the log-density by each probe.
        """
        lead = log_det.shape
        z0, integral, calls = push(self.field, z, rows, rule, noise=noise, each=each, backward=True)
        start = self.base.log_prob(z0.reshape(*lead, *self.event_shape))
        return start - integral.reshape(len(integral), *lead) + log_det, calls

    def _probe_noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        return rademacher(x, self.probes, generator) if self.divergence == "hutchinson" else None

    def _noise(self, sample_shape: Sequence[int], cond: Condition, generator: torch.Generator | None) -> Tensor:
        """Return draws of the base, with shape `(*sample_shape, *batch, *event)`."""
        return self.base.draw(self._lead(sample_shape, cond), self._like(cond), generator)


class BoundContinuousFlow(BoundFlow):
    """A `ContinuousFlow` bound to its conditions; see `BoundFlow`."""

    flow: ContinuousFlow

    def estimate(
        self, value: Tensor, *, reference: Reference = "refined", generator: torch.Generator | None = None
    ) -> LogDensity:
        """Return the log-density and estimates of its error; see `ContinuousFlow.estimate`."""
        return self.flow.estimate(value, self._cond, reference=reference, generator=generator)

    def trajectory(
        self,
        sample_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
        *,
        x0: Tensor | None = None,
        solver: str | None = None,
        steps: int | None = None,
        grid: TimeGrid | None = None,
        check: bool | None = None,
    ) -> Tensor:
        """Draw samples and return their states from noise to data; see `ContinuousFlow.trajectory`."""
        return self.flow.trajectory(
            sample_shape, self._cond, generator, x0=x0, solver=solver, steps=steps, grid=grid, check=check
        )

    @property
    def transform(self) -> FlowTransform:
        """The map from noise to data, given the conditions."""
        return FlowTransform(self.flow, self._cond)


class FlowTransform(Transform):
    """The map of a `ContinuousFlow` from noise to data, in the units of both, with its log-determinant.

    Each call is one solve; `call_and_ladj` returns the value and the log-determinant of the same one.

    Args:
        flow: The flow.
        cond: The conditions, whose batch broadcasts with that of the points.
        inverse: Whether to map from data to noise.

    Examples:
        >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4")
        >>> x, log_determinant = flow.transform.call_and_ladj(torch.ones(1, 2))
        >>> x.detach(), log_determinant.detach(), flow.transform.inv(x).detach()
        (tensor([[2.7183, 2.7183]]), tensor([2.0000]), tensor([[1.0000, 1.0000]]))
    """

    bijective = True

    def __init__(self, flow: ContinuousFlow, cond: Condition = None, inverse: bool = False) -> None:
        super().__init__()
        self.flow, self.cond, self.inverse = flow, cond, inverse

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """The set of all tensors of the event shape."""
        return self.flow.support

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """The set of all tensors of the event shape."""
        return self.flow.support

    @property
    def inv(self) -> FlowTransform:
        """The map in the other direction."""
        return FlowTransform(self.flow, self.cond, not self.inverse)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the image of points, with shape `(*batch, *event)`."""
        flow = self.flow
        if self.inverse:
            rows, cond, log_det = flow._standardised_rows(x, self.cond)
            return flow._rule.solve(flow.field, rows, cond, backward=True).x.reshape(*log_det.shape, *flow.event_shape)
        rows, cond, lead = flow._rows(flow._cast(x), self.cond)
        return flow._in_units(flow._rule.solve(flow.field, rows, cond).x.reshape(*lead, *flow.event_shape))

    def call_and_ladj(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the image of points and the logarithm of the absolute determinant of the Jacobian, by one solve.

        Args:
            x: The points, with shape `(*batch, *event)`.
            generator: The source of randomness of the probes of hutchinson.

        Returns:
            The image `(*batch, *event)` and the log-determinants `(*batch,)`.
        """
        flow = self.flow
        if self.inverse:
            rows, cond, log_det = flow._standardised_rows(x, self.cond)
            noise = flow._probe_noise(rows, generator)
            z, integral, _ = push(flow.field, rows, cond, flow._rule, noise=noise, backward=True)
            lead = log_det.shape
            return z.reshape(*lead, *flow.event_shape), log_det - integral[0].reshape(lead)
        rows, cond, lead = flow._rows(flow._cast(x), self.cond)
        z, integral, _ = push(flow.field, rows, cond, flow._rule, noise=flow._probe_noise(rows, generator))
        y, log_det = flow._in_units_with_log_det(z.reshape(*lead, *flow.event_shape))
        return y, integral[0].reshape(lead) - log_det

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the absolute determinant of the Jacobian at `x`, with shape `(*batch,)`."""
        return self.call_and_ladj(x)[1]
