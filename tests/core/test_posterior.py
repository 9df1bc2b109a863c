"""Laws of the posterior-averaged loss: the same gradient as flow matching, with less variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import expand_time
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.objectives import cfm_loss, posterior_cfm_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import VE, VP, AffinePath, CondOT, Cosine, Quantity
from tests.support.fields import zero
from tests.support.random import generator, randn

PATHS = [CondOT(), CondOT(sigma_min=0.1), Cosine(), VP(), VE(0.1, 5.0)]
PREDICTIONS = get_args(Quantity)


def mixture() -> GaussianMixture:
    means = torch.tensor([[-2.0, 0.0], [1.5, 1.0]], dtype=torch.float64)
    return GaussianMixture(
        torch.tensor([0.6, 0.4], dtype=torch.float64), means, 0.2 * torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    )


def features(t: Time, x: Tensor) -> Tensor:
    s = expand_time(t, x)
    return torch.cat([x, s * x, torch.ones_like(s)], 1)


def linear_field(theta: Tensor) -> VelocityField:
    return lambda t, x, cond: features(t, x) @ theta


def target(loss: Callable[[VelocityField], Tensor], shape: torch.Size) -> Tensor:
    """The target of a mean-squared loss, read from its gradient in the prediction."""
    prediction = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(lambda t, x, cond: prediction), prediction)
    return -gradient * prediction.numel() / 2


def bayes(path: AffinePath, t: Tensor, x: Tensor, rows: Tensor, prediction: Quantity, mask: Tensor | None) -> Tensor:
    """The posterior average over the rows, one by one and by the density of torch."""
    result = []
    for i in range(len(x)):
        normal = torch.distributions.Normal(path.alpha(t[i]) * rows, path.sigma(t[i]))
        log_prob = normal.log_prob(x[i]).sum(1)
        if mask is not None:
            log_prob = log_prob.masked_fill(~mask[i], -math.inf)
        here = x[i].expand_as(rows)
        each = path.convert(rows, t[i].expand(len(rows)), here, "data", prediction)
        result.append(log_prob.softmax(0) @ each)
    return torch.stack(result)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("more", [0, 20])
def test_target_is_the_average_by_the_rule_of_bayes(path: AffinePath, prediction: Quantity, more: int) -> None:
    g = generator()
    x1, x0 = mixture().sample(12, generator=g), randn(12, 2, seed=1)
    reference = mixture().sample(more, generator=g) if more else None
    t = torch.linspace(0.05, 0.97, 12, dtype=torch.float64)

    def loss(field: VelocityField) -> Tensor:
        return posterior_cfm_loss(field, path, x1, x0, reference=reference, time=t, prediction=prediction)

    rows = x1 if reference is None else torch.cat([x1, reference])
    expected = bayes(path, t, path.sample(x0, x1, t).x_t, rows, prediction, None)
    if prediction == "score":  # the loss carries sigma^2
        expected = path.sigma(t)[:, None].square() * expected
    torch.testing.assert_close(target(loss, x1.shape), expected)


@pytest.mark.parametrize("path", [CondOT(), Cosine(), VP()], ids=repr)
def test_all_of_a_finite_dataset_gives_its_exact_marginal_velocity(path: AffinePath) -> None:
    data = mixture().sample(30, generator=generator())
    atoms = GaussianMixture(
        torch.full((30,), 1 / 30, dtype=torch.float64), data, torch.zeros(30, 2, 2, dtype=torch.float64)
    )
    x0, t = randn(10, 2, seed=1), torch.linspace(0, 0.95, 10, dtype=torch.float64)
    x1 = data[:10]
    expected = atoms.velocity(t[:, None].squeeze(1), path.sample(x0, x1, t).x_t, path)
    found = target(lambda f: posterior_cfm_loss(f, path, x1, x0, reference=data[10:], time=t), x1.shape)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=repr)
def test_at_the_data_only_the_own_row_has_weight(path: AffinePath) -> None:
    for dtype in (torch.float32, torch.float64):
        x1, x0 = randn(6, 2).to(dtype), randn(6, 2, seed=1).to(dtype)
        times = torch.tensor([1.0, 1 - 1e-6, 1 - 1e-5, 1 - 1e-4, 0.999, 0.995], dtype=dtype)
        own = cfm_loss(zero, path, x1, x0, time=times)
        found = posterior_cfm_loss(zero, path, x1, x0, reference=randn(50, 2, seed=2).to(dtype), time=times)
        torch.testing.assert_close(found, own)


def early(n: int, **options: Any) -> Tensor:
    return 0.8 * torch.rand(n, **options)


def gradients(loss: Callable[..., Tensor], repeats: int, batch: int, **options: object) -> Tensor:
    """The gradients of independent batches, for a linear field with fixed weights."""
    g, data, found = generator(1), mixture(), []
    theta = randn(5, 2, seed=3).requires_grad_()
    for _ in range(repeats):
        more = {k: v(g) for k, v in options.items() if callable(v)}
        x1 = data.sample(batch, generator=g)
        value = loss(linear_field(theta), CondOT(), x1, time=early, generator=g, **more)
        found.append(torch.autograd.grad(value, theta)[0])
    return torch.stack(found)


def exact_gradient(n: int = 400_000) -> tuple[Tensor, Tensor]:
    """The gradient of the regression on the true marginal velocity, and its standard error."""
    g, data = generator(9), mixture()
    theta = randn(5, 2, seed=3)
    t = early(n, generator=g, dtype=torch.float64)
    x0 = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x = CondOT().sample(x0, data.sample(n, generator=g), t).x_t
    basis = features(t, x)
    each = (basis @ theta - data.velocity(t, x))[:, None, :] * basis[:, :, None]
    return each.mean(0), each.std(0) / math.sqrt(n)


def test_gradient_is_unbiased_with_as_few_as_three_rows() -> None:
    truth, error = exact_gradient()
    found = gradients(posterior_cfm_loss, repeats=1500, batch=3)
    error = (found.var(0) / len(found) + error.square()).sqrt()
    assert ((found.mean(0) - truth).abs() < 4.5 * error).all()

    # what the row's own data are for: without them fewer draws show the bias
    def without_own(
        field: VelocityField,
        path: AffinePath,
        x1: Tensor,
        *,
        time: Callable[..., Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        fresh = mixture().sample(len(x1), generator=generator)
        x0 = torch.randn(x1.shape, generator=generator, dtype=torch.float64)
        t = time(len(x1), generator=generator, dtype=torch.float64)
        x = path.sample(x0, x1, t).x_t
        return (field(t, x, None) - bayes(path, t, x, fresh, "velocity", None)).square().mean()

    biased = gradients(without_own, repeats=600, batch=3)
    assert ((biased.mean(0) - truth).abs() > 6 * biased.std(0) / math.sqrt(len(biased))).any()


def test_gradient_at_the_optimum_has_less_variance_the_more_rows_there_are() -> None:
    """There the exact gradient is zero, and that of flow matching nothing but the noise of its target."""
    data = mixture()
    truth = data.velocity_field()

    def variance(loss: Callable[..., Tensor], rows: int) -> float:
        g, scale, found = generator(1), torch.ones((), dtype=torch.float64, requires_grad=True), []
        for _ in range(200):
            more = {"reference": data.sample(rows, generator=g)} if rows else {}
            x1 = data.sample(16, generator=g)
            value = loss(lambda t, x, c: scale * truth(t, x, c), CondOT(), x1, time=early, generator=g, **more)
            found.append(torch.autograd.grad(value, scale)[0])
        return float(torch.stack(found).var())

    plain, alone, more = variance(cfm_loss, 0), variance(posterior_cfm_loss, 0), variance(posterior_cfm_loss, 240)
    assert alone < plain / 2  # measured: a third
    assert more < plain / 20  # measured: a fortieth


def test_loss_is_smaller_by_the_variance_that_is_averaged_out() -> None:
    """At the true velocity, cfm_loss is the variance of its target, and an infinite reference leaves nothing."""
    data, g = mixture(), generator(4)
    x1, x0 = data.sample(2000, generator=g), torch.randn(2000, 2, generator=g, dtype=torch.float64)
    t = 0.8 * torch.rand(2000, generator=g, dtype=torch.float64)
    field = data.velocity_field()
    losses = [float(cfm_loss(field, CondOT(), x1, x0, time=t))]
    for rows in (50, 5000):
        reference = data.sample(rows, generator=g)
        subset = slice(0, 200)  # few rows of x1, so that the reference counts
        losses.append(
            float(posterior_cfm_loss(field, CondOT(), x1[subset], x0[subset], reference=reference, time=t[subset]))
        )
    assert losses[0] > 10 * losses[1] > 20 * losses[2] > 0


def test_only_rows_of_the_same_condition_are_averaged() -> None:
    x1, x0, t = mixture().sample(12, generator=generator()), randn(12, 2, seed=1), torch.full((12,), 0.3).double()
    reference = mixture().sample(20, generator=generator(1))
    labels, more = torch.arange(12) % 3, torch.arange(20) % 4
    cond, reference_cond = (torch.stack([c, torch.ones_like(c)], 1).double() for c in (labels, more))
    x = CondOT().sample(x0, x1, t).x_t
    mask = labels[:, None] == torch.cat([labels, more])
    expected = bayes(CondOT(), t, x, torch.cat([x1, reference]), "velocity", mask)
    found = target(
        lambda f: posterior_cfm_loss(
            f, CondOT(), x1, x0, cond, reference=reference, reference_cond=reference_cond, time=t
        ),
        x1.shape,
    )
    torch.testing.assert_close(found, expected)
    alone = torch.arange(12.0)[:, None]  # all different
    torch.testing.assert_close(
        posterior_cfm_loss(zero, CondOT(), x1, cond=alone, x0=x0, time=t), cfm_loss(zero, CondOT(), x1, x0, time=t)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("more", [0, 20])
def test_weights_give_the_expected_gradient_of_the_weighted_loss_given_point_and_rows(
    prediction: Quantity, more: int
) -> None:
    """Row j generated the point with probability p_ij, and cfm_loss would then weigh its error by w_j."""
    g, path = generator(), Cosine()
    rows, weight = mixture().sample(12 + more, generator=g), randn(12 + more, seed=2).square()
    x1, x0, t = rows[:12], randn(12, 2, seed=1), torch.linspace(0.05, 0.9, 12, dtype=torch.float64)
    weight[3] = 0
    reference = {"reference": rows[12:], "reference_weight": weight[12:]} if more else {}
    value = randn(12, 2, seed=4).requires_grad_()
    loss = posterior_cfm_loss(
        lambda t, x, cond: value, path, x1, x0, time=t, prediction=prediction, weight=weight[:12], **reference
    )
    found = torch.autograd.grad(loss, value)[0]

    x = path.sample(x0, x1, t).x_t
    for i in range(12):
        normal = torch.distributions.Normal(path.alpha(t[i]) * rows, path.sigma(t[i]))
        chance = normal.log_prob(x[i]).sum(1).softmax(0)
        each = path.convert(rows, t[i].expand(len(rows)), x[i].expand_as(rows), "data", prediction)
        error = value[i].detach() - each
        if prediction == "score":
            error = path.sigma(t[i]).square() * error
        torch.testing.assert_close(found[i], 2 * ((chance * weight)[:, None] * error).sum(0) / 24)


def test_conditions_of_any_shape_are_compared() -> None:
    x1, x0, t = mixture().sample(12, generator=generator()), randn(12, 2, seed=1), torch.full((12,), 0.3).double()
    reference = mixture().sample(20, generator=generator(1))
    labels, more = torch.arange(12) % 3, torch.arange(20) % 4

    def loss(cond: object, reference_cond: object) -> Tensor:
        return posterior_cfm_loss(
            zero, CondOT(), x1, x0, cond, reference=reference, reference_cond=reference_cond, time=t
        )

    expected = loss(labels[:, None].double(), more[:, None].double())
    image = torch.nn.functional.one_hot(torch.arange(4), 9).reshape(4, 1, 3, 3).double()
    assert loss(labels, more) == expected
    assert loss(image[labels], image[more]) == expected
    assert loss({"a": labels % 2, "b": labels // 2}, {"a": more % 2, "b": more // 2}) == expected
    assert loss(labels % 2, more % 2) != expected


def test_it_draws_noise_then_time_as_flow_matching_does() -> None:
    x1 = randn(16, 2)
    seen: list[Tensor] = []

    def record(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        seen.extend([t, x])
        return x

    one, two = generator(3), generator(3)
    cfm_loss(record, CondOT(), x1, generator=one)
    posterior_cfm_loss(record, CondOT(), x1, generator=two)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert torch.equal(one.get_state(), two.get_state())


def test_any_event_and_autocast_keep_the_weights() -> None:
    x1, x0 = randn(5, 1, 2, 3).float(), randn(5, 1, 2, 3, seed=1).float()
    flat = posterior_cfm_loss(zero, CondOT(), x1.flatten(1), x0=x0.flatten(1), time=torch.full((5,), 0.4))
    with torch.autocast("cpu", torch.bfloat16):
        shaped = posterior_cfm_loss(zero, CondOT(), x1, x0=x0, time=torch.full((5,), 0.4))
    torch.testing.assert_close(shaped, flat)


def test_bad_arguments_are_named() -> None:
    x1, cond = randn(4, 2), randn(4, 1)
    with pytest.raises(ValueError, match=r"reference has shape \(3, 1\)"):
        posterior_cfm_loss(zero, CondOT(), x1, reference=randn(3, 1))
    for bad in (None, randn(2, 1), randn(3, 2)):
        with pytest.raises(ValueError, match="reference_cond has shape"):
            posterior_cfm_loss(zero, CondOT(), x1, None, cond, reference=randn(3, 2), reference_cond=bad)
    with pytest.raises(ValueError, match="reference_cond has shape"):
        posterior_cfm_loss(zero, CondOT(), x1, reference=randn(3, 2), reference_cond=cond[:3])
    with pytest.raises(ValueError, match=r"reference_weight has shape None beside weight of shape \(4,\), but both"):
        posterior_cfm_loss(zero, CondOT(), x1, reference=randn(3, 2), weight=x1[:, 0])
    with pytest.raises(ValueError, match="x0 has shape"):
        posterior_cfm_loss(zero, CondOT(), x1, x0=x1[:2])
    with pytest.raises(ValueError, match="the result of field has shape"):
        posterior_cfm_loss(lambda t, x, cond: x[:, :1], CondOT(), x1)
