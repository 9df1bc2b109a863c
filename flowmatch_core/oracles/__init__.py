"""Closed-form solutions: Gaussian mixtures along a path, and successor measures of linear-Gaussian processes.

They can replace a trained network: as the target of a temporal-difference loss, as the model of a sampler or a
likelihood, or as the ground truth of a metric.
"""

from flowmatch_core.oracles.gaussian_mixture import GaussianMixture
from flowmatch_core.oracles.linear_gaussian import LinearGaussianMDP

__all__ = ["GaussianMixture", "LinearGaussianMDP"]
