"""Units of data: where they are kept, and the flows whose network works on a standardised variable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flowmatch_core._conditions import Condition, CondShape, map_condition
from flowmatch_core._flow import Flow
from flowmatch_core._tensors import broadcast

__all__ = ["StandardisedFlow", "UnitsModule", "check_pair", "check_units", "network_dtype"]


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


class StandardisedFlow(UnitsModule, Flow):
    r"""A flow of $z = (x - \mu) / s$, whose samples and points are in the units of $x$.

    The arithmetic of the units is of the finer dtype of $x$ and the units; $z$ and the conditions have that of the
    parameters of the network, so that a network in single precision serves data in double precision.

    Args:
        event_shape: The shape of one `x`.
        cond_shape: The shape of one condition; see `Flow`.
        batch_shape: The shape of the batch of the flow itself.
        loc: The location, which broadcasts to the event shape, or None for 0.
        scale: The scale, likewise, or None for 1.
    """

    loc: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        event_shape: Sequence[int],
        cond_shape: CondShape,
        batch_shape: Sequence[int],
        loc: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        super().__init__(event_shape, cond_shape, batch_shape)
        check_units(self.event_shape, loc=loc, scale=scale)
        self._register_units("loc", loc)
        self._register_units("scale", scale)

    def _network(self) -> object:
        """Return what is evaluated at standardised points."""
        raise NotImplementedError

    def _standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised points of `(*lead, *event)`, and the log-determinants `(*lead,)` of the map there."""
        log_det = x.new_zeros(x.shape[: x.ndim - len(self.event_shape)])
        if self.loc is not None:
            x = x - self.loc
        if self.scale is not None:
            x = x / self.scale
            log_det = log_det - self.scale.to(x.dtype).log().expand(self.event_shape).sum()
        return self._cast(x), log_det.to(x.dtype)

    def _standardised_rows(self, value: Tensor, cond: Condition) -> tuple[Tensor, Condition, Tensor]:
        """Return the standardised points and the conditions as rows, and the log-determinants `(*lead,)`."""
        x, rows, lead = self._rows(value, cond)
        z, log_det = self._standardised(x)
        return z, rows, log_det.reshape(lead)

    def _in_units_with_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised points in the units of the data, and the log-determinants of `_standardised` there."""
        x = self._in_units(z)
        return x, self._standardised(x)[1]

    def _in_units(self, z: Tensor) -> Tensor:
        """Return standardised points in the units of the data."""
        if self.scale is not None:
            z = z * self.scale
        return z if self.loc is None else z + self.loc

    def _condition_rows(self, cond: Condition, lead: Sequence[int]) -> Condition:
        rows = super()._condition_rows(cond, lead)
        return map_condition(lambda part: self._cast(part) if part.is_floating_point() else part, rows)

    def _like(self, cond: Condition) -> Tensor:
        """Return a tensor whose dtype and device are those of standardised points."""
        network = _floating(self._network())
        if network is not None:
            return network
        units = [unit for unit in (self.loc, self.scale) if unit is not None and unit.is_floating_point()]
        if not units:
            return super()._like(cond)
        return units[0].to(torch.promote_types(units[0].dtype, self._default.dtype))

    def _cast(self, z: Tensor) -> Tensor:
        """Return the tensor in the dtype of the network, or as it is for a network without parameters."""
        dtype = network_dtype(self._network())
        return z if dtype is None else z.to(dtype)


def network_dtype(network: object) -> torch.dtype | None:
    """Return the dtype of the parameters of a network; None for a plain callable or a network without parameters.

    Examples:
        >>> network_dtype(nn.Linear(1, 1)), network_dtype(lambda t, x, cond: x)
        (torch.float32, None)
    """
    found = _floating(network)
    return None if found is None else found.dtype


def _floating(network: object) -> Tensor | None:
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    return next((parameter for parameter in parameters if parameter.is_floating_point()), None)


def check_units(event_shape: Sequence[int], **units: Tensor | None) -> None:
    """Raise a `ValueError` unless locations are finite, scales finite and positive, and both broadcast to the event.

    Args:
        event_shape: The shape that they broadcast to.
        units: The locations and scales by name; the name of a scale ends in "scale".

    Examples:
        >>> check_units((2,), loc=torch.zeros(2), scale=torch.tensor([1.0, 0.0]))
        Traceback (most recent call last):
        ValueError: scale holds values that are not positive, but should be positive.
        >>> check_units((2,), loc=torch.tensor([0.0, float("nan")]))
        Traceback (most recent call last):
        ValueError: loc holds 1 numbers that are not finite, but should hold none.
    """
    for name, unit in units.items():
        if unit is None:
            continue
        broadcast(name, unit, event_shape)
        if bad := int((~unit.isfinite()).sum()):
            raise ValueError(f"{name} holds {bad} numbers that are not finite, but should hold none.")
        if name.endswith("scale") and not (unit > 0).all():
            raise ValueError(f"{name} holds values that are not positive, but should be positive.")


def check_pair(**units: Tensor | None) -> None:
    """Raise a `ValueError` unless a location and its scale are both None, or of one shape, finite and positive.

    Examples:
        >>> check_pair(loc=torch.zeros(2), scale=None)
        Traceback (most recent call last):
        ValueError: loc and scale should be given both or neither, but one of them was None.
    """
    first, second = units.values()
    if (first is None) != (second is None):
        raise ValueError(f"{' and '.join(units)} should be given both or neither, but one of them was None.")
    if first is not None:
        check_units(first.shape, **units)
