"""Change the path of a trained velocity field."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import as_time, check_finite, expand_time
from flowmatch_core.field import (
    Field,
    Time,
    VelocityField,
    cond_shape,
    has_closed_form_divergence,
    velocity_and_divergence,
)
from flowmatch_core.paths._affine import AffinePath

__all__ = ["Rescheduled"]


@final
class Rescheduled(Field):
    r"""The velocity field along one path, from a field that was trained along another.

    Affine paths differ only in the rate at which the `angle` $\theta_t$ changes and in the scale $r_t =
    \sqrt{\alpha_t^2 + \sigma_t^2}$: $x_t / r_t = x_1 \sin\theta_t + x_0 \cos\theta_t$. With a bar for the trained
    path, and $\bar t$ its time of the same angle,

    $$
    v_t(x) = \left( \frac{\dot r}{r} - \frac{\dot\theta}{\dot{\bar\theta}}
    \frac{\dot{\bar r}}{\bar r} \right) x + \frac{\dot\theta}{\dot{\bar\theta}} \frac{r}{\bar r}
    \, \bar v_{\bar t}\!\left( \frac{\bar r}{r} x \right) .
    $$

    The velocity is finite at $t = 0$ and $t = 1$. Where the rate of one angle is zero or infinite and the other is
    not, the trained velocity does not determine the new one. At $\sigma_t = 0$ it then follows from the score just
    before (see `AffinePath.latest_time`); at $\alpha_t = 0$ the data are replaced by their mean. At an angle that the
    trained path does not reach, the nearer end of it is used.

    References:
        - Flow Matching Guide and Code (Lipman et al., 2024), section 4.8.3, https://arxiv.org/abs/2412.06264

    Args:
        field: The trained velocity field $\bar v$.
        trained: The path along which it was trained.
        path: The path of the new field.
        mean: The mean of the data, which broadcasts to the event; zero, that of standardised data, by default.

    Examples:
        >>> from flowmatch_core.paths import CondOT, Cosine
        >>> straight = lambda t, x, cond: x * (2 * t - 1) / (t**2 + (1 - t) ** 2)  # from N(0, I) to N(0, I)
        >>> Rescheduled(straight, CondOT(), Cosine())(0.3, torch.ones(1, 1)).abs() < 1e-6
        tensor([[True]])
    """

    mean: Tensor | None

    def __init__(self, field: VelocityField, trained: AffinePath, path: AffinePath, mean: Tensor | None = None) -> None:
        super().__init__()
        self.field, self.trained, self.path = field, trained, path
        self.cond_shape = cond_shape(field)
        self._latest = 1.0 if trained.d_sigma(1.0).isinf() else path.latest_time
        if mean is not None:
            check_finite("mean", mean)
        self.register_buffer("mean", mean)

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether the divergence of the trained field has a closed form."""
        return has_closed_form_divergence(self.field)

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the velocity, shaped like `x`."""
        change = self._change(t, x)
        value = call_field(self.field, change.time, expand_time(change.scale, x) * x, cond)
        return self._velocity(change, x, value)

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Return the velocity, shaped like `x`, and its exact divergence, with shape `(batch,)`."""
        change = self._change(t, x)
        point = expand_time(change.scale, x) * x
        value, divergence = velocity_and_divergence(self.field, change.time, point, cond)
        a, pace = (expand_time(c, x).flatten() for c in (change.a, change.pace))
        return self._velocity(change, x, value), a * math.prod(x.shape[1:]) + pace * divergence

    def _change(self, t: Time, x: Tensor) -> _Change:
        t = as_time(t, x)
        if self._latest == 1:
            return _change(t, self.trained, self.path)
        start = torch.where(t == 1, self._latest, t)
        change = _change(start, self.trained, self.path)
        a, b = self.path.keep_score(start, t)
        return replace(change, pace=b * change.pace, a=a + b * change.a, of_mean=b * change.of_mean)

    def _velocity(self, change: _Change, x: Tensor, value: Tensor) -> Tensor:
        velocity = expand_time(change.a, x) * x + expand_time(change.pace / change.scale, x) * value
        return velocity if self.mean is None else velocity + expand_time(change.of_mean, x) * self.mean


@dataclass(frozen=True)
class _Change:
    """The coefficients of a change of schedule, all shaped like the time."""

    time: Tensor  # of the trained path
    scale: Tensor  # from x to the trained path's x
    pace: Tensor  # the ratio of the rates of the angles
    a: Tensor  # of x
    of_mean: Tensor  # of the mean of the data


def _change(t: Tensor, trained: AffinePath, path: AffinePath) -> _Change:
    new = _Polar.of(path, t)
    time = trained.time_of_ratio(new.alpha, new.sigma)
    old = _Polar.of(trained, time)
    # where both rates are infinite at the data, the sigma in them cancels
    pace = torch.where(new.rate.isinf() & old.rate.isinf(), new.flux / old.flux, new.rate / old.rate)
    known, at_data = pace.isfinite(), new.sigma == 0
    pace = torch.where(known, pace, 0.0)
    mean = torch.where(at_data, new.d_alpha / new.alpha, new.d_sigma / new.sigma)
    a = torch.where(known, new.growth - pace * old.growth, mean)
    return _Change(time, old.radius / new.radius, pace, a, torch.where(known | at_data, 0.0, new.d_alpha))


@dataclass(frozen=True)
class _Polar:
    """A path at some time, in both coordinates."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    radius: Tensor
    growth: Tensor  # the rate of the radius, divided by it
    rate: Tensor  # of the angle
    flux: Tensor  # the rate of the angle, times its cosine: finite at the data

    @classmethod
    def of(cls, path: AffinePath, t: Tensor) -> _Polar:
        alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        sigma_d_sigma, square = path.sigma_d_sigma(t), alpha.square() + sigma.square()
        return cls(
            alpha=alpha,
            sigma=sigma,
            d_alpha=d_alpha,
            d_sigma=d_sigma,
            radius=square.sqrt(),
            growth=(alpha * d_alpha + sigma_d_sigma) / square,
            rate=(d_alpha * sigma - alpha * d_sigma) / square,
            flux=(d_alpha * sigma.square() - alpha * sigma_d_sigma) / square**1.5,
        )
