"""Objectives that train a denoiser of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._call import check_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_numbered, weighted_mean
from flowmatch_core.discrete.categorical import Denoiser, TokenDistribution, check_prediction
from flowmatch_core.discrete.path import MixturePath
from flowmatch_core.discrete.schedules import token_time
from flowmatch_core.discrete.sources import check_tokens
from flowmatch_core.field import Time, TimeSampler

__all__ = ["cross_entropy_loss", "generalised_kl_loss", "jump_divergence"]


def generalised_kl_loss(
    denoiser: Denoiser,
    path: MixturePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    time: Time | TimeSampler = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the generalised Kullback-Leibler loss between jump rates, averaged over positions and batch.

    $$
    E_{t, x_t} \sum_i \sum_{y \neq x_t^i} \left( u \log \frac{u}{v} - u + v \right) / d,
    \quad u = u_t^i(y, x_t \mid x_1), \quad v = u_t^i(y, x_t)
    $$

    Times uniform on [0, 1], the default, make it the negative of the evidence lower bound per position
    (see `TokenFlow.elbo`), and for any times its minimum is at the true posterior. The rate $\lambda_t$ gives a few
    late times a large weight; `cross_entropy_loss` has the same minimiser without it.

    References:
        - Flow Matching with General Discrete Paths (Shaul et al., 2024), https://arxiv.org/abs/2412.03487

    Args:
        denoiser: The estimate of $p_{1|t}$.
        path: The path.
        x1: The data, tokens with shape `(batch, *event)`.
        x0: The states at `t = 0`, with the same shape; drawn from the source of the path by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default: the loss of a row is multiplied
            by its weight before the average over the batch.
        generator: The source of randomness, drawn for the source, the time and the path in this order.

    Examples:
        >>> from flowmatch_core.discrete import Logits, MaskSource
        >>> path, x1 = MixturePath(MaskSource(2)), torch.ones(8, 3, dtype=torch.long)
        >>> sure = lambda t, x, cond: Logits(torch.tensor([-100.0, 100.0]).expand(*x.shape, 2))
        >>> generalised_kl_loss(sure, path, x1)
        tensor(0.)
    """
    prediction, x_t, t = _predict(denoiser, path, x1, x0, cond, time, generator)
    return weighted_mean(path.rate(token_time(t, x1)) * jump_divergence(prediction, path, x_t, x1), weight)


def cross_entropy_loss(
    denoiser: Denoiser,
    path: MixturePath,
    x1: Tensor,
    x0: Tensor | None = None,
    cond: Condition = None,
    *,
    time: Time | TimeSampler = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return the denoising cross-entropy $-E \log p_{1|t}(x_1^i \mid x_t)$, averaged over positions and batch.

    Positions that are certainly data, that is not masked, count as zero.

    References:
        - Discrete Flow Matching (Gat et al., 2024), https://arxiv.org/abs/2407.15595

    Args:
        denoiser: The estimate of $p_{1|t}$.
        path: The path.
        x1: The data, tokens with shape `(batch, *event)`.
        x0: The states at `t = 0`, with the same shape; drawn from the source of the path by default.
        cond: The conditions, a tensor whose first dimension is the batch or a mapping of such tensors.
        time: The times, with shape `(batch,)`, or a sampler with the call of `torch.rand`, the default.
        weight: The weights of the rows of `x1`, with shape `(batch,)`, ones by default: the loss of a row is multiplied
            by its weight before the average over the batch.
        generator: The source of randomness, drawn for the source, the time and the path in this order.

    Examples:
        >>> from flowmatch_core.discrete import Logits, UniformSource
        >>> path, x1 = MixturePath(UniformSource(4)), torch.ones(8, 3, dtype=torch.long)
        >>> cross_entropy_loss(lambda t, x, cond: Logits(torch.zeros(*x.shape, 4)), path, x1)  # log 4
        tensor(1.3863)
    """
    prediction, x_t, _ = _predict(denoiser, path, x1, x0, cond, time, generator)
    return weighted_mean(-prediction.log_prob(x1).masked_fill(path.source.is_data(x_t), 0.0), weight)


def jump_divergence(prediction: TokenDistribution, path: MixturePath, x_t: Tensor, x1: Tensor) -> Tensor:
    r"""Return the divergence of the jump rates at each position, divided by the rate $\lambda_t$.

    With the estimate $p$ it is $-\log p(x_1^i) - p(x_t^i)$ where $x_t^i \neq x_1^i$, and
    $1 - p(x_t^i)$ where they are equal; zero at a position that is certainly data.

    Args:
        prediction: The result of a denoiser at `x_t`.
        path: The path.
        x_t: The states, with shape `(batch, *event)`.
        x1: The data, with the same shape.

    Examples:
        >>> from flowmatch_core.discrete import Probabilities, UniformSource
        >>> half = Probabilities(torch.tensor([[0.5, 0.5]]))
        >>> jump_divergence(half, MixturePath(UniformSource(2)), torch.tensor([0]), torch.tensor([0]))
        tensor([0.5000])
    """
    at_data = prediction.log_prob(x1)
    at_state = prediction.log_prob(x_t)
    divergence = torch.where(x_t == x1, -torch.expm1(at_state), -at_data - at_state.exp())
    return divergence.masked_fill(path.source.is_data(x_t), 0.0)


def _predict(
    denoiser: Denoiser,
    path: MixturePath,
    x1: Tensor,
    x0: Tensor | None,
    cond: Condition,
    time: Time | TimeSampler,
    generator: torch.Generator | None,
) -> tuple[TokenDistribution, Tensor, Time]:
    check_field(denoiser, "denoiser")
    check_tokens("x1", x1, path.source)
    if x0 is None:
        x0 = path.source.sample(x1.shape, generator, x1.device)
    else:
        check_numbered("x0", x0, path.source.states, ", the states of the source")
    t = (
        time(len(x1), generator=generator, device=x1.device)
        if callable(time) and not isinstance(time, Tensor)
        else time
    )
    x_t = path.sample(x0, x1, t, generator)
    prediction = denoiser(t, x_t, cond)
    check_prediction(prediction, x1, path.source.vocabulary)
    return prediction, x_t, t
