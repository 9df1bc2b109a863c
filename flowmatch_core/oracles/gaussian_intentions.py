"""Linear-Gaussian policies with a Gaussian intention: its posterior given an action, and what an action tells of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from flowmatch_core._tensors import check_finite
from flowmatch_core.oracles._batches import check_covariance

__all__ = ["GaussianIntentions"]


@dataclass(frozen=True, eq=False)
class GaussianIntentions:
    r"""Actions that depend linearly on the state and on a Gaussian intention.

    $$
    a = K s + C z + e, \quad z \sim N(0, I), \quad e \sim N(0, \Pi)
    $$

    The posterior of the intention and the information that an action has about it, in nats, are

    $$
    z|s,a \sim N(\Lambda^{-1} C^\top \Pi^{-1} (a - K s), \Lambda^{-1}), \quad \Lambda = I + C^\top \Pi^{-1} C,
    \qquad I(z; a|s) = \tfrac12 \log\det(I + C C^\top \Pi^{-1})
    $$

    It is the truth for an encoder q(z|s,a). Given z, the policy is that of a `LinearGaussianMDP` with $k = C z$.

    Args:
        K: The matrix of the state, with shape `(p, d)`.
        C: The matrix of the intention, with shape `(p, m)`.
        Pi: The covariance of the noise, positive definite, with shape `(p, p)`.

    Examples:
        >>> I = torch.eye(1)
        >>> policy = GaussianIntentions(K=0 * I, C=I, Pi=I)
        >>> policy.posterior(torch.zeros(1, 1), torch.ones(1, 1))
        (tensor([[0.5000]]), tensor([[0.5000]]))
        >>> policy.information()                                                # log(2) / 2
        tensor(0.3466)
    """

    K: Tensor
    C: Tensor
    Pi: Tensor

    def __post_init__(self) -> None:
        p, d, m = len(self.Pi), self.K.shape[-1], self.C.shape[-1]
        for name, shape in (("K", (p, d)), ("C", (p, m)), ("Pi", (p, p))):
            if getattr(self, name).shape != shape:
                found = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} had shape {found}, but with {p} actions it should be {shape}.")
            check_finite(name, getattr(self, name))
        variances = torch.linalg.eigvalsh(self.Pi)
        check_covariance("Pi", self.Pi, variances)
        if not float(variances.min()) > 0:
            raise ValueError(f"Pi has the eigenvalue {float(variances.min()):.4g}, but should be positive definite.")

    def act(self, state: Tensor, intention: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw an action for every row, `(*rows, p)`, from states `(*rows, d)` and intentions `(*rows, m)`."""
        mean = linear(state, self.K) + linear(intention, self.C)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + linear(noise, torch.linalg.cholesky(self.Pi))

    def posterior(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the intention of every row, `(*rows, m)`, and its covariance, `(m, m)`."""
        gain = torch.linalg.solve(self.Pi, self.C)
        covariance = torch.linalg.inv(self._precision())
        return (action - linear(state, self.K)) @ gain @ covariance, covariance

    def information(self) -> Tensor:
        """Return I(z; a | s) in nats, a scalar."""
        return torch.logdet(self._precision()) / 2

    def _precision(self) -> Tensor:
        identity = torch.eye(self.C.shape[-1], dtype=self.C.dtype, device=self.C.device)
        precision: Tensor = identity + self.C.mT @ torch.linalg.solve(self.Pi, self.C)
        return precision
