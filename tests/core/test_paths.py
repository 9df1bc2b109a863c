"""Laws of the probability paths, on every path, in float64."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn
from torch.autograd.functional import jvp

from flowmatch_core._tensors import expand_time
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.paths import OU, VE, VP, AffinePath, CondOT, Cosine, CustomPath, Polynomial, Quantity, VelocityOf
from flowmatch_core.solvers import solve
from tests.support.random import randn
from tests.support.truths import overlapping

QUARTER = CustomPath(lambda t: torch.sin(math.pi / 2 * t), lambda t: torch.sin(math.pi / 2 * (1 - t)))
BENT = CustomPath(lambda t: 0.1 + t + t**2, lambda t: (1 - t) * torch.exp(t))  # neither end is 0 or 1 but one

# for each path: alpha and sigma at both ends
ENDS = {
    CondOT(): ((0, 1), (1, 0)),
    CondOT(sigma_min=0.1): ((0, 1), (1, 0.1)),
    Cosine(): ((0, 1), (1, 0)),
    VP(): ((math.exp(-5.025), 1), (math.sqrt(1 - math.exp(-10.05)), 0)),
    VP(beta_min=2.0, beta_max=2.0): ((math.exp(-1), 1), (math.sqrt(1 - math.exp(-2)), 0)),
    OU(horizon=2.0): ((math.exp(-2), 1), (math.sqrt(1 - math.exp(-4)), 0)),
    VE(sigma_min=0.1, sigma_max=10.0): ((1, 1), (10, 0.1)),
    Polynomial(): ((0, 1), (1, 0)),
    Polynomial(n=2.5): ((0, 1), (1, 0)),
    QUARTER: ((0, 1), (1, 0)),
    BENT: ((0.1, 2.1), (1, 0)),
}
NAMES = {QUARTER: "CustomPath(quarter)", BENT: "CustomPath(bent)"}
PATHS = list(ENDS)
QUANTITIES = get_args(Quantity)
PAIRS = list(itertools.product(QUANTITIES, QUANTITIES))
TIMES = [0.0, 1e-3, 0.4, 1 - 1e-3, 1.0]


def name(path: AffinePath) -> str:
    return NAMES.get(path, repr(path))


every_path = pytest.mark.parametrize("path", PATHS, ids=name)


def linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


def gaussian_truth(path: AffinePath, t: Time, x: Tensor, mean: float = 0.7, std: float = 0.6) -> dict[str, Tensor]:
    """The four quantities at `(t, x)` for data N(mean, std^2), by Gaussian conditioning."""
    a, s, da, sds = (f(t) for f in (path.alpha, path.sigma, path.d_alpha, path.sigma_d_sigma))
    residual = (x - a * mean) / (a**2 * std**2 + s**2)
    data = mean + a * std**2 * residual
    return {"data": data, "noise": s * residual, "score": -residual, "velocity": da * data + sds * residual}


def verdict(path: AffinePath, t: float, source: str, target: str) -> str:
    """What the algebra alone allows: exact, the mean of what is hidden, or nothing at all."""
    a, s, da, ds = (float(f(t)) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    if source == target:
        return "exact"
    if a == 0:  # x is the noise
        if target in ("noise", "score"):
            return "exact"
        if source == "velocity":
            return "exact" if da else "nothing"
        if source in ("noise", "score"):
            return "exact" if target == "velocity" and da == 0 else "nothing"
    if s == 0:  # x is the data
        fast = math.isinf(ds)  # then a finite velocity tells the score
        if target == "score":
            return "exact" if source == "velocity" and fast else "nothing"
        if target == "velocity" and fast:
            return "exact" if source == "score" else "mean"
    return "exact"


# --- the schedules -----------------------------------------------------------------------------------------


@every_path
def test_derivatives_are_those_of_differences(path: AffinePath) -> None:
    t, h = linspace(0.01, 0.99, 25), 1e-5
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        expected = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), expected, rtol=1e-6, atol=1e-8)
    for end, inside in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        expected = (path.sigma(inside) ** 2 - path.sigma(end) ** 2) / (2 * (inside - end))
        torch.testing.assert_close(path.sigma_d_sigma(end), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.sigma_d_sigma(t), path.sigma(t) * path.d_sigma(t))


@every_path
def test_derivatives_are_those_of_autograd_to_the_ends(path: AffinePath) -> None:
    t = linspace(0, 1, 11)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        _, expected = jvp(value, t, torch.ones_like(t))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(derivative(t), expected)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_the_stated_ones_and_a_zero_is_exact(path: AffinePath, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    for value, stated in zip((path.alpha(ends), path.sigma(ends)), ENDS[path], strict=True):
        assert value.dtype == dtype
        assert value.tolist() == pytest.approx(stated, rel=2e-6)
        assert all(got == 0 for got, exact in zip(value.tolist(), stated, strict=True) if exact == 0)


@every_path
def test_the_time_of_a_ratio_is_the_inverse_of_the_schedule(path: AffinePath) -> None:
    t = linspace(0, 1, 41)
    alpha, sigma = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(path.time_of_ratio(3 * alpha, 3 * sigma), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(path.time_of_angle(path.angle(t)), t, rtol=0, atol=1e-8)
    angle = path.angle(t)
    assert (angle.diff() > 0).all() and angle.min() >= 0 and angle.max() <= math.pi / 2
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    ends = float(path.time_of_ratio(zero, one)), float(path.time_of_ratio(one, zero))
    assert ends == pytest.approx((0, 1), abs=1e-12)
    assert ends[0] == 0 or path.alpha(0.0) > 0  # an exact zero stays one
    assert ends[1] == 1
    single = t.float()
    torch.testing.assert_close(path.time_of_ratio(path.alpha(single), path.sigma(single)), single, rtol=0, atol=1e-4)


def test_vp_is_the_integral_of_its_rate() -> None:
    path = VP(beta_min=0.1, beta_max=20.0)
    for t in (0.0, 0.3, 0.9, 1.0):
        integral = quad(lambda s: 0.1 + 19.9 * s, 0, 1 - t)[0]
        assert float(path.alpha(t)) == pytest.approx(math.exp(-integral / 2), rel=1e-12)
        assert float(path.alpha(t) ** 2 + path.sigma(t) ** 2) == pytest.approx(1, rel=1e-14)


def test_sigma_of_vp_keeps_its_digits_next_to_the_data() -> None:
    t = torch.tensor(1 - 2**-20)
    assert float(VP().sigma(t)) == pytest.approx(math.sqrt(-math.expm1(-0.1 * 2**-20 - 9.95 * 2**-40)), rel=1e-6)


@pytest.mark.parametrize("path", [Polynomial(), Polynomial(n=2.5), CondOT(sigma_min=1e-5), Cosine(), OU()], ids=name)
def test_sigma_keeps_its_digits_next_to_the_data(path: AffinePath) -> None:
    for t in (torch.tensor(1 - 2**-k) for k in range(1, 24)):
        assert float(path.sigma(t)) == pytest.approx(float(path.sigma(t.double())), rel=1e-6)


def test_ou_has_the_moments_of_its_process() -> None:
    # d E[x] = -E[x] ds and d Var = (2 - 2 Var) ds, integrated by RK4 from one data point
    path = OU(horizon=1.5)
    moments = np.array([1.0, 0.0])
    steps = 200
    for _ in range(steps):
        h = 1.5 / steps

        def rate(m: np.ndarray) -> np.ndarray:
            return np.array([-m[0], 2 - 2 * m[1]])

        k1 = rate(moments)
        k2 = rate(moments + h / 2 * k1)
        k3 = rate(moments + h / 2 * k2)
        moments = moments + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(moments + h * k3))
    assert float(path.alpha(0.0)) == pytest.approx(moments[0], rel=1e-9)
    assert float(path.sigma(0.0)) ** 2 == pytest.approx(moments[1], rel=1e-9)


def test_probability_flow_of_each_diffusion() -> None:
    """In the time of the diffusion, s = 1 - t: v = f - g^2 score / 2."""
    t = linspace(0, 1, 11)
    vp, ou, ve = VP(), OU(horizon=3.0), VE(sigma_min=0.1, sigma_max=10.0)
    beta = 0.1 + 19.9 * (1 - t)
    expected = {vp: (beta / 2, beta / 2), ou: (torch.full_like(t, 3.0),) * 2}
    rate = 2 * math.log(100.0) * ve.sigma(t) ** 2  # g^2 = d sigma^2 / ds
    expected[ve] = (torch.zeros_like(t), rate / 2)
    for path, coefficients in expected.items():
        for got, wanted in zip(path.coefficients(t, "score", "velocity"), coefficients, strict=True):
            torch.testing.assert_close(got, wanted)


def test_custom_path_is_the_path_of_the_same_formula() -> None:
    x0, x1, t = randn(11, 2), randn(11, 2, seed=1), linspace(0, 1, 11)
    own, given = Cosine().sample(x0, x1, t), QUARTER.sample(x0, x1, t)
    torch.testing.assert_close(own.x_t, given.x_t)
    torch.testing.assert_close(own.velocity, given.velocity)
    assert "alpha=<function" in repr(QUARTER)
    with torch.no_grad():
        torch.testing.assert_close(QUARTER.d_alpha(t), Cosine().d_alpha(t))


# --- the path ----------------------------------------------------------------------------------------------


@every_path
def test_float_scalar_and_batch_times_agree(path: AffinePath) -> None:
    x0, x1 = randn(4, 3), randn(4, 3, seed=1)
    expected = path.sample(x0, x1, torch.full((4,), 0.3, dtype=torch.float64))
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        sample = path.sample(x0, x1, t)
        torch.testing.assert_close(sample.x_t, expected.x_t, rtol=0, atol=1e-15)
        torch.testing.assert_close(sample.velocity, expected.velocity, rtol=0, atol=1e-13)
    assert path.sample(x0.float(), x1.float(), 0.3).x_t.dtype == torch.float32
    assert path.convert(x0.float(), 0.3, x1.float(), "velocity", "score").dtype == torch.float32


@every_path
def test_sampled_velocity_is_the_derivative_of_the_sampled_point(path: AffinePath) -> None:
    x0, x1, t = randn(5, 2, 2), randn(5, 2, 2, seed=1), linspace(0, 0.999, 5)
    along = torch.ones_like(t)
    x_t, velocity = jvp(lambda t: path.sample(x0, x1, t).x_t, t, along)  # type: ignore[no-untyped-call]
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(sample.x_t, x_t)
    torch.testing.assert_close(sample.velocity, velocity)


@every_path
def test_time_goes_with_the_batch_even_if_the_event_is_as_wide(path: AffinePath) -> None:
    x0, x1, t = randn(3, 3), randn(3, 3, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = path.sample(x0, x1, t)
    converted = path.convert(together.velocity, t, together.x_t, "velocity", "data")
    for i, time in enumerate(t.tolist()):
        alone = path.sample(x0[i : i + 1], x1[i : i + 1], time)
        torch.testing.assert_close(together.x_t[i : i + 1], alone.x_t)
        torch.testing.assert_close(together.velocity[i : i + 1], alone.velocity)
    torch.testing.assert_close(converted, x1)


@every_path
def test_conditional_velocity_generates_the_path(path: AffinePath) -> None:
    """The Gaussian-path theorem: the flow of `u_t(x | x1)` is `alpha_t x1 + sigma_t x0`."""
    x0, x1 = randn(6, 2), randn(6, 2, seed=1)
    t1 = linspace(0.1, 0.9, 6)
    start = path.sample(x0, x1, 0.0).x_t
    end = solve(lambda t, x, cond: path.conditional_velocity(t, x, x1), start, t1=t1, solver="rk4", steps=200).x
    torch.testing.assert_close(end, path.sample(x0, x1, t1).x_t, rtol=0, atol=1e-6)


@every_path
def test_conditional_velocity_along_the_path_is_the_sampled_one(path: AffinePath) -> None:
    x0, x1, t = randn(6, 2), randn(6, 2, seed=1), linspace(0, 0.99, 6)
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(path.conditional_velocity(t, sample.x_t, x1), sample.velocity)


@every_path
def test_conditional_score_is_that_of_the_normal_density(path: AffinePath) -> None:
    x1, t = randn(6, 2, seed=1), linspace(0, 0.99, 6)
    x = randn(6, 2).requires_grad_()
    normal = torch.distributions.Normal(path.alpha(t)[:, None] * x1, path.sigma(t)[:, None])
    (score,) = torch.autograd.grad(normal.log_prob(x).sum(), x)
    torch.testing.assert_close(path.convert(x1, t, x.detach(), "data", "score"), score)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_velocity_is_finite_at_the_end(path: AffinePath, dtype: torch.dtype) -> None:
    x0, x1 = randn(3, 2).to(dtype), randn(3, 2, seed=1).to(dtype)
    x = path.sample(x0, x1, 1.0).x_t.requires_grad_()
    velocity = path.conditional_velocity(torch.tensor([0.0, 0.5, 1.0], dtype=dtype), x, x1)
    assert torch.isfinite(velocity).all()
    if path.sigma(1.0) == 0:
        torch.testing.assert_close(velocity[2], path.d_alpha(1.0) * x1[2], check_dtype=False)
    (gradient,) = torch.autograd.grad(velocity.sum(), x)
    assert torch.isfinite(gradient).all()


# --- conversions -------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("t", TIMES)
def test_conversions_match_a_gaussian(path: AffinePath, t: float) -> None:
    x = randn(50, 1)
    truth = gaussian_truth(path, t, x)
    for source, target in PAIRS:
        result = path.convert(truth[source], t, x, source=source, target=target)
        case = verdict(path, t, source, target)
        if case == "exact":
            torch.testing.assert_close(result, truth[target], rtol=1e-6, atol=1e-7)
        elif case == "mean":  # the noise is taken to be zero, so x is alpha times the data
            torch.testing.assert_close(result, path.d_alpha(t) * x / path.alpha(t))
        else:
            assert result.isnan().all(), (source, target)


@every_path
@pytest.mark.parametrize("t", TIMES)
def test_round_trips_return_at_the_ends_too(path: AffinePath, t: float) -> None:
    x = randn(20, 2)
    trips = [p for p in PAIRS if verdict(path, t, *p) == verdict(path, t, *reversed(p)) == "exact"]
    assert len(trips) >= 6  # each with itself, and one pair at least
    for source, target in trips:
        value = gaussian_truth(path, t, x)[source]
        there = path.convert(value, t, x, source, target)
        torch.testing.assert_close(path.convert(there, t, x, target, source), value, rtol=1e-6, atol=1e-6)


@every_path
def test_any_value_makes_the_round_trip_inside(path: AffinePath) -> None:
    x, value, t = randn(20, 2), randn(20, 2, seed=1), linspace(0.02, 0.98, 20)
    for source, target in itertools.permutations(QUANTITIES, 2):
        there = path.convert(value, t, x, source, target)
        torch.testing.assert_close(path.convert(there, t, x, target, source), value, rtol=1e-6, atol=1e-6)


@every_path
def test_a_chain_of_conversions_is_the_direct_one(path: AffinePath) -> None:
    x, value, t = randn(20, 2), randn(20, 2, seed=1), linspace(0.02, 0.98, 20)
    for source, middle, target in itertools.permutations(QUANTITIES, 3):
        detour = path.convert(path.convert(value, t, x, source, middle), t, x, middle, target)
        torch.testing.assert_close(path.convert(value, t, x, source, target), detour, rtol=1e-6, atol=1e-6)


@every_path
def test_coefficients_have_the_shape_of_the_time(path: AffinePath) -> None:
    for t in (0.3, torch.tensor(0.3), torch.rand(4), torch.rand(2, 3)):
        shape = t.shape if isinstance(t, Tensor) else torch.Size()
        for source, target in PAIRS:
            assert [c.shape for c in path.coefficients(t, source, target)] == [shape, shape]


@every_path
@pytest.mark.parametrize("kept", [1.0, 0.4])
def test_a_step_moves_the_data_and_a_share_of_the_noise_along_the_path(path: AffinePath, kept: float) -> None:
    """From any prediction that is right, to the end itself; times of rows and times of all alike."""
    x0, x1, rows = randn(5, 2), randn(5, 2, seed=1), linspace(0.1, 0.6, 5)
    times = torch.stack([rows, rows + 0.3, torch.ones_like(rows)])
    for source in QUANTITIES:
        of_x, of_source = path.step_coefficients(times, source, kept)
        assert of_x.shape == of_source.shape == (2, 5)
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            x = path.sample(x0, x1, s).x_t
            value = path.convert(x1, s, x, source="data", target=source)
            moved = expand_time(of_x[i], x) * x + expand_time(of_source[i], x) * value
            torch.testing.assert_close(moved, path.sample(kept * x0, x1, t).x_t, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(path.step_coefficients(times[:, 3], source, kept), (of_x[:, 3], of_source[:, 3]))


@every_path
def test_a_step_from_pure_noise_takes_unknown_data_to_be_zero(path: AffinePath) -> None:
    times = torch.tensor([0.0, 0.4], dtype=torch.float64)
    if path.alpha(0.0) != 0:
        pytest.skip("its start shows data")
    of_x, of_noise = path.step_coefficients(times, "noise")
    assert (of_x, of_noise) == (0, path.sigma(0.4) / path.sigma(0.0))
    of_x, of_velocity = path.step_coefficients(times, "velocity")
    if path.d_alpha(0.0) == 0:  # nor does a velocity at rest
        assert (of_x * path.sigma(0.0), of_velocity) == (path.sigma(0.4), 0)
    else:
        torch.testing.assert_close(of_velocity[0], path.alpha(0.4) / path.d_alpha(0.0))


@every_path
def test_an_end_in_the_batch_spoils_no_gradient(path: AffinePath) -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x, value = randn(3, 2).requires_grad_(), randn(3, 2, seed=1).requires_grad_()
    for source, target in itertools.permutations(QUANTITIES, 2):
        gradients = torch.autograd.grad(path.convert(value, t, x, source, target)[1].sum(), (x, value))
        assert all(torch.isfinite(gradient).all() for gradient in gradients), (source, target)


# --- a velocity field of a network that predicts something else --------------------------------------------


@every_path
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_velocity_of_a_true_prediction_is_the_true_velocity(path: AffinePath, prediction: Quantity) -> None:
    truth = overlapping()

    def network(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if prediction == "velocity":
            return truth.velocity(t, x, path)
        if prediction == "data" and path.alpha(t) == 0:
            return truth.mean.expand_as(x)
        return path.convert(truth.score(t, x, path), t, x, "score", prediction)

    field = VelocityOf(network, path, prediction, mean=truth.mean)
    x = randn(30, 2)
    for t in TIMES:
        expected = truth.velocity(t, x, path)
        # where the rate of the noise is infinite the score is that of a moment before
        tolerance = 1e-3 if verdict(path, t, prediction, "velocity") == "mean" else 1e-6
        torch.testing.assert_close(field(t, x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert torch.isfinite(solve(field, x, solver="rk4", steps=8).x).all()


@torch.no_grad()
@pytest.mark.parametrize("path", [path for path in PATHS if not isinstance(path, CustomPath)], ids=name)
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_likelihood_of_a_prediction_converges_to_both_ends(path: AffinePath, prediction: Quantity) -> None:
    """From the data at t = 1 to the noise at t = 0, for N(m, I), whose flow scales the deviation from the mean."""
    mean = torch.full((2,), 0.3, dtype=torch.float64)

    def network(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return gaussian_truth(path, expand_time(t, x), x, mean=0.3, std=1.0)[prediction]

    x, base, ends = randn(20, 2), float(path.sigma(0.0)), linspace(0, 1, 2)
    size = (path.alpha(ends).square() + path.sigma(ends).square()).sqrt()
    x0 = size[0] / size[1] * (x - path.alpha(1.0) * mean) + path.alpha(0.0) * mean
    exact = torch.distributions.Normal(0.0, base).log_prob(x0).sum(1) + 2 * (size[0] / size[1]).log()
    field = VelocityOf(network, path, prediction, mean=mean)
    errors = [
        float((ContinuousFlow(field, (2,), solver="rk4", steps=n, base_scale=base).log_prob(x) - exact).abs().max())
        for n in (16, 32)
    ]
    assert errors[1] < max(errors[0] / 3, 1e-6), errors  # a wrong value at an end halves at best


@every_path
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_divergence_of_a_prediction_is_in_closed_form(path: AffinePath, prediction: Quantity) -> None:
    network = MLPField(3, (8, 8), generator=torch.Generator().manual_seed(0)).double()
    field = VelocityOf(network, path, prediction, mean=torch.ones(3, dtype=torch.float64))
    assert field.has_closed_form_divergence
    x = randn(5, 3)
    for t in (0.0, 0.5, 1.0, linspace(0, 1, 5)):
        velocity, total = divergence(field, t, x)
        same, expected = divergence(field, t, x, method="exact")
        torch.testing.assert_close(velocity, same)
        torch.testing.assert_close(total, expected)
        assert torch.isfinite(velocity).all()
    assert not VelocityOf(lambda t, x, cond: x, path, prediction).has_closed_form_divergence


@every_path
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_gradients_of_a_prediction_are_finite_at_the_ends(path: AffinePath, prediction: Quantity) -> None:
    network = MLPField(2, (8,), generator=torch.Generator().manual_seed(0)).double()
    field = VelocityOf(network, path, prediction)
    field(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), randn(3, 2)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None) > 0


def test_a_prediction_is_a_module_of_its_network() -> None:
    network = nn.Linear(2, 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            out: Tensor = self.inner(x)
            return out if cond is None else out + cond

    field = VelocityOf(Net(), Cosine(), "data", mean=torch.ones(2))
    assert set(field.state_dict()) == {"mean", "network.inner.weight", "network.inner.bias"}
    x, cond = torch.ones(3, 2), torch.ones(3, 2)
    assert not torch.equal(field(0.5, x, cond), field(0.5, x))


# --- arguments ---------------------------------------------------------------------------------------------


@every_path
def test_bad_arguments_are_named(path: AffinePath) -> None:
    x = randn(3, 2)
    with pytest.raises(ValueError, match=r"t has shape \(3, 1\)"):
        path.sample(x, x, torch.rand(3, 1))
    with pytest.raises(ValueError, match=r"t has shape \(2,\)"):
        path.sample(x, x, torch.rand(2))
    with pytest.raises(ValueError, match=r"t has shape \(3, 1\)"):
        path.convert(x, torch.rand(3, 1), x, "velocity", "score")
    with pytest.raises(ValueError, match="x0 has shape"):
        path.sample(x[:, :1], x, 0.5)
    with pytest.raises(ValueError, match="source is 'flow'"):
        path.convert(x, 0.5, x, source="flow", target="score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target is 'flow'"):
        path.coefficients(0.5, source="score", target="flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value has shape"):
        path.convert(x[:1], 0.5, x, source="velocity", target="score")
    with pytest.raises(ValueError, match="prediction is 'flow'"):
        VelocityOf(lambda t, x, cond: x, path, prediction="flow")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        path.sample(x, x, time=0.5)  # type: ignore[call-arg]


def test_bad_schedules_are_refused() -> None:
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="sigma_min is"):
            CondOT(sigma_min=bad)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="beta_min is"):
            VP(beta_min=low, beta_max=high)
        with pytest.raises(ValueError, match="sigma_min is"):
            VE(sigma_min=low, sigma_max=high)
    for bad in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="n is"):
            Polynomial(n=bad)
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="horizon is"):
            OU(horizon=bad)
    with pytest.raises(ValueError, match=r"the result of alpha has shape \(1,\)"):
        CustomPath(lambda t: t.reshape(1), lambda t: 1 - t).alpha(0.5)
    assert expand_time(0.5, randn(2, 2)) == 0.5
