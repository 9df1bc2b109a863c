"""Laws of the transforms of single columns, and of flows that work on the transformed columns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from flowmatch_core import ContinuousFlow, DiscreteTimeFlow, Marginals
from flowmatch_core.marginals import Identity, Marginal, Mixture, Steps
from flowmatch_core.normalizing import MAF
from tests.support.checks import BOUND, close, z_scores
from tests.support.random import generator, randn, tensor

WEIGHTS, MEANS, SCALES = tensor(0.5, 0.3, 0.2), tensor(-4.0, 1.0, 2.0), tensor(0.5, 1.0, 3.0)


def mixture(offset: float = 0.0, size: float = 1.0) -> Mixture:
    return Mixture(WEIGHTS, offset + size * MEANS, size * SCALES)


def truth() -> Any:
    return MixtureSameFamily(Categorical(WEIGHTS), Normal(MEANS, SCALES))


def steps() -> Steps:
    """Levels 2 to 6, of which 4 is rare."""
    return Steps(tensor(0.01, 0.3, 0.2, 1e-4, 0.28, 0.2, 0.01), low=2)


COLUMNS: dict[str, tuple[Marginal, float, float]] = {
    "mixture": (mixture(), -40.0, 40.0),
    "far from zero": (mixture(6e6, 0.3), 6e6 - 10, 6e6 + 10),
    "steps": (steps(), -1.0, 10.0),
    "scaled steps": (Steps(steps().mass, low=2, start=-3.0, width=0.25), -3.75, -0.5),
    "uniform": (Steps(tensor(1e-3, 1.0, 1e-3), low=0, start=-1.5, width=4.0), -21.5, 18.5),
    "identity": (Identity(), -8.0, 8.0),
}


def normal_log_prob(u: Tensor) -> Tensor:
    return -u.square() / 2 - math.log(2 * math.pi) / 2


@pytest.mark.parametrize("name", COLUMNS)
def test_the_inverse_is_one_over_bulk_and_tails(name: str) -> None:
    column, low, high = COLUMNS[name]
    x = torch.linspace(low, high, 301, dtype=torch.float64)
    u, log_slope = column(x)
    assert u.dtype == log_slope.dtype == torch.float64 and u.isfinite().all() and log_slope.isfinite().all()
    assert (u.diff() > 0).all()
    close(column.inverse(u), x, 1e-8)
    images = torch.linspace(-12, 12, 301, dtype=torch.float64)
    close(column(column.inverse(images))[0], images, 1e-6)  # some lie between modes, where the slope is small
    close(column.inverse(images[:5]), column.inverse(images)[:5], 1e-13)


@pytest.mark.parametrize("name", COLUMNS)
def test_the_slope_is_that_of_autograd_both_ways(name: str) -> None:
    column, low, high = COLUMNS[name]
    x = torch.linspace(low, high, 332, dtype=torch.float64).requires_grad_()
    u, log_slope = column(x)
    (slope,) = torch.autograd.grad(u.sum(), x)
    close(slope.log(), log_slope.detach(), 1e-7)
    images = u.detach().requires_grad_()
    (back,) = torch.autograd.grad(column.inverse(images).sum(), images)
    close(-back.log(), log_slope.detach(), 1e-6)


@pytest.mark.parametrize("name", COLUMNS)
def test_the_density_integrates_to_one(name: str) -> None:
    column, low, high = COLUMNS[name]
    edges = torch.linspace(low, high, 20_001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    u, log_slope = column(x)
    density = (normal_log_prob(u) + log_slope).exp()
    assert float(density.sum() * (edges[1] - edges[0])) == pytest.approx(1, abs=1e-4)


def test_a_mixture_has_its_own_density_and_distribution_function() -> None:
    column, x = mixture(), torch.linspace(-12, 20, 401, dtype=torch.float64)
    u, log_slope = column(x)
    close(normal_log_prob(u) + log_slope, truth().log_prob(x), 1e-12)
    close(torch.special.ndtr(u), truth().cdf(x), 1e-12)


def test_far_tails_are_those_of_the_widest_component() -> None:
    """There F = w Phi(z), so that z^2 / 2 + log(z sqrt(2 pi)) - log w is that of the image without a weight."""
    column = mixture()
    for distance in (8.0, 40.0, 1000.0):
        x = 2 + 3 * tensor(-distance, distance)
        u, log_slope = column(x)
        tail = math.log(0.2) + torch.special.log_ndtr(tensor(-distance))
        close(torch.special.log_ndtr(-u.abs()), tail.expand(2), 1e-10)
        close(column.inverse(u), x, 1e-10)
        close(log_slope.exp(), torch.full_like(u, 1 / 3), 0.1)


def test_a_single_component_is_an_affine_map() -> None:
    column, x = Mixture(tensor(1.0), tensor(3.0), tensor(2.0)), torch.linspace(-60, 70, 301, dtype=torch.float64)
    u, log_slope = column(x)
    close(u, (x - 3) / 2)
    close(log_slope, torch.full_like(x, -math.log(2.0)))


def test_a_fit_finds_the_mixture_of_its_rows() -> None:
    g, n = generator(), 5000
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    x = 6e6 + MEANS[which] + SCALES[which] * randn(n, seed=1)
    column = Mixture.fit(x, components=3, floor=0.02, iterations=100)
    u, log_slope = column(x)
    assert z_scores(u, 0.0).abs() < BOUND and float(u.std()) == pytest.approx(1, abs=0.02)
    gain = truth().log_prob(x - 6e6) - normal_log_prob(u) - log_slope
    assert abs(float(gain.mean())) < 0.005  # the likelihood ratio of 8 parameters is about 8 / 2n


@pytest.mark.parametrize("kind", ["mixture", "steps"])
def test_weights_are_repetitions(kind: str) -> None:
    x, weight = (3 * randn(60)).round() + 0.25, torch.arange(60) % 4
    repeated = x.repeat_interleave(weight)
    fit: Any = Mixture.fit if kind == "mixture" else Steps.fit
    options = {"components": 3} if kind == "mixture" else {}
    weighted, plain = fit(x, weight.double(), **options), fit(repeated, **options)
    for name, value in plain.state_dict().items():
        close(weighted.state_dict()[name], value, 1e-9)
    assert not torch.allclose(fit(x, **options)(x)[0], weighted(x)[0], atol=1e-3)


def test_steps_have_the_frequencies_of_the_levels() -> None:
    levels = torch.tensor([3, 3, 3, 5, 5, 6])
    column = Steps.fit(levels + torch.rand(6, generator=generator()).double(), pseudo_count=1e-9)
    x = tensor(3.4, 4.5, 5.9, 6.0)
    u, log_slope = column(x)
    close((normal_log_prob(u) + log_slope).exp(), tensor(3 / 6, 0.0, 2 / 6, 1 / 6), 1e-8)
    close(torch.special.ndtr(u), tensor(0.4 * 3 / 6, 3 / 6, 3 / 6 + 0.9 * 2 / 6, 5 / 6), 1e-8)
    place = {"start": 0.0, "width": 1.0}
    assert column.describe() == {"kind": "steps", "low": 3, "levels": 4, **place}
    wider = Steps.fit(levels, low=1, high=9)
    assert wider.describe() == {"kind": "steps", "low": 1, "levels": 9, **place}


def test_scaled_steps_are_steps_in_other_units() -> None:
    levels = (5 * torch.rand(500, generator=generator()).double().square()).floor()
    x = levels + torch.rand(500, generator=generator(1), dtype=torch.float64)
    plain, scaled = Steps.fit(x), Steps.fit(2 + 0.5 * x, start=2.0, width=0.5)
    assert torch.equal(plain.mass, scaled.mass)
    wide = torch.linspace(-2, 8, 201, dtype=torch.float64) + 1e-4
    (u, log_slope), (image, log_scaled) = plain(wide), scaled(2 + 0.5 * wide)
    close(image, u, 1e-10)
    close(log_scaled, log_slope + math.log(2), 1e-10)


def test_levels_come_back_exactly() -> None:
    column, levels = Steps.fit(torch.arange(1990, 2030).repeat(3)), torch.arange(1990, 2030)
    x = levels + torch.rand(40, generator=generator(), dtype=torch.float64)
    for noisy in (x, levels.double(), levels.double() + (1 - 1e-10)):
        assert torch.equal(column.inverse(column(noisy)[0]).floor().long(), levels)


def test_columns_are_transformed_on_their_own() -> None:
    x = torch.stack([randn(500).exp(), randn(500, seed=1), (3 * randn(500, seed=2)).round()], 1)
    marginals = Marginals.fit(x, kinds=("mixture", "identity", "steps"), components=4)
    u, log_det = marginals(x)
    singles = [column(x[:, i]) for i, column in enumerate(marginals.columns)]
    assert torch.equal(u, torch.stack([image for image, _ in singles], 1))
    close(log_det, sum((slope for _, slope in singles), tensor(0.0)))
    close(marginals.inverse(u.reshape(5, 100, 3)), x.reshape(5, 100, 3), 1e-8)
    assert u.std(0)[0] < 1.1 and torch.equal(u[:, 1], x[:, 1])


def test_columns_of_equal_levels_are_transformed_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(5, 9, generator=generator, dtype=torch.float64) ** 8 + 1e-9
    columns = [Steps(one, low=2, start=-1.0, width=0.5) for one in mass]
    x = 6 * torch.rand(3, 40, 5, generator=generator, dtype=torch.float64) - 1  # some beyond the levels
    together = Marginals(columns)
    u, log_det = together(x)
    alone = [column(x[..., i]) for i, column in enumerate(columns)]
    torch.testing.assert_close(u, torch.stack([image for image, _ in alone], -1), rtol=0, atol=0)
    torch.testing.assert_close(log_det, sum(slope for _, slope in alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.inverse(u), x, rtol=0, atol=1e-6)
    other = Marginals([*columns[:4], Steps(mass[4], low=3, start=-1.0, width=0.5)])  # one level further
    torch.testing.assert_close(other(x)[0][..., 4], columns[4](x[..., 4] - 0.5)[0], rtol=0, atol=0)


def test_a_description_and_a_state_rebuild_the_transforms() -> None:
    scaled = Steps(steps().mass, low=2, start=1.0, width=0.5)
    marginals = Marginals([mixture(6e6, 0.3), steps(), Identity(), scaled])
    x = torch.stack([6e6 + randn(50), 2 + 4 * torch.rand(50, generator=generator()), *randn(2, 50, seed=1)], 1)
    other = Marginals.from_description(marginals.description)
    other.load_state_dict(marginals.state_dict())
    nn.ModuleList([other]).float()
    for found, expected in zip(other(x), marginals(x), strict=True):
        assert torch.equal(found, expected)


class Doubling(nn.Module):
    """The field x log 2, in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((2, 2), math.log(2.0)).triu().tril(), requires_grad=False)

    def forward(self, t: float, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return x @ self.rate


def flows() -> dict[str, ContinuousFlow | DiscreteTimeFlow]:
    marginals = Marginals([mixture(6e6, 0.3), steps()])
    loc, scale = tensor(0.1, -0.2), tensor(0.5, 0.6)
    return {
        "continuous": ContinuousFlow(Doubling(), (2,), "rk4", 8, loc=loc, scale=scale, marginals=marginals),
        "discrete time": DiscreteTimeFlow(MAF(), 2, loc=loc, scale=scale, marginals=marginals, generator=generator()),
    }


def points(n: int = 60) -> Tensor:
    return torch.stack(
        [6e6 + 0.3 * (4 * randn(n)), 2 + 5 * torch.rand(n, generator=generator(), dtype=torch.float64)], 1
    )


def test_the_density_of_a_flow_has_the_log_determinant_of_its_marginals() -> None:
    """u = loc + scale 2 z, in closed form."""
    flow, x = flows()["continuous"], points()
    assert isinstance(flow, ContinuousFlow) and flow.marginals is not None
    u, log_det = flow.marginals(x)
    exact = Normal(tensor(0.1, -0.2), 2 * tensor(0.5, 0.6)).log_prob(u).sum(1) + log_det  # type: ignore[no-untyped-call]
    z, volume = flow.transform.inv.call_and_ladj(x)
    for found in (
        flow.log_prob(x),
        flow.estimate(x).log_prob,
        flow.given(None).log_prob(x),
        volume + normal_log_prob(z).sum(1),
    ):
        close(found, exact, 1e-4)
    back, forward_volume = flow.transform.call_and_ladj(z)
    close(back - 6e6, x - 6e6, 1e-3)
    close(forward_volume, -volume, 1e-3)
    assert torch.equal(flow.trajectory((5,), generator=generator())[-1], flow.sample((5,), generator=generator()))


@pytest.mark.parametrize("kind", ["continuous", "discrete time"])
def test_samples_and_densities_of_a_flow_with_marginals_agree(kind: str) -> None:
    flow, g = flows()[kind], generator()
    x, log_prob = flow.rsample_and_log_prob((200,), generator=g)
    assert x.dtype == log_prob.dtype == torch.float64
    close(x, flow.sample((200,), generator=generator()), 1e-9)
    close(log_prob, flow.log_prob(x), 1e-3)
    assert len(set(x[:, 0].tolist())) > 195


@pytest.mark.parametrize("kind", ["continuous", "discrete time"])
def test_the_density_of_a_flow_with_marginals_integrates_to_one(kind: str) -> None:
    flow = flows()[kind]
    first = torch.linspace(6e6 - 6, 6e6 + 8, 141, dtype=torch.float64)
    second = torch.linspace(-2, 10, 121, dtype=torch.float64) + 0.05
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(first, second)).exp()
    total = float(density.sum() * (first[1] - first[0]) * (second[1] - second[0]))
    assert total == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("kind", ["continuous", "discrete time"])
def test_gradients_reach_the_noise_and_the_points(kind: str) -> None:
    flow, x = flows()[kind], points(3).requires_grad_()
    (gradient,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    step = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    with torch.no_grad():
        slope = (flow.log_prob(x + step) - flow.log_prob(x - step)) / 2e-4
    close(gradient[:, 1], slope, 2e-2)
    if kind == "discrete time":
        drawn = flow.rsample((3,), generator=generator()).sum()
        assert any(bool((g != 0).any()) for g in torch.autograd.grad(drawn, list(flow.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mixture.fit(tensor(1.0, 1.0, 1.0)), "x is constant, 1, but should have at least 2 distinct values"),
        (lambda: Mixture.fit(tensor(1.0, 2.0, 3.0)), "x has 3 distinct values, but should have at least 8"),
        (lambda: Mixture.fit(tensor(1.0, math.nan, 3.0)), "x holds 1 numbers that are not finite"),
        (lambda: Mixture.fit(randn(20), components=0), "components and iterations are 0 and 60"),
        (lambda: Mixture.fit(randn(20), floor=0.0), "floor is 0.0, but should be above 0 and at most 1"),
        (lambda: Mixture.fit(randn(20), -torch.ones(20)), "weight holds values that are negative"),
        (
            lambda: Mixture.fit(randn(20), torch.zeros(20)),
            "weight holds values that are negative or not finite, or only",
        ),
        (lambda: Mixture.fit(randn(20), torch.ones(3)), r"weight has shape \(3,\), but should be of shape \(20,\)"),
        (lambda: Mixture(tensor(1.0, 0.0), tensor(0.0, 1.0), tensor(1.0, 1.0)), r"weights is \[1.0, 0.0\], but should"),
        (lambda: Mixture(tensor(1.0), tensor(math.inf), tensor(1.0)), r"means is \[inf\], but should hold finite"),
        (lambda: Mixture(tensor(1.0), tensor(0.0), tensor(math.nan)), r"scales is \[nan\], but should hold positive"),
        (lambda: Steps.fit(torch.arange(9), low=3), "x has levels from 0 to 8, but should have levels from 3 to 8"),
        (lambda: Steps.fit(torch.arange(9), pseudo_count=0.0), "pseudo_count is 0.0, but should be positive"),
        (lambda: Steps(tensor(1.0, -1.0, 1.0), 0), "mass is .* but should hold positive, finite numbers"),
        (lambda: Steps(tensor(1.0, 1.0), 0), r"mass has shape \(2,\), but should be of shape \(levels \+ 2,\)"),
        (lambda: Steps(tensor(1.0, 1.0, 1.0), 0, width=0.0), "width is 0.0, but should be positive and finite"),
        (lambda: Steps(tensor(1.0, 1.0, 1.0), 0, start=math.inf), "start is inf, but should be finite"),
        (lambda: Marginals.fit(randn(20)), r"x has shape \(20,\), but should be of shape \(n, columns\)"),
        (lambda: Marginals.fit(randn(20, 2), kinds=("mixture",)), "kinds has 1 entries, but should have 2"),
        (lambda: Marginals.fit(randn(20, 1), kinds=("step",)), r"kinds\[0\] is 'step', but should be one of mixture"),
        (lambda: Marginals.fit(torch.ones(20, 1)), "column 0 of x is constant, 1"),
        (lambda: Marginals([]), "columns is empty"),
        (lambda: Marginals([Identity()])(randn(3, 2)), r"x has shape \(3, 2\), but should end in 1"),
        (
            lambda: ContinuousFlow(Doubling(), (2,), marginals=Marginals([Identity()])),
            "marginals has 1 columns, but should have 2, one for each entry of event_shape",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
