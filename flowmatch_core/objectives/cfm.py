"""Conditional flow matching: regression on the velocity of a path, or on noise, data or score."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_object
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

__all__ = ["cfm_batch", "cfm_loss"]


def cfm_loss(
    field: VelocityField,
    path: AffinePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    coupling: Coupling = Independent(),
    time: Times = torch.rand,
    prediction: Quantity = "velocity",
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the conditional flow matching loss, averaged over the event dimensions and the batch.

    $$
    E_{t, (x_0, x_1)} \lVert f_\theta(t, x_t, c) - y \rVert^2 / d,
    \quad x_t = \alpha_t x_1 + \sigma_t x_0
    $$

    - `velocity`: $y = \dot\alpha_t x_1 + \dot\sigma_t x_0$, flow matching.
    - `noise`: $y = x_0$, the loss of DDPM.
    - `data`: $y = x_1$, a denoiser.
    - `score`: denoising score matching, weighted by $\sigma_t^2$, which keeps it finite:
      $\sigma_t^2 \lVert f_\theta + x_0 / \sigma_t \rVert^2 = \lVert \sigma_t f_\theta + x_0 \rVert^2$.

    Its gradient is that of the regression on $E[y \mid x_t, c]$, which for the velocity is the marginal velocity; its
    minimum is not zero. `VelocityOf` turns each of these predictions into a velocity field.

    References:
        - Flow Matching for Generative Modeling (Lipman et al., 2023), https://arxiv.org/abs/2210.02747
        - Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
        - A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011),
          https://doi.org/10.1162/NECO_a_00142

    Args:
        field: The network $f_\theta$.
        path: The path.
        x1: The data, with shape `(batch, *event)`.
        x0: The noise, with the same shape; standard normal by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        coupling: How noise and data are paired.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        prediction: What the network predicts: one of velocity, noise, data and score.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default: the loss of a row is multiplied
            by its weight before the average over the batch. A coupling knows no weights, so that the noise beside
            weighted rows is no longer normal unless the coupling is independent: draw the rows by their weights then.
        generator: The source of randomness, drawn for the noise, the coupling and the time in this order.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> x1 = torch.ones(8, 2)
        >>> cfm_loss(lambda t, x, cond: x1, CondOT(), x1, x0=torch.zeros(8, 2))
        tensor(0.)
    """
    batch = cfm_batch(
        path,
        x1,
        x0,
        cond,
        coupling=coupling,
        time=time,
        prediction=prediction,
        weight=weight,
        generator=generator,
    )
    return batch.loss(field)


def cfm_batch(
    path: AffinePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    coupling: Coupling = Independent(),
    time: Times = torch.rand,
    prediction: Quantity = "velocity",
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RegressionBatch:
    """Draw what `cfm_loss` regresses on: `cfm_batch(path, x1, ...).loss(field)` is `cfm_loss(field, path, x1, ...)`.

    Nothing in it depends on the network, so batches can be computed ahead. Many are drawn at once and split, which
    takes a small network's step less time than to draw each alone, or, where a coupling pairs the rows of a batch,
    one by one in a second thread (see `flowmatch_core.prefetch.ahead`).

    Args:
        path: The path.
        x1: The data, with shape `(batch, *event)`.
        x0: The noise, with the same shape; standard normal by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        coupling: How noise and data are paired.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        prediction: What the network predicts: one of velocity, noise, data and score.
        weight: The weights of the rows of `x1`, with shape `(batch,)`.
        generator: The source of randomness, drawn for the noise, the coupling and the time in this order.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> field = lambda t, x, cond: torch.ones_like(x)
        >>> drawn = cfm_batch(CondOT(), torch.ones(64, 2), x0=torch.zeros(64, 2))
        >>> [batch.loss(field).item() for batch in drawn.split(16)]
        [0.0, 0.0, 0.0, 0.0]
    """
    check_prediction(prediction)
    check_object("path", path)
    x0, x1, cond = draw_pairs(x1, x0, cond, coupling, generator)
    t = draw_times(time, x1, generator)
    return RegressionBatch.along(path, prediction, x0, x1, t, cond, weight)
