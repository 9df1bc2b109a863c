"""Probability paths between noise and data; one file per path."""

from flowmatch_core.paths._affine import AffinePath, PathSample, Quantity
from flowmatch_core.paths.cond_ot import CondOT
from flowmatch_core.paths.cosine import Cosine

__all__ = ["AffinePath", "CondOT", "Cosine", "PathSample", "Quantity"]
