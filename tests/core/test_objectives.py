"""Laws of the training objectives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.couplings import Independent, MinibatchOT
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.objectives import (
    cfm_batch,
    cfm_loss,
    interpolant_loss,
    posterior_cfm_loss,
    sb_cfm_loss,
    sf2m_loss,
)
from flowmatch_core.objectives.interpolant import parabola
from flowmatch_core.paths import VE, VP, AffinePath, CondOT, Cosine, CustomPath, Polynomial, Quantity
from flowmatch_core.successor import Transitions, mc_cfm_loss, td2_cfm_loss
from tests.support.fields import zero
from tests.support.random import generator


def torch_tanh(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    return torch.tanh(x)


PREDICTIONS = get_args(Quantity)
ONES = torch.ones(4, 2)
ATOMS = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -2.0]], dtype=torch.float64)


def features(t: Time, x: Tensor) -> Tensor:
    s = expand_time(t, x)
    return torch.cat([x, s * x, torch.ones_like(s), s], 1)


def linear_field(theta: Tensor) -> VelocityField:
    return lambda t, x, cond: features(t, x) @ theta


def marginal(path: AffinePath, t: Tensor, x: Tensor, prediction: Quantity) -> Tensor:
    """The quantity for data on the atoms: their posterior weighs what each of them would give."""
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    distance = ((x[:, None] - alpha[..., None] * ATOMS) / sigma[..., None]).square().sum(-1)
    each = torch.stack([path.convert(a.expand_as(x), t, x, "data", prediction) for a in ATOMS], 1)
    return ((-distance / 2).softmax(-1)[..., None] * each).sum(1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "path", [CondOT(), CondOT(sigma_min=0.2), Cosine(), VP(), VE(0.1, 5.0), Polynomial()], ids=repr
)
def test_gradient_is_that_of_the_regression_on_the_marginal_quantity(path: AffinePath, prediction: Quantity) -> None:
    n, g = 50_000, generator()
    x1 = ATOMS[torch.randint(3, (n,), generator=g)]
    x0 = torch.randn(x1.shape, generator=g, dtype=torch.float64)
    t = 0.9 * torch.rand(n, generator=g, dtype=torch.float64)
    theta = torch.randn(6, 2, generator=g, dtype=torch.float64, requires_grad=True)

    loss = cfm_loss(linear_field(theta), path, x1, x0, time=t, prediction=prediction)
    (gradient,) = torch.autograd.grad(loss, theta)

    x = path.sample(x0, x1, t).x_t
    basis, truth = features(t, x), marginal(path, t, x, prediction)
    weight = path.sigma(t).square() if prediction == "score" else torch.ones_like(t)
    basis_weight = (weight[:, None] * basis)[:, :, None]
    residual = (basis @ theta.detach() - truth)[:, None, :] * basis_weight
    conditional = path.convert(x1, t, x, "data", prediction)
    difference = (truth - conditional)[:, None, :] * basis_weight
    expected = residual.mean(0)  # the 2 of the square cancels the mean over the two dimensions
    standard_error = difference.std(0) / math.sqrt(n)
    assert ((gradient - expected).abs() < 4.5 * standard_error).all()
    assert (expected.abs() > 20 * standard_error).any()


@pytest.mark.parametrize("path", [CondOT(), VP(), VE(0.1, 5.0)], ids=repr)
@pytest.mark.parametrize("prediction", ["noise", "data", "score"])
def test_minimum_of_the_other_predictions_for_gaussian_data_is_known(path: AffinePath, prediction: Quantity) -> None:
    std, g = 0.5, generator()
    x1 = std * torch.randn(200_000, 2, generator=g, dtype=torch.float64)

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        a, s = (expand_time(f(t), x) for f in (path.alpha, path.sigma))
        score = -x / (a**2 * std**2 + s**2)
        return {"score": score, "noise": -s * score, "data": (x + s**2 * score) / a.clamp_min(1e-9)}[prediction]

    def variance(t: float) -> float:
        a, s = float(path.alpha(t)) ** 2 * std**2, float(path.sigma(t)) ** 2
        return (std**2 * s if prediction == "data" else a) / (a + s)

    loss = cfm_loss(field, path, x1, prediction=prediction, generator=g)
    assert float(loss) == pytest.approx(quad(variance, 0, 1)[0], rel=0.02)


def test_the_loss_of_ddpm_is_the_error_of_the_noise() -> None:
    x1 = torch.randn(64, 3, generator=generator(1), dtype=torch.float64)
    g = generator(7)
    noise = torch.randn(64, 3, generator=g, dtype=torch.float64)
    t = torch.rand(64, generator=g, dtype=torch.float64)
    s = 1 - t  # DDPM counts from the data
    alpha_bar = torch.exp(-0.1 * s - 9.95 * s**2)
    x = alpha_bar.sqrt()[:, None] * x1 + (1 - alpha_bar).sqrt()[:, None] * noise
    expected = (torch.tanh(x) - noise).square().mean()
    loss = cfm_loss(lambda t, x, cond: torch.tanh(x), VP(), x1, prediction="noise", generator=generator(7))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("path", [CondOT(), VP(), VE(0.1, 5.0), Cosine()], ids=repr)
def test_a_score_is_a_noise_in_other_units_and_finite_at_the_end(path: AffinePath) -> None:
    x1 = torch.randn(64, 3, generator=generator(1), dtype=torch.float64)
    t = torch.linspace(0, 1, 64, dtype=torch.float64)

    def noise(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return torch.tanh(x)

    def score(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return -torch.tanh(x) / expand_time(path.sigma(t), x).clamp_min(1e-300)

    losses = [
        cfm_loss(field, path, x1, time=t, prediction=prediction, generator=generator(2))  # type: ignore[arg-type]
        for field, prediction in ((noise, "noise"), (score, "score"))
    ]
    assert losses[0].isfinite()
    inside = [
        cfm_loss(field, path, x1, time=0.9 * t, prediction=prediction, generator=generator(2))  # type: ignore[arg-type]
        for field, prediction in ((noise, "noise"), (score, "score"))
    ]
    torch.testing.assert_close(*inside)
    assert cfm_loss(noise, path, x1, time=torch.ones(64), prediction="score").isfinite()


def test_the_default_draws_noise_then_time_and_regresses_the_velocity() -> None:
    x1 = torch.randn(64, 3, generator=generator(1))
    g = generator(5)
    x0 = torch.randn(64, 3, generator=g)
    t = torch.rand(64, generator=g)[:, None]
    expected = (torch.tanh(t * x1 + (1 - t) * x0) - (x1 - x0)).square().mean()
    g_loss = generator(5)
    assert torch.equal(cfm_loss(lambda t, x, cond: torch.tanh(x), CondOT(), x1, generator=g_loss), expected)
    assert torch.equal(g.get_state(), g_loss.get_state())


def test_minimum_for_gaussian_data_is_known() -> None:
    std, g = 0.5, generator()
    x1 = std * torch.randn(200_000, 2, generator=g, dtype=torch.float64)

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        s = expand_time(t, x)
        return (s * std**2 - (1 - s)) / ((1 - s) ** 2 + s**2 * std**2) * x

    loss = cfm_loss(field, CondOT(), x1, generator=g)
    assert float(loss) == pytest.approx(math.pi / 2 * std, rel=0.01)


def test_times_are_the_ones_given_or_sampled() -> None:
    x0, x1 = torch.randn(2, 16, 3, generator=generator(), dtype=torch.float64)
    seen: list[Tensor] = []

    def record(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        seen.extend([t, x])
        return x

    cfm_loss(record, CondOT(), x1, x0, time=torch.zeros(16))
    torch.testing.assert_close(seen[1], x0)
    cfm_loss(record, CondOT(), x1, x0, time=lambda *a, **k: 1 - 0 * torch.rand(*a, **k), generator=generator())
    torch.testing.assert_close(seen[3], x1)
    cfm_loss(record, CondOT(), x1, x0, generator=generator(1))
    assert seen[4].shape == (16,) and seen[4].dtype == x1.dtype and 0 <= seen[4].min() < seen[4].max() < 1


def test_the_coupling_pairs_and_the_condition_stays_with_the_data() -> None:
    x1 = torch.randn(32, 2, generator=generator(), dtype=torch.float64)
    x0, cond = x1.flip(0), torch.arange(32.0)[:, None]

    def field(t: Time, x: Tensor, given: Tensor | None = None) -> Tensor:
        assert given is cond
        return torch.zeros_like(x)

    assert cfm_loss(field, CondOT(), x1, x0, cond, coupling=MinibatchOT()) == 0
    assert cfm_loss(field, CondOT(), x1, x0, cond) > 1


def test_randomness_comes_from_the_generator_alone() -> None:
    x1 = torch.ones(64, 2)
    state = torch.get_rng_state()
    losses = [cfm_loss(zero, CondOT(), x1, generator=generator(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("loss", [cfm_loss, interpolant_loss, posterior_cfm_loss])
def test_an_unknown_prediction_is_named(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="prediction is 'eps', but should be one of velocity, score, noise, data"):
        loss(zero, CondOT(), torch.ones(4, 2), prediction="eps")


# --- stochastic interpolants -------------------------------------------------------------------------------


def wave(t: Tensor) -> Tensor:
    return torch.sin(math.pi * t).square()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [wave, parabola, lambda t: torch.sqrt(2 * t * (1 - t))])
def test_the_minimiser_between_two_gaussians_is_known(gamma: Callable[[Tensor], Tensor], prediction: Quantity) -> None:
    n, time, path, g = 100_000, 0.3, Cosine(), generator()
    (m0, s0), (m1, s1) = (-1.0, 0.5), (2.0, 1.5)
    x0 = m0 + s0 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    x1 = m1 + s1 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    t = torch.full((n,), time, dtype=torch.float64)

    a, s, da, ds = (float(f(time)) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    h = 1e-6
    c, dc = float(gamma(t[0])), float(gamma(t[0] + h) - gamma(t[0] - h)) / (2 * h)
    variance = a**2 * s1**2 + s**2 * s0**2 + c**2
    slope = {
        "velocity": (da * a * s1**2 + ds * s * s0**2 + dc * c) / variance,
        "noise": c / variance,
        "score": -1 / variance,
        "data": a * s1**2 / variance,
    }[prediction]
    offset = {"velocity": da * m1 + ds * m0, "noise": 0.0, "score": 0.0, "data": m1}[prediction]
    middle = a * m1 + s * m0

    theta = torch.tensor([slope, offset], dtype=torch.float64, requires_grad=True)

    def field(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return theta[0] * (x - middle) + theta[1]

    loss = interpolant_loss(field, path, x1, x0, gamma=gamma, time=t, prediction=prediction, generator=g)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    for i in range(2):  # a Newton step from the truth is nothing but sampling noise
        curvature = float(torch.autograd.grad(gradient[i], theta, retain_graph=True)[0][i])
        step = abs(float(gradient[i].detach())) / curvature
        standard_error = math.sqrt(2 * float(loss.detach()) / curvature / n)
        assert step < 4.5 * standard_error < 0.1


def test_without_latent_noise_an_interpolant_is_flow_matching() -> None:
    x1, x0 = torch.randn(2, 32, 3, generator=generator())
    for prediction in ("velocity", "data"):
        expected = cfm_loss(torch_tanh, Cosine(), x1, x0, prediction=prediction, generator=generator(3))
        loss = interpolant_loss(
            torch_tanh, Cosine(), x1, x0, gamma=torch.zeros_like, prediction=prediction, generator=generator(3)
        )
        assert torch.equal(loss, expected)


def test_velocity_and_denoiser_see_the_same_points() -> None:
    x1 = torch.randn(32, 3, generator=generator())
    seen: list[Tensor] = []

    def record(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        seen.extend([t, x])
        return x

    for prediction in ("velocity", "noise"):
        interpolant_loss(record, CondOT(), x1, prediction=prediction, generator=generator(3))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    interpolant_loss(record, CondOT(), x1, coupling=MinibatchOT(), generator=generator(3))
    assert not torch.equal(seen[5], seen[1])


def test_loss_is_the_mean_over_rows_and_dimensions_of_any_event() -> None:
    x1, x0 = torch.full((4, 1, 2, 3), 3.0), torch.zeros(4, 1, 2, 3)
    assert cfm_loss(zero, CondOT(), x1, x0) == 9


def test_bad_arguments_are_named() -> None:
    x1 = torch.ones(4, 2)
    with pytest.raises(ValueError, match="the result of field has shape"):
        cfm_loss(lambda t, x, cond: x[:, :1], CondOT(), x1)
    with pytest.raises(ValueError, match="x0 has shape"):
        cfm_loss(zero, CondOT(), x1, x1[:1])
    with pytest.raises(TypeError):
        cfm_loss(zero, CondOT(), x1, couplng=MinibatchOT())  # type: ignore[call-arg]


def test_no_rows_and_no_real_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="x1 has no rows"):
        cfm_loss(lambda t, x, cond: x, CondOT(), torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"x1 has dtype torch\.int64, but should be of a floating-point dtype"):
        cfm_loss(lambda t, x, cond: x, CondOT(), torch.ones(3, 2, dtype=torch.int64))


BAD_CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: cfm_loss(zero, CondOT(), ONES, coupling=MinibatchOT), "coupling is the class MinibatchOT, but"),  # type: ignore[arg-type]
    (lambda: sb_cfm_loss(zero, ONES, coupling=Independent), "coupling is the class Independent, but"),  # type: ignore[arg-type]
    (lambda: cfm_loss(zero, CondOT, ONES), r"path is the class CondOT, but should be an object; pass CondOT\(\)"),  # type: ignore[arg-type]
    (lambda: posterior_cfm_loss(zero, CondOT, ONES), "path is the class CondOT, but"),  # type: ignore[arg-type]
    (lambda: interpolant_loss(zero, CondOT, ONES), "path is the class CondOT, but"),  # type: ignore[arg-type]
    (lambda: interpolant_loss(zero, CondOT(), ONES.long(), ONES), r"x1 has dtype torch\.int64, but"),
    (lambda: posterior_cfm_loss(zero, CondOT(), ONES.long(), ONES), r"x1 has dtype torch\.int64, but"),
    (lambda: cfm_loss(lambda x, t: x, CondOT(), ONES), "field takes the arguments .* t comes first"),  # type: ignore[arg-type]
    (lambda: interpolant_loss(lambda t, x: x, CondOT(), ONES), "let it take a third one"),  # type: ignore[arg-type]
    (lambda: cfm_loss(lambda t, x, cond: t * x, CondOT(), torch.ones(2, 2)), "spreads a time of shape"),
    (lambda: cfm_loss(zero, CondOT(), ONES, cond=ONES[:1]), r"cond has shape \(1, 2\), but should have 4 rows"),
    (lambda: cfm_loss(zero, CondOT(), ONES, cond={"a": ONES, "b": ONES[0]}), r"cond has shape \(2,\), but"),
    (lambda: cfm_loss(zero, CondOT(), ONES, cond=[1, 2, 3, 4]), "cond is a list, but should be a tensor or a mapping"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_a_mistake_in_a_call_is_one_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def embed(cond: Any) -> Tensor:
    """Two numbers of each condition, whatever it is."""
    parts = list(cond.values()) if isinstance(cond, dict) else [cond]
    rows = torch.cat([part.reshape(len(part), -1).double() for part in parts], 1)
    return rows.sum(1, keepdim=True) * torch.tensor([0.1, -0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    "cond",
    [
        torch.arange(6) % 3,
        torch.randn(6, 1, 4, 4, generator=generator(3), dtype=torch.float64),
        {"label": torch.arange(6) % 3, "image": torch.randn(6, 2, 2, generator=generator(4), dtype=torch.float64)},
    ],
    ids=["labels", "images", "mapping"],
)
def test_conditions_of_any_shape_reach_the_field(cond: Any) -> None:
    """The loss is that of the same field with its condition written out as two columns."""
    x1, x0 = torch.randn(2, 6, 2, generator=generator(), dtype=torch.float64)

    def given(t: Time, x: Tensor, c: Any) -> Tensor:
        return torch.tanh(x) + embed(c)

    def written_out(t: Time, x: Tensor, c: Tensor | None) -> Tensor:
        assert c is not None
        return torch.tanh(x) + c

    for loss in (
        partial(cfm_loss, path=CondOT()),
        partial(interpolant_loss, path=CondOT()),
        partial(posterior_cfm_loss, path=CondOT(), time=torch.ones(6)),  # where no row is averaged with another
        partial(sb_cfm_loss, coupling=Independent()),
        partial(sf2m_loss, score=zero, coupling=Independent()),
    ):
        found = loss(field=given, x1=x1, x0=x0, cond=cond, generator=generator(1))
        assert found == loss(field=written_out, x1=x1, x0=x0, cond=embed(cond), generator=generator(1))


@pytest.mark.parametrize(
    "path", [CondOT(), CustomPath(alpha=lambda t: t**3, sigma=lambda t: 1 - t**3)], ids=["CondOT", "CustomPath"]
)
def test_an_expanded_time_is_a_time_of_each_row(path: AffinePath) -> None:
    x1, x0 = torch.randn(2, 4, 3, generator=generator())
    one = torch.tensor([0.3])
    for loss in (cfm_loss, interpolant_loss, posterior_cfm_loss):
        losses = [
            loss(torch_tanh, path, x1, x0, time=t, generator=generator(2)) for t in (one.expand(4), one.repeat(4))
        ]
        assert losses[0] == losses[1]


def test_a_time_may_be_one_number() -> None:
    x1, x0 = torch.randn(4, 2), torch.randn(4, 2)
    times = (0.5, torch.tensor(0.5), torch.full((4,), 0.5))
    values = [cfm_loss(lambda t, x, cond: x * 0, CondOT(), x1, x0, time=t) for t in times]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_asks_a_sampler_for_a_time_of_each_row_in_the_dtype_of_the_data(dtype: torch.dtype) -> None:
    asked, x, g = [], torch.randn(5, 2, dtype=dtype), torch.Generator()

    def sampler(*args: object, **options: object) -> Tensor:
        asked.append((args, options))
        return torch.rand(5, dtype=dtype)

    batch = Transitions(x, None, x, None)
    for loss in (
        lambda: cfm_loss(zero, CondOT(), x, time=sampler, generator=g),
        lambda: mc_cfm_loss(zero, batch, x, time=sampler, generator=g),
        lambda: td2_cfm_loss(zero, zero, batch, gamma=0.9, time=sampler, generator=g),
    ):
        loss()
    assert asked == 3 * [((5,), {"generator": g, "dtype": dtype, "device": x.device})]


# --- batches that are drawn ahead ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_batch_has_the_loss_of_its_draw(prediction: Quantity) -> None:
    x1, cond = torch.randn(2, 12, 2, generator=generator(), dtype=torch.float64)
    weight = torch.rand(12, generator=generator(1))

    def field(t: Time, x: Tensor, c: Tensor | None) -> Tensor:
        assert c is not None
        return torch.tanh(x) * expand_time(t, x) + c

    given: dict[str, Any] = {"cond": cond, "weight": weight, "prediction": prediction, "coupling": MinibatchOT()}
    batch = cfm_batch(Cosine(), x1, **given, generator=generator(2))
    assert batch.loss(field) == cfm_loss(field, Cosine(), x1, **given, generator=generator(2))


@pytest.mark.parametrize("prediction", ["velocity", "score"])
@pytest.mark.parametrize("time", [0.3, torch.rand])
def test_the_parts_of_a_batch_have_its_rows_in_their_order(prediction: Quantity, time: Any) -> None:
    """The loss of each part is that of these rows of the data, the noise, the conditions, the weights and the times."""
    x1, x0, image = torch.randn(3, 10, 2, generator=generator(), dtype=torch.float64)
    times = time if isinstance(time, float) else torch.rand(10, generator=generator(1), dtype=torch.float64)
    cond, weight = {"label": torch.arange(10), "image": image}, torch.rand(10, generator=generator(2))

    def field(t: Time, x: Tensor, c: Any) -> Tensor:
        return torch.tanh(x) * expand_time(t, x) + embed(c)

    drawn = cfm_batch(VP(), x1, x0, cond, time=times, prediction=prediction, weight=weight)
    parts = list(drawn.split(4))
    assert [len(part.x_t) for part in parts] == [4, 4, 2]
    for part, rows in zip(parts, torch.arange(10).split(4), strict=True):
        t = times if isinstance(times, float) else times[rows]
        at_rows = {name: each[rows] for name, each in cond.items()}
        expected = cfm_loss(
            field, VP(), x1[rows], x0[rows], at_rows, time=t, prediction=prediction, weight=weight[rows]
        )
        torch.testing.assert_close(part.loss(field), expected)
    plain = next(cfm_batch(CondOT(), x1, x0, image, time=times).split(3))
    assert plain.weight is None and torch.equal(plain.cond, image[:3])
    with pytest.raises(ValueError, match="size is 0, but should be at least 1"):
        drawn.split(0)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_straight_path_has_the_values_of_any_affine_path_bit_for_bit(sigma_min: float, dtype: torch.dtype) -> None:
    path = CondOT(sigma_min)
    x0, x1 = torch.randn(2, 50, 3, generator=generator(), dtype=dtype)
    for t in (0.3, torch.rand(50, generator=generator(1)), torch.linspace(0, 1, 50, dtype=dtype)):
        found, expected = path.sample(x0, x1, t), AffinePath.sample(path, x0, x1, t)
        for name in ("x_t", "velocity", "t"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
