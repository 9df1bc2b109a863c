"""The divergence of a velocity field: in closed form, by differentiation, or estimated with random probes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from flowmatch_core._tensors import check_choice, check_shape
from flowmatch_core.field import Time, VelocityField, has_closed_form_divergence

__all__ = ["DivergenceMethod", "divergence", "divergence_per_probe", "full_precision", "prepared", "rademacher"]

DivergenceMethod = Literal["auto", "exact", "hutchinson"]

ROWS_AT_ONCE = 2**14
"""How many points go through one differentiation: bounds the memory."""


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
    - `exact`: all event dimensions, of any shape, in one batched differentiation, or one after the other if
      the field has an operation that cannot be batched.
    - `hutchinson`: :math:`\frac{1}{k} \sum_{i=1}^k \epsilon_i^T (\partial v / \partial x) \epsilon_i` with
      independent signs :math:`\epsilon_i`, unbiased, of variance :math:`\frac{2}{k} (\lVert S \rVert_F^2 -
      \sum_j S_{jj}^2)` where :math:`S` is the symmetric part of the Jacobian.

    The field must treat the rows of `x` apart. A graph is built only while gradients are enabled. Autocast is
    off inside.

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
    velocity, each = divergence_per_probe(field, t, x, cond, method, probes=probes, noise=noise, generator=generator)
    return velocity, each.sum(0) / len(each)


def divergence_per_probe(
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
    """Return the velocity and each probe's estimate of the divergence, with shape `(k, batch)`.

    Their spread says how far off their mean, the result of `divergence`, may be. An exact method has one
    estimate. Arguments and references are those of `divergence`.

    Example:
        >>> divergence_per_probe(lambda t, x, cond: 3 * x, 0.0, torch.ones(1, 2), method="hutchinson", probes=3)[1]
        tensor([[6.],
                [6.],
                [6.]])
    """
    check_choice("method", method, get_args(DivergenceMethod))
    if method == "hutchinson":
        directions = rademacher(x, probes, generator) if noise is None else noise
        check_shape("noise", directions, (len(directions), *x.shape))
    with full_precision(x):
        if method == "auto" and has_closed_form_divergence(field):
            velocity, total = cast(Any, field).velocity_and_divergence(t, x, cond)
            return velocity, total[None]
        if method == "hutchinson":
            return _pulled_back(field, t, x, cond, directions)
        basis = torch.eye(math.prod(x.shape[1:]), dtype=x.dtype, device=x.device)
        velocity, each = _pulled_back(field, t, x, cond, basis.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape))
        return velocity, each.sum(0, keepdim=True)


def prepared(field: VelocityField, method: DivergenceMethod) -> VelocityField:
    """Return the field, with what a closed form needs of the weights computed once if it has that and uses it.

    For the length of one solve: the weights are those of the moment.
    """
    if method != "auto" or not has_closed_form_divergence(field) or not hasattr(field, "prepared"):
        return field
    return cast(VelocityField, field.prepared())


def _pulled_back(
    field: VelocityField, t: Time, x: Tensor, cond: Tensor | None, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the velocity and the product of each direction with the Jacobian on both sides, `(directions, batch)`."""
    if torch.is_inference_mode_enabled():  # where nothing can be differentiated, not even under enable_grad
        with torch.inference_mode(False), torch.no_grad():
            t = t.clone() if isinstance(t, Tensor) else t
            cond = None if cond is None else cond.clone()
            return _pulled_back(field, t, x.clone(), cond, directions.clone())
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if graph and x.requires_grad else x.detach().requires_grad_()
        velocity = field(t, point, cond)
        if not velocity.requires_grad:
            return velocity, x.new_zeros(directions.shape[:2])

        def pull(some: Tensor, batched: bool) -> Tensor:
            (pulled,) = torch.autograd.grad(
                velocity,
                point,
                some,
                retain_graph=True,
                create_graph=graph,
                materialize_grads=True,
                is_grads_batched=batched,
            )
            return pulled

        parts = []
        for some in torch.split(directions, max(1, ROWS_AT_ONCE // max(1, len(x)))):
            try:
                pulled = pull(some, batched=True)
            except RuntimeError:  # an operation that cannot be batched
                pulled = torch.stack([pull(direction, batched=False) for direction in some])
            parts.append((pulled * some).flatten(2).sum(2) if x.ndim > 1 else pulled * some)
        each = torch.cat(parts)
    return (velocity, each) if graph else (velocity.detach(), each.detach())


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of `x`: a trace of products in bfloat16 is off by percents.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.ones(2)):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


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
