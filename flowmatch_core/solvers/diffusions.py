"""Diffusion coefficients of `solve_sde`: how much noise is added at each time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core.paths import AffinePath

__all__ = [
    "Constant",
    "Custom",
    "Diffusion",
    "Memoryless",
    "Proportional",
    "check_not_negative",
    "integrated_retention",
]


class Diffusion(ABC):
    r"""How much noise a diffusion adds at each time: the coefficient $w_t$ of `solve_sde`.

    A member gives $w_t$ and, because that may be infinite where a path begins or ends, what a solver
    needs of it: the share of its noise that a state keeps over a step.
    """

    @abstractmethod
    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        r"""Return $w_t$, shaped like `t`."""

    @abstractmethod
    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        r"""Return $\kappa = \exp(-\frac12 \int_s^t w_u^2 / \sigma_u^2\, du)$, within [0, 1].

        Args:
            path: The path, which gives $\sigma$.
            start: The times $s$, of any shape.
            end: The times $t > s$, of the same shape.
        """


def check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}, but should be a finite number that is not negative.")


@final
@dataclass(frozen=True)
class Memoryless(Diffusion):
    r"""The reverse of the diffusion that turns data into noise: $w_t^2 = \eta^2\, 2 \sigma_t
    (\dot\alpha_t \sigma_t / \alpha_t - \dot\sigma_t)$.

    With $\eta = 1$ the end is independent of the start where the path begins in pure noise, since
    $w$ is infinite there; the share kept is $(\alpha_s \sigma_t / \alpha_t \sigma_s)^{\eta^2}$,
    finite everywhere. On `VP` this is the reverse SDE of DDPM, $w^2 = \beta$.

    References:
        - Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456
        - Adjoint Matching (Domingo-Enrich et al., 2024), https://arxiv.org/abs/2409.08861

    Args:
        eta: The factor $\eta$, 0 for no noise.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Memoryless().kept(CondOT(), torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.75]))
        tensor([0.0000, 0.3333])
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative("eta", self.eta)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return self.eta * (2 * (path.d_alpha(t) * sigma**2 / alpha - path.sigma_d_sigma(t))).sqrt()

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        ratio = path.alpha(start) * path.sigma(end) / (path.alpha(end) * path.sigma(start))
        return ratio**self.eta**2


@final
@dataclass(frozen=True)
class Constant(Diffusion):
    r"""The same noise at all times; 0 is no noise, the probability-flow ODE.

    Where a path ends in the data, $\sigma_1 = 0$, noise should vanish like $\sigma$ or
    $w^2$ like it (`Proportional`, `Memoryless`): noise that does not costs the solvers their order there.

    Args:
        value: The coefficient $w$.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Constant(0.0).kept(CondOT(), torch.tensor(0.0), torch.tensor(1.0))
        tensor(1.)
    """

    value: float

    def __post_init__(self) -> None:
        check_not_negative("value", self.value)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return integrated_retention(self, path, start, end)


@final
@dataclass(frozen=True)
class Proportional(Diffusion):
    r"""Noise in proportion to that of the path, $w_t = c\, \sigma_t$: the share kept over a step
    $h$ is $e^{-c^2 h / 2}$, the same everywhere.

    Args:
        factor: The factor $c$.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Proportional(2.0).kept(CondOT(), torch.tensor(0.0), torch.tensor(0.5))  # 1 / e
        tensor(0.3679)
    """

    factor: float

    def __post_init__(self) -> None:
        check_not_negative("factor", self.factor)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return self.factor * path.sigma(t)

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return torch.exp(-(self.factor**2) * (end - start) / 2)


@final
@dataclass(frozen=True)
class Custom(Diffusion):
    r"""Any noise $w_t$, as a function of a tensor of times; it is never evaluated at the ends of a step.

    Args:
        function: The function, whose result is shaped like its argument.

    Examples:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Custom(lambda t: 2 * (1 - t)).kept(CondOT(), torch.tensor(0.0), torch.tensor(0.5))  # 1 / e
        tensor(0.3679)
    """

    function: Callable[[Tensor], Tensor]

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return self.function(t)

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return integrated_retention(self, path, start, end)


def integrated_retention(diffusion: Diffusion, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
    """The share of the noise that is kept, by Gauss and Legendre's rule of three nodes, none of them an end."""
    half, middle = (end - start) / 2, (end + start) / 2
    total = torch.zeros_like(half)
    for node, weight in ((-(0.6**0.5), 5 / 9), (0.0, 8 / 9), (0.6**0.5, 5 / 9)):
        t = middle + node * half
        total = total + weight * (diffusion.w(path, t) / path.sigma(t)).square()
    return torch.exp(-half * total / 2)
