"""Closed-form solutions: Gaussian mixtures along a path, successor measures, and posteriors of intentions.

They can replace a trained network: as the target of a temporal-difference loss, as the model of a sampler or a
likelihood, or as the ground truth of a metric.
"""

from flowmatch_core.oracles.gaussian_intentions import GaussianIntentions
from flowmatch_core.oracles.gaussian_mixture import GaussianMixture
from flowmatch_core.oracles.linear_gaussian import LinearGaussianMDP
from flowmatch_core.oracles.two_drifts import TwoDrifts

__all__ = ["GaussianIntentions", "GaussianMixture", "LinearGaussianMDP", "TwoDrifts"]
