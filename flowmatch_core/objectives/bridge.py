"""Simulation-free Schrödinger bridges: regression on the velocity and the score of Brownian bridges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import as_time, check_shape, expand_time, noise_like, weighted_mean
from flowmatch_core.couplings import Coupling, SchrodingerBridge
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.objectives._regression import Times, draw_pairs, draw_times

__all__ = ["BridgeSample", "BrownianBridge", "sb_cfm_loss", "sf2m_loss"]


@dataclass(frozen=True)
class BridgeSample:
    """A point of a bridge, its velocity and its score, all `(batch, *event)`, and its time."""

    x_t: Tensor
    velocity: Tensor
    score: Tensor
    t: Tensor


@final
@dataclass(frozen=True)
class BrownianBridge:
    r"""The Brownian bridge of scale $\sigma$ between two given ends.

    $$
    x_t = (1 - t) x_0 + t x_1 + \sigma \sqrt{t (1 - t)}\, z, \quad z \sim N(0, I)
    $$

    References:
        - Simulation-Free Schrödinger Bridges via Score and Flow Matching (Tong et al., 2024),
          https://arxiv.org/abs/2307.03672

    Args:
        sigma: The scale $\sigma$.

    Examples:
        >>> BrownianBridge(sigma=2.0).std(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0., 1., 0.])
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}, but should be positive and finite.")

    def std(self, t: Tensor) -> Tensor:
        r"""Return $\sigma \sqrt{t (1 - t)}$."""
        return self.sigma * (t * (1 - t)).sqrt()

    def point(self, x0: Tensor, x1: Tensor, t: Time, noise: Tensor) -> Tensor:
        """Return the point $x_t$; arguments as in `sample`."""
        check_shape("x0", x0, x1.shape)
        check_shape("noise", noise, x1.shape)
        s = expand_time(t, x1)
        return (1 - s) * x0 + s * x1 + self.std(s) * noise

    def sample(self, x0: Tensor, x1: Tensor, t: Time, noise: Tensor) -> BridgeSample:
        r"""Return the point $x_t$, its velocity and its score.

        $$
        u_t = x_1 - x_0 + \frac{\sigma (1 - 2t)}{2 \sqrt{t (1 - t)}} z, \quad
        \nabla \log p_t(x_t \mid x_0, x_1) = -\frac{z}{\sigma \sqrt{t (1 - t)}}
        $$

        Both are infinite at `t = 0` and `t = 1`.

        Args:
            x0: The start, with shape `(batch, *event)`.
            x1: The end, with the same shape.
            t: The time, a float, 0-d or `(batch,)`.
            noise: The noise $z$, with the same shape.
        """
        x_t, s = self.point(x0, x1, t, noise), expand_time(t, x1)
        std = self.std(s)
        return BridgeSample(
            x_t=x_t,
            velocity=x1 - x0 + self.sigma**2 * (1 - 2 * s) / (2 * std) * noise,
            score=-noise / std,
            t=as_time(t, x1),
        )


def sb_cfm_loss(
    field: VelocityField,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    sigma: float = 1.0,
    coupling: Coupling | None = None,
    time: Times = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the loss of the flow of a Schrödinger bridge, averaged over the event dimensions and the batch.

    $$
    E_{t, (x_0, x_1), z}\, \lambda_t \lVert v_\theta(t, x_t, c) - u_t \rVert^2 / d, \quad
    \lambda_t^{-1} = 1 + \sigma^2 \frac{(1 - 2t)^2}{4 t (1 - t)}
    $$

    with $x_t$ and $u_t$ of a `BrownianBridge`. Its minimiser $E[u_t \mid x_t, c]$ is the
    probability flow of the bridge. The variance of $u_t$ and hence the unweighted loss are infinite at `t = 0` and `t
    = 1`: the weight $\lambda_t$, the inverse of one plus that variance, keeps all terms finite. As a positive weight
    it does not change the minimiser.

    References:
        - Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport
          (Tong et al., 2024), https://arxiv.org/abs/2302.00482

    Args:
        field: The velocity field $v_\theta$.
        x1: The data, with shape `(batch, *event)`.
        x0: The sample at `t = 0`, with the same shape; standard normal by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        sigma: The scale $\sigma$ of the Brownian motion.
        coupling: How the ends are paired; `SchrodingerBridge(sigma)` by default, which ignores the conditions. Where
            these are given it has to be named, for example `SchrodingerBridge(sigma, weight=math.inf)` for labels.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default: the loss of a row is multiplied
            by its weight before the average over the batch.
        generator: The source of randomness, drawn for `x0`, the coupling, the time and the noise in this order.

    Examples:
        >>> x0, x1 = torch.zeros(8, 2), torch.ones(8, 2)
        >>> sb_cfm_loss(lambda t, x, cond: x1, x1, x0, time=torch.full((8,), 0.5))
        tensor(0.)
    """
    x_t, t, cond, flow_error, _ = _bridges(x1, x0, cond, sigma, coupling, time, generator)
    return weighted_mean(flow_error(call_field(field, t, x_t, cond)).square(), weight)


def sf2m_loss(
    field: VelocityField,
    score: VelocityField,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    sigma: float = 1.0,
    coupling: Coupling | None = None,
    time: Times = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the loss of the flow and of the score of a Schrödinger bridge, on the same points.

    $$
    E_{t, (x_0, x_1), z} \bigl[\lambda_t \lVert v_\theta(t, x_t, c) - u_t \rVert^2
    + \sigma_t^2 \lVert s_\theta(t, x_t, c) - \nabla \log p_t(x_t \mid x_0, x_1) \rVert^2 \bigr] / d
    $$

    The first term is `sb_cfm_loss`; in the second $\sigma_t = \sigma \sqrt{t (1 - t)}$, so it is $\lVert \sigma_t
    s_\theta + z \rVert^2$, finite at `t = 0` and `t = 1`. The two fields give the bridge as a diffusion, $dx = (v +
    \frac{\sigma^2}{2} s)\,dt + \sigma\,dB$ forward in time and, with the sign of the score reversed, backward in
    time.

    References:
        - Simulation-Free Schrödinger Bridges via Score and Flow Matching (Tong et al., 2024),
          https://arxiv.org/abs/2307.03672

    Args:
        field: The velocity field $v_\theta$.
        score: The score $s_\theta$, with the call of a velocity field.
        x1: The data, with shape `(batch, *event)`.
        x0: The sample at `t = 0`, with the same shape; standard normal by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        sigma: The scale $\sigma$ of the Brownian motion.
        coupling: How the ends are paired; `SchrodingerBridge(sigma)` by default, which ignores the conditions. Where
            these are given it has to be named, for example `SchrodingerBridge(sigma, weight=math.inf)` for labels.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default: the loss of a row is multiplied
            by its weight before the average over the batch.
        generator: The source of randomness, drawn for `x0`, the coupling, the time and the noise in this order.

    Examples:
        >>> x0, x1, half = torch.zeros(8, 2), torch.ones(8, 2), torch.full((8,), 0.5)
        >>> loss = sf2m_loss(lambda t, x, cond: x1, lambda t, x, cond: (0.5 - x) / 0.25, x1, x0, time=half)
        >>> bool(loss < 1e-10)
        True
    """
    x_t, t, cond, flow_error, score_error = _bridges(x1, x0, cond, sigma, coupling, time, generator)
    flow = weighted_mean(flow_error(call_field(field, t, x_t, cond)).square(), weight)
    return flow + weighted_mean(score_error(call_field(score, t, x_t, cond, "score")).square(), weight)


Errors = Callable[[Tensor], Tensor]


def _bridges(
    x1: Tensor,
    x0: Tensor | None,
    cond: Condition,
    sigma: float,
    coupling: Coupling | None,
    time: Times,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Condition, Errors, Errors]:
    """Return points of bridges, their times and conditions, and the weighted errors of velocity and score."""
    bridge = BrownianBridge(sigma)
    if coupling is None:
        if cond is not None:
            raise ValueError(
                "cond is given without a coupling, but the default, SchrodingerBridge(sigma), ignores conditions; pass "
                "coupling=SchrodingerBridge(sigma, weight=math.inf) for labels, or a finite weight otherwise."
            )
        coupling = SchrodingerBridge(sigma)
    x0, x1, cond = draw_pairs(x1, x0, cond, coupling, generator)
    t = draw_times(time, x1, generator)
    z = noise_like(x1, generator)
    straight = x1 - x0
    s = expand_time(t, x1)
    x_t = bridge.point(x0, x1, t, z)
    # u = straight + tilt / spread * z, each multiplied out so that no term is infinite at t = 0 and t = 1
    spread, tilt = 2 * (s * (1 - s)).sqrt(), sigma * (1 - 2 * s)
    scale = (spread.square() + tilt.square()).rsqrt()

    def flow_error(velocity: Tensor) -> Tensor:
        return scale * (spread * (velocity - straight) - tilt * z)

    def score_error(score: Tensor) -> Tensor:
        return bridge.std(s) * score + z

    return x_t, as_time(t, x1), cond, flow_error, score_error
