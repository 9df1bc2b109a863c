"""Generative models of successor measures, learned by temporal differences: one file a loss."""

from flowmatch_core.successor.bootstrap import Loss, SuccessorLoss, logit_normal
from flowmatch_core.successor.horizon import geometric
from flowmatch_core.successor.horizon_model import GeometricHorizonModel
from flowmatch_core.successor.mc_cfm import mc_cfm_loss
from flowmatch_core.successor.td2_cfm import td2_cfm_loss
from flowmatch_core.successor.td_cfm import td_cfm_loss
from flowmatch_core.successor.td_cfm_coupled import td_cfm_coupled_loss
from flowmatch_core.successor.transitions import Transitions

__all__ = [
    "GeometricHorizonModel",
    "Loss",
    "SuccessorLoss",
    "Transitions",
    "geometric",
    "logit_normal",
    "mc_cfm_loss",
    "td2_cfm_loss",
    "td_cfm_coupled_loss",
    "td_cfm_loss",
]
