"""Losses of successor-measure models: one file a method."""

from flowmatch_core.successor.losses.bootstrap import Loss, SuccessorLoss
from flowmatch_core.successor.losses.ensemble import GaussianEnsemble, ensemble_loss
from flowmatch_core.successor.losses.gan import HorizonGAN, gan_loss
from flowmatch_core.successor.losses.intention import (
    IntentionDecoder,
    IntentionEncoder,
    IntentionLoss,
    intention_loss,
)
from flowmatch_core.successor.losses.mc_cfm import mc_cfm_loss
from flowmatch_core.successor.losses.td2_cfm import td2_cfm_loss
from flowmatch_core.successor.losses.td2_dd import td2_dd_loss
from flowmatch_core.successor.losses.td_cfm import td_cfm_loss
from flowmatch_core.successor.losses.td_cfm_coupled import td_cfm_coupled_loss
from flowmatch_core.successor.losses.td_dd import td_dd_loss
from flowmatch_core.successor.losses.vae import HorizonVAE, vae_loss

__all__ = [
    "GaussianEnsemble",
    "HorizonGAN",
    "HorizonVAE",
    "IntentionDecoder",
    "IntentionEncoder",
    "IntentionLoss",
    "Loss",
    "SuccessorLoss",
    "ensemble_loss",
    "gan_loss",
    "intention_loss",
    "mc_cfm_loss",
    "td2_cfm_loss",
    "td2_dd_loss",
    "td_cfm_coupled_loss",
    "td_cfm_loss",
    "td_dd_loss",
    "vae_loss",
]
