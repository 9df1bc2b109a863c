"""The best single policy of a family for a reward, by its true return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.environments import Array, Family, Simulator

STARTS, LENGTH = 4, 200  # start states of each policy, and transitions of an episode


def best(
    simulator: Simulator,
    family: Family,
    rewards: Sequence[str],
    n: int,
    rng: np.random.Generator,
    length: int = LENGTH,
) -> dict[str, Array]:
    """Return for each reward the w, (dw,), with the greatest mean return among n of the training's law.

    The return is the sum of rewards along episodes of `length` transitions from `STARTS` start states, the same for
    all policies. It is a strong choice: a zero-shot one knows no return.
    """
    w, starts = family.draw(n, rng), simulator.starts(rng, STARTS)
    each = w.repeat(STARTS, 0)
    states, _ = simulator.roll(np.tile(starts, (n, 1)), length, lambda state: family.act(state, each), rng)
    found = simulator.rewards(states[:, 1:].reshape(-1, states.shape[-1]))
    return {reward: w[found[reward].reshape(n, -1).sum(1).argmax()] for reward in rewards}
