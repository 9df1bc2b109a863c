"""Arguments that were accepted, and gave results that are wrong: numbers that are not finite, levels, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowmatch_core import (
    EDM,
    VE,
    VP,
    BrownianBridge,
    CondOT,
    ContinuousFlow,
    Dequantiser,
    GaussianMixture,
    LinearGaussianMDP,
    Logits,
    MaskSource,
    MixtureFlow,
    MixturePath,
    Power,
    Rescheduled,
    SchrodingerBridge,
    Sinkhorn,
    TokenFlow,
    TokenTable,
    UniformSource,
    VelocityOf,
    cross_entropy_loss,
    generalised_kl_loss,
)
from tests.support.random import generator, tensor

NAN, INF = math.nan, math.inf
ONE = torch.ones(1, 1)


def still(t: object, x: Tensor, cond: object) -> Tensor:
    return 0 * x


def mixture(
    weights: tuple[float, float] = (0.5, 0.5), mean: float = 0.0, covariance: tuple[float, float, float] = (1, 0, 1)
) -> GaussianMixture:
    a, b, c = covariance
    return GaussianMixture(tensor(*weights), mean * torch.ones(2, 2), tensor([a, b], [b, c]).expand(2, 2, 2))


def process(c: float = 1.0, W: float = 1.0) -> LinearGaussianMDP:
    return LinearGaussianMDP(A=0.5 * ONE, B=ONE, c=torch.tensor([c]), W=W * ONE, K=ONE, k=torch.zeros(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContinuousFlow(still, (1,), base_scale=INF), "base_scale is inf, but should be positive and finite"),
        (lambda: ContinuousFlow(still, (1,), base=NAN * ONE), "base holds 1 numbers that are not finite"),
        (lambda: mixture(weights=(NAN, 0.5)), "weights holds 1 numbers that are not finite"),
        (lambda: mixture(weights=(-1.0, 2.0)), "weights is .*, but should hold probabilities, whose sum is 1"),
        (lambda: mixture(weights=(1.0, 2.0)), "weights is .*, but should hold probabilities, whose sum is 1"),
        (lambda: mixture(mean=INF), "means holds 4 numbers that are not finite"),
        (lambda: mixture(covariance=(1, NAN, 1)), "covariances holds 4 numbers that are not finite"),
        (lambda: mixture(covariance=(1, 2, 1)), "covariances has the eigenvalue -1, but should be a covariance"),
        (
            lambda: GaussianMixture(tensor(1.0), torch.zeros(1, 2), tensor([[1.0, 0.5], [0.0, 1.0]])),
            "covariances is not symmetric, but should be a covariance",
        ),
        (lambda: process(c=NAN), "c holds 1 numbers that are not finite"),
        (lambda: process(W=-1.0), "W has the eigenvalue -1, but should be a covariance"),
        (lambda: TokenTable(torch.tensor([INF, 1.0])), "probabilities holds negative or infinite values"),
        (lambda: MixtureFlow(ONE[0], NAN * ONE, ONE[None]), "means holds 1 numbers that are not finite"),
        (lambda: MixtureFlow(ONE[0], ONE, INF * ONE[None]), "factors holds 1 numbers that are not finite"),
        (lambda: MixtureFlow(ONE[0], ONE, ONE[None], NAN * ONE), "slopes holds 1 numbers that are not finite"),
        (lambda: VE(sigma_max=INF), "sigma_max is inf, but should be finite"),
        (lambda: VP(beta_max=INF), "beta_max is inf, but should be finite"),
        (lambda: BrownianBridge(INF), "sigma is inf, but should be positive and finite"),
        (lambda: SchrodingerBridge(INF), "sigma is inf, but should be positive and finite"),
        (lambda: Sinkhorn(INF), "reg is inf, but should be positive and finite"),
        (lambda: EDM(noisiest=INF), "cleanest and noisiest are 0.002 and inf, but should be positive and finite"),
        (lambda: EDM(rho=INF), "rho is inf, but should be at least 1 and finite"),
        (lambda: Power(INF), "rho is inf, but should be a whole number from 1"),  # type: ignore[arg-type]
        (lambda: Power(NAN), "rho is nan, but should be a whole number from 1"),  # type: ignore[arg-type]
        (lambda: VelocityOf(still, CondOT(), "data", mean=tensor(NAN)), "mean holds 1 numbers that are not finite"),
        (lambda: Rescheduled(still, CondOT(), VP(), mean=tensor(INF)), "mean holds 1 numbers that are not finite"),
        (lambda: Dequantiser(256, 0.0, INF), "low and high are 0.0 and inf, but should be finite, low below high"),
        (lambda: Dequantiser(256, NAN, 1.0), "low and high are nan and 1.0, but should be finite, low below high"),
        (lambda: Dequantiser(2.5), "levels is 2.5, but should be a whole number"),  # type: ignore[arg-type]
        (lambda: MaskSource(2.5), "vocabulary is 2.5, but should be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_parameters_that_are_no_numbers_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            torch.tensor([[0.0, 0.25, 1.0]]),
            r"holds 0.25, .* to 255; multiply pixels in \[0, 1\] by 255 and round",
        ),
        (torch.tensor([[0.5, 200.0]]), r"holds 0.5, but should hold whole numbers from 0 to 255\.$"),
        (torch.tensor([[3, 300]]), r"holds 300, but should hold whole numbers from 0 to 255\.$"),
        (torch.tensor([[3, -1]]), r"holds -1, but should hold whole numbers from 0 to 255\.$"),
        (torch.tensor([[3.0, NAN]]), r"holds nan, but should hold whole numbers from 0 to 255\.$"),
    ],
)
def test_levels_that_are_none_are_named(levels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"levels {message}"):
        Dequantiser(256)(levels)


def logits(t: object, x: Tensor, cond: object) -> Logits:
    return Logits(torch.zeros(*x.shape, 3))


@pytest.mark.parametrize("source", [MaskSource(3), UniformSource(3)], ids=repr)
@pytest.mark.parametrize("token", [3, -1, 7])
def test_a_token_outside_the_vocabulary_is_named(source: MaskSource | UniformSource, token: int) -> None:
    """The mask among the data was taken for data that the loss leaves out."""
    path, x1 = MixturePath(source), torch.tensor([[0, token, 2]])
    message = rf"holds {token}, but should hold numbers from 0 to 2, the tokens of the data"
    if isinstance(source, MaskSource):
        message += "; 3 is the mask"
    for loss in (generalised_kl_loss, cross_entropy_loss):
        with pytest.raises(ValueError, match=f"x1 {message}"):
            loss(logits, path, x1, generator=generator())
        with pytest.raises(ValueError, match=rf"x0 holds 9, but should hold numbers from 0 to {source.states - 1}"):
            loss(logits, path, x1.clamp(0, 2), torch.full_like(x1, 9), generator=generator())
    flow = TokenFlow(logits, path, (3,))
    with pytest.raises(ValueError, match=f"value {message}"):
        flow.log_prob(x1)
    with pytest.raises(ValueError, match="value has dtype"):
        flow.log_prob(x1.float())
