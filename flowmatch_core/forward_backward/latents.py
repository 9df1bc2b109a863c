"""The parameters z of the policies of Forward-Backward representations: their law in training, that of a reward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_core._tensors import check_finite, check_shape

__all__ = ["draw_latents", "on_sphere", "reward_weights", "uniform_latents"]


def on_sphere(z: Tensor) -> Tensor:
    r"""Return $\sqrt d\, z / |z|$, on the sphere of radius $\sqrt d$, with the shape `(..., d)` of `z`.

    Examples:
        >>> on_sphere(torch.tensor([0.0, 0.1, 0.0, 0.0]))
        tensor([0., 2., 0., 0.])
    """
    return math.sqrt(z.shape[-1]) * F.normalize(z, dim=-1)


def uniform_latents(
    n: int,
    d: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw z uniformly on the sphere of radius $\sqrt d$, where $E[z] = 0$ and $E[z z^\top] = I$.

    Args:
        n: The number of draws.
        d: The number of dimensions.
        generator: The source of randomness.
        dtype: The dtype of the result.
        device: The device of the result.

    Returns:
        The draws, with shape `(n, d)`.

    Examples:
        >>> uniform_latents(1000, 4, generator=torch.Generator().manual_seed(0)).norm(dim=1).mean()
        tensor(2.)
    """
    return on_sphere(torch.randn(n, d, generator=generator, dtype=dtype, device=device))


def draw_latents(backward: Tensor, *, share: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw a policy for every row: that of a goal among the states of the batch, or a uniform one.

    With the chance `share` it is $z = \sqrt d\, B(s') / |B(s')|$ of a row drawn at random, the policy that goes to
    $s'$; else a draw of `uniform_latents`.

    References:
        - Does Zero-Shot Reinforcement Learning Exist? (Touati et al., 2023), appendix,
          https://arxiv.org/abs/2209.14935

    Args:
        backward: The features $B(s')$ of a batch, with shape `(batch, d)`.
        share: The share of goals, in [0, 1].
        generator: The source of randomness.

    Returns:
        The parameters, on the sphere of radius $\sqrt d$, with shape `(batch, d)`, without gradient.

    Examples:
        >>> draw_latents(torch.tensor([[0.5, 0.0]]), share=1.0)
        tensor([[1.4142, 0.0000]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, but should be in [0, 1].")
    n, d = backward.shape
    dtype, device = backward.dtype, backward.device
    goals = on_sphere(backward.detach()[torch.randint(n, (n,), generator=generator, device=device)])
    uniform = uniform_latents(n, d, generator=generator, dtype=dtype, device=device)
    return torch.where(torch.rand(n, 1, generator=generator, device=device) < share, goals, uniform)


def reward_weights(reward: Tensor, backward: Tensor) -> Tensor:
    r"""Return the parameters of the policy for a reward.

    $$
    z_r = \sqrt d\, \frac{E_\rho[r(s') B(s')]}{|E_\rho[r(s') B(s')]|}
    $$

    No training is needed for a new reward. The values $F^\top z_r$ have the scale of $r$ before $z_r$ is normalised;
    the actions of greatest value are the same.

    Args:
        reward: The rewards $r(s')$ of states drawn from $\rho$, with shape `(n,)` or `(tasks, n)`.
        backward: Their features $B(s')$, with shape `(n, d)`.

    Returns:
        The parameters, with shape `(d,)` or `(tasks, d)`.

    Raises:
        ValueError: A reward is not finite, or has no correlation with the features, as where it is 0 everywhere.

    Examples:
        >>> reward_weights(torch.tensor([1.0, 0.0]), torch.eye(2))
        tensor([1.4142, 0.0000])
    """
    check_shape("reward", reward, (*reward.shape[:-1], len(backward)))
    check_finite("reward", reward)
    weights = reward @ backward / len(backward)
    if not weights.any(-1).all():
        raise ValueError("reward has the mean 0 with every feature, as a reward of 0 has, but should have another.")
    return on_sphere(weights)
