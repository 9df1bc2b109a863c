"""Networks that serve as velocity fields; one file per network."""

from flowmatch_core.networks._common import ACTIVATIONS, FourierTime
from flowmatch_core.networks.concat_squash import ConcatSquashField
from flowmatch_core.networks.conv_unet import ConvUNetField
from flowmatch_core.networks.film_mlp import FiLMField
from flowmatch_core.networks.mlp import MLPField
from flowmatch_core.networks.residual import ResidualField
from flowmatch_core.networks.unet_mlp import UNetMLPField

__all__ = [
    "ACTIVATIONS",
    "ConcatSquashField",
    "ConvUNetField",
    "FiLMField",
    "FourierTime",
    "MLPField",
    "ResidualField",
    "UNetMLPField",
]
