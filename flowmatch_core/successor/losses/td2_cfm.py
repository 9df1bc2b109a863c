r"""TD²-CFM: bootstrap from the target's flow, solved only to time t, and its velocity at the point reached.

$$
\widehat X_t = \psi_t(X_0|S',A';\bar\theta), \quad
\hat u_t = v_t(\widehat X_t|S',A';\bar\theta), \quad X_0 \sim N(0, I)
$$

References:
    - Temporal Difference Flows (Farebrother et al., 2025), equation 9, https://arxiv.org/abs/2503.09817

Examples:
    >>> import torch
    >>> from flowmatch_core.oracles import LinearGaussianMDP
    >>> from flowmatch_core.successor import Transitions
    >>> I, g = torch.eye(1), torch.Generator().manual_seed(0)
    >>> mdp = LinearGaussianMDP(A=I, B=I, c=torch.ones(1), W=I, K=-I, k=torch.zeros(1))
    >>> s = torch.zeros(64, 1)
    >>> batch = Transitions(state=s, action=None, next_state=mdp.step(s, None, generator=g), next_action=None)
    >>> oracle = mdp.velocity_field(gamma=0.9)
    >>> loss = td2_cfm_loss(oracle, oracle, batch, gamma=0.9, generator=g)
    >>> float(loss.bootstrap) < 1e-9                     # the target is exact
    True
"""

from __future__ import annotations

from torch import Tensor

from flowmatch_core.successor.losses.bootstrap import Target, two_term

__all__ = ["td2_cfm_loss"]


@two_term()
def td2_cfm_loss(target: Target, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the TD²-CFM loss of `field`, bootstrapped from `target`."""
    point = target.flow(target.noise(), t)
    return point, target.predict(t, point)
