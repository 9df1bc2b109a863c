"""Averages of weights: the target network of a temporal-difference loss, the network to sample from."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["polyak_update"]


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
