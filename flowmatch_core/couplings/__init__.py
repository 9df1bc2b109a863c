"""How noise is paired with data; one file per coupling."""

from flowmatch_core.couplings._base import Coupling
from flowmatch_core.couplings.independent import Independent
from flowmatch_core.couplings.minibatch_ot import MinibatchOT

__all__ = ["Coupling", "Independent", "MinibatchOT"]
