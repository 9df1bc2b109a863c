r"""Diffusion models as flows: the chain of DDPM, its samplers, and its continuous limit.

Diffusion models count time from the data: `s = 1 - t` runs from data to noise. On the path `VP` (rate $\beta$) or
`OU` ($\beta = 2$) they correspond to flows as follows:

- predictions of noise, score, data and velocity are equivalent: `AffinePath.convert`, `VelocityOf`;
- the probability-flow ODE $dx = [-\frac12 \beta x - \frac12 \beta \nabla \log p]\, ds$ is the flow, so
  $v = \frac12 \beta (x + \nabla \log p)$: `flowmatch_core.solvers.solve`;
- the reverse SDE $dx = [-\frac12 \beta x - \beta \nabla \log p]\, ds + \sqrt\beta\, d\bar B$ is the diffusion
  `Memoryless` of the flow: `flowmatch_core.solvers.solve_sde`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import noise_like
from flowmatch_core.field import VelocityField
from flowmatch_core.paths import AffinePath
from flowmatch_core.solvers.diffusions import Diffusion, Memoryless
from flowmatch_core.solvers.grids import Nodes, TimeGrid, Uniform
from flowmatch_core.solvers.ode import Solution
from flowmatch_core.solvers.sde import solve_sde

__all__ = ["DDPM", "ddim"]


@final
@dataclass(frozen=True, eq=False)
class DDPM:
    r"""The chain of `n` steps that turns data $x_0$ into noise.

    $$
    q(x_i \mid x_{i-1}) = N(\sqrt{1 - \beta_i}\, x_{i-1}, \beta_i I), \qquad
    q(x_i \mid x_0) = N(\sqrt{\bar\alpha_i}\, x_0, (1 - \bar\alpha_i) I), \qquad
    \bar\alpha_i = \prod_{j \le i} (1 - \beta_j)
    $$

    Its states have the law of a variance-preserving path (`VP`, `Cosine`, `OU`) at the times of equal signal-to-noise
    ratio, so a field trained along the path can be sampled with the steps of the chain: see `grid`.

    References:
        - Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239

    Args:
        betas: The variances $\beta_1 \dots \beta_n$, each within (0, 1), in float64.

    Examples:
        >>> chain = DDPM(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        >>> chain.alpha[-1]  # the weight of the data at the end
        tensor(0.0064, dtype=torch.float64)
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) == 0:
            raise ValueError(f"betas has shape {tuple(self.betas.shape)}, but should have shape (n,) with n > 0.")
        if not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("betas holds values outside (0, 1), but should hold variances below one.")

    @classmethod
    def of_rate(cls, rate: Callable[[Tensor], Tensor], steps: int) -> DDPM:
        r"""Return the chain $\beta_i = \beta(i / n) / n$ of a continuous rate.

        For $n \to \infty$ it becomes the diffusion $dx = -\frac12 \beta(s) x\, ds + \sqrt{\beta(s)}\,
        dB$, whose path is `VP`.

        Args:
            rate: The rate $\beta(s)$, a function of times within (0, 1].
            steps: The number `n` of steps.

        Examples:
            >>> DDPM.of_rate(lambda s: 0.1 + 19.9 * s, steps=1000).betas[-1]
            tensor(0.0200, dtype=torch.float64)
        """
        return cls(rate(torch.arange(1, steps + 1, dtype=torch.float64) / steps) / steps)

    @property
    def alpha(self) -> Tensor:
        r"""The weights of the data $\sqrt{\bar\alpha_i}$, with shape `(n + 1,)`, from one at `i = 0`."""
        return (self._log_retention() / 2).exp()

    @property
    def sigma(self) -> Tensor:
        r"""The weights of the noise $\sqrt{1 - \bar\alpha_i}$, with shape `(n + 1,)`, from zero at `i = 0`."""
        return (-torch.expm1(self._log_retention())).sqrt()

    def step(self, x: Tensor, i: int, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw from $q(x_i \mid x_{i-1})$.

        Args:
            x: The state $x_{i-1}$, with shape `(batch, *event)`.
            i: The number of the step, 1 to n.
            generator: The source of randomness.

        Examples:
            >>> DDPM(torch.tensor([0.1, 0.2])).step(torch.zeros(3, 2), 2).shape
            torch.Size([3, 2])
        """
        if not 1 <= i <= len(self.betas):
            raise ValueError(f"i is {i}, but should be from 1 to {len(self.betas)}.")
        beta = self.betas[i - 1]
        return (1 - beta).sqrt() * x + beta.sqrt() * noise_like(x, generator)

    def grid(self, path: AffinePath) -> tuple[float, Nodes]:
        r"""Return the start time of ancestral sampling on a path, and the grid of its steps from there to 1.

        The steps end at the times when $\alpha / \sigma$ of the path is that of the chain. States of the
        chain with more noise than the path has at its start take no steps.

        Examples:
            >>> from flowmatch_core.paths import Cosine
            >>> t0, grid = DDPM(torch.tensor([0.5, 0.5], dtype=torch.float64)).grid(Cosine())
            >>> [round((1 - s) * t0 + s, 4) for s in grid.nodes(2)]  # 1/4, 1/2 and all of the variance is data
            [0.3333, 0.5, 1.0]
        """
        times = path.time_of_ratio(self.alpha, self.sigma).flip(0)
        times = times[max(0, int((times <= 0).sum()) - 1) :]
        shares = (times - times[0]) / (times[-1] - times[0])
        return float(times[0]), Nodes(shares)

    def _log_retention(self) -> Tensor:
        return torch.cat([self.betas.new_zeros(1), torch.log1p(-self.betas).cumsum(0)])


def ddim(
    field: VelocityField,
    x: Tensor,
    *,
    path: AffinePath,
    eta: float = 0.0,
    t0: float = 0.0,
    t1: float = 1.0,
    cond: Condition = None,
    steps: int = 50,
    grid: TimeGrid = Uniform(),
    generator: torch.Generator | None = None,
    save: bool = False,
    check: bool = True,
) -> Solution:
    r"""Sample from a velocity field by DDIM or by the ancestral sampling of DDPM, for any path and times.

    $$
    x_t = \alpha_t \hat x_1 + \sqrt{\sigma_t^2 - \eta^2 \tilde\beta}\, \hat x_0 + \eta
    \sqrt{\tilde\beta}\, z, \qquad \tilde\beta = \sigma_t^2 \left( 1 - \left( \frac{\alpha_s
    \sigma_t}{\alpha_t \sigma_s} \right)^2 \right)
    $$

    for a step from `s` to `t`: DDIM, deterministic, for $\eta = 0$, and the ancestral sampling of DDPM
    for $\eta = 1$, where $\tilde\beta$ is the variance of $q(x_t \mid x_s, x_1)$. Backward in time (`t1 < t0`) DDIM
    maps data to their noise.

    For $\eta > 0$ the noise of the path has to be independent of the data: a field that was trained with a coupling
    (`MinibatchOT`, `SchrodingerBridge`, `Reflow`) is sampled wrongly, and needs `solve_sde` with its score.

    References:
        - Denoising Diffusion Implicit Models (Song et al., 2021), https://arxiv.org/abs/2010.02502

    Args:
        field: The velocity field, as trained along `path`; see `VelocityOf` for one that predicts noise.
        x: The state at `t0`, with shape `(batch, *event)`.
        path: The path of the field.
        eta: The factor $\eta$, within [0, 1].
        t0: The start.
        t1: The end.
        cond: The condition handed to the field, a tensor or a mapping of tensors whose first dimension is the batch.
        steps: The number of steps.
        grid: Where the steps end; see `DDPM.grid` for those of a chain.
        generator: The source of randomness.
        save: Whether to keep the states at the ends of the steps.
        check: Whether to raise a `SolverError` if the result is not finite; the check synchronises with the device.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> field = lambda t, x, cond: (3 - x) / (1 - t)  # all of the data at 3
        >>> ddim(field, torch.zeros(1, 1), path=CondOT(), eta=1.0, steps=4).x
        tensor([[3.]])
    """
    return solve_sde(
        field,
        x,
        path=path,
        diffusion=_Ancestral(eta),
        t0=t0,
        t1=t1,
        cond=cond,
        steps=steps,
        grid=grid,
        generator=generator,
        save=save,
        check=check,
    )


@final
@dataclass(frozen=True)
class _Ancestral(Diffusion):
    r"""DDPM posterior variance times $\eta^2$; for short steps $w$ is that of `Memoryless`."""

    eta: float

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}, but should be from 0 to 1.")

    def w(self, path: AffinePath, t: Tensor) -> Tensor:
        return Memoryless(self.eta).w(path, t)

    def noise_retention(self, path: AffinePath, start: Tensor, end: Tensor) -> Tensor:
        ratio = Memoryless().noise_retention(path, start, end)
        return (1 - self.eta**2 * (1 - ratio**2)).sqrt()
