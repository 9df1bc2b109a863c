"""The divergence of a velocity field: in closed form, by differentiation, or estimated with random probes."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from flowmatch_core.fields import Time, VelocityField, check_choice, check_shape, flatten_event

__all__ = ["DivergenceMethod", "divergence", "rademacher"]

DivergenceMethod = Literal["auto", "exact", "hutchinson"]


def divergence(
    field: VelocityField,
    t: Time,
    x: Tensor,
    cond: Tensor | None = None,
    method: DivergenceMethod = "auto",
    *,
    probes: int = 1,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the velocity and its divergence :math:`\operatorname{tr} \partial v / \partial x`.

    - `auto`: the field's own closed form, if it has one (see `MLPField`), else `exact`.
    - `exact`: one differentiation per event dimension, for any event shape.
    - `hutchinson`: :math:`\frac{1}{k} \sum_{i=1}^k \epsilon_i^T (\partial v / \partial x) \epsilon_i` with
      independent signs :math:`\epsilon_i`, unbiased, of variance :math:`\frac{2}{k} (\lVert S \rVert_F^2 -
      \sum_j S_{jj}^2)` where :math:`S` is the symmetric part of the Jacobian.

    The field must treat the rows of `x` apart. A graph is built only while gradients are enabled.

    References:
        | FFJORD: Free-form Continuous Dynamics (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367

    Arguments:
        field: The velocity field.
        t: The time, a float, 0-d or `(batch,)`.
        x: The point, with shape `(batch, *event)`.
        cond: The condition, with shape `(batch, c)`.
        method: One of auto, exact and hutchinson.
        probes: The number :math:`k` of probes.
        noise: The probes themselves, with shape `(k, batch, *event)`, for the same ones in several calls.
        generator: The source of randomness of the probes.

    Returns:
        The velocity `(batch, *event)` and the divergence `(batch,)`.

    Example:
        >>> divergence(lambda t, x, cond: 3 * x, 0.0, torch.ones(1, 2))[1]
        tensor([6.])
    """
    check_choice("method", method, get_args(DivergenceMethod))
    if method == "auto" and getattr(field, "has_closed_form_divergence", False):
        velocity, total = cast(Any, field).velocity_and_divergence(t, x, cond)
        return velocity, total

    if method == "hutchinson":
        directions = rademacher(x, probes, generator) if noise is None else noise
        check_shape("noise", directions, (len(directions), *x.shape))
    else:
        basis = torch.eye(math.prod(x.shape[1:]), dtype=x.dtype, device=x.device)
        directions = basis.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)

    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if graph and x.requires_grad else x.detach().requires_grad_()
        velocity = field(t, point, cond)
        total = x.new_zeros(len(x))
        if velocity.requires_grad:
            for i, direction in enumerate(directions):
                last = i == len(directions) - 1
                (pulled,) = torch.autograd.grad(
                    velocity,
                    point,
                    direction,
                    retain_graph=graph or not last,
                    create_graph=graph,
                    materialize_grads=True,
                )
                total = total + flatten_event(pulled * direction).sum(1)
    if method == "hutchinson":
        total = total / len(directions)
    return (velocity, total) if graph else (velocity.detach(), total.detach())


def rademacher(x: Tensor, probes: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `probes` batches of random signs shaped like `x`, with shape `(probes, *x.shape)`.

    Example:
        >>> rademacher(torch.zeros(3, 2), probes=4).abs().unique()
        tensor([1.])
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}, but should be at least 1.")
    signs = torch.randint(0, 2, (probes, *x.shape), generator=generator, device=x.device)
    return (2 * signs - 1).to(x.dtype)
