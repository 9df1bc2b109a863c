"""Predicted distributions of tokens: logits and probabilities as two separate types."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape
from flowmatch_core.field import Time

__all__ = ["Denoiser", "Logits", "Probabilities", "TokenDistribution", "check_prediction"]


class TokenDistribution(ABC):
    """Independent distributions over the tokens `0, ..., V - 1`, one per position.

    Either `Logits` or `Probabilities`; a plain tensor is refused, because it could be either. Samples are drawn in
    float64: in float32 rare tokens are lost to rounding, which changes the perplexity of samples.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The shape of the positions."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """The number of tokens."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-probabilities of the tokens, minus infinity for states that are not tokens.

        Args:
            x: The states, with the shape of the positions.
        """

    @abstractmethod
    def probabilities(self) -> Probabilities:
        """Return the same distributions as probabilities."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one token per position."""

    @abstractmethod
    def is_valid(self) -> Tensor:
        """Return whether every position holds a distribution, as a 0-d tensor on the same device."""


@final
@dataclass(frozen=True)
class Logits(TokenDistribution):
    r"""Distributions given by logits $\ell$, $p(k) = e^{\ell_k} / \sum_j e^{\ell_j}$.

    Args:
        values: The logits, with shape `(*positions, V)`.

    Examples:
        >>> import torch
        >>> Logits(torch.zeros(2, 4)).log_prob(torch.tensor([0, 3])).exp()
        tensor([0.2500, 0.2500])
    """

    values: Tensor

    def __post_init__(self) -> None:
        _check_values("Logits", self.values)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    def log_prob(self, x: Tensor) -> Tensor:
        values = self.values.to(_at_least_float32(self.values))
        return _gather(values, x, float("-inf")) - values.logsumexp(-1)

    def probabilities(self) -> Probabilities:
        return Probabilities(self.values.softmax(-1, dtype=_at_least_float32(self.values)))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return _draw(self.values.softmax(-1, dtype=torch.float64), generator)

    def is_valid(self) -> Tensor:
        return self.values.logsumexp(-1).isfinite().all()


@final
@dataclass(frozen=True)
class Probabilities(TokenDistribution):
    """Distributions given by their probabilities.

    They are not checked at construction, which would synchronise with the device; `solve_ctmc` checks them by
    `is_valid`.

    Args:
        values: The probabilities, with shape `(*positions, V)` and sum one over the last dimension.

    Examples:
        >>> import torch
        >>> Probabilities(torch.tensor([[0.25, 0.75]])).log_prob(torch.tensor([1])).exp()
        tensor([0.7500])
    """

    values: Tensor

    def __post_init__(self) -> None:
        _check_values("Probabilities", self.values)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[:-1]

    @property
    def vocabulary(self) -> int:
        return self.values.shape[-1]

    def log_prob(self, x: Tensor) -> Tensor:
        found = _gather(self.values.to(_at_least_float32(self.values)), x, 0.0)
        possible = found > 0
        # log(0) would turn a gradient of zero into NaN
        return torch.where(possible, torch.where(possible, found, 1.0).log(), float("-inf"))

    def probabilities(self) -> Probabilities:
        return self

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return _draw(self.values.double(), generator)

    def is_valid(self) -> Tensor:
        # tolerance for the rounding errors of the values in their sum
        slack = 16 * max(torch.finfo(dtype).eps for dtype in (self.values.dtype, torch.float32))
        total = self.values.sum(-1, dtype=torch.float64)
        return (self.values >= 0).all() & ((total - 1).abs() <= slack).all()


class Denoiser(Protocol):
    r"""Any callable `denoiser(t, x, cond)` whose result estimates $p_{1|t}(x_1^i \mid x_t)$ at each position.

    `t` is a float, a 0-d tensor or a tensor of shape `(batch,)`; `x` holds states, with shape
    `(batch, *event)`. The result holds one distribution over the `V` tokens of the data per position.
    """

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None, /) -> TokenDistribution: ...


def check_prediction(prediction: TokenDistribution, x: Tensor, vocabulary: int) -> None:
    """Raise a `ValueError` unless the result of a denoiser is a distribution over the tokens at each position."""
    if not isinstance(prediction, TokenDistribution):
        given = type(prediction).__name__
        raise ValueError(f"the result of denoiser is a {given}, but should be Logits or Probabilities.")
    if (prediction.shape, prediction.vocabulary) != (x.shape, vocabulary):
        shape = (*prediction.shape, prediction.vocabulary)
        raise ValueError(
            f"the result of denoiser has shape {tuple(shape)}, but should be of shape {(*x.shape, vocabulary)}."
        )


def _check_values(name: str, values: Tensor) -> None:
    if values.ndim == 0 or values.shape[-1] == 0 or not values.is_floating_point():
        raise ValueError(
            f"values of {name} has shape {tuple(values.shape)} and dtype {values.dtype}, but should be of shape "
            "(*positions, V) with V > 0 and hold real numbers."
        )


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _gather(values: Tensor, x: Tensor, absent: float) -> Tensor:
    check_shape("x", x, values.shape[:-1])
    vocabulary = values.shape[-1]
    found = values.gather(-1, x.clamp(max=vocabulary - 1)[..., None]).squeeze(-1)
    return torch.where(x < vocabulary, found, absent)


def _draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from float64 weights by one uniform number per position; a weight of zero is never drawn."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    uniform = torch.rand(total.shape, generator=generator, dtype=weights.dtype, device=weights.device)
    # the largest uniform number is 1 - 2^-53, whose product with the total rounds below the total
    return torch.searchsorted(cumulative, uniform * total, right=True).squeeze(-1)
