"""Flows whose network works on a standardised variable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition, CondShape, map_condition
from flowmatch_core._flow import Flow
from flowmatch_core._tensors import check_finite, check_shape
from flowmatch_core._units import UnitsModule, check_units, network_dtype, network_parameter
from flowmatch_core.marginals import Marginals

__all__ = ["StandardisedFlow"]


class StandardisedFlow(UnitsModule, Flow):
    r"""A flow of $z = A\, (T(x) - \mu) / s$, whose samples and points are in the units of $x$.

    The arithmetic of the units is of the finer dtype of $x$ and the units; $z$ and the conditions have that of the
    parameters of the network, so that a network in single precision serves data in double precision.

    Args:
        event_shape: The shape of one `x`.
        cond_shape: The shape of one condition; see `Flow`.
        batch_shape: The shape of the batch of the flow itself.
        loc: The location, which broadcasts to the event shape, or None for 0.
        scale: The scale, likewise, or None for 1.
        marginals: The transform $T$ of the entries, or None for none.
        whitening: The matrix $A$ of the flattened event, invertible, or None for the identity.
    """

    UNITS = ("loc", "scale", "whitening")
    loc: Tensor | None
    scale: Tensor | None
    whitening: Tensor | None
    marginals: Marginals | None

    def __init__(
        self,
        event_shape: Sequence[int],
        cond_shape: CondShape,
        batch_shape: Sequence[int],
        loc: Tensor | None,
        scale: Tensor | None,
        marginals: Marginals | None,
        whitening: Tensor | None,
    ) -> None:
        super().__init__(event_shape, cond_shape, batch_shape)
        check_units(loc, scale, self.event_shape)
        if marginals is not None and len(marginals.columns) != self.event_shape.numel():
            raise ValueError(
                f"marginals has {len(marginals.columns)} columns, but should have {self.event_shape.numel()}, one for "
                "each entry of event_shape."
            )
        self.marginals = marginals
        self._register_units("loc", loc)
        self._register_units("scale", scale)
        if whitening is not None:
            d = self.event_shape.numel()
            check_shape("whitening", whitening, (d, d))
            check_finite("whitening", whitening)
            if not bool(torch.linalg.slogdet(whitening.detach()).logabsdet.isfinite()):
                raise ValueError("whitening is singular, but should be an invertible matrix.")
        self._register_units("whitening", whitening)

    def _network(self) -> object:
        """Return what is evaluated at standardised points."""
        raise NotImplementedError

    def _standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised points of `(*lead, *event)`, and the log-determinants `(*lead,)` of the map there."""
        lead = x.shape[: x.ndim - len(self.event_shape)]
        log_det = x.new_zeros(lead)
        if self.marginals is not None:
            u, log_det = self.marginals(x.reshape(*lead, self.event_shape.numel()))
            x = u.reshape(x.shape)
        if self.loc is not None:
            x = x - self.loc
        if self.scale is not None:
            x = x / self.scale
            log_det = log_det - self.scale.to(x.dtype).log().expand(self.event_shape).sum()
        if self.whitening is not None:
            dtype = torch.promote_types(x.dtype, self.whitening.dtype)
            x = (x.to(dtype).reshape(*lead, -1) @ self.whitening.to(dtype).T).reshape(x.shape)
            log_det = log_det + torch.linalg.slogdet(self.whitening).logabsdet
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
        lead = z.shape[: z.ndim - len(self.event_shape)]
        if self.whitening is not None:
            dtype = torch.promote_types(z.dtype, self.whitening.dtype)
            rows = z.to(dtype).reshape(-1, self.event_shape.numel())
            z = torch.linalg.solve(self.whitening.to(dtype), rows.T).T.reshape(z.shape)
        if self.scale is not None:
            z = z * self.scale
        if self.loc is not None:
            z = z + self.loc
        if self.marginals is None:
            return z
        return self.marginals.inverse(z.reshape(*lead, self.event_shape.numel())).reshape(z.shape)

    def _condition_rows(self, cond: Condition, lead: Sequence[int]) -> Condition:
        rows = super()._condition_rows(cond, lead)
        return map_condition(lambda part: self._cast(part) if part.is_floating_point() else part, rows)

    def _like(self, cond: Condition) -> Tensor:
        """Return a tensor whose dtype and device are those of standardised points."""
        network = network_parameter(self._network())
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
