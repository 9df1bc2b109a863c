"""Laws of flow times against numerical integration, and stratified draws against independent ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from flowmatch_core.objectives import cfm_loss, interpolant_loss, posterior_cfm_loss
from flowmatch_core.paths import CondOT
from flowmatch_core.times import LateTime, LogitNormalTime, StratifiedTime, TimeLaw, UniformTime
from tests.support.checks import BOUND, z_scores
from tests.support.random import generator, randn

LAWS: list[tuple[TimeLaw, Callable[[float], float]]] = [
    (UniformTime(), lambda t: 1.0),
    (LateTime(0.1), lambda t: 1 / (1.1 - t)),
    (LateTime(0.005), lambda t: 1 / (1.005 - t)),
    (LateTime(50.0), lambda t: 1 / (51 - t)),
    (LogitNormalTime(), lambda t: 0.0 if t in (0, 1) else stats.norm.pdf(torch.logit(torch.tensor(t))) / (t * (1 - t))),
]
IDS = [str(law) for law, _ in LAWS]


@pytest.mark.parametrize(("law", "density"), LAWS, ids=IDS)
def test_quantiles_invert_the_integral_of_the_density(law: TimeLaw, density: Callable[[float], float]) -> None:
    u = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    whole = integrate.quad(density, 0, 1)[0]
    shares = [integrate.quad(density, 0, float(t), limit=200)[0] / whole for t in law.quantile(u)]
    torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), u, rtol=1e-6, atol=1e-7)
    assert law.quantile(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("law", [law for law, _ in LAWS], ids=IDS)
def test_draws_have_the_law_of_the_quantiles(law: TimeLaw) -> None:
    t = law(5_000, generator=generator(), dtype=torch.float64)
    u = torch.rand(5_000, generator=generator(1), dtype=torch.float64)
    assert stats.ks_2samp(t.numpy(), law.quantile(u).numpy()).pvalue > 1e-3
    assert t.min() >= 0
    assert t.max() <= 1


def test_uniform_times_are_the_bits_of_rand() -> None:
    assert torch.equal(UniformTime()(100, generator=generator()), torch.rand(100, generator=generator()))


@pytest.mark.parametrize(("law", "density"), LAWS, ids=IDS)
def test_a_batch_has_one_stratified_time_in_each_interval(law: TimeLaw, density: Callable[[float], float]) -> None:
    n = 257
    t = StratifiedTime(law)(n, generator=generator(), dtype=torch.float64)
    ends = law.quantile(torch.arange(n + 1, dtype=torch.float64) / n)
    counts = torch.bincount(torch.searchsorted(ends, t, right=True) - 1, minlength=n)
    assert torch.equal(counts, torch.ones_like(counts))


def test_a_stratified_time_of_a_row_has_the_law_and_knows_nothing_of_the_row() -> None:
    """Row 3 of a batch of 4: uniform over all strata."""
    sampler, g = StratifiedTime(UniformTime()), generator()
    t = torch.stack([sampler(4, generator=g, dtype=torch.float64)[3] for _ in range(2_000)])
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("objective", [cfm_loss, interpolant_loss, posterior_cfm_loss])
def test_stratified_times_leave_the_expectation_of_a_loss_and_reduce_its_variance(
    objective: Callable[..., Tensor],
) -> None:
    x1, g = 0.1 * randn(64, 1), generator()
    field = lambda t, x, cond: 9 * t[:, None] ** 2 * torch.ones_like(x)  # noqa: E731  # its error depends on the time

    def values(time: Callable[..., Tensor]) -> Tensor:
        return torch.stack([objective(field, CondOT(), x1, time=time, generator=g) for _ in range(400)])

    plain, stratified = values(LateTime(0.1)), values(StratifiedTime(LateTime(0.1)))
    error = (plain.var() / 400 + stratified.var() / 400).sqrt()
    assert abs(float((plain.mean() - stratified.mean()) / error)) < BOUND
    assert stratified.var() < plain.var() / 3


def test_the_loss_under_a_law_is_the_integral_with_its_density() -> None:
    """At fixed ends the loss of a constant-in-x field is a function of time alone."""
    x1 = torch.ones(20_000, 1, dtype=torch.float64)
    field = lambda t, x, cond: 1 + t[:, None] ** 2  # noqa: E731  # against the velocity 1
    law = LateTime(0.1)
    t = law(len(x1), generator=generator(), dtype=torch.float64)
    errors = torch.stack([cfm_loss(field, CondOT(), x1[:1], torch.zeros_like(x1[:1]), time=s[None]) for s in t])
    whole = integrate.quad(lambda s: 1 / (1.1 - s), 0, 1)[0]
    expected = integrate.quad(lambda s: s**4 / (1.1 - s), 0, 1)[0] / whole
    assert z_scores(errors, expected).abs().max() < BOUND


@pytest.mark.parametrize("eps", [0.0, -1.0, float("inf"), float("nan")])
def test_an_eps_that_is_no_positive_number_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps is .*, but should be positive and finite"):
        LateTime(eps)
