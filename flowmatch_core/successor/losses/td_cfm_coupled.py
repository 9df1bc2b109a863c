r"""TD-CFM(C): bootstrap from a sample of the target's model, paired with the noise that it was generated from.

$$
X_1 = \psi_1(X_0|S',A';\bar\theta), \quad
\widehat X_t = \alpha_t X_1 + \sigma_t X_0, \quad \hat u_t = \dot\alpha_t X_1 + \dot\sigma_t X_0, \quad
X_0 \sim N(0, I)
$$

Its fixed point agrees with that of the other methods only at t=1: the samples are correct, but the velocity differs.

References:
    - Temporal Difference Flows (Farebrother et al., 2025), equation 8, https://arxiv.org/abs/2503.09817

Examples:
    >>> import torch
    >>> from flowmatch_core.oracles import LinearGaussianMDP
    >>> from flowmatch_core.successor import Transitions
    >>> I, g = torch.eye(1), torch.Generator().manual_seed(0)
    >>> mdp = LinearGaussianMDP(A=I, B=I, c=torch.ones(1), W=I, K=-I, k=torch.zeros(1))
    >>> s = torch.zeros(64, 1)
    >>> batch = Transitions(state=s, action=None, next_state=mdp.step(s, None, generator=g), next_action=None)
    >>> oracle = mdp.velocity_field(gamma=0.9)
    >>> loss = td_cfm_coupled_loss(oracle, oracle, batch, gamma=0.9, generator=g)
    >>> bool(loss.total.isclose(0.1 * loss.direct + 0.9 * loss.bootstrap))
    True
"""

from __future__ import annotations

from torch import Tensor

from flowmatch_core.successor.losses.bootstrap import Target, two_term

__all__ = ["td_cfm_coupled_loss"]


@two_term()
def td_cfm_coupled_loss(target: Target, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TD-CFM(C) loss of `field`, bootstrapped from `target`."""
    x0 = target.noise()
    return target.interpolate(x0, target.flow(x0, 1.0), t)
