"""Products with the Jacobian of a field by automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["exact_divergence", "full_precision", "vector_jacobian"]

ROWS_AT_ONCE = 2**14
"""Maximum number of points in one differentiation, which bounds the memory."""


def vector_jacobian(
    field: Callable[..., Tensor], t: float | Tensor, x: Tensor, cond: Tensor | None, directions: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the velocity and $\epsilon_i^T (\partial v / \partial x) \epsilon_i$ for each direction $\epsilon_i$.

    A graph is built only while gradients are enabled.

    Args:
        field: Any callable `field(t, x, cond)`.
        t: The time, a float, 0-d or `(batch,)`.
        x: The point, with shape `(batch, *event)`.
        cond: The condition, with shape `(batch, c)`, or None.
        directions: The directions, with shape `(k, batch, *event)`.

    Returns:
        The velocity `(batch, *event)` and the products `(k, batch)`.
    """
    if torch.is_inference_mode_enabled():  # where nothing can be differentiated, not even under enable_grad
        with torch.inference_mode(False), torch.no_grad():
            t = t.clone() if isinstance(t, Tensor) else t
            cond = None if cond is None else cond.clone()
            return vector_jacobian(field, t, x.clone(), cond, directions.clone())
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


def exact_divergence(
    field: Callable[..., Tensor], t: float | Tensor, x: Tensor, cond: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the velocity `(batch, *event)` and its exact divergence `(batch,)`, one direction per event dimension.

    Examples:
        >>> exact_divergence(lambda t, x, cond: 3 * x, 0.0, torch.ones(1, 2), None)[1]
        tensor([6.])
    """
    with full_precision(x):
        basis = torch.eye(math.prod(x.shape[1:]), dtype=x.dtype, device=x.device)
        velocity, each = vector_jacobian(field, t, x, cond, basis.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape))
    return velocity, each.sum(0)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of `x`: a trace computed in bfloat16 is off by percents.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.ones(2)):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
