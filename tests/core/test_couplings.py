"""Laws of the couplings: the marginals they keep, the costs they save, and the laws that single them out."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch
from scipy import stats
from torch import Tensor

from flowmatch_core import transport
from flowmatch_core._tensors import expand_time
from flowmatch_core.couplings import (
    ConditionalOT,
    Coupling,
    Independent,
    IndexCoupling,
    MinibatchOT,
    Reflow,
    SchrodingerBridge,
    Sinkhorn,
)
from flowmatch_core.couplings._base import check_coupling
from flowmatch_core.field import Time
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import CondOT
from flowmatch_core.solvers import SolverError, solve
from tests.support.random import generator, tensor

PERMUTATIONS: list[IndexCoupling] = [Independent(), MinibatchOT(), ConditionalOT(), ConditionalOT(weight=10.0)]
DRAWS: list[IndexCoupling] = [Sinkhorn(reg=1.0), SchrodingerBridge(sigma=0.7), Sinkhorn(reg=1.0, weight=3.0)]


def batch(n: int, *event: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(n, *event, generator=g, dtype=torch.float64) for _ in range(2))
    return x0, 2 * x1 + 1, torch.arange(n, dtype=torch.float64)[:, None]


def cost(x0: Tensor, x1: Tensor) -> float:
    return float((x1 - x0).square().sum())


@pytest.mark.parametrize("coupling", PERMUTATIONS, ids=repr)
@pytest.mark.parametrize("event", [(2,), (1, 3, 3), ()])
def test_no_row_is_lost_and_none_doubled(coupling: Coupling, event: tuple[int, ...]) -> None:
    x0, x1, cond = batch(256, *event)
    y0, y1, y_cond = coupling(x0, x1, cond)
    assert y1 is x1 and y_cond is cond
    rows, kept = (sorted(map(tuple, a.reshape(256, -1).tolist())) for a in (x0, y0))
    assert rows == kept


def test_independent_pairs_rows_as_given() -> None:
    x0, x1, cond = batch(5, 2)
    assert Independent()(x0, x1, cond) == (x0, x1, cond)
    assert Independent()(x0, x1)[2] is None


def test_ot_finds_the_best_permutation() -> None:
    for seed in range(5):
        x0, x1, _ = batch(6, 2, seed=seed)
        best = min(cost(x0[list(p)], x1) for p in itertools.permutations(range(6)))
        assert cost(MinibatchOT()(x0, x1)[0], x1) == pytest.approx(best)


def test_ot_is_cheaper_than_chance() -> None:
    x0, x1, _ = batch(256, 2)
    assert cost(MinibatchOT()(x0, x1)[0], x1) < 0.75 * cost(x0, x1)


def test_ot_undoes_a_shuffle_far_from_the_origin() -> None:
    x0, _, _ = batch(64, 2)
    x0 = x0 + 1e6
    shuffled = x0[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(MinibatchOT()(shuffled, x0)[0], x0, rtol=0, atol=0)


def test_ot_keeps_equal_rows_apart() -> None:
    x1 = torch.zeros(8, 2, dtype=torch.float64)
    x0, _, _ = batch(8, 2)
    assert len({tuple(row) for row in MinibatchOT()(x0, x1)[0].tolist()}) == 8


def test_ot_lets_gradients_through_the_rows() -> None:
    x0, x1, _ = batch(8, 2)
    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(MinibatchOT()(x0, x1)[0].sum(), x0)
    assert (gradient == 1).all()


# --- draws from a plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", DRAWS, ids=repr)
@pytest.mark.parametrize("event", [(2,), (1, 3, 3), ()])
def test_the_data_stay_and_the_noise_comes_from_the_batch(coupling: Coupling, event: tuple[int, ...]) -> None:
    x0, x1, cond = batch(64, *event)
    y0, y1, y_cond = coupling(x0, x1, cond, generator=generator())
    assert y1 is x1 and y_cond is cond and y0.shape == x0.shape
    rows, kept = ({tuple(row) for row in a.reshape(64, -1).tolist()} for a in (x0, y0))
    assert kept <= rows


def test_pairs_are_drawn_by_the_entropic_plan() -> None:
    n, copies, calls, reg = 6, 50, 12, 1.5
    x0, x1, _ = batch(n, 2)
    weights = [1 / n] * n
    plan = n * torch.from_numpy(ot.sinkhorn(weights, weights, ot.dist(x1.numpy(), x0.numpy()), reg, stopThr=1e-12))
    counts, g = torch.zeros(n, n, dtype=torch.float64), generator()
    for _ in range(calls):  # copies of all points leave the probabilities of pairs of different points as they are
        y0 = Sinkhorn(reg)(x0.repeat(copies, 1), x1.repeat(copies, 1), generator=g)[0]
        counts += (y0[:, None] == x0).all(-1).reshape(copies, n, n).sum(0)
    assert (counts.sum(1) == copies * calls).all()
    error = (counts / (copies * calls) - plan) / (plan * (1 - plan) / (copies * calls)).sqrt()
    assert float(error.abs().max()) < 4.5
    assert float(plan.max()) > 2 * float(plan.min())


def test_a_pair_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]])  # the other pairs have exp(-1000)
    for level in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *a, level=level, **k: torch.full(a, level, dtype=k["dtype"]))
        assert torch.equal(Sinkhorn(1e-3)(x0, x1)[0], x1)


def test_each_row_of_the_noise_is_taken_once_on_average() -> None:
    x0, x1, _ = batch(128, 2)
    mean = torch.stack([Sinkhorn(0.5)(x0, x1, generator=generator(seed))[0].mean(0) for seed in range(50)]).mean(0)
    torch.testing.assert_close(mean, x0.mean(0), rtol=0, atol=0.03)
    assert float(x0.mean(0).abs().max()) > 0.03  # the mean of this batch, not that of the law it comes from


def test_little_entropy_gives_the_optimal_pairs_and_much_gives_independent_ones() -> None:
    x0, x1, _ = batch(64, 2)
    assert torch.equal(Sinkhorn(1e-4)(x0, x1, generator=generator())[0], MinibatchOT()(x0, x1)[0])
    y0 = Sinkhorn(1e6)(x0.repeat(8, 1), x1.repeat(8, 1), generator=generator())[0]
    expected = ((x1[:, None] - x0).square().sum(-1)).mean()
    assert float((y0 - x1.repeat(8, 1)).square().sum(1).mean()) == pytest.approx(float(expected), rel=0.1)
    costs = [cost(Sinkhorn(reg)(x0, x1, generator=generator())[0], x1) for reg in (0.1, 1.0, 10.0)]
    assert cost(MinibatchOT()(x0, x1)[0], x1) < costs[0] < costs[1] < costs[2]


def test_an_entropic_plan_that_is_not_found_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ROUNDS", 2)
    x0, x1, _ = batch(64, 2)
    with pytest.raises(RuntimeError, match=r"reg=0\.0001 should be larger"):
        Sinkhorn(1e-4)(x0, x1)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_ends_of_a_schrodinger_bridge_between_gaussians_have_the_known_correlation(sigma: float) -> None:
    moments = []
    for seed in range(4):
        g = generator(seed)
        x0, x1 = torch.randn(2, 512, 1, generator=g, dtype=torch.float64)
        y0, y1, _ = SchrodingerBridge(sigma)(x0, x1, generator=g)
        moments.append(float((y0 * y1).mean()))
    # minimising KL to exp(-|x1 - x0|^2 / 2 sigma^2) between standard normals: c / (1 - c^2) = 1 / sigma^2
    expected = (math.sqrt(4 + sigma**4) - sigma**2) / 2
    assert sum(moments) / 4 == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("coupling", DRAWS, ids=repr)
def test_randomness_comes_from_the_generator_alone(coupling: Coupling) -> None:
    x0, x1, cond = batch(64, 2)
    state = torch.get_rng_state()
    results = [coupling(x0, x1, cond, generator=generator(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(state, torch.get_rng_state())


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [*PERMUTATIONS, *DRAWS], ids=repr)
def test_the_indices_are_those_of_the_pairs(coupling: IndexCoupling) -> None:
    x0, x1, cond = batch(64, 2)
    label = torch.arange(64) // 8
    for given in (cond // 16, {"label": label // 2, "dose": cond // 8}):
        i0, i1 = coupling.pairs(x0, x1, given, generator=generator(3))
        y0, y1, y_cond = coupling(x0, x1, given, generator=generator(3))
        assert torch.equal(x0[i0], y0) and torch.equal(x1[i1], y1) and y_cond is given
        labelled, _, _ = coupling(
            torch.stack([x0, label[:, None] + 0 * x0], 1)[:, 0], x1, given, generator=generator(3)
        )
        assert torch.equal(label[i0], (labelled[:, None] == x0).all(-1).double().argmax(1) // 8)


def test_a_coupling_of_ones_own_needs_only_the_partners() -> None:
    class Reverse(IndexCoupling):
        def partners(
            self, x0: Tensor, x1: Tensor, cond: object = None, *, generator: torch.Generator | None = None
        ) -> Tensor:
            return torch.arange(len(x1)).flip(0)

    x0, x1, cond = batch(5, 2)
    y0, y1, y_cond = Reverse()(x0, x1, cond)
    assert torch.equal(y0, x0.flip(0)) and y1 is x1 and y_cond is cond
    assert Reverse().pairs(x0, x1)[0].tolist() == [4, 3, 2, 1, 0]


# --- conditions ------------------------------------------------------------------------------------------------------


def labelled(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two classes of data far to the left and right: a coupling that ignores them sorts the noise by class."""
    g = generator(seed)
    label = (torch.rand(n, 1, generator=g) < 0.3).double()
    x0, x1 = torch.randn(2, n, 2, generator=g, dtype=torch.float64)
    return x0, 0.5 * x1 + torch.cat([6 * label - 3, 0 * label], 1), label


def noise_by_label(coupling: Coupling) -> list[Tensor]:
    triples = [coupling(*labelled(128, seed)) for seed in range(40)]
    return [torch.cat([x0[label[:, 0] == k] for x0, _, label in triples if label is not None]) for k in (0, 1)]


def test_within_a_label_the_noise_stays_gaussian() -> None:
    for noise in noise_by_label(ConditionalOT()):
        assert all(stats.kstest(noise[:, i], "norm").pvalue > 1e-3 for i in range(2))
    # what it is for: without the condition the noise of a label is only one side of the Gaussian
    assert stats.kstest(noise_by_label(MinibatchOT())[0][:, 0], "norm").pvalue < 1e-12


def test_within_a_label_the_pairs_are_the_best_and_no_row_changes_its_label() -> None:
    x0, x1, label = labelled(200, 0)
    order = torch.randperm(200, generator=generator())
    y0 = ConditionalOT()(x0[order], x1, label)[0]
    for k in (0, 1):
        rows = label[:, 0] == k
        assert torch.equal(y0[rows], MinibatchOT()(x0[order][rows], x1[rows])[0])
    several = torch.cat([label, torch.arange(200)[:, None] % 2 + 0.0], 1)  # a row of two labels is one condition
    y0 = ConditionalOT()(x0, x1, several)[0]
    for a, b in itertools.product((0, 1), repeat=2):
        rows = (several == torch.tensor([a, b])).all(1)
        assert torch.equal(y0[rows], MinibatchOT()(x0[rows], x1[rows])[0])


def test_one_label_is_no_condition_and_labels_that_all_differ_move_nothing() -> None:
    x0, x1, different = batch(64, 2)
    best = MinibatchOT()(x0, x1)[0]
    for weight in (math.inf, 5.0):
        assert torch.equal(ConditionalOT(weight)(x0, x1, torch.full((64, 3), 2.0))[0], best)
    assert torch.equal(ConditionalOT()(x0, x1, different)[0], x0)
    assert torch.equal(ConditionalOT(weight=1e9)(x0, x1, different)[0], x0)
    assert torch.equal(ConditionalOT(weight=0)(x0, x1, different)[0], best)


def test_the_weight_trades_transport_for_noise_that_knows_nothing_of_the_condition() -> None:
    correlation, costs = [], []
    for weight in (0.0, 10.0, 1000.0):
        rows = []
        for seed in range(10):
            g = generator(seed)
            cond = torch.randn(256, 1, generator=g, dtype=torch.float64)
            x0, rest = torch.randn(2, 256, 2, generator=g, dtype=torch.float64)
            x1 = 0.3 * rest + torch.cat([2 * cond, 0 * cond], 1)
            y0 = ConditionalOT(weight)(x0, x1, cond)[0]
            rows.append(torch.cat([y0[:, :1], cond], 1))
            costs.append(cost(y0, x1))
        correlation.append(abs(float(torch.cat(rows).T.corrcoef()[0, 1])))
    assert correlation[0] > 0.9 > 0.5 > correlation[1] > correlation[2] and correlation[2] < 0.06
    assert sum(costs[:10]) < sum(costs[10:20]) < sum(costs[20:]) < 10 * 256 * (2 + 4 + 2 * 0.09)


def test_a_bridge_within_labels_is_the_bridge_of_each_label() -> None:
    """Labels of unlike Gaussians: each has its own closed form, and no bridge of the mixture has both."""
    sigma, moments = 0.8, []
    for seed in range(6):
        g = generator(seed)
        x0, z = torch.randn(2, 400, 1, generator=g, dtype=torch.float64)
        label = torch.arange(400)[:, None] % 2
        scale, shift = torch.where(label == 0, 2.0, 0.5), 6.0 * label - 3
        coupling = SchrodingerBridge(sigma, weight=math.inf)
        y0, y1, _ = coupling(x0, scale * z + shift, {"label": label[:, 0]}, generator=g)
        product = y0 * (y1 - shift)
        moments.append([float(product[label == k].mean()) for k in (0, 1)])
        assert sorted(y0[label == 0].tolist()) != sorted(x0[label == 0].tolist())  # it draws
        assert {tuple(r) for r in y0[label[:, 0] == 1].tolist()} <= {tuple(r) for r in x0[label[:, 0] == 1].tolist()}
    # N(0, 1) to N(m, s^2): the covariance c solves c / (s^2 - c^2) = 1 / sigma^2
    for found, s in zip(torch.tensor(moments).mean(0).tolist(), (2.0, 0.5), strict=True):
        expected = (math.sqrt(4 * s**2 + sigma**4) - sigma**2) / 2
        assert found == pytest.approx(expected, abs=0.12 * s)
    ignored = torch.cat([SchrodingerBridge(sigma)(x0, scale * z + shift, label, generator=generator())[0], label], 1)
    assert abs(float(ignored[label[:, 0] == 1, 0].mean())) > 0.5


def test_entropic_plans_within_labels_turn_into_the_permutations_of_each_label() -> None:
    x0, x1, label = labelled(100, 0)
    for weight, cond in ((math.inf, label), (20.0, batch(100, 2)[2])):
        sharp = Sinkhorn(1e-6, weight)(x0, x1, cond, generator=generator())[0]
        assert torch.equal(sharp, ConditionalOT(weight)(x0, x1, cond)[0])


def test_the_draws_of_different_labels_are_independent() -> None:
    x0, x1, _ = batch(60, 2)
    label = torch.arange(120) // 60  # both labels hold the same rows
    i0, _ = Sinkhorn(5.0, math.inf).pairs(x0.repeat(2, 1), x1.repeat(2, 1), label, generator=generator())
    assert (i0[:60] < 60).all() and (i0[60:] >= 60).all()
    assert float((i0[:60] == i0[60:] - 60).double().mean()) < 0.3


def test_a_mapping_of_conditions_is_one_condition_of_several_parts() -> None:
    x0, x1, label = labelled(120, 1)
    other = torch.arange(120) % 3
    together = torch.cat([label, other[:, None]], 1)
    for coupling in (ConditionalOT(), Sinkhorn(0.5, weight=math.inf)):
        results = [
            coupling(x0, x1, cond, generator=generator())[0]
            for cond in (together, {"side": label, "third": other}, {"side": label})
        ]
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    cond = torch.randn(120, 2, generator=generator(), dtype=torch.float64)
    both = {"a": cond, "b": 100 * cond + 3}  # the price has no units, part by part
    assert torch.equal(ConditionalOT(20.0)(x0, x1, both)[0], ConditionalOT(20.0)(x0, x1, cond)[0])


def test_the_weight_has_no_units() -> None:
    x0, x1, _ = batch(64, 2)
    cond = torch.randn(64, 3, generator=generator(), dtype=torch.float64)
    first = ConditionalOT(20.0)(x0, x1, cond)[0]
    assert torch.equal(ConditionalOT(20.0)(1000 * x0, 1000 * x1 + 7, 1e-3 * cond + 5)[0], 1000 * first)
    assert not torch.equal(first, x0) and not torch.equal(first, MinibatchOT()(x0, x1)[0])


WORDS = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize("coupling", [ConditionalOT(), ConditionalOT(1000.0), Sinkhorn(0.5, 1000.0)], ids=repr)
def test_words_in_one_hot_code_keep_their_noise_gaussian_in_batches_drawn_by_weight(coupling: IndexCoupling) -> None:
    """A large weight forbids exchanges between words; rows and words stay together, as the data do not move."""
    centres, taken = tensor([-4.0, 0.0], [0.0, 5.0], [6.0, -1.0]), []
    for seed in range(40):
        g = generator(seed)
        word = torch.randint(3, (400,), generator=g)
        weight = torch.tensor([0.2, 1.0, 3.0])[word] * torch.rand(400, generator=g)
        drawn = word[torch.multinomial(weight, 128, replacement=True, generator=g)]
        x0, z = torch.randn(2, 128, 2, generator=g, dtype=torch.float64)
        x1, cond = centres[drawn] + 0.5 * z, WORDS[drawn]
        i0, i1 = coupling.pairs(x0, x1, cond, generator=g)
        assert torch.equal(i1, torch.arange(128)) and torch.equal(drawn[i0], drawn)
        y0, y1, y_cond = coupling(x0, x1, cond, generator=generator(seed))
        assert y1 is x1 and y_cond is cond
        taken.append((x0[i0], drawn))
        if isinstance(coupling, ConditionalOT):
            assert cost(y0, y1) < cost(x0, x1)
    noise, words = (torch.cat(parts) for parts in zip(*taken, strict=True))
    for k in range(3):
        rows = noise[words == k]
        error = 2 / math.sqrt(len(rows))  # that of the mean, twice, as draws of Sinkhorn repeat rows
        assert rows.mean(0).abs().max() < 4.5 * error and (rows.std(0) - 1).abs().max() < 4.5 * error / math.sqrt(2)
    assert (words == 2).double().mean() > 3 * (words == 0).double().mean()


# --- reflow ----------------------------------------------------------------------------------------------------------


def mixture() -> GaussianMixture:
    eye = torch.eye(2, dtype=torch.float64)
    means = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.4, 0.6], dtype=torch.float64), means, torch.stack([0.2 * eye, 0.5 * eye]))


def test_reflow_pairs_the_noise_with_what_the_model_makes_of_it() -> None:
    x0, x1, cond = batch(16, 2)

    def field(t: Time, x: Tensor, given: Tensor | None) -> Tensor:
        assert given is cond
        return 0 * x + expand_time(t, x) * cond

    y0, y1, y_cond = Reflow(field, solver="rk4", steps=3)(x0, x1, cond)
    assert y0 is x0 and y_cond is cond
    torch.testing.assert_close(y1, x0 + cond / 2)


def test_reflow_keeps_the_law_of_the_data_and_cuts_the_cost() -> None:
    truth, n = mixture(), 4000
    x0 = torch.randn(n, 2, generator=generator(), dtype=torch.float64)
    x1 = truth.sample(n, generator=generator(1))
    y0, y1, _ = Reflow(truth.velocity_field(CondOT()), solver="rk4", steps=40)(x0, x1)
    assert stats.ks_2samp(y1[:, 0], x1[:, 0]).pvalue > 1e-3 and stats.ks_2samp(y1[:, 1], x1[:, 1]).pvalue > 1e-3
    # theorem 3.5 of Liu et al., for two convex costs
    assert cost(y0, y1) < 0.9 * cost(x0, x1)
    assert float((y1 - y0).norm(dim=1).mean()) < float((x1 - x0).norm(dim=1).mean())


def test_reflow_uses_the_solver_and_the_steps_it_is_given() -> None:
    x0, x1, _ = batch(8, 2)
    field = mixture().velocity_field(CondOT())
    for solver, steps in (("euler", 2), ("heun", 3)):
        expected = solve(field, x0, solver=solver, steps=steps).x
        assert torch.equal(Reflow(field, solver=solver, steps=steps)(x0, x1)[1], expected)


def test_reflow_sends_no_gradient_and_a_broken_model_is_an_error() -> None:
    x0, x1, _ = batch(8, 2)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert not Reflow(lambda t, x, cond: weight * x)(x0, x1)[1].requires_grad
    with pytest.raises(SolverError):
        Reflow(lambda t, x, cond: x * math.nan)(x0, x1)


# --- what a caller relies on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [*PERMUTATIONS, *DRAWS], ids=repr)
def test_dtypes_stay_and_a_batch_of_one_is_its_own_pair(coupling: Coupling) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        x0, x1, cond = (x.to(dtype) for x in batch(5, 2))
        y0, y1, _ = coupling(x0, x1, cond, generator=generator())
        assert y0.dtype == y1.dtype == dtype
        assert torch.equal(coupling(x0[:1], x1[:1], cond[:1], generator=generator())[0], x0[:1])


@pytest.mark.parametrize("coupling", [*PERMUTATIONS[1:], *DRAWS], ids=repr)
def test_bad_arguments_are_named(coupling: Coupling) -> None:
    x0, x1, cond = batch(8, 2)
    with pytest.raises(ValueError, match="x0 has shape"):
        coupling(x0[:4], x1, cond)
    with pytest.raises(TypeError):
        coupling(x0, x1, cond, generatr=None)  # type: ignore[call-arg]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="x1 holds values that are not finite, but should hold none"):
            coupling(x0, torch.full_like(x1, bad), cond)
        with pytest.raises(ValueError, match="x0 holds values that are not finite, but should hold none"):
            coupling(torch.full_like(x0, bad), x1, cond)


def test_bad_parameters_are_named() -> None:
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"reg is {bad}, but should be positive"):
            Sinkhorn(bad)
        with pytest.raises(ValueError, match=f"sigma is {bad}, but should be positive"):
            SchrodingerBridge(bad)
    for bad in (-1.0, math.nan):
        for make in (ConditionalOT, lambda w: Sinkhorn(weight=w), lambda w: SchrodingerBridge(weight=w)):
            with pytest.raises(ValueError, match=f"weight is {bad}, but should be at least 0"):
                make(bad)
    x0, x1, cond = batch(8, 2)
    with pytest.raises(ValueError, match="cond is None, but should hold the conditions of the rows of x1"):
        ConditionalOT()(x0, x1)
    with pytest.raises(ValueError, match=r"cond has shape \(3, 1\), but should have shape \(8, c\)"):
        ConditionalOT()(x0, x1, cond[:3])
    with pytest.raises(ValueError, match="cond is None, but should hold the conditions of the rows of x1"):
        SchrodingerBridge(weight=1.0)(x0, x1)
    with pytest.raises(ValueError, match="x0 has shape"):
        Reflow(lambda t, x, cond: x)(x0[:2], x1)


def test_a_class_or_a_name_in_place_of_a_coupling_is_an_error() -> None:
    for coupling in (*PERMUTATIONS, *DRAWS, Reflow(lambda t, x, cond: x)):
        check_coupling(coupling)
    with pytest.raises(ValueError, match=r"^coupling is the class MinibatchOT, .* object; pass MinibatchOT\(\)\.$"):
        check_coupling(MinibatchOT)
    with pytest.raises(ValueError, match=r"^coupling is a str, but should be a Coupling; pass one such as Minib"):
        check_coupling("minibatch_ot")
