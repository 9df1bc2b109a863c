"""Guidance of denoisers."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from flowmatch_core._conditions import Condition, condition_rows, map_condition
from flowmatch_core.discrete.categorical import Denoiser, Logits, TokenDistribution
from flowmatch_core.field import Time
from flowmatch_core.guidance import GuidanceScale, check_guidance, guidance_scale

__all__ = ["guided_tokens"]


def guided_tokens(
    denoiser: Denoiser,
    scale: GuidanceScale = 2.0,
    *,
    null: Condition = None,
    weak: Denoiser | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:
    r"""Return the denoiser with guidance: classifier-free, or by a worse model.

    $$
    p^w(x_1^i \mid x_t, c) \propto q(x_1^i \mid x_t)^{1 - w}\, p(x_1^i \mid x_t, c)^w
    $$

    where $q$ is the denoiser at the null condition, or a worse denoiser at the same condition. $w = 1$ is the
    denoiser itself, $w = 0$ is $q$. The result is normalised at each position (Schiff et al.). The rates of
    predictor-free guidance (Nisonoff et al.) are the same product without the normalisation, a factor of the speed of
    the jumps from a position; `MixturePath` jumps at the speed of its schedule. A token that is impossible under the
    condition stays impossible for $w > 0$.

    A single token from a `MaskSource` has the tilted law $p(x)^{1 - w} p(x \mid c)^w / Z$ exactly; sequences do not.

    References:
        - Simple Guidance Mechanisms for Discrete Diffusion Models (Schiff et al., 2024),
          https://arxiv.org/abs/2412.10193
        - Unlocking Guidance for Discrete State-Space Diffusion and Flow Models (Nisonoff et al., 2024),
          https://arxiv.org/abs/2406.01572

    Args:
        denoiser: The estimate of $p_{1|t}$.
        scale: The scale $w$, a number or a function of the time.
        null: The null condition, of the shape of one condition. By default the denoiser is called with the condition
            None.
        weak: A worse denoiser, for autoguidance.
        interval: The times, first and last, at which the scale acts; outside them it is 1.

    Examples:
        >>> def denoiser(t, x, cond):
        ...     p = torch.tensor([0.5, 0.5]) if cond is None else torch.tensor([0.75, 0.25])
        ...     return Logits(p.log().expand(*x.shape, 2))
        >>> x, cond = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
        >>> guided_tokens(denoiser, scale=2.0)(0.5, x, cond).probabilities().values  # 9 to 1
        tensor([[[0.9000, 0.1000]]])
    """
    if weak is not None and null is not None:
        raise ValueError("null and weak are both given, but should be one of them: a weak one has the condition too.")
    check_guidance(scale, interval)
    return _GuidedTokens(denoiser, scale, null, weak, interval)


@final
class _GuidedTokens(nn.Module):
    def __init__(
        self,
        denoiser: Denoiser,
        scale: GuidanceScale,
        null: Condition,
        weak: Denoiser | None,
        interval: tuple[float, float],
    ) -> None:
        super().__init__()
        self.denoiser, self.scale, self.null, self.weak, self.interval = denoiser, scale, null, weak, interval

    def forward(self, t: Time, x: Tensor, cond: Condition = None) -> TokenDistribution:
        """Return the distributions at each position."""
        scale = guidance_scale(self.scale, self.interval, t)
        given: TokenDistribution = self.denoiser(t, x, cond)
        if not isinstance(scale, Tensor) and scale == 1:
            return given
        if self.weak is None:
            null = condition_rows(self.null, x.shape[:1])
            weak = self.denoiser(t, x, map_condition(lambda part: part.to(x.device), null))
        else:
            weak = self.weak(t, x, cond)
        return Logits(_product(_log(weak), _log(given), scale))


def _log(prediction: TokenDistribution) -> Tensor:
    """Return the normalised log-probabilities of all tokens."""
    if isinstance(prediction, Logits):
        return prediction.values.log_softmax(-1)
    return prediction.probabilities().values.log()


def _product(weak: Tensor, given: Tensor, scale: Time) -> Tensor:
    """Return `(1 - scale) * weak + scale * given` with 0 times minus infinity equal to 0."""
    w = torch.as_tensor(scale, dtype=given.dtype, device=given.device)
    w = w.reshape(-1, *(1,) * (given.ndim - 1)) if w.ndim else w
    total = torch.where(w == 1, 0.0, (1 - w) * weak) + torch.where(w == 0, 0.0, w * given)
    impossible = given.isneginf() & (w > 0)
    # where only the weak one rules a token out, the product is plus infinity, and that token is the result
    return torch.where(impossible, -math.inf, total).clamp_max(torch.finfo(total.dtype).max)
