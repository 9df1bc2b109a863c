"""Networks that serve as velocity fields; one file per network."""

from flowmatch_core.networks.concat_squash import ConcatSquashField
from flowmatch_core.networks.conv_unet import ConvUNetField, FlatUNetField
from flowmatch_core.networks.embeddings import FourierTime
from flowmatch_core.networks.encoded import EncodedField, LabelEmbedding
from flowmatch_core.networks.film_mlp import FiLMField
from flowmatch_core.networks.layers import ACTIVATIONS
from flowmatch_core.networks.mlp import MLPField
from flowmatch_core.networks.noise_prediction import NoisePrediction
from flowmatch_core.networks.preconditioned import Preconditioned
from flowmatch_core.networks.residual import ResidualField
from flowmatch_core.networks.unet_mlp import UNetMLPField

__all__ = [
    "ACTIVATIONS",
    "ConcatSquashField",
    "ConvUNetField",
    "EncodedField",
    "FiLMField",
    "FlatUNetField",
    "FourierTime",
    "LabelEmbedding",
    "MLPField",
    "NoisePrediction",
    "Preconditioned",
    "ResidualField",
    "UNetMLPField",
]
