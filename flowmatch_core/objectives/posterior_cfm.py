"""Flow matching on the posterior mean of the velocity: the same expected gradient with less variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flowmatch_core._conditions import Condition, map_condition
from flowmatch_core._tensors import check_object, check_shape, expand_time, flatten_event, noise_like
from flowmatch_core.field import VelocityField
from flowmatch_core.objectives._regression import RegressionBatch, Times, check_batch, check_prediction, draw_times
from flowmatch_core.paths import AffinePath, Quantity

__all__ = ["posterior_cfm_loss"]


def posterior_cfm_loss(
    field: VelocityField,
    path: AffinePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    reference: Tensor | None = None,
    reference_cond: Condition = None,
    reference_weight: Tensor | None = None,
    time: Times = torch.rand,
    prediction: Quantity = "velocity",
    weight: Tensor | None = None,
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

    With weights $\omega_j$ of the rows, which stand for draws of another law, the average is over $w_{ij} \omega_j$
    and the error of row `i` is multiplied by $\sum_j w_{ij} \omega_j$: the gradient is that of the weighted
    `cfm_loss` in expectation, and linear in the weights.

    References:
        - Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023),
          https://arxiv.org/abs/2302.00670

    Args:
        field: The network $f_\theta$.
        path: The path.
        x1: The data, with shape `(batch, *event)`.
        x0: The noise, with the shape of `x1`, normal and independent of it; drawn by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        reference: More data, independent of the rows of `x1`, with shape `(rows, *event)`.
        reference_cond: The conditions of the reference, like those of `x1`.
        reference_weight: The weights of the reference, with shape `(rows,)`.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        prediction: What the network predicts, as in `cfm_loss`: one of velocity, noise, data and score.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default.
        generator: The source of randomness, drawn for the noise and the time in this order.

    Examples:
        >>> from flowmatch_core.paths import CondOT
        >>> x1 = torch.tensor([[-1.0], [1.0]])  # at t = 0 both rows are equally likely: E[x1 - x0] = -x0
        >>> posterior_cfm_loss(lambda t, x, cond: -x, CondOT(), x1, time=torch.zeros(2)) < 1e-12
        tensor(True)
    """
    check_prediction(prediction)
    check_object("path", path)
    check_batch(x1, cond)
    rows, row_cond, row_weight = x1, cond, weight
    if reference is not None:
        check_shape("reference", reference, (len(reference), *x1.shape[1:]))
        rows = torch.cat([x1, reference])
        row_cond = _joined("cond", cond, reference_cond, len(reference))
        row_weight = _joined("weight", weight, reference_weight, len(reference))
    if weight is not None:
        check_shape("weight", weight, x1.shape[:1])
    if x0 is None:
        x0 = noise_like(x1, generator)
    batch = RegressionBatch.along(path, prediction, x0, x1, draw_times(time, x1, generator), cond, None)
    mean, total = _posterior_mean(path, batch.t, x0, x1, rows, row_cond, row_weight)
    # each target is affine in the data, so the shift of their mean is exact
    slope = path.coefficients(batch.t, "data", "noise" if prediction == "score" else prediction)[1]
    target = batch.target + expand_time(slope, x1) * (mean - x1)
    return replace(batch, target=target, weight=total).loss(field)


@torch.no_grad()
def _posterior_mean(
    path: AffinePath,
    t: Tensor,
    x0: Tensor,
    x1: Tensor,
    rows: Tensor,
    row_cond: Condition,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    r"""Return $\sum_j w_{ij} \omega_j x_1^j / W_i$ and $W_i = \sum_j w_{ij} \omega_j$, None without weights.

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

        def exclude(part: Tensor) -> Tensor:
            label = torch.unique(flatten_event(part), dim=0, return_inverse=True)[1]
            return logits.masked_fill_(label[: len(x1), None] != label, -torch.inf)

        map_condition(exclude, row_cond)
        posterior = logits.softmax(1)
        total = None
        if row_weight is not None:
            posterior = posterior * row_weight.to(posterior.dtype)
            total = posterior.sum(1)
            # a sum of zero: the error of the row does not count
            posterior = posterior / torch.where(total == 0, 1.0, total)[:, None]
        return (posterior @ others).reshape(x1.shape), total


def _joined(name: str, own: Condition, more: Condition, rows: int) -> Condition:
    """Return the conditions or weights of `x1` and of the reference as one."""
    if own is None and more is None:
        return None
    a, b = (dict(part) if isinstance(part, Mapping) else {"": part} for part in (own, more))
    shapes = [{key: None if part is None else tuple(part.shape) for key, part in parts.items()} for parts in (a, b)]
    if shapes[1] != {key: None if shape is None else (rows, *shape[1:]) for key, shape in shapes[0].items()}:
        given = [shape.get("", shape) for shape in shapes]
        raise ValueError(
            f"reference_{name} has shape {given[1]} beside {name} of shape {given[0]}, but both should be given, "
            f"reference_{name} with {rows} rows like those of {name}."
        )
    joined = {key: torch.cat([a[key], b[key]]) for key in a}
    return joined if isinstance(own, Mapping) else joined[""]
