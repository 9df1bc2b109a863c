"""Stochastic sampling: the diffusions that have the marginals of a flow, from the same velocity field."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from flowmatch_core.fields import VelocityField, check_choice, noise_like
from flowmatch_core.grids import TimeGrid, Uniform
from flowmatch_core.paths import AffinePath
from flowmatch_core.solvers import CountedField, Solution, check_finite

__all__ = ["SDE_SOLVERS", "Constant", "Custom", "Diffusion", "Memoryless", "Proportional", "solve_sde"]

SDE_SOLVERS = ("euler_maruyama", "heun")
"""The names of the solvers, of weak order 1 and 2."""


class Diffusion(ABC):
    r"""How much noise a diffusion adds at each time: the coefficient :math:`w_t` of `solve_sde`.

    A member gives :math:`w_t` and, because that may be infinite where a path begins or ends, what a solver
    needs of it: the share of its noise that a state keeps over a step.
    """

    @abstractmethod
    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        r"""Return :math:`w_t`, shaped like `t`."""

    @abstractmethod
    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        r"""Return :math:`\kappa = \exp(-\frac12 \int_s^t w_u^2 / \sigma_u^2\, du)`, within [0, 1].

        Arguments:
            path: The path, which gives :math:`\sigma`.
            start: The times :math:`s`, of any shape.
            end: The times :math:`t > s`, of the same shape.
        """


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}, but should be a finite number that is not negative.")


@final
@dataclass(frozen=True)
class Memoryless(Diffusion):
    r"""The reverse of the diffusion that turns data into noise: :math:`w_t^2 = \eta^2\, 2 \sigma_t
    (\dot\alpha_t \sigma_t / \alpha_t - \dot\sigma_t)`.

    With :math:`\eta = 1` the end is independent of the start where the path begins in pure noise, since
    :math:`w` is infinite there; the share kept is :math:`(\alpha_s \sigma_t / \alpha_t \sigma_s)^{\eta^2}`,
    finite everywhere. On `VP` this is the reverse SDE of DDPM, :math:`w^2 = \beta`.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456
        | Adjoint Matching (Domingo-Enrich et al., 2024), https://arxiv.org/abs/2409.08861

    Arguments:
        eta: The factor :math:`\eta`, 0 for no noise.

    Example:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Memoryless().kept(CondOT(), torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.75]))
        tensor([0.0000, 0.3333])
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative("eta", self.eta)

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

    Where a path ends in the data, :math:`\sigma_1 = 0`, noise should vanish like :math:`\sigma` or
    :math:`w^2` like it (`Proportional`, `Memoryless`): noise that does not costs the solvers their order there.

    Arguments:
        value: The coefficient :math:`w`.

    Example:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Constant(0.0).kept(CondOT(), torch.tensor(0.0), torch.tensor(1.0))
        tensor(1.)
    """

    value: float

    def __post_init__(self) -> None:
        _check_not_negative("value", self.value)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return _kept(self, path, start, end)


@final
@dataclass(frozen=True)
class Proportional(Diffusion):
    r"""Noise in proportion to that of the path, :math:`w_t = c\, \sigma_t`: the share kept over a step
    :math:`h` is :math:`e^{-c^2 h / 2}`, the same everywhere.

    Arguments:
        factor: The factor :math:`c`.

    Example:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Proportional(2.0).kept(CondOT(), torch.tensor(0.0), torch.tensor(0.5))  # 1 / e
        tensor(0.3679)
    """

    factor: float

    def __post_init__(self) -> None:
        _check_not_negative("factor", self.factor)

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return self.factor * path.sigma(t)

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return torch.exp(-(self.factor**2) * (end - start) / 2)


@final
@dataclass(frozen=True)
class Custom(Diffusion):
    r"""Any noise :math:`w_t`, as a function of a tensor of times; it is never evaluated at the ends of a step.

    Arguments:
        function: The function, whose result is shaped like its argument.

    Example:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> Custom(lambda t: 2 * (1 - t)).kept(CondOT(), torch.tensor(0.0), torch.tensor(0.5))  # 1 / e
        tensor(0.3679)
    """

    function: Callable[[Tensor], Tensor]

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return self.function(t)

    def kept(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        return _kept(self, path, start, end)


def solve_sde(
    field: VelocityField,
    x: Tensor,
    *,
    path: AffinePath,
    diffusion: Diffusion = Memoryless(),
    t0: float = 0.0,
    t1: float = 1.0,
    cond: Tensor | None = None,
    solver: str = "euler_maruyama",
    steps: int = 100,
    grid: TimeGrid = Uniform(),
    generator: torch.Generator | None = None,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Simulate the diffusion that has the marginals :math:`p_t` of the flow, from `t0` to `t1`.

    .. math:: dX = \left[ v(t, X) + \tfrac{w_t^2}{2} \nabla \log p_t(X) \right] dt + w_t\, dB

    The score is read off the velocity field of the path. The right-hand side may be infinite at both ends,
    so a step goes by the means :math:`\hat x_0, \hat x_1` of noise and data that the velocity stands for:

    .. math:: X_t = \alpha_t \hat x_1 + \sigma_t \left( \kappa\, \hat x_0 + \sqrt{1 - \kappa^2}\, z \right),
              \quad z \sim N(0, I), \quad \kappa = \exp\left( -\tfrac12 \int_s^t w_u^2 / \sigma_u^2\, du \right).

    It is the exact law if the data are one point, whatever the step, and otherwise the method of
    Euler-Maruyama up to terms of second order. `heun` corrects the step by the data :math:`\hat x_1` found
    at its end, unless that is `t = 1`. With :math:`w = 0` the first is Euler's method on `CondOT` and DDIM on
    any path. A step to :math:`\sigma_t = 0` ends in :math:`\hat x_1`, the mean of the data, without noise; a
    path whose noise vanishes late (`VP`, `OU`) wants a `grid` with short steps there.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          https://arxiv.org/abs/2011.13456
        | SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (Gonzalez et al.,
          2023), https://arxiv.org/abs/2305.14267

    Arguments:
        field: The velocity field, as trained along `path`.
        x: The state at `t0`, with shape `(batch, *event)`.
        path: The path of the field.
        diffusion: The noise :math:`w_t`.
        t0: The start.
        t1: The end, after the start.
        cond: The condition handed to the field, with shape `(batch, c)`.
        solver: One of `SDE_SOLVERS`.
        steps: The number of steps.
        grid: Where the steps lie between `t0` and `t1`.
        generator: The source of randomness.
        save: Whether to keep the states at the ends of the steps.
        check: Whether to raise a `SolverError` if the result is not finite, which waits for the device.

    Example:
        >>> import torch
        >>> from flowmatch_core.paths import CondOT
        >>> g = torch.Generator().manual_seed(0)
        >>> x0 = torch.randn(1000, 2, generator=g)
        >>> field = lambda t, x, cond: (2 * t - 1) / (t**2 + (1 - t)**2) * x  # from N(0, I) to N(0, I)
        >>> solve_sde(field, x0, path=CondOT(), solver="heun", steps=20, generator=g).x.std().round(decimals=1)
        tensor(1.)
    """
    check_choice("solver", solver, SDE_SOLVERS)
    if not 0 <= t0 < t1 <= 1:
        raise ValueError(f"t0 and t1 are {t0} and {t1}, but should be between 0 and 1 and t0 before t1.")
    ends = [(1 - s) * t0 + s * t1 for s in grid.nodes(steps)]  # exact at both ends
    # Coefficients live on the CPU in float64: they promote no other dtype, and nothing waits for a device.
    times = torch.tensor(ends, dtype=torch.float64)
    alpha, sigma = path.alpha(times), path.sigma(times)
    data_of_x, data_of_v = path.data_or_mean(times, "velocity")
    kept = diffusion.kept(path, times[:-1], times[1:])
    fresh = (1 - kept**2).clamp_min(0).sqrt()
    of_x, of_v = path.step_coefficients(times, "velocity", kept)
    states, evaluate = [x], CountedField(field, cond)
    for i, j in itertools.pairwise(range(steps + 1)):
        velocity = evaluate(ends[i], x)
        z = noise_like(x, generator)
        trial = of_x[i] * x + of_v[i] * velocity + sigma[j] * fresh[i] * z
        # Without noise the state is the data: nothing to correct at the end, where a velocity may be infinite.
        if solver == "heun" and ends[j] < 1:
            data = data_of_x[i] * x + data_of_v[i] * velocity
            change = data_of_x[j] * trial + data_of_v[j] * evaluate(ends[j], trial) - data
            trial = trial + (alpha[j] - alpha[i] * kept[i] * sigma[j] / sigma[i]) / 2 * change
        x = trial
        if save:
            states.append(x)
    if check:
        check_finite(solver, x)
    solution = Solution(x=x, nfe=evaluate.calls, status="finished" if check else "unchecked")
    return replace(solution, t=times.to(x.device, x.dtype), path=torch.stack(states)) if save else solution


def _kept(diffusion: Diffusion, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
    """The share of the noise that is kept, by Gauss and Legendre's rule of three nodes, none of them an end."""
    half, middle = (end - start) / 2, (end + start) / 2
    total = torch.zeros_like(half)
    for node, weight in ((-(0.6**0.5), 5 / 9), (0.0, 8 / 9), (0.6**0.5, 5 / 9)):
        t = middle + node * half
        total = total + weight * (diffusion.w(path, t) / path.sigma(t)).square()
    return torch.exp(-half * total / 2)
