"""A velocity field as a probability distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from flowmatch_core.divergence import DivergenceMethod, divergence, rademacher
from flowmatch_core.fields import Time, VelocityField, check_choice, check_shape, flatten_event
from flowmatch_core.solvers import SOLVERS, solve

__all__ = ["ContinuousFlow"]

ROWS_AT_ONCE = 2**14
"""How many points are handed to the field at once when a likelihood is summed: bounds the memory."""


class ContinuousFlow(Distribution):
    r"""The distribution of :math:`x = \mu + s\, \psi_1(x_0)`, where :math:`x_0 \sim N(0, I)` and
    :math:`\psi` is the flow of a velocity field.

    .. math:: \log p(x) = \log N(x_0; 0, I) - \int_0^1 \nabla \cdot v(t, x_t, c)\, dt - \sum \log |s|

    With a fixed-step solver the path :math:`x_t` is solved backward first, and the divergence is then
    evaluated at its `steps + 1` points only, all together, and summed by Simpson's rule: a quarter of the
    divergences of a joint Runge-Kutta solve. With `dopri5` point and integral are solved together, under
    one tolerance. Either way gradients reach the parameters of the field, `x` and `cond`.

    References:
        | Neural Ordinary Differential Equations (Chen et al., 2018), https://arxiv.org/abs/1806.07366
        | FFJORD: Free-form Continuous Dynamics (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367

    Arguments:
        field: The velocity field, of the standardised variable :math:`(x - \mu) / s`.
        event_shape: The shape of one `x`.
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        steps: The number of steps of a fixed-step solver.
        divergence: One of auto, exact and hutchinson. The probes of hutchinson stay the same along a path.
        probes: The number of probes of hutchinson.
        loc: The location :math:`\mu`, which broadcasts to the event shape; 0 by default.
        scale: The scale :math:`s`, likewise; 1 by default.
        rtol: The relative tolerance of `dopri5`.
        atol: The absolute tolerance of `dopri5`.

    Example:
        >>> flow = ContinuousFlow(lambda t, x, cond: x, event_shape=(2,), solver="rk4")  # N(0, e^2 I)
        >>> flow.sample((1000,), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([1000, 2])
        >>> flow.log_prob(torch.zeros(1, 2))  # -2 - log(2 pi)
        tensor([-3.8379])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(
        self,
        field: VelocityField,
        event_shape: Sequence[int],
        solver: str = "midpoint",
        steps: int = 20,
        divergence: DivergenceMethod = "auto",
        *,
        probes: int = 1,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> None:
        check_choice("solver", solver, SOLVERS)
        check_choice("divergence", divergence, get_args(DivergenceMethod))
        for name, tensor in (("loc", loc), ("scale", scale)):
            if tensor is not None:
                _expand(name, tensor, event_shape)
        if scale is not None and not (scale > 0).all():
            raise ValueError("scale holds values that are not positive, but should be positive.")
        super().__init__(event_shape=torch.Size(event_shape), validate_args=False)
        self.field, self.solver, self.steps = field, solver, steps
        self.divergence, self.probes = divergence, probes
        self.loc, self.scale, self.rtol, self.atol = loc, scale, rtol, atol

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        shape = tuple(self.event_shape)
        return f"ContinuousFlow(event_shape={shape}, solver={self.solver!r}, steps={self.steps})"

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples, without gradients.

        Arguments:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, c)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The samples, with shape `(*sample_shape, *batch, *event)`.
        """
        with torch.no_grad():
            return self.rsample(sample_shape, cond, generator)

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples that carry gradients; otherwise as `sample`."""
        like = self._like(cond)
        lead = (*sample_shape, *(() if cond is None else cond.shape[:-1]))
        noise = torch.randn((*lead, *self.event_shape), generator=generator, dtype=like.dtype, device=like.device)
        x0, rows = self._rows(noise, cond)
        x = solve(self.field, x0, cond=rows, solver=self.solver, steps=self.steps, rtol=self.rtol, atol=self.atol).x
        x = x.reshape(noise.shape)
        if self.scale is not None:
            x = x * self.scale
        return x if self.loc is None else x + self.loc

    def log_prob(
        self, value: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the log-density in nats.

        Arguments:
            value: The points, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, c)` or one that broadcasts to it.
            generator: The source of randomness of the probes of hutchinson.

        Returns:
            The log-densities, with shape `(*batch,)`.
        """
        return self._log_prob(value, cond, self._probe_noise(value, generator))

    def log_prob_with_error(
        self, value: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the log-density with twice the steps, and how far it moved by that.

        The second result estimates from above what is left of the solver's error in the first (a method of
        order `p` leaves about `1 / (2**p - 1)` of it) once the grid resolves the field at all. For `dopri5`
        a tolerance a tenth as large stands for twice the steps. The noise of hutchinson is not part of it:
        both solves use the same probes.
        """
        noise = self._probe_noise(value, generator)
        coarse = self._log_prob(value, cond, noise)
        fine = self._log_prob(value, cond, noise, refined=True)
        return fine, (fine - coarse).abs()

    def _log_prob(self, value: Tensor, cond: Tensor | None, noise: Tensor | None, refined: bool = False) -> Tensor:
        x1, rows = self._rows(value, cond)
        if self.loc is not None:
            x1 = x1 - self.loc
        if self.scale is not None:
            x1 = x1 / self.scale
        x0, integral = (self._joint if self.solver == "dopri5" else self._quadrature)(x1, rows, noise, refined)
        log_prob = -(flatten_event(x0).square() + math.log(2 * math.pi)).sum(1) / 2 - integral
        if self.scale is not None:
            log_prob = log_prob - self.scale.log().expand(self.event_shape).sum()
        return log_prob.reshape(value.shape[: value.ndim - len(self.event_shape)])

    def _quadrature(self, x: Tensor, cond: Tensor | None, noise: Tensor | None, refined: bool) -> tuple[Tensor, Tensor]:
        steps = 2 * self.steps if refined else self.steps
        solution = solve(self.field, x, t0=1.0, t1=0.0, cond=cond, solver=self.solver, steps=steps, save=True)
        assert solution.t is not None and solution.path is not None
        weights = _simpson_weights(steps, like=x)
        integral = x.new_zeros(len(x))
        nodes_at_once = max(1, ROWS_AT_ONCE // max(1, len(x)))
        for first in range(0, steps + 1, nodes_at_once):
            nodes = slice(first, first + nodes_at_once)
            n = len(weights[nodes])
            _, values = divergence(
                self.field,
                solution.t[nodes].repeat_interleave(len(x)),
                solution.path[nodes].flatten(0, 1),
                None if cond is None else cond.repeat(n, 1),
                self.divergence,
                noise=None if noise is None else noise.repeat(1, n, *(1,) * len(self.event_shape)),
            )
            integral = integral + weights[nodes] @ values.reshape(n, len(x))
        return solution.x, integral

    def _joint(self, x: Tensor, cond: Tensor | None, noise: Tensor | None, refined: bool) -> tuple[Tensor, Tensor]:
        def joint(t: Time, state: Tensor, cond: Tensor | None = None) -> Tensor:
            point = state[:, :-1].reshape(x.shape)
            velocity, rate = divergence(self.field, t, point, cond, self.divergence, noise=noise)
            return torch.cat([flatten_event(velocity), rate[:, None]], 1)

        state = torch.cat([flatten_event(x), x.new_zeros(len(x), 1)], 1)
        rtol, atol = (0.1 * tolerance if refined else tolerance for tolerance in (self.rtol, self.atol))
        state = solve(joint, state, t0=1.0, t1=0.0, cond=cond, solver=self.solver, rtol=rtol, atol=atol).x
        return state[:, :-1].reshape(x.shape), -state[:, -1]

    def _probe_noise(self, value: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if self.divergence != "hutchinson":
            return None
        return rademacher(self._rows(value, None)[0], self.probes, generator)

    def _rows(self, value: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        lead = value.shape[: value.ndim - len(self.event_shape)]
        check_shape("value", value, (*lead, *self.event_shape))
        if cond is not None:
            width = cond.shape[-1]
            cond = _expand("cond", cond, (*lead, width)).reshape(math.prod(lead), width)
        return value.reshape(math.prod(lead), *self.event_shape), cond

    def _like(self, cond: Tensor | None) -> Tensor:
        """Return a tensor whose dtype and device are those of the samples."""
        parameters = self.field.parameters() if isinstance(self.field, nn.Module) else iter(())
        known = (tensor for tensor in (self.loc, self.scale, cond) if tensor is not None)
        return next(known, next(parameters, torch.empty(0)))


def _expand(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    try:
        return tensor.expand(*shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but should broadcast to shape {tuple(shape)}."
        ) from None


def _simpson_weights(intervals: int, like: Tensor) -> Tensor:
    """Return the weights of `intervals + 1` equidistant nodes in a rule of order four on [0, 1].

    Simpson's rule; an odd number of intervals ends in one panel of his 3/8 rule, and a single one is a
    trapezoid.

    Example:
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
