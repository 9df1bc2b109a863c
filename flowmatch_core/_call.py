"""The call of a velocity field, with one sentence for each way to write a field wrongly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from types import CodeType
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from flowmatch_core._conditions import Condition, map_condition
from flowmatch_core._tensors import check_shape
from flowmatch_core.field import Field, Time, VelocityField

__all__ = ["call_field", "check_field"]

_STATE_NAMES = frozenset({"x", "x_t", "xt"})
_TIME_NAMES = frozenset({"t", "time", "times", "timestep", "timesteps"})
_ROWS_DEPEND = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
_seen: set[CodeType] = set()
_compared: WeakSet[VelocityField] = WeakSet()


def call_field(field: VelocityField, t: Time, x: Tensor, cond: Condition = None, name: str = "field") -> Tensor:
    """Return the velocity `field(t, x, cond)`, whose shape is that of `x`.

    Args:
        field: The velocity field, or another callable of its kind.
        t: The time, a float, 0-d or `(batch,)`.
        x: The state, with shape `(batch, *event)`.
        cond: The condition, a tensor or a mapping of tensors whose first dimension is the batch.
        name: What an error calls it.

    Raises:
        ValueError: The field takes other arguments, or its result has another shape, or it spreads a time of shape
            `(batch,)` over the last dimension of a state instead of its rows.

    Examples:
        >>> call_field(lambda t, x, cond: t * x, 0.5, torch.ones(1, 2))
        tensor([[0.5000, 0.5000]])
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_field(field, name)
    velocity = field(t, x, cond)
    check_shape(f"the result of {name}", velocity, x.shape)
    # Only here does the error stay silent: with any other number of rows the product of t and x has no shape.
    silent = isinstance(t, Tensor) and t.ndim > 0 and x.ndim > 1 and len(x) == x.shape[-1] > 1
    if silent and not (compiling or x.is_meta or isinstance(field, Field)):
        _check_row_times(field, cast(Tensor, t), x, cond, velocity, name)
    return velocity


def check_field(field: Callable[..., object], name: str = "field") -> None:
    """Raise a `ValueError` unless the field can be called with `(t, x, cond)`, the time first.

    Each function is inspected once.

    Examples:
        >>> check_field(lambda t, x: x)
        Traceback (most recent call last):
        ValueError: field takes the arguments (t, x), but is called as field(t, x, cond); let it take a third one.
    """
    code = _code(field)
    if code in _seen:
        return
    if not callable(field):
        raise ValueError(f"{name} is a {type(field).__name__}, but should be a callable {name}(t, x, cond).")
    if inspect.isclass(field):
        given = field.__name__
        raise ValueError(f"{name} is the class {given}, but should be an object: pass {given}(...).")
    try:
        signature = inspect.signature(field.forward if isinstance(field, nn.Module) else field)
    except (TypeError, ValueError):  # a builtin, which states none
        return
    names = [argument for argument, each in signature.parameters.items() if each.kind <= each.POSITIONAL_OR_KEYWORD]
    if len(names) > 1 and names[0] in _STATE_NAMES and names[1] in _TIME_NAMES:
        raise ValueError(
            f"{name} takes the arguments {signature}, but is called as {name}(t, x, cond): t comes first; "
            f"wrap it as lambda t, x, cond: {name}(x, t)."
        )
    try:
        signature.bind(None, None, None)
    except TypeError:
        fix = "let it take a third one" if len(names) == 2 else "let it take these three"
        raise ValueError(
            f"{name} takes the arguments {signature}, but is called as {name}(t, x, cond); {fix}."
        ) from None
    if code is not None:
        _seen.add(code)


def _code(field: Any) -> CodeType | None:
    """Return what tells one function from another, without keeping the objects it closes over alive."""
    function = getattr(field, "forward", None) if isinstance(field, nn.Module) else field
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None and not inspect.isclass(field):
        code = getattr(getattr(type(field), "__call__", None), "__code__", None)  # noqa: B004
    return code if isinstance(code, CodeType) else None


def _check_row_times(field: VelocityField, t: Tensor, x: Tensor, cond: Condition, velocity: Tensor, name: str) -> None:
    """Compare the first row with its evaluations at its own time and at all times, its value in a field that spreads.

    Each object is compared once, at times that differ: equal ones are the same over rows and dimensions. It is left
    alone where chance or the other rows may change a row.
    """
    if _is_compared(field) or (isinstance(field, nn.Module) and _rows_depend(field)):
        return

    def error(times: Tensor) -> float:
        value = field(times, x[:1], map_condition(lambda part: part[:1], cond))
        return float((value - velocity[:1]).abs().amax()) if value.shape == velocity[:1].shape else math.inf

    with torch.no_grad():
        if bool((t == t[0]).all()):
            return
        by_row, spread = error(t[:1]), math.inf
        if by_row > 1e-6 * float(velocity[:1].abs().amax()):
            with suppress(Exception):  # a field that takes times by row may refuse more times than rows
                spread = error(t)
    if by_row > 100 * spread:
        raise ValueError(
            f"{name} spreads a time of shape {tuple(t.shape)} over the last dimension of x of shape "
            f"{tuple(x.shape)}, but should apply it row by row; use t.reshape(-1, 1) where t has a dimension."
        )
    with suppress(TypeError):  # neither hashed nor referred to: compared each time
        _compared.add(field)


def _is_compared(field: VelocityField) -> bool:
    try:
        return field in _compared
    except TypeError:
        return False


def _rows_depend(field: nn.Module) -> bool:
    return any(module.training and isinstance(module, _ROWS_DEPEND) for module in field.modules())
