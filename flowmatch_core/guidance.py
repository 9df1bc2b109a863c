"""Guidance: move the velocity from that without a condition, or from that of a worse model, towards the better one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition, condition_parts, condition_rows, map_condition
from flowmatch_core._tensors import expand_time
from flowmatch_core.field import (
    Field,
    Time,
    VelocityField,
    at_condition,
    cond_shape,
    has_closed_form_divergence,
    velocity_and_divergence,
)

__all__ = ["GuidanceScale", "check_guidance", "drop_condition", "guidance_scale", "guided"]

GuidanceScale = float | Callable[[Time], Time]
"""A number, or a function of the time whose result is a number or shaped like the time."""


def guided(
    field: VelocityField,
    scale: GuidanceScale = 2.0,
    *,
    null: Condition = None,
    weak: VelocityField | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Field:
    r"""Return the velocity field with guidance: classifier-free, or by a worse model.

    $$
    v_t(x, c) = u_t(x) + w_t\, (v_t(x, c) - u_t(x))
    $$

    where $u$ is the field at the null condition (classifier-free guidance, for a field trained with
    `drop_condition`), or a worse field at the same condition (autoguidance). $w = 1$ is the field itself, $w = 0$ is
    $u$, and $w > 1$ moves samples towards what sets them apart. Where $w = 1$ as a number, $u$ is not evaluated. The
    divergence is linear in the same way, and has a closed form if those of both fields have one.

    The samples of a guided field do not have the tilted density $p(x)^{1 - w} p(x \mid c)^w$. Its log-densities are
    those of its samples.

    References:
        - Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), https://arxiv.org/abs/2207.12598
        - Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024),
          https://arxiv.org/abs/2406.02507
        - Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
          (Kynkäänniemi et al., 2024), https://arxiv.org/abs/2404.07724

    Args:
        field: The velocity field.
        scale: The scale $w$, a number or a function of the time.
        null: The null condition, of the shape of one condition. By default the field is called with the condition
            None.
        weak: A worse field, such as a smaller network or one trained for fewer steps, for autoguidance.
        interval: The times, first and last, at which the scale acts; outside them it is 1. A likelihood or an
            adaptive solver needs a smooth function of the time as `scale` instead.

    Examples:
        >>> import torch
        >>> field = lambda t, x, cond: torch.zeros_like(x) if cond is None else cond - x
        >>> guided(field, scale=2.0)(0.5, torch.zeros(1, 1), torch.ones(1, 1))
        tensor([[2.]])
        >>> guided(field, scale=lambda t: 1 + t)(0.5, torch.zeros(1, 1), torch.ones(1, 1))
        tensor([[1.5000]])
        >>> guided(field, scale=2.0, interval=(0.2, 0.8))(0.9, torch.zeros(1, 1), torch.ones(1, 1))
        tensor([[1.]])
    """
    if weak is not None and null is not None:
        raise ValueError("null and weak are both given, but should be one of them: a weak field has the condition too.")
    check_guidance(scale, interval)
    return _Guided(field, _AtNull(field, null) if weak is None else weak, scale, interval)


def guidance_scale(scale: GuidanceScale, interval: tuple[float, float], t: Time) -> Time:
    """Return the scale at a time: a number, or a tensor shaped like the time.

    Examples:
        >>> import torch
        >>> guidance_scale(3.0, (0.0, 0.5), 0.75), guidance_scale(3.0, (0.0, 0.5), torch.tensor([0.25, 0.75]))
        (1.0, tensor([3., 1.]))
    """
    first, last = interval
    value = scale(t) if callable(scale) else scale
    if (first, last) == (0.0, 1.0):
        return value
    if isinstance(t, Tensor):
        return torch.where((first <= t) & (t <= last), value, 1.0)
    return value if first <= t <= last else 1.0


def check_guidance(scale: GuidanceScale, interval: tuple[float, float]) -> None:
    """Raise a `ValueError` unless the scale is finite and the interval lies in [0, 1]."""
    if not callable(scale) and not abs(scale) < math.inf:
        raise ValueError(f"scale is {scale}, but should be finite, or a function of the time.")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval is {interval}, but should hold two times, 0 <= first <= last <= 1.")


@final
class _Guided(Field):
    def __init__(
        self, field: VelocityField, weak: VelocityField, scale: GuidanceScale, interval: tuple[float, float]
    ) -> None:
        super().__init__()
        self.field, self.weak, self.scale, self.interval = field, weak, scale, interval
        self.cond_shape = cond_shape(field)

    @property
    def has_closed_form_divergence(self) -> bool:
        """Whether both divergences have closed forms."""
        return has_closed_form_divergence(self.field) and has_closed_form_divergence(self.weak)

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        """Return the velocity, shaped like `x`."""
        scale, velocity = guidance_scale(self.scale, self.interval, t), call_field(self.field, t, x, cond)
        if _is_one(scale):
            return velocity
        return _towards(call_field(self.weak, t, x, cond), velocity, scale)

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        """Return the velocity, shaped like `x`, and its exact divergence, with shape `(batch,)`."""
        scale = guidance_scale(self.scale, self.interval, t)
        both = velocity_and_divergence(self.field, t, x, cond)
        if _is_one(scale):
            return both
        weak = velocity_and_divergence(self.weak, t, x, cond)
        return _towards(weak[0], both[0], scale), _towards(weak[1], both[1], scale)

    def prepared(self) -> Field:
        """Return the field with both fields prepared."""
        field, weak = (f.prepared() if isinstance(f, Field) else f for f in (self.field, self.weak))
        return _Guided(field, weak, self.scale, self.interval)

    def at_condition(self, cond: Condition) -> VelocityField:
        """Return the field with the condition encoded once by both fields."""
        field, weak = at_condition(self.field, cond), at_condition(self.weak, cond)
        return _Guided(field, weak, self.scale, self.interval)


@final
class _AtNull(Field):
    """A field at the null condition, whatever condition it is called with."""

    def __init__(self, field: VelocityField, null: Condition) -> None:
        super().__init__()
        self.field, self.null = field, null

    @property
    def has_closed_form_divergence(self) -> bool:
        return has_closed_form_divergence(self.field)

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> Tensor:
        return call_field(self.field, t, x, self._rows(x))

    def velocity_and_divergence(self, t: Time, x: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor]:
        return velocity_and_divergence(self.field, t, x, self._rows(x))

    def prepared(self) -> Field:
        return _AtNull(self.field.prepared(), self.null) if isinstance(self.field, Field) else self

    def _rows(self, x: Tensor) -> Condition:
        rows = condition_rows(self.null, x.shape[:1], cond_shape(self.field))
        return map_condition(lambda part: part.to(x.device), rows)


def _is_one(scale: Time) -> bool:
    return not isinstance(scale, Tensor) and scale == 1


def _towards(weak: Tensor, value: Tensor, scale: Time) -> Tensor:
    """Return `weak + scale * (value - weak)`, exactly `value` at the scale 1."""
    return torch.lerp(weak, value, expand_time(scale, value))


def drop_condition(cond: Condition, probability: float, *, generator: torch.Generator | None = None) -> Condition:
    """Return conditions of which each row is dropped with a probability: NaN, or -1 in integers such as labels.

    `EncodedField` takes such rows to its null condition. Trained with a `probability` of 0.1, one network serves
    as the conditional and as the unconditional field of `guided`.

    Args:
        cond: The conditions, with shape `(batch, *cond)`, or a mapping of such tensors, whose rows are dropped
            together.
        probability: The probability.
        generator: The source of randomness.

    Examples:
        >>> drop_condition(torch.tensor([3, 1, 2]), 1.0), drop_condition(torch.ones(1, 2), 1.0)
        (tensor([-1, -1, -1]), tensor([[nan, nan]]))
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}, but should be from 0 to 1.")
    first = condition_parts(cond)[0]
    dropped = torch.rand(len(first), generator=generator, device=first.device) < probability

    def drop(part: Tensor) -> Tensor:
        mark = math.nan if part.is_floating_point() else -1
        return part.masked_fill(dropped.reshape(-1, *(1,) * (part.ndim - 1)), mark)

    return map_condition(drop, cond)
