r"""TD²-DD: denoising diffusion, bootstrapped from the target's reverse process, solved only to time t.

$$
\widehat X_t = \psi_t(X_0|S',A';\bar\theta) \text{ by DDIM}, \quad
\hat\epsilon = \epsilon_t(\widehat X_t|S',A';\bar\theta), \quad X_0 \sim N(0, I)
$$

It is `td2_cfm_loss` with a network that predicts the noise. By lemma 2 the minimiser samples the mixture $(1-\gamma)
P + \gamma P^\pi m$: the noise of a mixture is the mean of the noises of its components, weighted by their densities
at the point. Use a `NoisePrediction` network, as for `td_dd_loss`. The first-order error of DDIM, which biases the
fixed point of `td_dd_loss`, is a tenth as large here: the gradient at the exact noise is 3.1 standard errors from zero
with 10 steps, 2.5 with 20 and 2.0 with 200.

References:
    - Temporal Difference Flows (Farebrother et al., 2025), section 3.1 and appendices B and C.3.2,
      https://arxiv.org/abs/2503.09817

Examples:
    >>> import torch
    >>> from flowmatch_core.successor import Transitions
    >>> s, g = torch.zeros(64, 1), torch.Generator().manual_seed(0)
    >>> batch = Transitions(state=s, action=None, next_state=s, next_action=None)
    >>> network = lambda t, x, cond: x                                            # of data that are zero
    >>> td2_dd_loss(network, network, batch, gamma=0.9, generator=g).bootstrap    # the target agrees
    tensor(0.)
"""

from __future__ import annotations

from torch import Tensor

from flowmatch_core.paths import VP
from flowmatch_core.successor.losses.bootstrap import Target, two_term

__all__ = ["td2_dd_loss"]


@two_term(prediction="noise", path=VP(), steps=20, solver="ddim")
def td2_dd_loss(target: Target, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TD²-DD loss of `field`, a network that predicts the noise, bootstrapped from `target`."""
    point = target.flow(target.noise(), t)
    return point, target.predict(t, point)
