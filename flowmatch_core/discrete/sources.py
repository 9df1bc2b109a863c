"""Source distributions of tokens at `t = 0`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._tensors import check_numbered

__all__ = ["MaskSource", "Source", "UniformSource", "check_tokens"]


class Source(ABC):
    """The distribution of the state of each position at `t = 0`, independent across positions.

    Data are tokens `0, ..., vocabulary - 1`; a source may add further states after them.
    """

    vocabulary: int

    @property
    @abstractmethod
    def states(self) -> int:
        """The number of states of a position, which is the size of an embedding in a network."""

    @abstractmethod
    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw states of the given shape."""

    @abstractmethod
    def probability(self, x: Tensor) -> Tensor:
        """Return the probability of each state in float64."""

    @abstractmethod
    def is_data(self, x: Tensor) -> Tensor:
        """Return which states certainly come from the data, so that they do not jump again."""


@final
@dataclass(frozen=True)
class MaskSource(Source):
    """Every position starts masked, in the additional state `vocabulary`.

    A state other than the mask comes from the data and is kept, whatever the network predicts.

    Args:
        vocabulary: The number of tokens of the data.

    Examples:
        >>> MaskSource(5).sample((2, 3))
        tensor([[5, 5, 5],
                [5, 5, 5]])
    """

    vocabulary: int

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocabulary)

    @property
    def states(self) -> int:
        return self.vocabulary + 1

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return torch.full(tuple(shape), self.vocabulary, device=device)

    def probability(self, x: Tensor) -> Tensor:
        return (x == self.vocabulary).double()

    def is_data(self, x: Tensor) -> Tensor:
        return x != self.vocabulary


@final
@dataclass(frozen=True)
class UniformSource(Source):
    """Every position starts at a token drawn uniformly.

    Args:
        vocabulary: The number of tokens of the data.

    Examples:
        >>> UniformSource(4).probability(torch.tensor([0, 3]))
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """

    vocabulary: int

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocabulary)

    @property
    def states(self) -> int:
        return self.vocabulary

    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return torch.randint(self.vocabulary, tuple(shape), generator=generator, device=device)

    def probability(self, x: Tensor) -> Tensor:
        return torch.full(x.shape, 1 / self.vocabulary, dtype=torch.float64, device=x.device)

    def is_data(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=torch.bool)


def check_tokens(name: str, x: Tensor, source: Source) -> None:
    """Raise a `ValueError` unless data are tokens of the vocabulary; another state of the source, a mask, is none.

    Examples:
        >>> check_tokens("x1", torch.tensor([[0, 2]]), MaskSource(2))
        Traceback (most recent call last):
        ValueError: x1 holds 2, but should hold numbers from 0 to 1, the tokens of the data; 2 is the mask.
    """
    if x.dtype != torch.long:
        raise ValueError(
            f"{name} has dtype {x.dtype}, but should hold tokens of dtype torch.int64; pass {name}.long()."
        )
    mask = f"; {source.vocabulary} is the mask" if isinstance(source, MaskSource) else ""
    check_numbered(name, x, source.vocabulary, f", the tokens of the data{mask}")


def _check_vocabulary(vocabulary: int) -> None:
    if vocabulary < 1 or vocabulary != int(vocabulary):
        raise ValueError(f"vocabulary is {vocabulary}, but should be a whole number from 1.")
