"""Flow matching on the posterior mean of the velocity: the same expected gradient with less variance."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape, expand_time, flatten_event
from flowmatch_core.field import VelocityField
from flowmatch_core.objectives._regression import Times, check_prediction, draw_noise, draw_times, residual
from flowmatch_core.paths import AffinePath, Quantity

__all__ = ["posterior_cfm_loss"]


def posterior_cfm_loss(
    field: VelocityField,
    path: AffinePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    reference_cond: Tensor | None = None,
    time: Times = torch.rand,
    prediction: Quantity = "velocity",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the flow matching loss whose target is averaged over the posterior of the data given the point.

    $$
    E\, \Bigl\lVert f_\theta(t, x_t^i, c) - \sum_j w_{ij}\, u_t(x_t^i \mid x_1^j) \Bigr\rVert^2 / d,
    \qquad w_{ij} \propto p_t(x_t^i \mid x_1^j) = N(x_t^i; \alpha_t x_1^j, \sigma_t^2 I)
    $$

    where $j$ runs over the rows of `x1`, including the $x_1^i$ that generated the point $x_t^i$, and over those of
    `reference`.

    The target is unbiased for any number of rows, if these are independent draws of the data: given $x_t^i$ and all
    rows, $w_{ij}$ is the probability that row $j$ generated the point, so the average is the conditional mean of the
    target of `cfm_loss` (Rao-Blackwell), and has its mean $v_t(x_t^i)$ and a smaller variance. The gradient is that
    of `cfm_loss` in expectation; the loss itself is smaller, by the variance that is averaged out. (An average
    without the row's own $x_1^i$ would be self-normalised importance sampling, with a bias of order one over the
    rows.)

    The variance is reduced most where many rows may have generated a point: at early times and in few dimensions. The
    noise has to be independent of the data, so there is no coupling. Only rows of equal condition are averaged; if
    all conditions differ, the loss is `cfm_loss`.

    References:
        - Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023),
          https://arxiv.org/abs/2302.00670

    Args:
        field: The network $f_\theta$.
        path: The path.
        x1: The data, with shape `(batch, *event)`.
        x0: The noise, with the shape of `x1`, normal and independent of it; drawn by default.
        cond: The conditions, with shape `(batch, c)`.
        reference: More data, independent of the rows of `x1`, with shape `(rows, *event)`.
        reference_cond: The conditions of the reference, with shape `(rows, c)`.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        prediction: What the network predicts, as in `cfm_loss`: one of velocity, noise, data and score.
        generator: The source of randomness, drawn for the noise and the time in this order.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> x1 = torch.tensor([[-1.0], [1.0]])  # at t = 0 both rows are equally likely: E[x1 - x0] = -x0
        >>> posterior_cfm_loss(lambda t, x, cond: -x, CondOT(), x1, time=torch.zeros(2)) < 1e-12
        tensor(True)
    """
    check_prediction(prediction)
    rows, row_cond = x1, cond
    if reference is not None:
        check_shape("reference", reference, (len(reference), *x1.shape[1:]))
        rows = torch.cat([x1, reference])
        if cond is not None or reference_cond is not None:
            row_cond = _join_conditions(cond, reference_cond, len(reference))
    if x0 is None:
        x0 = draw_noise(x1, generator)
    sample = path.sample(x0, x1, draw_times(time, x1, generator))
    shift = _posterior_mean(path, sample.t, x0, x1, rows, cond, row_cond) - x1
    value = field(sample.t, sample.x_t, cond)
    error = residual(value, prediction, sample.t, velocity=sample.velocity, noise=x0, data=x1, sigma=path.sigma)
    # each target is affine in the data, so the shift of their mean is exact
    slope = path.coefficients(sample.t, "data", "noise" if prediction == "score" else prediction)[1]
    return (error - expand_time(slope, x1) * shift).square().mean()


@torch.no_grad()
def _posterior_mean(
    path: AffinePath,
    t: Tensor,
    x0: Tensor,
    x1: Tensor,
    rows: Tensor,
    cond: Tensor | None,
    row_cond: Tensor | None,
) -> Tensor:
    r"""Return $\sum_j w_{ij} x_1^j$ for every row of `x1`.

    Relative to the row's own data, $\log (w_{ij} / w_{ii}) = -k\, x_0^i \cdot (x_1^i - x_1^j) - \frac{1}{2} k^2
    \lVert x_1^i - x_1^j \rVert^2$ with $k = \alpha_t / \sigma_t$: nothing cancels where $\sigma_t$ is small.
    """
    sigma = path.sigma(t)
    tiny = torch.finfo(sigma.dtype).tiny ** 0.5  # its square is still above zero
    k = (path.alpha(t) / sigma.clamp_min(tiny)).expand(len(x1))[:, None]
    noise, own, others = flatten_event(x0), flatten_event(x1), flatten_event(rows)
    with torch.autocast(x1.device.type, enabled=False):
        squares = torch.cdist(own, others, compute_mode="donot_use_mm_for_euclid_dist").square()
        products = (noise * own).sum(1, keepdim=True) - noise @ others.T
        logits = -k * products - k.square() * squares / 2
        if cond is not None and row_cond is not None:
            logits = logits.masked_fill((cond[:, None] != row_cond).any(-1), -torch.inf)
        return (logits.softmax(1) @ others).reshape(x1.shape)


def _join_conditions(cond: Tensor | None, reference_cond: Tensor | None, rows: int) -> Tensor:
    given = [None if c is None else tuple(c.shape) for c in (cond, reference_cond)]
    if cond is None or reference_cond is None or reference_cond.shape != (rows, *cond.shape[1:]):
        raise ValueError(
            f"reference_cond has shape {given[1]} beside cond of shape {given[0]}, "
            f"but both should be given, reference_cond with {rows} rows of the width of cond."
        )
    return torch.cat([cond, reference_cond])
