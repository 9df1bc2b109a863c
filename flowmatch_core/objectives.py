"""Regression objectives that train a velocity field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch_core.couplings import Coupling, Independent
from flowmatch_core.fields import VelocityField, check_shape
from flowmatch_core.paths import AffinePath

__all__ = ["cfm_loss"]


def cfm_loss(
    field: VelocityField,
    path: AffinePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    coupling: Coupling = Independent(),
    time: Tensor | Callable[..., Tensor] = torch.rand,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the conditional flow matching loss, averaged over the event dimensions and the batch.

    .. math:: E_{t, (x_0, x_1)} \lVert v_\theta(t, x_t, c) - \dot\alpha_t x_1 - \dot\sigma_t x_0 \rVert^2 / d,
              \quad x_t = \alpha_t x_1 + \sigma_t x_0

    Its gradient is that of the regression on the marginal velocity :math:`E[\dot x_t \mid x_t, c]`; its
    minimum is not zero.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), https://arxiv.org/abs/2210.02747

    Arguments:
        field: The velocity field :math:`v_\theta`.
        path: The path.
        x1: The data, with shape `(batch, *event)`.
        x0: The noise, with the same shape; standard normal by default.
        cond: The conditions, with shape `(batch, c)`.
        coupling: How noise and data are paired.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        generator: The source of randomness, drawn for the noise, the coupling and the time in this order.

    Example:
        >>> from flowmatch_core.paths import CondOT
        >>> x1 = torch.ones(8, 2)
        >>> cfm_loss(lambda t, x, cond: x1, CondOT(), x1, x0=torch.zeros(8, 2))
        tensor(0.)
    """
    if x0 is None:
        x0 = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
    x0, x1, cond = coupling(x0, x1, cond, generator=generator)
    if not isinstance(time, Tensor):
        time = time(len(x1), generator=generator, dtype=x1.dtype, device=x1.device)
    sample = path.sample(x0, x1, time)
    velocity = field(sample.t, sample.x_t, cond)
    check_shape("the result of field", velocity, x1.shape)
    return (velocity - sample.velocity).square().mean()
