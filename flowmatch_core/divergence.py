"""The divergence of a velocity field: in closed form, by automatic differentiation, or by Hutchinson's estimator."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._jacobian import exact_divergence, full_precision, vector_jacobian
from flowmatch_core._tensors import check_choice, check_floating, check_shape
from flowmatch_core.field import Field, Time, VelocityField

__all__ = ["DivergenceMethod", "divergence", "divergence_per_probe", "prepared", "rademacher"]

DivergenceMethod = Literal["auto", "exact", "hutchinson"]
"""How the divergence is computed; see `divergence`."""


def divergence(
    field: VelocityField,
    t: Time,
    x: Tensor,
    cond: Condition = None,
    method: DivergenceMethod = "auto",
    *,
    probes: int = 1,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the velocity and its divergence $\operatorname{tr} \partial v / \partial x$.

    - `auto`: the field's own closed form, if it has one (see `MLPField`), else `exact`.
    - `exact`: by automatic differentiation, all event dimensions in one batched call, or one after the other if the
      field has an operation that cannot be batched.
    - `hutchinson`: $\frac{1}{k} \sum_{i=1}^k \epsilon_i^T (\partial v / \partial x) \epsilon_i$ with
      independent signs $\epsilon_i$, unbiased, of variance $\frac{2}{k} (\lVert S \rVert_F^2 -
      \sum_j S_{jj}^2)$ where $S$ is the symmetric part of the Jacobian.

    The velocity of a row must not depend on other rows. A graph is built only while gradients are enabled and `x`,
    `t`, `cond` or a parameter of the field requires them. Autocast is disabled inside.

    Every operation on `x` in the field has to be differentiable. A field none of whose operations on `x` is recorded
    (`torch.no_grad()` around them, NumPy inside) is an error; one that detaches some of them has a wrong divergence,
    which cannot be detected.

    References:
        - FFJORD: Free-form Continuous Dynamics (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367

    Args:
        field: The velocity field.
        t: The time, a float, 0-d or `(batch,)`.
        x: The point, with shape `(batch, *event)`.
        cond: The condition, a tensor or a mapping of tensors whose first dimension is the batch.
        method: One of auto, exact and hutchinson.
        probes: The number $k$ of probes.
        noise: The probes, with shape `(k, batch, *event)`, to use the same ones in several calls; drawn by default.
        generator: The source of randomness of the probes.

    Returns:
        The velocity `(batch, *event)` and the divergence `(batch,)`.

    Examples:
        >>> divergence(lambda t, x, cond: 3 * x, 0.0, torch.ones(1, 2))[1]
        tensor([6.])
    """
    velocity, each = divergence_per_probe(field, t, x, cond, method, probes=probes, noise=noise, generator=generator)
    return velocity, each.sum(0) / len(each)


def divergence_per_probe(
    field: VelocityField,
    t: Time,
    x: Tensor,
    cond: Condition = None,
    method: DivergenceMethod = "auto",
    *,
    probes: int = 1,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the velocity and each probe's estimate of the divergence, with shape `(k, batch)`.

    The standard error of their mean, the result of `divergence`, follows from their spread. An exact method has one
    estimate. The arguments are those of `divergence`.

    Examples:
        >>> divergence_per_probe(lambda t, x, cond: 3 * x, 0.0, torch.ones(1, 2), method="hutchinson", probes=3)[1]
        tensor([[6.],
                [6.],
                [6.]])
    """
    check_choice("method", method, get_args(DivergenceMethod))
    check_floating("x", x)
    if method == "hutchinson":
        directions = rademacher(x, probes, generator) if noise is None else noise
        check_shape("noise", directions, (len(directions), *x.shape))
    checked = partial(call_field, field)
    with full_precision(x):
        if method == "hutchinson":
            return vector_jacobian(checked, t, x, cond, directions)
        if method == "auto" and isinstance(field, Field) and field.has_closed_form_divergence:
            velocity, total = field.velocity_and_divergence(t, x, cond)
        else:
            velocity, total = exact_divergence(checked, t, x, cond)
    return velocity, total[None]


def prepared(field: VelocityField, method: DivergenceMethod) -> VelocityField:
    """Return the field for one likelihood: `Field.prepared` where a closed form is used, else the field itself."""
    if method == "auto" and isinstance(field, Field) and field.has_closed_form_divergence:
        return field.prepared()
    return field


def rademacher(x: Tensor, probes: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `probes` batches of random signs shaped like `x`, with shape `(probes, *x.shape)`.

    Examples:
        >>> rademacher(torch.zeros(3, 2), probes=4).abs().unique()
        tensor([1.])
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}, but should be at least 1.")
    signs = torch.randint(0, 2, (probes, *x.shape), generator=generator, device=x.device)
    return (2 * signs - 1).to(x.dtype)
