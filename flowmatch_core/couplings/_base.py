"""The base classes of couplings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_object

__all__ = ["Coupling", "IndexCoupling", "check_coupling"]


class Coupling(ABC):
    """A rule that pairs the rows of a batch of noise with the rows of a batch of data.

    Row `i` of the three results belongs together. Conditions and data keep their order. An `IndexCoupling` permutes or
    resamples the noise; any other coupling computes rows (see `Reflow`).
    """

    @abstractmethod
    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Condition]:
        """Return `(x0, x1, cond)` with the rows of `x0` paired with those of `x1`.

        Args:
            x0: The noise, with shape `(batch, *event)`.
            x1: The data, with the same shape.
            cond: The conditions of the data, a tensor with shape `(batch, *cond)` or a mapping of such tensors.
            generator: The source of randomness of a coupling that draws.
        """


class IndexCoupling(Coupling):
    """A coupling that chooses a row of the noise for each row of the data.

    Whatever belongs to the rows of `x0`, such as labels or weights, follows by the indices.

    Examples:
        >>> from flowmatch_core.couplings import MinibatchOT
        >>> x0, x1, labels = torch.tensor([[0.0], [9.0]]), torch.tensor([[10.0], [1.0]]), torch.tensor([3, 4])
        >>> i0, i1 = MinibatchOT().pairs(x0, x1)
        >>> labels[i0], i1
        (tensor([4, 3]), tensor([0, 1]))
    """

    @abstractmethod
    def partners(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the index in `x0` of the partner of each row of `x1`, with shape `(batch,)`.

        Arguments as in a call.
        """

    def pairs(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return indices `(i0, i1)`, both `(batch,)`, such that a call returns `x0[i0]` and `x1[i1]`.

        The data keep their order, so `i1` counts from zero. Arguments as in a call.
        """
        i0 = self.partners(x0, x1, cond, generator=generator)
        return i0, torch.arange(len(i0), device=i0.device)

    def __call__(
        self, x0: Tensor, x1: Tensor, cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Condition]:
        return x0[self.partners(x0, x1, cond, generator=generator)], x1, cond

    def chain(
        self, batches: Sequence[Tensor], cond: Condition = None, *, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        r"""Return an index tensor `(batch,)` for each batch, such that consecutive indices are `pairs`.

        Each row of the last batch has a partner in the one before, this one a partner in the one before it, and so
        on: the joint law $\pi(x_0, \dots, x_K)$ is the Markov chain of the couplings of consecutive batches.

        Args:
            batches: Two or more batches of samples, all with shape `(batch, *event)`.
            cond: The conditions; row `i` of every batch has condition `i`.
            generator: The source of randomness, drawn for the last pair of batches first.

        Examples:
            >>> from flowmatch_core.couplings import MinibatchOT
            >>> a, b, c = torch.tensor([[0.0], [9.0]]), torch.tensor([[8.0], [1.0]]), torch.tensor([[2.0], [7.0]])
            >>> MinibatchOT().chain([a, b, c])
            [tensor([0, 1]), tensor([1, 0]), tensor([0, 1])]
        """
        if len(batches) < 2:
            raise ValueError(f"batches holds {len(batches)} batch, but should hold two or more.")
        indices = [torch.arange(len(batches[-1]), device=batches[-1].device)]
        for x0, x1 in reversed(list(pairwise(batches))):
            indices.append(self.partners(x0, x1, cond, generator=generator)[indices[-1]])
        return indices[::-1]


def check_coupling(coupling: object) -> None:
    """Raise a `ValueError` unless the argument is an object that can be called as a coupling, and not a class.

    Examples:
        >>> check_coupling(Coupling)
        Traceback (most recent call last):
        ValueError: coupling is the class Coupling, but should be an object; pass Coupling().
    """
    check_object("coupling", coupling)
    if not callable(coupling):
        kind = type(coupling).__name__
        raise ValueError(f"coupling is a {kind}, but should be a Coupling; pass one such as MinibatchOT().")
