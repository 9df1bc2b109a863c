"""The base class of couplings."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["Coupling", "check_coupling"]


class Coupling(ABC):
    """A rule that pairs the rows of a batch of noise with the rows of a batch of data.

    Row `i` of the three results belongs together. Conditions and data keep their order, except in a coupling that
    computes the data from the noise (see `Reflow`); the noise is permuted or resampled.
    """

    @abstractmethod
    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `(x0, x1, cond)` with the rows of `x0` paired with those of `x1`.

        Args:
            x0: The noise, with shape `(batch, *event)`.
            x1: The data, with the same shape.
            cond: The conditions of the data, with shape `(batch, c)`.
            generator: The source of randomness of a coupling that draws.
        """


def check_coupling(coupling: object) -> None:
    """Raise a `ValueError` unless the argument is an object that can be called as a coupling, and not a class.

    Examples:
        >>> check_coupling(Coupling)
        Traceback (most recent call last):
        ValueError: coupling is the class Coupling, but should be an object; pass Coupling().
    """
    if inspect.isclass(coupling):
        name = coupling.__name__
        raise ValueError(f"coupling is the class {name}, but should be an object; pass {name}().")
    if not callable(coupling):
        kind = type(coupling).__name__
        raise ValueError(f"coupling is a {kind}, but should be a Coupling; pass one such as MinibatchOT().")
