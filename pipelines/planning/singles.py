"""The best single policy of a family for a reward, by its true return."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from pipelines.environments import Array, Environment, Family

STARTS, LENGTH = 4, 200  # episodes of each policy, and their transitions
TOGETHER = 16  # policies whose episodes are drawn together


def best(
    environment: Environment,
    family: Family,
    rewards: Sequence[str],
    n: int,
    rng: np.random.Generator,
    length: int = LENGTH,
) -> dict[str, Array]:
    """Return for each reward the w, (dw,), with the greatest mean return among n of the training's law.

    The return is the sum of rewards along `STARTS` episodes of `length` transitions from the start distribution. It is
    a strong choice: a zero-shot one knows no return.
    """
    w = family.draw(n, rng)
    returns = dict[str, list[Array]]((reward, []) for reward in rewards)
    for some in np.array_split(w, -(-n // TOGETHER)):
        states = environment.acted(partial(_follow, family, some.repeat(STARTS, 0)), len(some) * STARTS, length, rng)
        found = environment.rewards(states[:, 1:].reshape(-1, states.shape[-1]))
        for reward, values in returns.items():
            values.append(found[reward].reshape(len(some), -1).sum(1))
    return {reward: w[np.concatenate(values).argmax()] for reward, values in returns.items()}


def _follow(family: Family, w: Array, state: Array) -> Array:
    return family.act(state, w)
