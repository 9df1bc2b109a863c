"""Products with the Jacobian of a field by automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from flowmatch_core._conditions import Condition, map_condition

__all__ = ["exact_divergence", "full_precision", "vector_jacobian"]

ROWS_AT_ONCE = 2**14
"""Maximum number of points in one differentiation, which bounds the memory."""


def vector_jacobian(
    field: Callable[..., Tensor], t: float | Tensor, x: Tensor, cond: Condition, directions: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the velocity and $\epsilon_i^T (\partial v / \partial x) \epsilon_i$ for each direction $\epsilon_i$.

    A graph is built only while gradients are enabled and `x`, `t`, `cond` or a parameter of the field requires them.

    Args:
        field: Any callable `field(t, x, cond)`.
        t: The time, a float, 0-d or `(batch,)`.
        x: The point, with shape `(batch, *event)`.
        cond: The condition, a tensor or a mapping of tensors whose first dimension is the batch, or None.
        directions: The directions, with shape `(k, batch, *event)`.

    Returns:
        The velocity `(batch, *event)` and the products `(k, batch)`.

    Raises:
        ValueError: The result moves with `x`, but no operation on `x` was recorded.
    """
    if torch.is_inference_mode_enabled():  # where nothing can be differentiated, not even under enable_grad
        with torch.inference_mode(False), torch.no_grad():
            t = t.clone() if isinstance(t, Tensor) else t
            return vector_jacobian(field, t, x.clone(), map_condition(Tensor.clone, cond), directions.clone())
    enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if enabled and x.requires_grad else x.detach().requires_grad_()
        velocity = field(t, point, cond)
        graph = enabled and (point is x or _others_require_gradients(velocity, point))

        def pull(some: Tensor, batched: bool) -> Tensor | None:
            if not velocity.requires_grad:
                return None
            (pulled,) = torch.autograd.grad(
                velocity,
                point,
                some,
                retain_graph=True,
                create_graph=graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
            return cast(Tensor | None, pulled)

        parts = []
        for some in torch.split(directions, max(1, ROWS_AT_ONCE // max(1, len(x)))):
            try:
                pulled = pull(some, batched=True)
            except RuntimeError:  # an operation that cannot be batched
                pulled = torch.stack([cast(Tensor, pull(direction, batched=False)) for direction in some])
            if pulled is None:
                _check_constant(field, t, point, cond, velocity)
                pulled = torch.zeros_like(some)
            parts.append((pulled * some).flatten(2).sum(2) if x.ndim > 1 else pulled * some)
        each = torch.cat(parts)
    return (velocity, each) if graph else (velocity.detach(), each.detach())


def _others_require_gradients(velocity: Tensor, point: Tensor) -> bool:
    """Return whether the graph of the velocity has a leaf other than the point."""
    if torch.compiler.is_compiling():
        return velocity.requires_grad
    nodes: list[Node | None] = [get_gradient_edge(velocity).node] if velocity.requires_grad else []
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", point) is not point:
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _check_constant(field: Callable[..., Tensor], t: float | Tensor, x: Tensor, cond: Condition, at_x: Tensor) -> None:
    """Raise a `ValueError` if a field without derivatives has another value at another point."""
    if torch.compiler.is_compiling() or x.is_meta:
        return
    with torch.no_grad():
        moved = field(t, x + 0.37, cond)  # no period of a field
    if not torch.equal(moved.nan_to_num(), at_x.nan_to_num()):
        raise ValueError(
            "field moves with x, but its result has no derivative by x, which its divergence needs; remove the "
            "torch.no_grad(), detach() or NumPy call inside."
        )


def exact_divergence(
    field: Callable[..., Tensor], t: float | Tensor, x: Tensor, cond: Condition
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
