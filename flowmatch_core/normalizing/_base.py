"""The base class of architectures."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

__all__ = ["Architecture", "check_layers"]


class Architecture(ABC):
    """The settings of an invertible network; `DiscreteTimeFlow` turns it into a distribution."""

    @abstractmethod
    def build(self, event_dim: int, cond_dim: int) -> nn.Module:
        """Return a module that maps a condition `(batch, cond_dim)`, or None, to a transform from data to noise.

        The transform is one of `torch.distributions` on real vectors, with the `call_and_ladj` of zuko. The initial
        weights are drawn from torch's global generator, which `DiscreteTimeFlow` seeds temporarily.
        """


def check_layers(name: str, layers: int, hidden: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless there is at least one layer and all widths are positive."""
    if layers < 1:
        raise ValueError(f"{name} is {layers}, but should be at least 1.")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden is {hidden}, but should hold at least one positive width.")
