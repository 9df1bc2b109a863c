"""Couplings of noise and data; one file per coupling."""

from flowmatch_core.couplings._base import Coupling, IndexCoupling
from flowmatch_core.couplings.conditional_ot import ConditionalOT
from flowmatch_core.couplings.independent import Independent
from flowmatch_core.couplings.minibatch_ot import MinibatchOT
from flowmatch_core.couplings.reflow import Reflow
from flowmatch_core.couplings.schrodinger_bridge import SchrodingerBridge
from flowmatch_core.couplings.sinkhorn import Sinkhorn

__all__ = [
    "ConditionalOT",
    "Coupling",
    "Independent",
    "IndexCoupling",
    "MinibatchOT",
    "Reflow",
    "SchrodingerBridge",
    "Sinkhorn",
]
