"""Objectives that train a velocity field; one file per objective."""

from flowmatch_core.objectives._regression import RegressionBatch
from flowmatch_core.objectives.bridge import BrownianBridge, sb_cfm_loss, sf2m_loss
from flowmatch_core.objectives.cfm import cfm_batch, cfm_loss
from flowmatch_core.objectives.interpolant import interpolant_loss
from flowmatch_core.objectives.likelihood import nll_loss
from flowmatch_core.objectives.posterior_cfm import posterior_cfm_loss
from flowmatch_core.objectives.snapshots import Spline, draw_snapshots, snapshot_cfm_loss

__all__ = [
    "BrownianBridge",
    "RegressionBatch",
    "Spline",
    "cfm_batch",
    "cfm_loss",
    "draw_snapshots",
    "interpolant_loss",
    "nll_loss",
    "posterior_cfm_loss",
    "sb_cfm_loss",
    "sf2m_loss",
    "snapshot_cfm_loss",
]
