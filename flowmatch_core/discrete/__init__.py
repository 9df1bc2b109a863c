"""Flow matching on discrete state spaces: tokens that jump from noise to data."""

from flowmatch_core.discrete.categorical import Denoiser, Logits, Probabilities, TokenDistribution
from flowmatch_core.discrete.flow import EvidenceBound, TokenFlow, perplexity
from flowmatch_core.discrete.guidance import guided_tokens
from flowmatch_core.discrete.objectives import cross_entropy_loss, generalised_kl_loss, jump_divergence
from flowmatch_core.discrete.oracle import TokenTable
from flowmatch_core.discrete.path import MixturePath
from flowmatch_core.discrete.schedules import CosineSchedule, PolynomialSchedule, Schedule
from flowmatch_core.discrete.solver import solve_ctmc
from flowmatch_core.discrete.sources import MaskSource, Source, UniformSource

__all__ = [
    "CosineSchedule",
    "Denoiser",
    "EvidenceBound",
    "Logits",
    "MaskSource",
    "MixturePath",
    "PolynomialSchedule",
    "Probabilities",
    "Schedule",
    "Source",
    "TokenDistribution",
    "TokenFlow",
    "TokenTable",
    "UniformSource",
    "cross_entropy_loss",
    "generalised_kl_loss",
    "guided_tokens",
    "jump_divergence",
    "perplexity",
    "solve_ctmc",
]
