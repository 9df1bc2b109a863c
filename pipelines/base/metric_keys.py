"""Names of table columns and metrics."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

REFERENCE = "one Gaussian"
"""Key, among the methods of a data set, of the Gaussian with the moments of the training rows."""

_SEED = "_seed"


def columns(part: str, names: Iterable[str]) -> list[str]:
    """Return the columns of a vector in a table, from the names of its components.

    >>> columns("state", ["x", "y"])
    ['state_x', 'state_y']
    """
    return [f"{part}_{name}" for name in names]


def free(name: str, taken: Collection[str]) -> str:
    """Return a name for an internal column that none of a user's columns has.

    >>> free("seed", ["x", "seed"])
    'seed_'
    """
    while name in taken:
        name += "_"
    return name


def seed_key(name: str, seed: int) -> str:
    """Return the key of one seed's value of a metric; the key without the seed holds the mean over seeds.

    >>> seed_key("emd", 3)
    'emd_seed3'
    """
    return f"{name}{_SEED}{seed}"


def by_seed(cell: Mapping[str, Any], name: str) -> dict[int, float]:
    """Return the values of a metric by seed, without missing values.

    >>> by_seed({"emd": 0.2, "emd_seed3": 0.1, "emd_seed5": 0.3, "emd_low": 0.0, "nll_seed3": None}, "emd")
    {3: 0.1, 5: 0.3}
    """
    prefix = f"{name}{_SEED}"
    numbers = {key.removeprefix(prefix): value for key, value in cell.items() if key.startswith(prefix)}
    return {int(seed): value for seed, value in numbers.items() if value is not None}
