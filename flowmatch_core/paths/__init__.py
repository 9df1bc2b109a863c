"""Probability paths between noise and data; one file per path."""

from flowmatch_core.paths._affine import AffinePath, PathSample, Quantity
from flowmatch_core.paths._custom import CustomPath
from flowmatch_core.paths._prediction import VelocityOf
from flowmatch_core.paths._reschedule import Rescheduled
from flowmatch_core.paths.cond_ot import CondOT
from flowmatch_core.paths.cosine import Cosine
from flowmatch_core.paths.ou import OU
from flowmatch_core.paths.polynomial import Polynomial
from flowmatch_core.paths.ve import VE
from flowmatch_core.paths.vp import VP

__all__ = [
    "OU",
    "VE",
    "VP",
    "AffinePath",
    "CondOT",
    "Cosine",
    "CustomPath",
    "PathSample",
    "Polynomial",
    "Quantity",
    "Rescheduled",
    "VelocityOf",
]
