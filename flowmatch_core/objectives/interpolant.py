"""Stochastic interpolants: regression along a path between two samples with latent noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_object, expand_time, noise_like
from flowmatch_core.couplings import Coupling, Independent
from flowmatch_core.field import VelocityField
from flowmatch_core.objectives._regression import (
    RegressionBatch,
    Times,
    check_prediction,
    draw_pairs,
    draw_times,
)
from flowmatch_core.paths import AffinePath, Quantity

__all__ = ["interpolant_loss", "parabola"]


def parabola(t: Tensor) -> Tensor:
    r"""Return $t (1 - t)$, an amount of latent noise with bounded derivatives.

    Examples:
        >>> parabola(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.2500, 0.0000])
    """
    return t * (1 - t)


def interpolant_loss(
    field: VelocityField,
    path: AffinePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    gamma: Callable[[Tensor], Tensor] = parabola,
    coupling: Coupling = Independent(),
    time: Times = torch.rand,
    prediction: Quantity = "velocity",
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the loss of a stochastic interpolant, averaged over the event dimensions and the batch.

    $$
    E_{t, (x_0, x_1), z} \lVert f_\theta(t, x_t, c) - y \rVert^2 / d,
    \quad x_t = \alpha_t x_1 + \sigma_t x_0 + \gamma_t z, \quad z \sim N(0, I)
    $$

    `x0` and `x1` may be any two samples; the score of $x_t$ comes from the latent noise $z$ instead of `x0`.

    - `velocity`: $y = \dot\alpha_t x_1 + \dot\sigma_t x_0 + \dot\gamma_t z$. The flow of its mean $b_t(x) = E[y \mid
      x_t = x]$ maps the law of `x0` to that of `x1`.
    - `noise`: $y = z$, the denoiser, and $\nabla \log p_t(x) = -E[z \mid x_t = x] / \gamma_t$.
    - `score`: $\gamma_t^2 \lVert f_\theta + z / \gamma_t \rVert^2 = \lVert \gamma_t f_\theta + z \rVert^2$.
    - `data`: $y = x_1$.

    Two calls with the same `generator` state train a velocity and a score on the same points. With the score, $dx =
    (b + \frac{1}{2} w^2 \nabla \log p)\,dt + w\,dB$ has the same marginals for any $w_t$.

    References:
        - Stochastic Interpolants: A Unifying Framework for Flows and Diffusions (Albergo et al., 2023),
          https://arxiv.org/abs/2303.08797

    Args:
        field: The network $f_\theta$.
        path: The weights $\alpha_t$ and $\sigma_t$ of the two samples.
        x1: The sample at `t = 1`, with shape `(batch, *event)`.
        x0: The sample at `t = 0`, with the same shape; standard normal by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        gamma: The amount $\gamma_t$ of latent noise, a function of a tensor of times, zero at 0 and 1.
            Its derivative is taken by automatic differentiation; $\sqrt{2 t (1 - t)}$, whose derivative is infinite
            at 0 and 1, needs times strictly between them.
        coupling: How the two samples are paired.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        prediction: What the network predicts: one of velocity, noise, data and score.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default: the loss of a row is multiplied
            by its weight before the average over the batch.
        generator: The source of randomness, drawn for `x0`, the coupling, the time and the latent noise in
            this order.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> x0, x1 = torch.zeros(8, 2), torch.ones(8, 2)
        >>> interpolant_loss(lambda t, x, cond: x1, CondOT(), x1, x0, gamma=torch.zeros_like)
        tensor(0.)
    """
    check_prediction(prediction)
    check_object("path", path)
    x0, x1, cond = draw_pairs(x1, x0, cond, coupling, generator)
    sample = path.sample(x0, x1, draw_times(time, x1, generator))
    z = noise_like(x1, generator)
    t = sample.t.contiguous()  # an expanded tensor cannot carry a tangent
    amount, rate = cast(tuple[Tensor, Tensor], torch.func.jvp(gamma, (t,), (torch.ones_like(t),)))
    batch = RegressionBatch.of(
        prediction,
        t,
        sample.x_t + expand_time(amount, x1) * z,
        cond,
        weight,
        velocity=sample.velocity + expand_time(rate, x1) * z,
        noise=z,
        data=x1,
        sigma=lambda t: amount,
    )
    return batch.loss(field)
