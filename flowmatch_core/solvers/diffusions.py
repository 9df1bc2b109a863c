"""Diffusion coefficients of `solve_sde`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from flowmatch_core.paths import AffinePath
from flowmatch_core.solvers._problem import GAUSS

__all__ = [
    "Constant",
    "Custom",
    "Diffusion",
    "Memoryless",
    "Proportional",
    "check_not_negative",
    "integral",
    "integrated_retention",
]


class Diffusion(ABC):
    r"""A diffusion coefficient $w_t$ of `solve_sde`.

    A subclass defines $w_t$ and the fraction of the noise that a state retains over a step. Along a path the solver
    uses only the latter, because $w_t$ may be infinite at `t = 0` and `t = 1`.
    """

    needs_path: ClassVar[bool] = True
    """Whether $w_t$ depends on the path."""

    @abstractmethod
    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        r"""Return $w_t$, shaped like `t`.

        Args:
            path: The path; any one where `needs_path` is false.
            t: The times, of any shape.
        """

    @abstractmethod
    def noise_retention(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        r"""Return the fraction $\kappa$ of the noise that is retained from $s$ to $t$, in [0, 1].

        It is $\kappa = \exp(-\frac12 \int_s^t w_u^2 / \sigma_u^2\, du)$.

        Args:
            path: The path, which gives $\sigma$.
            start: The times $s$, of any shape.
            end: The times $t > s$, of the same shape.
        """


def check_not_negative(name: str, value: float) -> None:
    """Raise a `ValueError` unless the value is finite and not negative."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}, but should be a finite number that is not negative.")


@final
@dataclass(frozen=True)
class Memoryless(Diffusion):
    r"""The time reversal of the diffusion from data to noise.

    Its coefficient is $w_t^2 = \eta^2\, 2 \sigma_t (\dot\alpha_t \sigma_t / \alpha_t - \dot\sigma_t)$.

    With $\eta = 1$ and a path that starts in pure noise, $w$ is infinite at the start, so the end is independent of
    it. The noise retention is $(\alpha_s \sigma_t / \alpha_t \sigma_s)^{\eta^2}$, finite everywhere. On `VP` this is
    the reverse SDE of DDPM, $w^2 = \beta$.

    References:
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456
        - Adjoint Matching (Domingo-Enrich et al., 2024), https://arxiv.org/abs/2409.08861

    Args:
        eta: The factor $\eta$, 0 for no noise.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Memoryless().noise_retention(CondOT(), torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.75]))
        tensor([0.0000, 0.3333])
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative("eta", self.eta)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return self.eta * (2 * (path.d_alpha(t) * sigma**2 / alpha - path.sigma_d_sigma(t))).sqrt()

    def noise_retention(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        ratio = path.alpha(start) * path.sigma(end) / (path.alpha(end) * path.sigma(start))
        return ratio**self.eta**2


@final
@dataclass(frozen=True)
class Constant(Diffusion):
    r"""A constant coefficient; 0 gives the probability-flow ODE.

    On a path with $\sigma_1 = 0$ the coefficient should vanish at `t = 1`, $w \sim \sigma$ or $w^2 \sim \sigma$
    (`Proportional`, `Memoryless`); otherwise the solvers lose their order there. On a bridge they do not.

    Args:
        value: The coefficient $w$.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Constant(0.0).noise_retention(CondOT(), torch.tensor(0.0), torch.tensor(1.0))
        tensor(1.)
    """

    needs_path: ClassVar[bool] = False
    value: float

    def __post_init__(self) -> None:
        check_not_negative("value", self.value)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)

    def noise_retention(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return integrated_retention(self, path, start, end)


@final
@dataclass(frozen=True)
class Proportional(Diffusion):
    r"""A coefficient in proportion to the noise of the path, $w_t = c\, \sigma_t$.

    The noise retention over a step $h$ is $e^{-c^2 h / 2}$ at every time.

    Args:
        factor: The factor $c$.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Proportional(2.0).noise_retention(CondOT(), torch.tensor(0.0), torch.tensor(0.5))  # 1 / e
        tensor(0.3679)
    """

    factor: float

    def __post_init__(self) -> None:
        check_not_negative("factor", self.factor)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return self.factor * path.sigma(t)

    def noise_retention(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return torch.exp(-(self.factor**2) * (end - start) / 2)


@final
@dataclass(frozen=True)
class Custom(Diffusion):
    r"""A coefficient $w_t$ given as a function of a tensor of times, which is never evaluated at the ends of a step.

    Args:
        function: The function, whose result is shaped like its argument.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Custom(lambda t: 2 * (1 - t)).noise_retention(CondOT(), torch.tensor(0.0), torch.tensor(0.5))  # 1 / e
        tensor(0.3679)
    """

    needs_path: ClassVar[bool] = False
    function: Callable[[Tensor], Tensor]

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return self.function(t)

    def noise_retention(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return integrated_retention(self, path, start, end)


def integrated_retention(diffusion: Diffusion, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
    """Return the noise retention by quadrature."""
    return torch.exp(-integral(lambda t: (diffusion.w(path, t) / path.sigma(t)).square(), start, end) / 2)


def integral(function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> Tensor:
    """Return the integral by the Gauss rule with three points, none of them an end of the interval.

    Examples:
        >>> integral(torch.square, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor([0.3333, 2.3333])
    """
    half, middle = (end - start) / 2, (end + start) / 2
    values = [weight * function(middle + point * half) for point, weight in GAUSS]
    return 2 * half * torch.stack(values).sum(0)
