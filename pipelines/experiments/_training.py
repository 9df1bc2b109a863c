"""The loop of gradient steps that experiments share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def minimise(
    loss: Callable[[], Tensor], optimizer: Optimizer, steps: int, after: Callable[[], object] = lambda: None
) -> None:
    """Take gradient steps at a learning rate that falls to zero on a cosine.

    Args:
        loss: Loss of a new batch.
        optimizer: Optimizer of what is trained.
        steps: Number of steps.
        after: Called after every step.
    """
    from torch.optim.lr_scheduler import CosineAnnealingLR

    schedule = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        after()
