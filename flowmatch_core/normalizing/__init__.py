"""Normalizing flows of finitely many invertible layers, built on zuko; one file per architecture."""

from flowmatch_core.normalizing._base import Architecture
from flowmatch_core.normalizing.flow import DiscreteTimeFlow
from flowmatch_core.normalizing.glow import Glow
from flowmatch_core.normalizing.made import MADE
from flowmatch_core.normalizing.maf import MAF
from flowmatch_core.normalizing.naf import NAF
from flowmatch_core.normalizing.nsf import NSF
from flowmatch_core.normalizing.planar import Planar
from flowmatch_core.normalizing.real_nvp import RealNVP
from flowmatch_core.normalizing.residual import Residual

__all__ = [
    "MADE",
    "MAF",
    "NAF",
    "NSF",
    "Architecture",
    "DiscreteTimeFlow",
    "Glow",
    "Planar",
    "RealNVP",
    "Residual",
]
