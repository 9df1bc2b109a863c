"""Forward-Backward representations: a policy for every reward, learned without one."""

from flowmatch_core.forward_backward.latents import draw_latents, reward_weights, uniform_latents
from flowmatch_core.forward_backward.losses import (
    FBLoss,
    fb_actor_loss,
    fb_loss,
    fb_orthonormality_loss,
    fb_value_loss,
)
from flowmatch_core.forward_backward.model import ForwardBackward

__all__ = [
    "FBLoss",
    "ForwardBackward",
    "draw_latents",
    "fb_actor_loss",
    "fb_loss",
    "fb_orthonormality_loss",
    "fb_value_loss",
    "reward_weights",
    "uniform_latents",
]
