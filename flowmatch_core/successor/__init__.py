"""Generative models of successor measures, learned by temporal differences: one file a loss."""

from flowmatch_core.successor.bootstrap import Loss, SuccessorLoss, logit_normal
from flowmatch_core.successor.gan import HorizonGAN, gan_loss
from flowmatch_core.successor.horizon import geometric
from flowmatch_core.successor.horizon_model import GeometricHorizonModel, HorizonModel
from flowmatch_core.successor.latent import LatentHorizonModel, LatentNetwork
from flowmatch_core.successor.mc_cfm import mc_cfm_loss
from flowmatch_core.successor.noise import NoisePrediction
from flowmatch_core.successor.particles import Particles
from flowmatch_core.successor.path_error import path_error
from flowmatch_core.successor.td2_cfm import td2_cfm_loss
from flowmatch_core.successor.td2_dd import td2_dd_loss
from flowmatch_core.successor.td_cfm import td_cfm_loss
from flowmatch_core.successor.td_cfm_coupled import td_cfm_coupled_loss
from flowmatch_core.successor.td_dd import td_dd_loss
from flowmatch_core.successor.transitions import Transitions, n_step
from flowmatch_core.successor.vae import HorizonVAE, vae_loss

__all__ = [
    "GeometricHorizonModel",
    "HorizonGAN",
    "HorizonModel",
    "HorizonVAE",
    "LatentHorizonModel",
    "LatentNetwork",
    "Loss",
    "NoisePrediction",
    "Particles",
    "SuccessorLoss",
    "Transitions",
    "gan_loss",
    "geometric",
    "logit_normal",
    "mc_cfm_loss",
    "n_step",
    "path_error",
    "td2_cfm_loss",
    "td2_dd_loss",
    "td_cfm_coupled_loss",
    "td_cfm_loss",
    "td_dd_loss",
    "vae_loss",
]
