r"""MC-CFM: regress on samples of the successor measure from on-policy futures, without a bootstrap.

$$
X_1 = S_T, \; T \sim \mathrm{Geometric}(1-\gamma) \text{ on } 1, 2, \dots, \quad
\ell(\theta) = E\,\|v_t(X_t|S,A;\theta) - (\dot\alpha_t X_1 + \dot\sigma_t X_0)\|^2
$$

References:
    - Temporal Difference Flows (Farebrother et al., 2025), equation 6, https://arxiv.org/abs/2503.09817
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._tensors import check_floating, noise_like, time_like, weighted_mean
from flowmatch_core.field import TimeSampler, VelocityField
from flowmatch_core.paths import AffinePath, CondOT
from flowmatch_core.successor.losses.bootstrap import Loss, check_path, squared_error
from flowmatch_core.successor.transitions import Transitions

__all__ = ["mc_cfm_loss"]


def mc_cfm_loss(
    field: VelocityField,
    batch: Transitions,
    future: Tensor,
    *,
    path: AffinePath = CondOT(),
    time: TimeSampler = torch.rand,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Loss:
    """Return the MC-CFM loss of `field`; `future` holds a state S_T of the policy for every row, `(batch, d)`.

    `future` decides the discount: draw it with that of the row, `geometric(gamma, (batch,))` steps ahead, for a field
    that has the discount in its condition. Only state and action of the batch are used. The bootstrap term is 0, so
    `total` equals `direct`. `weight`, with shape `(batch,)`, multiplies the error of each row before the average over
    the batch.

    Examples:
        >>> s = torch.zeros(64, 2)
        >>> batch = Transitions(state=s, action=None, next_state=s, next_action=None)
        >>> loss = mc_cfm_loss(lambda t, x, cond: -x, batch, future=s, generator=torch.Generator().manual_seed(0))
        >>> bool(loss.total == loss.direct), float(loss.bootstrap)
        (True, 0.0)
    """
    if future.shape != batch.state.shape:
        raise ValueError(
            f"future had shape {tuple(future.shape)}, but should have state's shape {tuple(batch.state.shape)}."
        )
    check_path(path)
    check_floating("future", future)
    t = time_like(future, time, generator)
    sample = path.sample(noise_like(future, generator), future, t)
    direct = weighted_mean(squared_error(call_field(field, t, sample.x_t, batch.condition), sample.velocity), weight)
    return Loss(direct, direct, torch.zeros_like(direct))
