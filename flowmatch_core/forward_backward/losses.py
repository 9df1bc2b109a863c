r"""Losses of Forward-Backward representations, functions of the features of a batch.

$F^z_i(s,a)$, $i = 1, \dots, k$, are the heads of the forward map and $B(s')$ is the backward map, both in $R^d$. They
factorise the density of the successor measure of the policy $\pi_z$ with respect to the law $\rho$ of the next states:

$$
M^{\pi_z}(dx|s,a) = \sum_{n\ge 1}\gamma^{n-1} P(S_n \in dx|s,a,\pi_z) \approx F^z(s,a)^\top B(x)\,\rho(dx), \qquad
Q^{\pi_z}(s,a) = F^z(s,a)^\top z_r, \quad z_r = E_\rho[r(x) B(x)]
$$

As in `successor` the first state is the NEXT one, and $M = m / (1-\gamma)$. Rows of a batch are independent, so that a
state of one row is a draw of $\rho$ for another.

References:
    - Learning One Representation to Optimize All Rewards (Touati & Ollivier, 2021), https://arxiv.org/abs/2103.07945
    - Does Zero-Shot Reinforcement Learning Exist? (Touati et al., 2023), https://arxiv.org/abs/2209.14935
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowmatch_core._tensors import check_shape
from flowmatch_core.successor.geometric import check_gamma

__all__ = ["FBLoss", "fb_actor_loss", "fb_loss", "fb_orthonormality_loss", "fb_value_loss", "pessimistic"]


class FBLoss(NamedTuple):
    """A loss and its terms, scalars with `total = off_diagonal + diagonal`."""

    total: Tensor
    off_diagonal: Tensor
    diagonal: Tensor


def fb_loss(forward: Tensor, backward: Tensor, next_forward: Tensor, next_backward: Tensor, *, gamma: float) -> FBLoss:
    r"""Return half the squared Bellman residual of the successor measure, up to a constant.

    $$
    \ell = \tfrac12 \sum_i \operatorname{mean}_{j \ne l} \big(F_i(s_j,a_j)^\top B(s'_l)
    - \gamma \bar F(s'_j,a'_j)^\top \bar B(s'_l)\big)^2 - \sum_i \operatorname{mean}_j F_i(s_j,a_j)^\top B(s'_j)
    $$

    with the mean $\bar F$ of the target's heads and $a' = \pi_z(s')$. Its expectation differs by a constant from half
    the squared norm of $F_i^\top B - (P/\rho + \gamma P^{\pi_z} \bar F^\top \bar B)$ in $L^2(\mu\otimes\rho)$, where
    $\mu$ is the law of $(s, a)$ in the data.

    Args:
        forward: The features $F_i(s,a)$, with shape `(heads, batch, d)`.
        backward: The features $B(s')$ of the next states, with shape `(batch, d)`.
        next_forward: The target's $\bar F_i(s',a')$, with shape `(heads, batch, d)`; no gradient reaches it.
        next_backward: The target's $\bar B(s')$, with shape `(batch, d)`; no gradient reaches it.
        gamma: The discount, in [0, 1).

    Examples:
        >>> F, B = torch.ones(1, 3, 1), torch.ones(3, 1)
        >>> fb_loss(F, B, F, B, gamma=0.5)                   # (1 - 0.5)² / 2 - 1
        FBLoss(total=tensor(-0.8750), off_diagonal=tensor(0.1250), diagonal=tensor(-1.))
    """
    check_gamma(gamma)
    _check_features(forward, backward)
    check_shape("next_forward", next_forward, tuple(forward.shape))
    check_shape("next_backward", next_backward, tuple(backward.shape))
    measure = forward @ backward.T
    with torch.no_grad():
        later = next_forward.mean(0) @ next_backward.T
    off_diagonal = _mean_off_diagonal((measure - gamma * later).square()).sum() / 2
    diagonal = -measure.diagonal(dim1=1, dim2=2).mean(1).sum()
    return FBLoss(off_diagonal + diagonal, off_diagonal, diagonal)


def fb_orthonormality_loss(backward: Tensor) -> Tensor:
    r"""Return the squared distance of $E[B B^\top]$ from the identity, less its constant $d$.

    $$
    \ell = \operatorname{mean}_{j \ne l} (B_j^\top B_l)^2 - 2 \operatorname{mean}_j |B_j|^2, \qquad
    E\,\ell = \|E[B B^\top] - I\|_F^2 - d
    $$

    It fixes the scale that the product $F^\top B$ leaves free.

    Args:
        backward: The features $B$ of independent states, with shape `(batch, d)`.

    Examples:
        >>> fb_orthonormality_loss(torch.ones(3, 1))          # E[B B] = 1
        tensor(-1.)
    """
    if backward.ndim != 2:
        raise ValueError(f"backward has shape {tuple(backward.shape)}, but should have shape (batch, d).")
    return _mean_off_diagonal((backward @ backward.T).square()) - 2 * backward.square().sum(1).mean()


def fb_value_loss(forward: Tensor, backward: Tensor, next_forward: Tensor, z: Tensor, *, gamma: float) -> Tensor:
    r"""Return half the squared Bellman residual of the values $F^\top z$, an optional addition to `fb_loss`.

    $$
    \ell = \tfrac12 \sum_i \operatorname{mean}\big(F_i(s,a)^\top z - B(s')^\top \Sigma^{-1} z
    - \gamma \bar F(s',a')^\top z\big)^2, \qquad \Sigma = \operatorname{mean} B B^\top
    $$

    The reward of $z$ is $B^\top \Sigma^{-1} z$, which the features represent: $E[B B^\top \Sigma^{-1} z] = z$. The loss
    weighs errors of $F$ in the direction of $z$, which are small in `fb_loss`.

    Args:
        forward: The features $F_i(s,a)$, with shape `(heads, batch, d)`.
        backward: The features $B(s')$ of the next states, `(batch, d)`, whose $\Sigma$ should be invertible; no
            gradient reaches it.
        next_forward: The target's $\bar F_i(s',a')$, with shape `(heads, batch, d)`; no gradient reaches it.
        z: The parameters of the policies, with shape `(batch, d)`.
        gamma: The discount, in [0, 1).

    Examples:
        >>> F, B = 2 * torch.ones(1, 3, 1), torch.ones(3, 1)
        >>> fb_value_loss(F, B, F, B, gamma=0.5)             # 2 = 1 + 0.5 · 2
        tensor(0.)
    """
    check_gamma(gamma)
    _check_features(forward, backward)
    check_shape("next_forward", next_forward, tuple(forward.shape))
    check_shape("z", z, tuple(backward.shape))
    with torch.no_grad():
        reward = (torch.linalg.solve(backward.T @ backward / len(backward), backward.T).T * z).sum(1)
        target = reward + gamma * (next_forward.mean(0) * z).sum(1)
    loss: Tensor = ((forward * z).sum(2) - target).square().mean(1).sum() / 2
    return loss


def fb_actor_loss(forward: Tensor, z: Tensor, *, pessimism: float = 0.5) -> Tensor:
    r"""Return the negative value of the actor's actions, in units of its size.

    $$
    \ell = -\frac{\operatorname{mean} Q}{\operatorname{mean} |Q|}, \qquad
    Q = (1-\kappa) \operatorname{mean}_i F_i(s,\pi_z(s))^\top z + \kappa \min_i F_i(s,\pi_z(s))^\top z
    $$

    The denominator has no gradient. Only the parameters of the actor should be stepped by this loss.

    Args:
        forward: The features at the actor's actions, with shape `(heads, batch, d)`.
        z: The parameters of the policies, with shape `(batch, d)`.
        pessimism: The share $\kappa$ of the least of the heads, in [0, 1].

    Examples:
        >>> fb_actor_loss(torch.tensor([[[1.0]], [[3.0]]]), torch.ones(1, 1))
        tensor(-1.)
    """
    _check_features(forward, z, "z")
    value = pessimistic((forward * z).sum(2), pessimism)
    return -value.mean() / value.detach().abs().mean().clamp_min(torch.finfo(value.dtype).tiny)


def pessimistic(values: Tensor, pessimism: float) -> Tensor:
    r"""Return $(1-\kappa)$ times the mean plus $\kappa$ times the least over the first dimension.

    Examples:
        >>> pessimistic(torch.tensor([1.0, 3.0]), 0.5)
        tensor(1.5000)
    """
    if not 0 <= pessimism <= 1:
        raise ValueError(f"pessimism is {pessimism}, but should be in [0, 1].")
    return (1 - pessimism) * values.mean(0) + pessimism * values.amin(0)


def _mean_off_diagonal(values: Tensor) -> Tensor:
    """Return the mean over the entries off the diagonal of matrices `(..., n, n)`, with shape `(...)`."""
    n = values.shape[-1]
    if n < 2:
        raise ValueError(f"the batch has {n} rows, but should have at least 2: pairs of rows are what is compared.")
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    return (values.sum((-2, -1)) - diagonal.sum(-1)) / (n * (n - 1))


def _check_features(forward: Tensor, other: Tensor, name: str = "backward") -> None:
    """Raise a `ValueError` unless the features are those of one batch."""
    if forward.ndim != 3:
        raise ValueError(f"forward has shape {tuple(forward.shape)}, but should have shape (heads, batch, d).")
    check_shape(name, other, tuple(forward.shape[1:]))
