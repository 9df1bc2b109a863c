"""Generative models of successor measures, learned by temporal differences."""

from flowmatch_core.networks.noise_prediction import NoisePrediction
from flowmatch_core.successor.diagnostics import path_error
from flowmatch_core.successor.ensemble_model import EnsembleHorizonModel
from flowmatch_core.successor.geometric import geometric
from flowmatch_core.successor.horizon_model import GeometricHorizonModel, HorizonModel
from flowmatch_core.successor.latent_model import LatentHorizonModel
from flowmatch_core.successor.losses import (
    GaussianEnsemble,
    HorizonGAN,
    HorizonVAE,
    Loss,
    SuccessorLoss,
    ensemble_loss,
    gan_loss,
    mc_cfm_loss,
    td2_cfm_loss,
    td2_dd_loss,
    td_cfm_coupled_loss,
    td_cfm_loss,
    td_dd_loss,
    vae_loss,
)
from flowmatch_core.successor.networks import LatentNetwork
from flowmatch_core.successor.particles import Particles
from flowmatch_core.successor.planning import Plan, gpi
from flowmatch_core.successor.transitions import Transitions, n_step

__all__ = [
    "EnsembleHorizonModel",
    "GaussianEnsemble",
    "GeometricHorizonModel",
    "HorizonGAN",
    "HorizonModel",
    "HorizonVAE",
    "LatentHorizonModel",
    "LatentNetwork",
    "Loss",
    "NoisePrediction",
    "Particles",
    "Plan",
    "SuccessorLoss",
    "Transitions",
    "ensemble_loss",
    "gan_loss",
    "geometric",
    "gpi",
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
