"""Laws of conditions of any shape, for every kind of condition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal

from flowmatch_core._conditions import Condition, CondShape, condition_batch, condition_rows, map_condition
from flowmatch_core.discrete import Logits, MaskSource, MixturePath, TokenFlow
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.normalizing import MAF, DiscreteTimeFlow
from flowmatch_core.objectives import nll_loss
from flowmatch_core.solvers import SOLVERS
from tests.support.checks import close
from tests.support.random import generator, randn, tensor

Independent: Any = torch.distributions.Independent  # whose methods have no types
MixtureSameFamily: Any = torch.distributions.MixtureSameFamily
MultivariateNormal: Any = torch.distributions.MultivariateNormal
TransformedDistribution: Any = torch.distributions.TransformedDistribution

TABLE = tensor(0.0, 10.0, -20.0)


def shift_of(cond: Condition) -> Tensor:
    """The number that a condition stands for, `(batch,)`."""
    if isinstance(cond, dict):
        return shift_of(cond["image"]) + TABLE[cond["label"]]
    number: Tensor = cond.flatten(1).sum(1) if cond.is_floating_point() else TABLE[cond]
    return number


class Shift(nn.Module):
    """v = (1 + x / 2) s(c): the law of x given c is Gaussian, with mean and deviation in closed form."""

    def forward(self, t: Time, x: Tensor, cond: Condition) -> Tensor:
        s = shift_of(cond)
        assert len(s) == len(x)
        return (s + x / 2).reshape(x.shape) if x.ndim == 1 else s[:, None] + x / 2


def law(cond: Condition) -> Any:
    mean = 2 * (math.exp(0.5) - 1) * shift_of(cond)
    return Independent(Normal(mean[:, None].expand(-1, 2), math.exp(0.5)), 1)


LABELS = torch.tensor([1, 2, 0, 1, 2])
CONDITIONS: dict[str, tuple[Condition, CondShape]] = {
    "vectors": (randn(5, 3), None),
    "images": (randn(5, 1, 2, 2), None),
    "labels": (LABELS, None),
    "dicts": ({"image": randn(5, 1, 2, 2), "label": LABELS}, None),
    "declared": (randn(5, 3), (3,)),
    "declared-dicts": ({"image": randn(5, 2, 2), "label": LABELS}, {"image": (2, 2), "label": ()}),
}
every = pytest.mark.parametrize("kind", CONDITIONS)


def flow_of(kind: str, solver: str = "rk4", divergence: Any = "exact", **options: Any) -> ContinuousFlow:
    return ContinuousFlow(Shift(), (2,), solver, 12, divergence, cond_shape=CONDITIONS[kind][1], **options).double()


@every
@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5", "dopri5_per_sample"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_density_is_that_of_the_condition(kind: str, solver: str, divergence: str) -> None:
    cond, x = CONDITIONS[kind][0], randn(5, 2) + 10
    flow = flow_of(kind, solver, divergence, probes=2)
    exact = law(cond).log_prob(x)
    close(flow.log_prob(x, cond).detach(), exact, 1e-4)
    estimate = flow.estimate(x, cond, reference="dopri5")
    close(estimate.log_prob.detach(), exact, 1e-5)
    close(-nll_loss(Shift(), x, cond, divergence=divergence, generator=generator()).detach(), exact.mean(), 1e-4)  # type: ignore[arg-type]


@every
@pytest.mark.parametrize("solver", SOLVERS)
def test_condition_and_sample_belong_together(kind: str, solver: str) -> None:
    cond, flow = CONDITIONS[kind][0], flow_of(kind, solver)
    x = flow.sample((4000,), cond, generator())
    assert x.shape == (4000, 5, 2)
    exact = law(cond)
    close(x.mean(0), exact.mean, 0.15 + (1 if solver == "euler" else 0))
    path = flow.trajectory((3,), cond, generator())
    close(path[-1], flow.sample((3,), cond, generator()), 1e-4)
    x, log_prob = flow.rsample_and_log_prob((3,), cond, generator())
    if solver != "euler":
        close(log_prob.detach(), exact.log_prob(x).detach(), 0.05)


@every
def test_rows_do_not_depend_on_the_batch(kind: str) -> None:
    cond, flow, x = CONDITIONS[kind][0], flow_of(kind), randn(5, 2)
    together = flow.log_prob(x, cond)
    order = torch.tensor([3, 0, 4])
    close(flow.log_prob(x[order], map_condition(lambda part: part[order], cond)), together[order])


@every
def test_values_and_conditions_broadcast_both_ways(kind: str) -> None:
    cond, flow = CONDITIONS[kind][0], flow_of(kind)
    x = randn(7, 1, 2)
    table = flow.log_prob(x, cond)
    assert table.shape == (7, 5)
    close(table.detach(), law(cond).log_prob(x), 1e-4)
    close(flow.log_prob(x[0, 0], cond), table[0])
    bound = flow.given(cond)
    close(bound.log_prob(x), table)
    close(bound.expand((7, 5)).log_prob(x[:1, 0]), table[:1].expand(7, 5))


@every
def test_a_bound_flow_is_the_flow_at_its_conditions(kind: str) -> None:
    cond, flow, x = CONDITIONS[kind][0], flow_of(kind), randn(5, 2)
    bound = flow.given(cond)
    assert isinstance(bound, Distribution) and bound.batch_shape == (5,) and bound.event_shape == (2,)
    close(bound.sample((4,), generator()), flow.sample((4,), cond, generator()))
    close(bound.rsample((4,), generator()), flow.rsample((4,), cond, generator()))
    close(bound.trajectory((4,), generator()), flow.trajectory((4,), cond, generator()))
    close(bound.estimate(x).log_prob, flow.estimate(x, cond).log_prob)
    for ours, theirs in zip(
        bound.rsample_and_log_prob((4,), generator()), flow.rsample_and_log_prob((4,), cond, generator()), strict=True
    ):
        close(ours, theirs)
    image, volume = bound.transform.call_and_ladj(x)
    close(image.detach(), flow.given(cond).transform(x).detach())
    close(volume.detach(), torch.ones(5).double(), 1e-5)  # 2 / 2


def test_a_single_condition_has_no_batch() -> None:
    flow = flow_of("declared")
    bound = flow.given(randn(3))
    assert bound.batch_shape == () and bound.sample((4,)).shape == (4, 2) and bound.sample().shape == (2,)
    assert flow_of("labels").given(torch.tensor(1)).log_prob(randn(6, 2)).shape == (6,)
    assert ContinuousFlow(Shift(), (2,)).given(randn(2, 3)).expand((4, 2)).sample((3,)).shape == (3, 4, 2, 2)


def test_a_condition_of_several_batch_dimensions_is_declared() -> None:
    cond, flow = randn(4, 6, 3), flow_of("declared")
    x = flow.sample((2,), cond, generator())
    assert x.shape == (2, 4, 6, 2)
    log_prob = flow.log_prob(x, cond)
    close(log_prob[:, 1, 2], flow.log_prob(x[:, 1, 2], cond[1, 2]))
    flow = ContinuousFlow(Shift(), (2,), "rk4", 12).double()  # undeclared: dimensions that equal those of x
    close(flow.log_prob(x[0], cond), log_prob[0])


def test_the_field_may_declare_its_condition() -> None:
    field = Shift()
    field.cond_shape = (2, 2)  # type: ignore[assignment]
    flow = ContinuousFlow(field, (2,)).double()
    assert flow.sample((3,), randn(2, 2)).shape == (3, 2) and flow.sample((3,), randn(4, 2, 2)).shape == (3, 4, 2)
    with pytest.raises(ValueError, match=r"cond has shape \(4, 3\), but should end in \(2, 2\)"):
        flow.sample((3,), randn(4, 3))


def test_tokens_take_conditions_of_any_shape() -> None:
    """A denoiser that knows the data from its label: token k with certainty."""

    def denoiser(t: Time, x: Tensor, cond: Condition) -> Logits:
        label = cond["label"] if isinstance(cond, dict) else cond
        return Logits(40 * nn.functional.one_hot(label, 4).double()[:, None].expand(-1, x.shape[1], 4))

    flow = TokenFlow(denoiser, MixturePath(MaskSource(4)), (3,), steps=4)
    label = torch.tensor([2, 0, 3])
    for cond in (label, {"label": label, "unused": randn(3, 2, 2)}):
        x = flow.sample((5,), cond, generator())
        assert (x == label[:, None]).all()
        assert (flow.log_prob(x, cond, generator=generator()).abs() < 1e-6).all()
        assert (flow.given(cond).sample((5,), generator()) == label[:, None]).all()
        bound = flow.log_prob(x[:, :1], cond, generator=generator())  # every value at every label
        assert bound.shape == (5, 3) and ((bound > -1e-6) == (label == label[0])).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: flow_of("vectors").log_prob(randn(3, 2), randn(2, 3)), r"cond has a batch of shape \(2,\), but"),
        (lambda: flow_of("declared").sample((3,), randn(2, 4)), r"cond has shape \(2, 4\), but should end in \(3,\)"),
        (lambda: flow_of("declared-dicts").sample((), {"image": randn(2, 2)}), "cond has the names"),
        (lambda: flow_of("vectors").sample((), [1.0]), "cond is a list, but should be a tensor"),
        (
            lambda: flow_of("dicts").sample((), {"image": randn(4, 1, 2, 2), "label": LABELS}),
            r"cond has parts of the batches \[\(4,\), \(5,\)\]",
        ),
        (lambda: flow_of("vectors").given(randn(2, 3)).expand((3,)), r"cond has a batch of shape \(2,\), but"),
    ],
)
def test_bad_conditions_are_named(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_rows_of_a_condition_are_those_of_its_batch() -> None:
    cond = randn(2, 3, 4, 5)
    assert condition_batch(cond, (4, 5)) == (2, 3)
    rows = condition_rows(cond, (6, 2, 3), (4, 5))
    close(rows.reshape(6, 2, 3, 4, 5), cond.expand(6, 2, 3, 4, 5))


# ---------------------------------------------------------------------------------------- torch.distributions

MEANS = tensor([0.0, 0.0], [3.0, 1.0], [-2.0, 2.0])


def moved(t: Time, x: Tensor, cond: Condition) -> Tensor:
    """The flow of N(c, I)."""
    velocity: Tensor = cond.expand_as(x)
    return velocity


def test_independent_makes_a_batch_an_event() -> None:
    bound = Independent(ContinuousFlow(moved, (2,), "rk4").double().given(MEANS), 1)
    x = randn(4, 3, 2)
    exact = Independent(Normal(MEANS, 1.0), 2)
    close(bound.log_prob(x).detach(), exact.log_prob(x), 1e-6)
    assert bound.sample((5,)).shape == (5, 3, 2)


def test_a_mixture_of_flows_is_the_mixture_of_their_laws() -> None:
    weights = Categorical(tensor(0.2, 0.3, 0.5))
    ours = MixtureSameFamily(weights, ContinuousFlow(moved, (2,), "rk4").double().given(MEANS))
    exact = MixtureSameFamily(weights, Independent(Normal(MEANS, 1.0), 1))
    x = randn(6, 2)
    close(ours.log_prob(x).detach(), exact.log_prob(x), 1e-6)
    close(ours.mean, exact.mean, 0.05)
    close(ours.variance, exact.variance, 0.15)
    assert ours.sample((7,)).shape == (7, 2)


@pytest.mark.parametrize("kind", ["continuous", "discrete_time"])
def test_moments_and_entropy_are_those_of_the_law(kind: str) -> None:
    """A linear map of noise, whose moments and entropy have a closed form."""
    loc, scale = tensor(1.0, -2.0), tensor(0.5, 3.0)
    flow: ContinuousFlow | DiscreteTimeFlow
    if kind == "continuous":
        flow = ContinuousFlow(lambda t, x, cond: torch.zeros_like(x), (2,), loc=loc, scale=scale).double()
    else:
        flow = DiscreteTimeFlow(MAF(1, (4,)), 2, loc=loc, scale=scale).double()
        for parameter in flow.parameters():
            parameter.data.zero_()
    exact = Independent(Normal(loc, scale), 1)
    state = torch.get_rng_state()
    mean, variance = flow.moments(40_000, generator=generator())
    assert ((mean - loc).abs() < 4.5 * scale / 200).all()
    close(variance, scale**2, 0.05)
    close(flow.mean, loc, 0.15)
    assert torch.equal(flow.mean, flow.mean) and torch.equal(torch.get_rng_state(), state)
    close(flow.entropy(40_000, generator=generator()).detach(), exact.entropy(), 0.03)
    assert flow.has_rsample and flow.batch_shape == () and flow.expand((3, 2)).sample((4,)).shape == (4, 3, 2, 2)


@pytest.mark.parametrize("kind", ["continuous", "discrete_time"])
def test_values_that_are_no_numbers_are_refused_alike(kind: str) -> None:
    flow: Any = ContinuousFlow(moved, (2,)) if kind == "continuous" else DiscreteTimeFlow(MAF(1, (4,)), 2, 2)
    cond, x = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [math.nan, 0.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="value holds 1 numbers that are not finite, but should hold none"):
        flow.log_prob(x, cond)
    with pytest.raises(ValueError, match=r"value has dtype torch\.int64, but should be of a floating-point dtype"):
        flow.log_prob(torch.zeros(3, 2, dtype=torch.long), cond)
    flow.check = False
    assert flow.log_prob(x, cond).isnan().tolist() == [False, True, False]


def test_a_flow_in_discrete_time_samples_with_its_density() -> None:
    flow = DiscreteTimeFlow(MAF(2, (8,)), 2, 3, loc=tensor(1.0, 2.0), scale=tensor(0.5, 2.0), generator=generator())
    flow.double()
    cond = randn(4, 3)
    x, log_prob = flow.rsample_and_log_prob((5,), cond, generator())
    close(x, flow.rsample((5,), cond, generator()))
    close(log_prob, flow.log_prob(x, cond))
    close(flow.given(cond).log_prob(x[:, :1]), flow.log_prob(x[:, :1], cond))
    assert flow.log_prob(x[:, :1], cond).shape == (5, 4)


# ---------------------------------------------------------------------------------------- transform


def curved(t: Time, x: Tensor, cond: Condition) -> Tensor:
    return torch.tanh(x.roll(1, -1) - cond * x) + 0.3 * x


@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5"])
def test_transform_maps_noise_to_data_with_its_volume(solver: str) -> None:
    """The log-determinant against that of the autograd Jacobian, the density by the change of variables."""
    loc, scale, cond = tensor(1.0, -2.0), tensor(0.5, 3.0), randn(4, 1)
    flow = ContinuousFlow(curved, (2,), solver, 40, loc=loc, scale=scale, rtol=1e-9, atol=1e-9).double()
    transform, noise = flow.given(cond).transform, randn(4, 2)
    x, volume = transform.call_and_ladj(noise)
    close(transform(noise), x, 1e-8)
    close(transform.log_abs_det_jacobian(noise, x), volume)
    back, inverse_volume = transform.inv.call_and_ladj(x)
    close(back, noise, 1e-6)
    close(transform.inv(x), noise, 1e-6)
    close(inverse_volume, -volume, 1e-6)
    for i in range(4):
        one = flow.given(cond[i]).transform
        jacobian = torch.autograd.functional.jacobian(one, noise[i])  # type: ignore[no-untyped-call]
        close(volume[i].detach(), torch.linalg.slogdet(jacobian).logabsdet, 1e-5)
    normal = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    close((normal.log_prob(noise) - volume).detach(), flow.log_prob(x, cond).detach(), 1e-5)
    pushed = TransformedDistribution(normal.expand((4,)), [transform], validate_args=False)
    close(pushed.log_prob(x).detach(), flow.log_prob(x, cond).detach(), 1e-5)


def test_sample_and_density_are_of_one_solve() -> None:
    loc, scale, cond = tensor(1.0, -2.0), tensor(0.5, 3.0), randn(4, 1)
    calls = 0

    def counted(t: Time, x: Tensor, cond: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        return curved(t, x, cond)

    flow = ContinuousFlow(counted, (2,), "rk4", 10, loc=loc, scale=scale).double()
    x, log_prob = flow.rsample_and_log_prob((3,), cond, generator())
    assert calls == 40
    close(x, flow.rsample((3,), cond, generator()))
    close(log_prob, flow.log_prob(x, cond), 1e-3)


def test_gradients_reach_a_sample_and_its_density() -> None:
    """The reverse Kullback-Leibler divergence of N(b, e^2a I) to N(0, I), whose gradient has a closed form."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.7))
    flow = ContinuousFlow(lambda t, x, cond: a * x + b, (2,), "rk4", 10).double()
    x, log_prob = flow.rsample_and_log_prob((20_000,), generator=generator())
    target = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    estimated = torch.autograd.grad((log_prob - target.log_prob(x)).mean(), (a, b))
    law = Independent(Normal((b * a.expm1() / a).expand(2), a.exp()), 1)
    exact = torch.autograd.grad(torch.distributions.kl_divergence(law, target), (a, b))
    for ours, theirs in zip(estimated, exact, strict=True):
        close(ours, theirs, 0.05)


# ---------------------------------------------------------------------------------------- bases

MATRIX, OFFSET = tensor([0.3, 0.8], [-0.5, -0.4]), tensor(0.5, -1.0)


def linear(t: Time, x: Tensor, cond: Condition) -> Tensor:
    return x @ MATRIX.T + OFFSET


def pushed(mean: Tensor, covariance: Tensor) -> Any:
    push = torch.linalg.matrix_exp(MATRIX)
    shift = torch.linalg.solve(MATRIX, (push - torch.eye(2).double()) @ OFFSET)
    return MultivariateNormal(push @ mean + shift, push @ covariance @ push.T)


START = MultivariateNormal(tensor(2.0, -1.0), tensor([1.0, 0.6], [0.6, 2.0]))


def flow_base() -> ContinuousFlow:
    """START as a flow, of a field that moves nothing but by its factor."""
    factor = torch.linalg.cholesky(START.covariance_matrix)
    log_factor = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    log_factor[0, 0], log_factor[1, 1] = factor.diagonal().log()
    ratio = factor[1, 0] / ((factor[1, 1] - factor[0, 0]) / (log_factor[1, 1] - log_factor[0, 0]))
    log_factor[1, 0] = ratio
    return ContinuousFlow(lambda t, x, cond: x @ log_factor.T, (2,), "rk4", 20, loc=START.mean).double()


@pytest.mark.parametrize("kind", ["distribution", "flow", "bound"])
def test_a_gaussian_base_is_pushed_by_a_linear_flow(kind: str) -> None:
    base: Any = START if kind == "distribution" else flow_base()
    if kind == "bound":
        base = base.given(None)
    flow = ContinuousFlow(linear, (2,), "rk4", 20, base=base).double()
    exact, x = pushed(START.mean, START.covariance_matrix), 2 * randn(50, 2)
    close(flow.log_prob(x).detach(), exact.log_prob(x), 1e-5)
    state = torch.get_rng_state()
    drawn = flow.sample((40_000,), generator=generator())
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(
        drawn, flow.sample((40_000,), generator=generator())
    )
    assert not torch.equal(drawn, flow.sample((40_000,), generator=generator(1)))
    close(drawn.mean(0), exact.mean, 0.05)
    close(drawn.T.cov(), exact.covariance_matrix, 0.1)
    x, log_prob = flow.rsample_and_log_prob((100,), generator=generator())
    close(log_prob.detach(), exact.log_prob(x).detach(), 1e-5)


def test_the_density_of_a_flow_between_data_sets_integrates_to_one() -> None:
    """From one mixture to another law, along a curved field."""
    start = MixtureSameFamily(
        Categorical(tensor(0.3, 0.7)), Independent(Normal(tensor([-2.0, 0.0], [1.0, 1.0]), 0.5), 1)
    )
    flow = ContinuousFlow(lambda t, x, cond: torch.tanh(x.roll(1, -1) - x), (2,), "rk4", 16, base=start)
    side = torch.linspace(-8, 8, 161, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(side, side)).exp()
    assert float(density.sum()) * 0.1**2 == pytest.approx(1, abs=1e-3)
    x = flow.sample((20_000,), generator=generator()).double()
    grid = torch.cartesian_prod(side, side)
    close(x.mean(0), (density[:, None] * grid).sum(0) * 0.1**2, 0.05)


def test_rows_are_a_base_without_a_density() -> None:
    rows = tensor([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])
    flow = ContinuousFlow(lambda t, x, cond: 0 * x + 10, (2,), base=rows).double()
    x = flow.sample((3000,), generator=generator()) - 10
    nearest = torch.cdist(x, rows).min(1)
    assert nearest.values.max() < 1e-6
    assert (torch.bincount(nearest.indices, minlength=3) / 3000 - 1 / 3).abs().max() < 0.04
    assert set(flow.state_dict()) == {"base.rows"}
    for call in (lambda: flow.log_prob(x), lambda: flow.estimate(x), lambda: flow.rsample_and_log_prob((3,))):
        with pytest.raises(ValueError, match="base is a set of 3 rows, which has no density"):
            call()
    close(flow.transform.inv(x + 10), x, 1e-6)


def test_a_base_of_independent_entries_is_their_product() -> None:
    entries = Normal(tensor(1.0, -2.0), tensor(0.5, 3.0))
    x = randn(5, 2)
    flow, same = (
        ContinuousFlow(linear, (2,), "rk4", base=base).double() for base in (entries, Independent(entries, 1))
    )
    assert flow.batch_shape == ()
    close(flow.log_prob(x).detach(), same.log_prob(x).detach(), 0)


def test_the_batch_of_a_base_is_that_of_the_flow() -> None:
    base = Independent(Normal(MEANS, 0.5), 1)
    flow = ContinuousFlow(moved, (2,), "rk4", base=base, cond_shape=(2,)).double()
    cond = tensor(1.0, -1.0)
    assert flow.batch_shape == (3,) and flow.sample((4,), cond).shape == (4, 3, 2)
    x = randn(5, 1, 2)
    exact = Independent(Normal(MEANS + cond, 0.5), 1)
    close(flow.log_prob(x, cond).detach(), exact.log_prob(x), 1e-6)
    x, log_prob = flow.given(MEANS[:, None]).rsample_and_log_prob((4,))
    assert x.shape == (4, 3, 3, 2)
    close(log_prob.detach(), Independent(Normal(MEANS[:, None] + MEANS, 0.5), 1).log_prob(x).detach(), 1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ContinuousFlow(linear, (2,), base=START, base_scale=2.0), "base_scale is 2.0, but should be 1 where"),
        (lambda: ContinuousFlow(linear, (2,), base=Normal(0.0, 1.0)), r"base has the batch shape \(\) and the event"),
        (lambda: ContinuousFlow(linear, (2,), base=torch.zeros(3)), r"base has shape \(3,\), but should be of shape"),
        (lambda: ContinuousFlow(linear, (2,), base=3.0), "base is a float, but should be"),  # type: ignore[arg-type]
        (lambda: ContinuousFlow(linear, (2,), base=torch.zeros(3, 2).long()), r"base has dtype torch\.int64"),
    ],
)
def test_bad_bases_are_named(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
