"""A policy of a user."""

from __future__ import annotations

import numpy as np


def still(state: np.ndarray) -> np.ndarray:
    """No action at all in the maze."""
    return np.zeros((len(state), 2))


def towards(state: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Half of the way to a point w in the plane."""
    return 0.5 * (w - state)


def flat(state: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One number, where the plane needs two."""
    return np.zeros((len(state), 1))


def undefined(state: np.ndarray, w: np.ndarray) -> np.ndarray:
    """No number where w is negative."""
    return np.where(w < 0, np.nan, w)


def corners(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a corner of the square, which a law without density has."""
    return rng.choice([-1.0, 1.0], (n, 2))


def outside(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a point too far away."""
    return np.full((n, 2), 7.0)
