"""Averages of weights: the target network of a temporal-difference loss, the network to sample from."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["polyak_update", "ramped_step"]


@torch.no_grad()
def polyak_update(target: nn.Module, network: nn.Module, step: float) -> None:
    r"""Move the parameters of a target towards those of the network (Polyak averaging), and copy the buffers.

    $$
    \bar\theta \leftarrow (1 - \tau)\,\bar\theta + \tau\,\theta
    $$

    The target starts as `copy.deepcopy(network)`. The same rule keeps an average of the weights for sampling.

    References:
        - Continuous Control with Deep Reinforcement Learning (Lillicrap et al., 2016),
          https://arxiv.org/abs/1509.02971

    Args:
        target: The target network, changed in place.
        network: The network that learns, of the same architecture.
        step: The step $\tau$, in [0, 1].

    Examples:
        >>> network, target = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> _ = torch.nn.init.ones_(network.weight), torch.nn.init.zeros_(target.weight)
        >>> polyak_update(target, network, step=0.25)
        >>> target.weight.item()
        0.25
    """
    if not 0 <= step <= 1:
        raise ValueError(f"step is {step}, but should be in [0, 1].")
    torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), step)
    for slow, fast in zip(target.buffers(), network.buffers(), strict=True):
        slow.copy_(fast)


def ramped_step(step: float, n: int, ramp: float | None) -> float:
    r"""Return the step of an average after `n` updates, larger at first, so that it forgets the initial weights.

    $$
    \tau_n = \max\Bigl(\tau,\, 1 - \frac{1 + n}{r + n}\Bigr)
    $$

    Args:
        step: The step $\tau$ that stays, in [0, 1].
        n: The number of updates before this one.
        ramp: The number $r$, at least 1; None for a constant step.

    Examples:
        >>> [round(ramped_step(0.001, n, 10), 3) for n in (0, 10, 100_000)], ramped_step(0.1, 0, None)
        ([0.9, 0.45, 0.001], 0.1)
    """
    if ramp is None:
        return step
    if not ramp >= 1:
        raise ValueError(f"ramp is {ramp}, but should be at least 1.")
    return max(step, 1 - (1 + n) / (ramp + n))
