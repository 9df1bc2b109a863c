"""Units of data: where they are kept, and what they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flowmatch_core._tensors import broadcast, check_finite

__all__ = ["UnitsModule", "check_pair", "check_units", "network_dtype", "network_parameter"]


class UnitsModule(nn.Module):
    """A module with buffers in the units of the data, which keep their dtype when the module is moved to another.

    Rows near 6e6 that differ by 0.3 are all the same in single precision, so their location has to stay in double
    precision whatever that of the network. The buffers follow devices. A parameter among the units is moved like any
    other. Loading a state never rounds them: they take its dtype where it is the finer one.
    """

    UNITS: ClassVar[tuple[str, ...]] = ("loc", "scale")

    def _register_units(self, name: str, value: Tensor | None) -> None:
        """Register a location or a scale: a parameter as such, another tensor as a buffer.

        The buffer is a copy, so that loading a state leaves the given tensor as it is. A tensor that requires
        gradients is kept itself: it is a variable of the caller.
        """
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value if value is None or value.requires_grad else value.clone())

    def _unit_buffers(self) -> dict[str, Tensor]:
        found = {name: self._buffers.get(name) for name in self.UNITS}
        return {name: unit for name, unit in found.items() if unit is not None}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        units = self._unit_buffers()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, moved in self._unit_buffers().items():
            if moved.dtype != units[name].dtype:
                self._buffers[name] = units[name].to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, unit in self._unit_buffers().items():
            if isinstance(loaded := state_dict.get(prefix + name), Tensor):
                self._buffers[name] = unit.to(torch.promote_types(unit.dtype, loaded.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)


def network_dtype(network: object) -> torch.dtype | None:
    """Return the dtype of the parameters of a network; None for a plain callable or a network without parameters.

    Examples:
        >>> network_dtype(nn.Linear(1, 1)), network_dtype(lambda t, x, cond: x)
        (torch.float32, None)
    """
    found = network_parameter(network)
    return None if found is None else found.dtype


def network_parameter(network: object) -> Tensor | None:
    """Return the first floating-point parameter of a network, whose dtype and device are those of its inputs.

    Examples:
        >>> network_parameter(nn.Linear(3, 1)).shape, network_parameter(lambda t, x, cond: x)
        (torch.Size([1, 3]), None)
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next((parameter for parameter in parameters if parameter.is_floating_point()), None)


def check_units(loc: Tensor | None, scale: Tensor | None, event_shape: Sequence[int], prefix: str = "") -> None:
    """Raise a `ValueError` unless the location is finite, the scale finite and positive, and both broadcast.

    Args:
        loc: The location, or None.
        scale: The scale, or None.
        event_shape: The shape that they broadcast to.
        prefix: What the names of both begin with.

    Examples:
        >>> check_units(torch.zeros(2), torch.tensor([1.0, 0.0]), (2,))
        Traceback (most recent call last):
        ValueError: scale holds values that are not positive, but should be positive.
    """
    for name, unit in ((f"{prefix}loc", loc), (f"{prefix}scale", scale)):
        if unit is not None:
            broadcast(name, unit, event_shape)
            check_finite(name, unit)
    if scale is not None and not (scale > 0).all():
        raise ValueError(f"{prefix}scale holds values that are not positive, but should be positive.")


def check_pair(loc: Tensor | None, scale: Tensor | None, prefix: str = "") -> None:
    """Raise a `ValueError` unless a location and its scale are both None, or of one shape, finite and positive.

    Examples:
        >>> check_pair(torch.zeros(2), None)
        Traceback (most recent call last):
        ValueError: loc and scale should be given both or neither, but one of them was None.
    """
    if (loc is None) != (scale is None):
        raise ValueError(f"{prefix}loc and {prefix}scale should be given both or neither, but one of them was None.")
    if loc is not None:
        check_units(loc, scale, loc.shape, prefix)
