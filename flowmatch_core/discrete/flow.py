"""The distribution of token sequences that a denoiser generates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import constraints

from flowmatch_core._conditions import Condition, CondShape, condition_parts
from flowmatch_core._flow import Flow
from flowmatch_core.discrete.categorical import Denoiser, check_prediction
from flowmatch_core.discrete.objectives import jump_divergence
from flowmatch_core.discrete.path import MixturePath
from flowmatch_core.discrete.solver import solve_ctmc
from flowmatch_core.discrete.sources import check_tokens
from flowmatch_core.solvers import TimeGrid, Uniform

__all__ = ["EvidenceBound", "TokenFlow", "perplexity"]


class EvidenceBound(NamedTuple):
    """An estimated lower bound of log-probabilities in nats and its standard error, both `(*batch,)`."""

    log_prob: Tensor
    standard_error: Tensor


@final
class TokenFlow(Flow):
    r"""The distribution of the tokens $x_1$ at the end of the jump process of a denoiser.

    Its log-probabilities have no closed form: `log_prob` and `elbo` estimate a lower bound.

    References:
        - Discrete Flow Matching (Gat et al., 2024), https://arxiv.org/abs/2407.15595
        - Flow Matching with General Discrete Paths (Shaul et al., 2024), https://arxiv.org/abs/2412.03487

    Args:
        denoiser: The estimate of $p_{1|t}$.
        path: The path on which it was trained.
        event_shape: The shape of one `x`, such as `(length,)`.
        steps: The number of steps of a sample.
        grid: Where they are placed in time.
        stochasticity: The weight of jumps back to noise; see `solve_ctmc`.
        cond_shape: The shape of one condition; that which the denoiser declares by default, see `Flow`.

    Examples:
        >>> from flowmatch_core.discrete import Logits, MaskSource
        >>> path = MixturePath(MaskSource(4))
        >>> flow = TokenFlow(lambda t, x, cond: Logits(torch.zeros(*x.shape, 4)), path, event_shape=(3,))
        >>> flow.sample((10,), generator=torch.Generator()).shape
        torch.Size([10, 3])
        >>> g = torch.Generator().manual_seed(0)
        >>> bound = flow.elbo(torch.zeros(1, 3, dtype=torch.long), samples=1000, generator=g)  # -3 log 4 = -4.16
        >>> bool((bound.log_prob + 3 * math.log(4)).abs() < 4 * bound.standard_error)
        True
    """

    denoiser: Denoiser

    def __init__(
        self,
        denoiser: Denoiser,
        path: MixturePath,
        event_shape: Sequence[int],
        steps: int = 64,
        *,
        grid: TimeGrid = Uniform(),
        stochasticity: float = 0.0,
        cond_shape: CondShape = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}, but should be at least 1.")
        declared: CondShape = getattr(denoiser, "cond_shape", None) if cond_shape is None else cond_shape
        super().__init__(event_shape, declared)
        self.denoiser, self.path = denoiser, path
        self.steps, self.grid, self.stochasticity = steps, grid, stochasticity

    @property
    def support(self) -> constraints.Constraint:
        """The set of all sequences of tokens."""
        last = self.path.source.vocabulary - 1
        tokens = constraints.integer_interval(0, last)  # type: ignore[no-untyped-call]
        return constraints.independent(tokens, len(self.event_shape))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"TokenFlow({self.path}, event_shape={tuple(self.event_shape)}, steps={self.steps})"

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        cond: Condition = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            sample_shape: The shape of the draws.
            cond: The conditions, with shape `(*batch, *cond)`; each gets `sample_shape` draws.
            generator: The source of randomness.

        Returns:
            The tokens, with shape `(*sample_shape, *batch, *event)`.
        """
        lead = self._lead(sample_shape, cond)
        device = next(iter(condition_parts(cond)), self._like(None)).device
        x0 = self.path.source.sample((math.prod(lead), *self.event_shape), generator, device)
        solution = solve_ctmc(
            self.denoiser,
            x0,
            path=self.path,
            steps=self.steps,
            grid=self.grid,
            cond=self._condition_rows(cond, lead),
            stochasticity=self.stochasticity,
            generator=generator,
        )
        return solution.x.reshape(*lead, *self.event_shape)

    def log_prob(
        self,
        value: Tensor,
        cond: Condition = None,
        *,
        samples: int = 16,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return an estimate of the evidence lower bound of the log-probability in nats: that of `elbo`.

        Args:
            value: The tokens, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, *cond)`; the batches of both broadcast.
            samples: The number of times per row, at least 2.
            generator: The source of randomness.

        Returns:
            The bounds, with shape `(*batch,)`. Gradients reach the denoiser.
        """
        return self.elbo(value, cond, samples=samples, generator=generator).log_prob

    def elbo(
        self,
        value: Tensor,
        cond: Condition = None,
        *,
        samples: int = 16,
        generator: torch.Generator | None = None,
    ) -> EvidenceBound:
        r"""Return an unbiased estimate of the evidence lower bound of the log-probability in nats.

        $$
        \log p(x_1) \ge -\int_0^1 \lambda_t \sum_i E_{x_t} D_i(x_t, x_1)\, dt
        $$

        with the `jump_divergence` $D$. It is the bound in continuous time, independent of the number of steps of a
        sample. With the true posterior of a masked path it equals the log-probability; with a uniform source it is
        strictly below.

        With uniform times the estimate has infinite variance, because a position with rate $\lambda_t$ is noise with
        probability $1 - \kappa_t$ only. The times are drawn, one in each of `samples` strata, such that $\sqrt[3]{1 -
        \kappa_t}$ is uniform. With the root of degree $m$ the moments of order below $m + 1$ are finite: the square
        root has the least variance; the cube root has 9/8 of its second moment and a finite third one, so that the
        mean of many estimates is normal as fast as $1 / \sqrt n$. The fourth moment diverges logarithmically, and with
        it the variance of the squared standard error; a finite one takes the fourth root and 4/3 of the least second
        moment. The standard error neglects the reduction by the strata, and so is slightly too large.

        Args:
            value: The tokens, with shape `(*batch, *event)`.
            cond: The conditions, with shape `(*batch, *cond)`; the batches of both broadcast.
            samples: The number of times per row, at least 2.
            generator: The source of randomness.

        Returns:
            The bounds and their standard errors. Gradients reach the denoiser.
        """
        if samples < 2:
            raise ValueError(f"samples is {samples}, but should be at least 2 for a standard error.")
        check_tokens("value", value, self.path.source)
        x1, rows, lead = self._rows(value, cond)
        terms = torch.stack([self._term(x1, rows, (k, samples), generator) for k in range(samples)])
        error = terms.std(0) / samples**0.5
        return EvidenceBound(terms.mean(0).reshape(lead), error.reshape(lead))

    def _term(self, x1: Tensor, cond: Condition, stratum: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        k, of = stratum
        uniform = torch.rand(len(x1), generator=generator, dtype=torch.float64, device=x1.device)
        root = (k + 1 - uniform) / of  # the cube root of the share of noise; never zero
        t = self.path.schedule.time_of_noise(root**3)
        x0 = self.path.source.sample(x1.shape, generator, x1.device)
        x_t = self.path.sample(x0, x1, t, generator)
        prediction = self.denoiser(t.to(self._like(None).dtype), x_t, cond)
        check_prediction(prediction, x1, self.path.source.vocabulary)
        divergence = jump_divergence(prediction, self.path, x_t, x1).double().flatten(1).sum(1)
        return -3 / root * divergence


def perplexity(log_prob: Tensor, tokens: int) -> Tensor:
    r"""Return the perplexity $\exp(-\operatorname{mean} \log p / L)$; an upper bound for a lower bound of $\log p$.

    The bits per token are `flowmatch_core.metrics.bits_per_dim(log_prob, tokens)`.

    Args:
        log_prob: The log-probabilities of sequences in nats, of any shape.
        tokens: The number $L$ of tokens of a sequence.

    Examples:
        >>> perplexity(torch.tensor([-10 * math.log(4)]), tokens=10)
        tensor(4.)
    """
    return torch.exp(-log_prob.mean() / tokens)
