"""A distribution of short token sequences as a table of probabilities, a ground truth for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from flowmatch_core.discrete.categorical import Denoiser, Probabilities
from flowmatch_core.discrete.path import MixturePath
from flowmatch_core.discrete.schedules import token_time
from flowmatch_core.field import Time

__all__ = ["TokenTable"]


@final
class TokenTable:
    r"""A distribution over sequences of `L` tokens, given by the table of all $V^L$ probabilities.

    Args:
        probabilities: The table, with `L` dimensions of `V` entries, positive or zero, of any sum; it is normalised.

    Examples:
        >>> table = TokenTable(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # both tokens are equal
        >>> table.log_prob(torch.tensor([[1, 1]])).exp()
        tensor([0.7500], dtype=torch.float64)
    """

    def __init__(self, probabilities: Tensor) -> None:
        if probabilities.ndim == 0 or len(set(probabilities.shape)) != 1:
            raise ValueError(
                f"probabilities has shape {tuple(probabilities.shape)}, but should be of shape (V, ..., V)."
            )
        if not (bool(((probabilities >= 0) & probabilities.isfinite()).all()) and bool(probabilities.sum() > 0)):
            raise ValueError(
                "probabilities holds negative or infinite values or only zeros, but should be a distribution."
            )
        self.probabilities = probabilities.double() / probabilities.double().sum()
        self.vocabulary, self.length = len(probabilities), probabilities.ndim

    def __repr__(self) -> str:
        return f"TokenTable(vocabulary={self.vocabulary}, length={self.length})"

    @property
    def support(self) -> Tensor:
        """All sequences in the order of the flattened table, with shape `(V**L, L)`."""
        tokens = torch.arange(self.vocabulary, device=self.probabilities.device)
        return torch.cartesian_prod(*[tokens] * self.length).reshape(-1, self.length)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probabilities of sequences with shape `(*batch, L)`."""
        return self.probabilities[value.unbind(-1)].log()

    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw sequences, with shape `(*sample_shape, L)`."""
        weights = Probabilities(self.probabilities.flatten().expand(*sample_shape, -1))
        return self.support[weights.sample(generator)]

    def marginal(self, path: MixturePath, t: Time) -> Tensor:
        """Return the table of the states at `t`, with `L` dimensions of as many entries as the source has states."""
        table = self.probabilities
        kernel = self._kernel(path, token_time(t, self.support[0]).double())
        for _ in range(self.length):
            table = torch.tensordot(table, kernel, dims=([0], [0]))  # the new dimension comes last
        return table

    def denoiser(self, path: MixturePath) -> Denoiser:
        r"""Return the true posterior $p_{1|t}(x_1^i \mid x_t)$.

        Its cost grows with $V^L$ times the batch.
        """

        def posterior(t: Time, x: Tensor, cond: Tensor | None = None) -> Probabilities:
            times = token_time(t, x).double().reshape(-1).expand(len(x))
            kernel = self._kernel(path, times[:, None, None])  # (batch, V, states)
            given = kernel.transpose(1, 2).gather(1, x[..., None].expand(*x.shape, self.vocabulary))  # (batch, L, V)
            positions = torch.arange(self.length, device=x.device)
            weights = self.probabilities.flatten() * given[:, positions, self.support].prod(-1)  # (batch, V**L)
            weights = weights.reshape(-1, *self.probabilities.shape)
            rows = [weights.movedim(1 + i, 1).reshape(len(x), self.vocabulary, -1).sum(-1) for i in range(self.length)]
            joint = torch.stack(rows, 1)
            return Probabilities(joint / joint.sum(-1, keepdim=True))

        return posterior

    def _kernel(self, path: MixturePath, t: Tensor) -> Tensor:
        """Return `p_t(x | x1)` of one position, with shape `(..., V, states)`."""
        if path.source.vocabulary != self.vocabulary:
            given = path.source.vocabulary
            raise ValueError(f"the source of path has {given} tokens, but should have {self.vocabulary}, as the table.")
        states = torch.arange(path.source.states, device=self.probabilities.device)
        same = (states[: self.vocabulary, None] == states).double()
        noise = path.schedule.noise(t)
        return noise * path.source.probability(states) + (1 - noise) * same
