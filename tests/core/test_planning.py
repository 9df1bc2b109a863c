"""Laws of generalised policy improvement over the policies of one horizon model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from flowmatch_core.field import Time
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import GeometricHorizonModel, Plan, gpi
from tests.support.checks import BOUND
from tests.support.processes import Chain, circle
from tests.support.random import generator, randn, tensor


def first(x: Tensor) -> Tensor:
    return x[:, 0]


def model_of(field: Callable[[Tensor, Tensor], Tensor], d: int = 1, gamma: float = 0.5) -> GeometricHorizonModel:
    """A model whose field is a function of the point and of w, for states and actions of one dimension."""

    def velocity(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        return field(x, cond[:, d + 1 :])

    return GeometricHorizonModel(velocity, (d,), gamma, "rk4", 4)


def shifts(x: Tensor, w: Tensor) -> Tensor:
    """X = X_0 + w."""
    return w + 0 * x


def by_place(x: Tensor) -> Tensor:
    """Small numbers that tell the rows of a batch apart, as rounding does where kernels share a product out."""
    return 1e-3 * torch.arange(len(x), dtype=x.dtype)[:, None]


def quarter_turns(x: Tensor, w: Tensor) -> Tensor:
    """The noise turned by w right angles: the same law for every w, and w = 1 independent of w = 0 in each entry."""
    return math.pi / 2 * w * torch.stack([-x[:, 1], x[:, 0]], -1)


def plan(model: GeometricHorizonModel, w: Tensor, seed: int = 0, **options: float) -> Plan:
    """Plan by the first entry of the states; the actions are of no account."""
    d = model.flow.event_shape[0]
    samples = int(options.pop("samples", 128))
    state, actions = w.new_zeros(len(w), d), w.new_zeros(*w.shape[:2], 1)
    return gpi(model, first, state, actions, w, samples=samples, generator=generator(seed), **options)


# What is chosen


def linear_family(targets: tuple[float, ...]) -> list[LinearGaussianMDP]:
    """s' = 0.9 s + a + noise with the policies a = 0.3 (target - s)."""
    one = torch.eye(1, dtype=torch.float64)
    return [
        LinearGaussianMDP(A=0.9 * one, B=one, c=tensor(0.0), W=0.05 * one, K=-0.3 * one, k=tensor(0.3 * target))
        for target in targets
    ]


def test_choice_is_that_of_the_exact_values_where_they_are_apart() -> None:
    gamma, family = 0.6, linear_family((-2.0, 0.0, 2.0))
    fields = [mdp.velocity_field(gamma, tolerance=1e-3) for mdp in family]

    def field(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        out = torch.zeros_like(x)
        for i, of_policy in enumerate(fields):
            rows = cond[:, 2] == i
            out[rows] = of_policy(t, x[rows], cond[rows, :2])
        return out

    model = GeometricHorizonModel(field, (1,), gamma)
    state = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None]
    actions = torch.stack([mdp.policy(state) for mdp in family], 1)
    w = tensor(0.0, 1.0, 2.0)[:, None].expand(len(state), 3, 1)
    found = gpi(model, lambda x: -x[:, 0].square(), state, actions, w, samples=512, generator=generator())
    minus = -torch.eye(1, dtype=torch.float64)
    exact = torch.stack([mdp.value_quadratic(state, None, gamma, matrix=minus) for mdp in family], 1)
    best, second = exact.topk(2, 1).values.T
    # the standard error of any difference is at most the sum of those of its two to candidate 0
    clear = best - second > 3 * found.error.topk(2, 1).values.sum(1)
    assert clear.double().mean() > 0.5
    assert len(exact.argmax(1)[clear].unique()) == 3
    assert (found.index == exact.argmax(1))[clear].double().mean() >= 0.95
    apart = (found.value - found.value[:, :1]) - (exact - exact[:, :1])
    assert (apart[:, 1:] / found.error[:, 1:]).abs().max() < BOUND


def test_improved_policy_is_worth_at_least_the_best_of_the_family() -> None:
    """V >= max_w V_w - 2 eps / (1 - gamma), by exact evaluation of the policies on a ring, and more in some state.

    The policies go one way each on their own half of the ring and rest on the other; the best goes on all of it.
    """
    n, gamma, samples = 6, 0.6, 1_000
    stay = torch.eye(n, dtype=torch.float64)
    on = stay.roll(1, 1)
    P = torch.stack([0.9 * stay + 0.1 * on, 0.1 * stay + 0.9 * on])
    half = torch.arange(n) < n // 2
    family = torch.stack([half.long(), (~half).long(), torch.zeros(n, dtype=torch.long)])  # the action in each state
    payoff = tensor(0.0, 0.0, 1.0, 0.0, 0.0, 3.0)

    def under(policy: Tensor) -> Tensor:
        """The chances of a step, `(n, n)`."""
        return P[policy, torch.arange(n)]

    def worth(policy: Tensor) -> Tensor:
        """The sum over k >= 0 of gamma^k r(S_(k+1)), `(n,)`."""
        return Chain(under(policy), circle(n)).successor(gamma) @ payoff / (1 - gamma)

    places = circle(n)
    chains = [Chain(under(policy), places) for policy in family]
    fields = [chain.field(gamma) for chain in chains]

    def field(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        out = torch.zeros_like(x)
        for i, of_policy in enumerate(fields):
            rows = cond[:, 3] == i
            out[rows] = of_policy(t, x[rows], cond[rows, :2])
        return out

    model = GeometricHorizonModel(field, (2,), gamma, steps=10)
    actions = family.T[..., None].double()
    w = torch.arange(3, dtype=torch.float64)[:, None].expand(n, 3, 1)
    found = gpi(
        model, lambda x: payoff[chains[0].nearest(x)], places, actions, w, samples=samples, generator=generator()
    )
    values = torch.stack([worth(policy) for policy in family], 1)
    eps = (found.value - values).abs().max()
    assert eps < 0.4
    improved = worth(family[found.index, torch.arange(n)])
    best = values.max(1).values
    assert (improved >= best - 2 * eps / (1 - gamma)).all()
    assert (improved > best + 0.05).any()


# The candidates


def test_order_of_the_candidates_changes_their_numbers_alone() -> None:
    model, w = model_of(lambda x, w: w + by_place(x)), randn(5, 7, 1, seed=1)
    order = torch.stack([torch.randperm(7, generator=generator(i)) for i in range(5)])
    straight, mixed = plan(model, w), plan(model, w.take_along_dim(order[..., None], 1))
    assert torch.equal(order.gather(1, mixed.index[:, None])[:, 0], straight.index)
    assert torch.equal(mixed.value, straight.value.gather(1, order))
    assert len(straight.index.unique()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_candidates_have_equal_values_bit_for_bit(dtype: torch.dtype) -> None:
    """Also where the result of a row depends on its place in the batch."""
    weight = randn(3, 3, seed=3, dtype=dtype)

    def mixing(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ weight + w) @ weight + by_place(x)

    w = randn(3, 5, 3, seed=4, dtype=dtype)
    w[:, 3], w[0, 4], w[1, 2] = w[:, 0], w[0, 0], w[1, 1]
    found = plan(model_of(mixing, d=3), w, samples=37)
    assert torch.equal(found.value[:, 3], found.value[:, 0])
    assert torch.equal(found.error[:, 3], torch.zeros(3, dtype=dtype))
    assert found.value[0, 4] == found.value[0, 0]
    assert found.value[1, 2] == found.value[1, 1]
    assert found.error[1, 2] == found.error[1, 1]
    assert found.value.dtype == dtype
    assert len(found.value[2].unique()) == 4


def test_parts_of_a_large_batch_are_planned_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, w = model_of(shifts), randn(4, 6, 1, seed=1)
    whole = plan(model, w)
    monkeypatch.setattr("flowmatch_core.successor.planning.ROWS", 5 * 128)
    in_parts = plan(model, w)
    assert torch.equal(in_parts.index, whole.index)
    torch.testing.assert_close(in_parts.value, whole.value)
    torch.testing.assert_close(in_parts.error, whole.error)


def test_condition_is_state_action_and_parameters_of_the_policy() -> None:
    """X = X_0 + s + 10 a + 100 w_1 + 1000 w_2, of every row."""

    def field(t: Time, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        assert cond is not None
        return cond @ tensor(1.0, 10.0, 100.0, 1000.0)[:, None] + 0 * x

    state, actions, w = randn(4, 1, seed=1), randn(4, 3, 1, seed=2), randn(4, 3, 2, seed=3)
    model = GeometricHorizonModel(field, (1,), 0.5)
    found = gpi(model, first, state, actions, w, generator=generator())
    means = state[:, None] + 10 * actions + w @ tensor(100.0, 1000.0)[:, None]
    difference = 2 * (means - means[:, :1])[..., 0]
    torch.testing.assert_close(found.value - found.value[:, :1], difference)
    assert torch.equal(found.index, means[..., 0].argmax(1))

    plain = GeometricHorizonModel(lambda t, x, cond: 10 * cond[:, 1:] + 0 * x, (1,), 0.5)
    without = gpi(plain, first, state, actions, None, generator=generator())
    torch.testing.assert_close(without.value - without.value[:, :1], 20 * (actions - actions[:, :1])[..., 0])


def test_values_are_in_raw_units() -> None:
    """With locations, scales and a constant component, as `HorizonModel.value` has it."""
    constant = tensor(math.nan, 7.0)
    model = GeometricHorizonModel(
        lambda t, x, cond: cond[:, 2:] + 0 * x,
        (1,),
        0.5,
        loc=tensor(3.0),
        scale=tensor(2.0),
        constant=constant,
    )
    w, state = tensor([[0.0], [1.0]]), tensor([3.0, 7.0])
    found = gpi(model, lambda x: x.sum(1), state, torch.zeros_like(w), w, samples=20_000, generator=generator())
    assert ((found.value[0] - 2 * (3 + 7 + tensor(0.0, 2.0))).abs() < BOUND * 4 / math.sqrt(20_000)).all()


# Shared noise, standard errors and the margin


def test_noise_that_candidates_share_cancels_from_their_difference() -> None:
    """X = X_0 + w: the difference of two values is exact, whatever the noise; each of them is not."""
    w = randn(6, 4, 1, seed=1)
    found = plan(model_of(shifts), w)
    torch.testing.assert_close(found.value - found.value[:, :1], 2 * (w - w[:, :1])[..., 0])
    assert found.error.max() < 1e-12
    assert (found.value - 2 * w[..., 0]).abs().max() > 0.01


def test_standard_error_is_that_of_the_difference() -> None:
    """Over states, whose noises are independent: (difference - truth) / error has mean 0 and about variance 1."""
    n = 1_000
    w = tensor([0.0], [1.0]).expand(n, 2, 1)
    found = plan(model_of(quarter_turns, d=2), w, samples=64)
    z = (found.value[:, 1] - found.value[:, 0]) / found.error[:, 1]
    assert abs(float(z.mean())) < BOUND / math.sqrt(n)
    assert abs(float(z.square().mean()) - 63 / 61) < BOUND * math.sqrt(2.2 / n)  # Student's law with 63 degrees
    expected = 2 * math.sqrt(2 / 64)  # two standard normals, over 1 - gamma
    assert float(found.error[:, 1].mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0])
def test_margin_is_that_of_a_one_sided_t_test(margin: float) -> None:
    """Of two candidates of one value the second is taken with the chance of the test, 1 - Phi(margin) for many samples.

    The differences are normal here, so that with few samples the law is Student's.
    """
    n, samples = 2_000, 16
    w = tensor([0.0], [1.0]).expand(n, 2, 1)
    found = plan(model_of(quarter_turns, d=2), w, margin=margin, samples=samples)
    chance = float(stats.t.sf(margin, samples - 1))
    assert abs(float(found.index.double().mean()) - chance) < BOUND * math.sqrt(chance * (1 - chance) / n)


def test_infinite_margin_keeps_the_default() -> None:
    w = torch.cat([tensor([0.0]).expand(8, 1, 1), 5 + randn(8, 3, 1, seed=1).abs()], 1)
    for model in (model_of(shifts), model_of(lambda x, w: w * x)):
        assert (plan(model, w).index > 0).any()
        assert not plan(model, w, margin=math.inf).index.any()


def test_of_candidates_that_clear_the_margin_the_best_is_taken() -> None:
    """A sure gain of 1 against an unsure one of 1.5: the margin decides which may be taken."""

    def field(x: Tensor, w: Tensor) -> Tensor:
        noisy = w[:, 1:] * 3 * torch.stack([x[:, 1], 0 * x[:, 1]], -1)
        return noisy + torch.cat([w[:, :1], 0 * w[:, :1]], -1)

    w = tensor([[0.0, 0.0], [1.0, 0.0], [1.5, 1.0]]).expand(50, 3, 2)
    bold, careful = (plan(model_of(field, d=2), w, samples=400, margin=m) for m in (0.0, 20.0))
    assert (bold.index == 2).double().mean() > 0.9
    assert (careful.index == 1).all()


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "samples is 1, but should be at least 2"),
        ({"margin": -1.0}, "margin is -1.0, but should not be negative"),
        ({"margin": math.nan}, "margin is nan, but should not be negative"),
        ({"state": torch.zeros(1)}, r"state has shape \(1,\), but should have shape \(batch, d\)"),
        ({"actions": torch.zeros(2, 0, 1)}, r"actions has shape \(2, 0, 1\), .*at least one candidate"),
        ({"actions": torch.zeros(3, 3, 1)}, r"actions has shape \(3, 3, 1\), but should have shape \(2, N, p\)"),
        ({"actions": torch.full((2, 3, 1), math.nan)}, "actions holds 6 numbers that are not finite"),
        ({"w": torch.zeros(2, 2, 1)}, r"w has shape \(2, 2, 1\), but should have shape \(2, 3, q\)"),
        ({"w": torch.full((2, 3, 1), math.inf)}, "w holds 6 numbers that are not finite"),
        ({"reward": lambda x: x}, r"the result of reward has shape \(768, 1\), but should be of shape \(768,\)"),
        ({"reward": lambda x: x[:, 0] > 0}, "the result of reward has dtype torch.bool"),
        ({"reward": lambda x: x[:, 0] / 0}, "the result of reward holds 768 numbers that are not finite"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    state, actions, w = torch.zeros(2, 1), torch.zeros(2, 3, 1), torch.arange(3.0)[:, None].expand(2, 3, 1)
    arguments = {"reward": first, "state": state, "actions": actions, "w": w, **change}
    with pytest.raises(ValueError, match=message):
        gpi(model_of(shifts), generator=generator(), **arguments)
