"""Laws of flow matching on discrete state spaces, against tables small enough to sum over, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import expm
from torch import Tensor, nn

from flowmatch_core.discrete import (
    CosineSchedule,
    Denoiser,
    Logits,
    MaskSource,
    MixturePath,
    PolynomialSchedule,
    Probabilities,
    Schedule,
    TokenDistribution,
    TokenFlow,
    TokenTable,
    UniformSource,
    cross_entropy_loss,
    generalised_kl_loss,
    jump_divergence,
    perplexity,
    solve_ctmc,
)
from flowmatch_core.field import Time
from flowmatch_core.metrics import bits_per_dim
from flowmatch_core.solvers import SolverError
from tests.support.checks import BOUND, close, z_scores
from tests.support.random import generator

SCHEDULES: list[Schedule] = [PolynomialSchedule(), PolynomialSchedule(2.5), CosineSchedule()]
SOURCES: list[type[MaskSource] | type[UniformSource]] = [MaskSource, UniformSource]
TABLE = TokenTable(torch.tensor([[8.0, 1.0, 1.0], [0.5, 6.0, 1.5], [2.0, 0.5, 9.0]]))  # V = 3, L = 2


def paths() -> list[MixturePath]:
    return [MixturePath(source(3), schedule) for source in SOURCES for schedule in SCHEDULES]


def states(path: MixturePath, length: int) -> Tensor:
    """All states, in the order of a flattened table."""
    return torch.tensor(list(itertools.product(range(path.source.states), repeat=length)))


def reachable(path: MixturePath, table: TokenTable, t: float) -> tuple[Tensor, Tensor]:
    """The states that have a probability at `t`, and these probabilities."""
    p = table.marginal(path, t).flatten()
    return states(path, table.length)[p > 0], p[p > 0]


def frequencies(x: Tensor, count: int) -> Tensor:
    """The table of relative frequencies of sampled sequences."""
    index = sum(x[:, i] * count ** (x.shape[1] - 1 - i) for i in range(x.shape[1]))
    return torch.bincount(torch.as_tensor(index), minlength=count ** x.shape[1]) / len(x)


def agrees(found: Tensor, truth: Tensor, n: int, sigmas: float = 5.0) -> bool:
    """Whether frequencies out of `n` are those of the truth, and nothing impossible was seen."""
    truth = truth.flatten()
    return bool(((found - truth).abs() <= sigmas * (truth * (1 - truth) / n).sqrt() + 1e-12).all())


def generator_matrix(path: MixturePath, table: TokenTable, t: float) -> Tensor:
    """The rates between all sequences: one position jumps at a time, at the rate of the velocity."""
    x = states(path, table.length)
    known, _ = reachable(path, table, t)
    velocity = path.velocity(table.denoiser(path)(t, known, None), t, known)
    size, count = len(x), path.source.states
    rates = torch.zeros(size, size, dtype=torch.float64)
    place = [count ** (table.length - 1 - i) for i in range(table.length)]
    for row, state in enumerate(known):
        index = int(sum(int(s) * p for s, p in zip(state, place, strict=True)))
        for i, p in enumerate(place):
            for y in range(count):
                rates[index, index + (y - int(state[i])) * p] += velocity[row, i, y]
    return rates


# --- logits and probabilities -----------------------------------------------------------------------------------------


def test_logits_and_probabilities_say_the_same() -> None:
    values = torch.randn(4, 5, 7, generator=generator(), dtype=torch.float64)
    x = torch.randint(7, (4, 5), generator=generator())
    truth = values.log_softmax(-1).gather(-1, x[..., None]).squeeze(-1)
    close(Logits(values).log_prob(x), truth, check_dtype=False)
    close(Logits(values).probabilities().log_prob(x), truth, check_dtype=False)
    assert torch.equal(Logits(values).sample(generator(1)), Logits(values).probabilities().sample(generator(1)))


@pytest.mark.parametrize("kind", [Logits, Probabilities])
def test_a_state_that_is_no_token_is_impossible(kind: type[Logits] | type[Probabilities]) -> None:
    values = torch.full((2, 3), 1 / 3, requires_grad=True)
    log_prob = kind(values).log_prob(torch.tensor([3, 0]))
    close(log_prob, torch.tensor([-math.inf, -math.log(3)]), 1e-6, check_dtype=False)
    log_prob.exp().sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("use", ["loss", "entropy", "velocity", "sample", "elbo"])
def test_a_bare_tensor_is_refused(use: str) -> None:
    path, x1 = MixturePath(UniformSource(3)), torch.zeros(2, 4, dtype=torch.long)

    def bare(t: Time, x: Tensor, cond: Tensor | None = None) -> TokenDistribution:
        return torch.zeros(*x.shape, 3)  # type: ignore[return-value]

    calls: dict[str, Callable[[], object]] = {
        "loss": lambda: generalised_kl_loss(bare, path, x1),
        "entropy": lambda: cross_entropy_loss(bare, path, x1),
        "velocity": lambda: path.velocity(bare(0.5, x1, None), 0.5, x1),
        "sample": lambda: solve_ctmc(bare, x1, path=path, steps=1),
        "elbo": lambda: TokenFlow(bare, path, (4,)).elbo(x1),
    }
    with pytest.raises(ValueError, match=r"denoiser is a Tensor, but should be Logits or Probabilities\."):
        calls[use]()


def test_logits_called_probabilities_and_nan_are_errors_not_samples() -> None:
    path, x0 = MixturePath(MaskSource(3)), torch.full((2, 4), 3)
    for values in (torch.tensor([0.2, 0.2, 0.2]), torch.tensor([-1.0, 1.0, 1.0]), torch.tensor([math.nan, 1.0, 0.0])):
        with pytest.raises(SolverError, match="not distributions"):
            solve_ctmc(lambda t, x, cond, v=values: Probabilities(v.expand(*x.shape, 3)), x0, path=path, steps=1)
    for values in (torch.full((3,), -math.inf), torch.tensor([math.nan, 1.0, 0.0])):
        with pytest.raises(SolverError, match="not distributions"):
            solve_ctmc(lambda t, x, cond, v=values: Logits(v.expand(*x.shape, 3)), x0, path=path, steps=1)
    assert bool(Probabilities(torch.randn(99, 50_000, generator=generator()).softmax(-1)).is_valid())
    assert bool(Probabilities(torch.randn(9, 50_000, generator=generator()).softmax(-1).bfloat16()).is_valid())


def test_draws_follow_the_probabilities_and_never_meet_a_zero() -> None:
    n, p = 200_000, torch.tensor([0.0, 0.5, 0.0, 1e-3, 0.499, 0.0], dtype=torch.float64)
    found = frequencies(Probabilities(p.expand(n, 1, 6)).sample(generator()), 6)
    assert agrees(found, p, n)


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (1 - 2**-28, 1), (1 - 2**-30, 2), (1 - 2**-53, 2)],
    ids=["0", "1-2^-28", "1-2^-30", "last"],
)
@pytest.mark.parametrize("scale", [1.0, 0.7, 3.0])
def test_draws_are_right_at_the_ends_and_beyond_float32(
    monkeypatch: pytest.MonkeyPatch, uniform: float, token: int, scale: float
) -> None:
    """The first and the last uniform number never meet an impossible token, and a token of probability 2^-29,
    less than the spacing of float32 numbers near one, has its share."""

    def rand(shape: tuple[int, ...], dtype: torch.dtype, **rest: object) -> Tensor:
        return torch.full(shape, uniform, dtype=dtype)

    weights = scale * torch.tensor([0.0, 1 - 2**-29, 2**-29, 0.0], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", rand)
    assert Probabilities(weights.expand(5, 4)).sample().tolist() == [token] * 5


# --- schedules, sources, path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedule_laws(schedule: Schedule) -> None:
    ends = schedule.noise(torch.tensor([0.0, 1.0]))
    assert torch.equal(ends, torch.tensor([1.0, 0.0]))
    assert not ends.signbit().any()  # minus zero would make a hazard infinite with the wrong sign
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    noise = schedule.noise(t)
    (slope,) = torch.autograd.grad(noise.sum(), t)
    close(schedule.d_kappa(t), -slope, check_dtype=False)
    close(schedule.time_of_noise(noise), t, 1e-12, check_dtype=False)
    late = torch.tensor([1e-3, 1e-7, 1e-9], dtype=torch.float64)  # exact near the end too
    assert ((schedule.noise(schedule.time_of_noise(late)) / late - 1).abs() < 1e-6).all()


def test_user_schedules_are_only_polynomials_that_start_without_data() -> None:
    for n in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"n is .*, but should be at least 1 and finite\."):
            PolynomialSchedule(n)


@pytest.mark.parametrize("source", SOURCES)
def test_source_samples_have_its_probability(source: type[MaskSource] | type[UniformSource]) -> None:
    n, given = 100_000, source(3)
    truth = given.probability(torch.arange(given.states))
    assert float(truth.sum()) == pytest.approx(1)
    assert agrees(frequencies(given.sample((n, 1), generator()), given.states), truth, n)


@pytest.mark.parametrize("path", paths(), ids=str)
def test_path_samples_the_mixture(path: MixturePath) -> None:
    n = 100_000
    x0, x1 = torch.tensor([[2, 0]]).expand(n, 2), torch.tensor([[1, 0]]).expand(n, 2)
    t = torch.tensor([0.0, 0.3, 0.8, 1.0]).repeat(n // 4)
    x_t = path.sample(x0, x1, t, generator())
    assert (x_t[:, 1] == 0).all()
    kappa = 1 - path.schedule.noise(t[:4].double())
    share = (x_t[:, 0] == 1).double().reshape(-1, 4).mean(0)
    assert ((share - kappa).abs() <= 5 * (kappa * (1 - kappa) / (n / 4)).sqrt()).all()
    assert torch.equal(path.sample(x0, x1, 1.0), x1)
    assert torch.equal(path.sample(x0, x1, 0.0), x0)


def test_times_have_no_trailing_dimension() -> None:
    path, x = MixturePath(UniformSource(3)), torch.zeros(4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"t has shape \(4, 1\), but should be a float, 0-d or of shape \(4,\)\."):
        path.sample(x, x, torch.rand(4, 1))


# --- rates and marginals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", paths(), ids=str)
def test_oracle_marginal_and_posterior_are_those_of_the_joint_sum(path: MixturePath) -> None:
    """By Bayes' rule, sequence by sequence."""
    t = 0.35
    noise = float(path.schedule.noise(torch.tensor(t, dtype=torch.float64)))
    x = states(path, 2)
    start = path.source.probability(x)
    marginal, posterior = torch.zeros(len(x)), torch.zeros(len(x), 2, 3)
    marginal, posterior = marginal.double(), posterior.double()
    for x1, p1 in zip(TABLE.support, TABLE.probabilities.flatten(), strict=True):
        joint = p1 * (noise * start + (1 - noise) * (x == x1).double()).prod(1)
        marginal += joint
        for i in range(2):
            posterior[:, i, x1[i]] += joint
    close(TABLE.marginal(path, t).flatten(), marginal, check_dtype=False)
    known, p = reachable(path, TABLE, t)
    found = TABLE.denoiser(path)(t, known, None).probabilities().values
    close(found, posterior[marginal > 0] / p[:, None, None], check_dtype=False)
    mixed = TABLE.denoiser(path)(torch.full((len(known),), t, dtype=torch.float64), known, None)
    close(mixed.probabilities().values, found, check_dtype=False)


@pytest.mark.parametrize("path", paths(), ids=str)
def test_conditional_jumps_are_the_matrix_exponential(path: MixturePath) -> None:
    """Kolmogorov's equation for the chain towards one data point: the generator is a rate times a constant
    matrix, so its solution is a matrix exponential, and it must be the mixture at any two times."""
    count, target, start = path.source.states, 1, path.source.states - 1
    everywhere = torch.arange(count)[:, None]
    sure = Probabilities(torch.eye(3, dtype=torch.float64)[target].expand(count, 1, 3))
    t, s = 0.2, 0.7
    rate = float(path.rate(torch.tensor(t, dtype=torch.float64)))
    matrix = path.velocity(sure, t, everywhere)[:, 0] / rate
    close(matrix.sum(1), torch.zeros(count), check_dtype=False)
    if isinstance(path.source, MaskSource):
        assert (matrix[: count - 1] == 0).all()  # data stay
    hazard, _ = quad(lambda r: float(path.rate(torch.tensor(r, dtype=torch.float64))), t, s, epsabs=1e-12)
    kappa = [1 - float(path.schedule.noise(torch.tensor(time, dtype=torch.float64))) for time in (t, s)]

    def mixture(share: float) -> Tensor:
        row = torch.zeros(count, dtype=torch.float64)
        row[start] += 1 - share
        row[target] += share
        return row

    close(mixture(kappa[0]) @ torch.as_tensor(expm(matrix.numpy() * hazard)), mixture(kappa[1]), check_dtype=False)


@pytest.mark.parametrize("path", paths(), ids=str)
def test_marginal_velocity_generates_the_marginals(path: MixturePath) -> None:
    """Kolmogorov's forward equation of whole sequences, dp/dt = p U."""
    for t in (0.1, 0.5, 0.9):
        h = 1e-5
        slope = (TABLE.marginal(path, t + h) - TABLE.marginal(path, t - h)).flatten() / (2 * h)
        close(TABLE.marginal(path, t).flatten() @ generator_matrix(path, TABLE, t), slope, 1e-7, check_dtype=False)


@pytest.mark.parametrize("source", SOURCES)
def test_chain_of_matrix_exponentials_carries_the_source_to_the_data(
    source: type[MaskSource] | type[UniformSource],
) -> None:
    """The chain as an outsider would solve it: frozen rates on many short intervals."""
    path, n = MixturePath(source(3)), 400
    p = TABLE.marginal(path, 0.0).flatten()
    for k in range(n):
        t, end = 0.98 * (k + 0.5) / n, 0.98 * (k + 1) / n
        matrix = generator_matrix(path, TABLE, t).numpy()
        p = p @ torch.as_tensor(expm(matrix * (end - 0.98 * k / n)))
    close(p, TABLE.marginal(path, 0.98).flatten(), 2e-4, check_dtype=False)
    close(TABLE.marginal(path, 1.0)[:3, :3], TABLE.probabilities, check_dtype=False)
    assert float(TABLE.marginal(path, 0.98)[:3, :3].sum()) > 0.95


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", paths(), ids=str)
def test_one_step_samples_the_first_posterior(path: MixturePath) -> None:
    """Positions are independent given the noise, so one call gives the product of the marginals, exactly."""
    n = 100_000
    solution = solve_ctmc(
        TABLE.denoiser(path), path.source.sample((n, 2), generator()), path=path, steps=1, generator=generator(1)
    )
    assert (solution.nfe, solution.status) == (1, "finished")
    product = TABLE.probabilities.sum(1)[:, None] * TABLE.probabilities.sum(0)
    assert agrees(frequencies(solution.x, 3), product, n)


@pytest.mark.parametrize("path", paths(), ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_token_is_exact_at_any_step_size(path: MixturePath, steps: int) -> None:
    """All states of the grid have the law of the path: with one position nothing else moves during a step."""
    n, table = 100_000, TokenTable(torch.tensor([0.6, 0.1, 0.3]))
    if isinstance(path.source, UniformSource) and steps > 1:
        table = TokenTable(torch.tensor([1.0, 0.0, 0.0]))  # several jumps: only a sure end stays exact
    x0 = path.source.sample((n, 1), generator())
    solution = solve_ctmc(table.denoiser(path), x0, path=path, steps=steps, save=True, generator=generator(1))
    assert solution.t is not None
    assert solution.path is not None
    assert solution.path.shape == (steps + 1, n, 1)
    assert torch.equal(solution.path[-1], solution.x)
    for t, x in zip(solution.t.tolist(), solution.path, strict=True):
        assert agrees(frequencies(x, path.source.states), table.marginal(path, t), n)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_many_steps_sample_the_joint_law(source: type[MaskSource] | type[UniformSource], stochasticity: float) -> None:
    n, path = 20_000, MixturePath(source(3), CosineSchedule())
    flow = TokenFlow(TABLE.denoiser(path), path, (2,), steps=50, stochasticity=stochasticity)
    x = flow.sample((n,), generator=generator())
    error = (frequencies(x, 3) - TABLE.probabilities.flatten()).abs().sum() / 2
    assert error < 0.03  # the noise of n draws and the bias of fifty steps
    product = TABLE.probabilities.sum(1)[:, None] * TABLE.probabilities.sum(0)
    assert (product - TABLE.probabilities).abs().sum() / 2 > 0.3  # what one step gives


@pytest.mark.parametrize("source", SOURCES)
def test_stochasticity_keeps_the_marginals_and_takes_back_mistakes(
    source: type[MaskSource] | type[UniformSource],
) -> None:
    n, path, table = 20_000, MixturePath(source(3)), TokenTable(torch.tensor([0.6, 0.1, 0.3]))
    right, wrong = table.denoiser(path), Probabilities(torch.tensor([0.1, 0.8, 0.1]).double().expand(n, 1, 3))
    x0 = path.source.sample((n, 1), generator())
    solution = solve_ctmc(right, x0, path=path, t1=0.8, steps=80, stochasticity=2.0, generator=generator(1))
    error = (frequencies(solution.x, path.source.states) - table.marginal(path, 0.8)).abs().sum() / 2
    assert error < 0.03

    def misled(t: Time, x: Tensor, cond: Tensor | None = None) -> TokenDistribution:
        return wrong if float(t) < 0.3 else right(t, x, cond)

    errors = []
    for stochasticity in (0.0, 4.0):
        flow = TokenFlow(misled, path, (1,), steps=80, stochasticity=stochasticity)
        found = frequencies(flow.sample((n,), generator=generator(2)), 3)
        errors.append(float((found - table.probabilities).abs().sum() / 2))
    assert errors[0] > 0.05
    assert errors[1] < errors[0] / 2


def test_mask_never_changes_what_is_revealed_whatever_the_denoiser_says() -> None:
    path = MixturePath(MaskSource(3))
    x = torch.tensor([[0, 3, 1]]).expand(1000, 3)
    solution = solve_ctmc(lambda t, x, cond: Logits(torch.zeros(*x.shape, 3)), x, path=path, steps=3)
    assert torch.equal(solution.x[:, [0, 2]], x[:, [0, 2]])
    assert solution.x.max() == 2


def test_samples_depend_on_the_generator_alone_and_have_the_shapes_of_their_conditions() -> None:
    path, cond = MixturePath(MaskSource(4)), torch.eye(4).reshape(2, 2, 4) * 50

    def told(t: Time, x: Tensor, cond: Tensor | None = None) -> Logits:
        assert cond is not None
        return Logits(cond[:, None].expand(*x.shape, 4))

    flow = TokenFlow(told, path, (3,), steps=3, cond_shape=(4,))
    x = flow.sample((5,), cond=cond, generator=generator())
    assert x.shape == (5, 2, 2, 3)
    assert (x == torch.arange(4).reshape(2, 2, 1)).all()
    free = TokenFlow(lambda t, x, cond: Logits(torch.zeros(*x.shape, 4)), MixturePath(UniformSource(4)), (3,))
    state = torch.get_rng_state()
    assert torch.equal(free.sample((9,), generator=generator(5)), free.sample((9,), generator=generator(5)))
    assert torch.equal(torch.get_rng_state(), state)
    bound = flow.elbo(x, cond, generator=generator())
    assert bound.log_prob.shape == (5, 2, 2)
    assert (bound.log_prob.abs() < 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 0}, r"steps is 0, but should be at least 1\."),
        ({"t0": 0.5, "t1": 0.5}, r"t0 and t1 are 0\.5 and 0\.5, but should be such that 0 <= t0 < t1 <= 1\."),
        ({"t1": 1.5}, r"t0 and t1 are 0\.0 and 1\.5, but should be such that 0 <= t0 < t1 <= 1\."),
        ({"stochasticity": -1.0}, r"stochasticity is -1\.0, but should be at least 0 and finite\."),
    ],
)
def test_bad_arguments_of_the_solver_are_named(arguments: dict[str, float], sentence: str) -> None:
    path = MixturePath(MaskSource(3))
    with pytest.raises(ValueError, match=sentence):
        solve_ctmc(TABLE.denoiser(path), torch.full((1, 2), 3), path=path, **arguments)  # type: ignore[arg-type]


# --- losses -----------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A denoiser with free logits for each state, the same at all times."""

    def __init__(self, path: MixturePath, values: Tensor) -> None:
        super().__init__()
        self.path, self.values = path, nn.Parameter(values)

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Logits:
        return Logits(self.values[x[:, 0] * self.path.source.states + x[:, 1]])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["kl", "entropy"])
def test_the_true_posterior_minimises_the_expected_loss(
    source: type[MaskSource] | type[UniformSource], kind: str
) -> None:
    """The expectation over data and states is a finite sum: its gradient vanishes at the truth only."""
    path, t = MixturePath(source(3)), 0.4
    x, p = reachable(path, TABLE, t)
    noise = float(path.schedule.noise(torch.tensor(t, dtype=torch.float64)))
    start = path.source.probability(x)
    pairs = [(noise * start + (1 - noise) * (x == x1).double()).prod(1) for x1 in TABLE.support]
    weights = torch.stack(pairs) * TABLE.probabilities.reshape(-1, 1)  # (x1, x_t)
    close(weights.sum(0), p, check_dtype=False)

    def expected(values: Tensor) -> Tensor:
        total = values.new_zeros(())
        for x1, weight in zip(TABLE.support, weights, strict=True):
            data, prediction = x1.expand(len(x), 2), Logits(values)
            if kind == "kl":
                cost = jump_divergence(prediction, path, x, data)
            else:
                cost = -prediction.log_prob(data).masked_fill(path.source.is_data(x), 0.0)
            total = total + (weight[:, None] * cost).nan_to_num(posinf=0.0).sum()
        return total

    truth = TABLE.denoiser(path)(t, x, None).probabilities().values.clamp(min=1e-30).log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected(truth), truth)
    assert gradient.abs().max() < 1e-9
    minimum = expected(truth.detach())
    for seed in range(5):
        other = truth.detach() + 0.1 * torch.randn(truth.shape, generator=generator(seed), dtype=torch.float64)
        assert expected(other) > minimum + 1e-5


@pytest.mark.parametrize("path", paths(), ids=str)
def test_jump_divergence_is_the_kullback_leibler_divergence_of_the_rates(path: MixturePath) -> None:
    """sum over y of u log(u/v) - u + v, with the rates written out by `velocity`."""
    t, count = 0.3, path.source.states
    x_t = torch.arange(count).repeat_interleave(3)[:, None]
    x1 = torch.arange(3).repeat(count)[:, None]
    values = torch.randn(len(x1), 1, 3, generator=generator(), dtype=torch.float64)
    sure = Probabilities(torch.eye(3, dtype=torch.float64)[x1])
    u, v = (path.velocity(p, t, x_t) for p in (sure, Logits(values)))
    jumps = torch.arange(count) != x_t[..., None]
    terms = torch.special.xlogy(u, u / v).nan_to_num() - u + v
    truth = terms.where(jumps, terms.new_zeros(())).sum(-1)
    rate = path.rate(torch.tensor(t, dtype=torch.float64))
    close(rate * jump_divergence(Logits(values), path, x_t, x1), truth, check_dtype=False)


@pytest.mark.parametrize("source", SOURCES)
def test_losses_are_the_sampled_means(source: type[MaskSource] | type[UniformSource]) -> None:
    """Both losses against the sum over all states at a fixed time."""
    n, path, t = 200_000, MixturePath(source(3), CosineSchedule()), 0.4
    x1 = torch.tensor([[0, 2]]).expand(n, 2)
    x = states(path, 2)
    noise = path.schedule.noise(torch.tensor(t, dtype=torch.float64))
    p = (noise * path.source.probability(x) + (1 - noise) * (x == x1[0]).double()).prod(1)
    values = torch.randn(len(x), 2, 3, generator=generator(), dtype=torch.float64)
    denoiser, given = Rows(path, values), x1[: len(x)]
    kl = path.rate(torch.tensor(t).double()) * (p[:, None] * jump_divergence(Logits(values), path, x, given)).sum() / 2
    entropy = -(p[:, None] * Logits(values).log_prob(given).masked_fill(path.source.is_data(x), 0.0)).sum() / 2
    time = torch.full((n,), t, dtype=torch.float64)
    for loss, truth in ((generalised_kl_loss, kl), (cross_entropy_loss, entropy)):
        found = loss(denoiser, path, x1, time=time, generator=generator(1))
        assert found.item() == pytest.approx(truth.item(), rel=0.02)
        assert torch.equal(found, loss(denoiser, path, x1, time=time, generator=generator(1)))


def test_training_finds_the_posterior() -> None:
    path, n = MixturePath(MaskSource(3)), 2048
    denoiser, g = Rows(path, torch.zeros(16, 2, 3)), generator()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.zero_grad()
        cross_entropy_loss(denoiser, path, TABLE.sample((n,), g), generator=g).backward()
        optimizer.step()
    x, _ = reachable(path, TABLE, 0.5)
    masked = x == 3
    truth = TABLE.denoiser(path)(0.5, x, None).probabilities().values  # of masked positions: the same at all times
    found = denoiser(0.5, x).probabilities().values
    assert (found[masked] - truth[masked]).abs().max() < 0.03


def test_losses_are_finite_with_gradients_at_both_ends_of_time() -> None:
    x1 = torch.tensor([[0, 2]]).expand(8, 2)
    for path in paths():
        for loss in (generalised_kl_loss, cross_entropy_loss):
            for end in (0.0, 1.0):
                denoiser = Rows(path, torch.zeros(16, 2, 3))
                value = loss(denoiser, path, x1, time=torch.full((8,), end))
                value.backward()  # type: ignore[no-untyped-call]
                assert value.isfinite()
                assert denoiser.values.grad is not None
                assert denoiser.values.grad.isfinite().all()


# --- bound ------------------------------------------------------------------------------------------------------------


def exact_bound(table: TokenTable, path: MixturePath, denoiser: Denoiser, x1: Tensor) -> float:
    """The evidence lower bound of one sequence: a sum over all states inside a quadrature over time."""
    x = states(path, table.length)

    def at(t: float) -> float:
        time = torch.tensor(t, dtype=torch.float64)
        noise = path.schedule.noise(time)
        p = (noise * path.source.probability(x) + (1 - noise) * (x == x1).double()).prod(1)
        seen = x[p > 0]
        cost = jump_divergence(denoiser(t, seen, None), path, seen, x1.expand(len(seen), -1)).sum(1)
        return (path.rate(time) * (p[p > 0] * cost).sum()).item()

    value, _ = quad(at, 0, 1, epsabs=1e-7, limit=200)
    return -value


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_bound_with_the_true_posterior_of_a_masked_path_is_the_log_probability(schedule: Schedule) -> None:
    path = MixturePath(MaskSource(3), schedule)
    flow = TokenFlow(TABLE.denoiser(path), path, (2,))
    truth = TABLE.log_prob(TABLE.support)
    for x1, log_prob in zip(TABLE.support, truth, strict=True):
        assert exact_bound(TABLE, path, flow.denoiser, x1) == pytest.approx(float(log_prob), abs=1e-5)
    bound = flow.elbo(TABLE.support.expand(500, 9, 2), samples=8, generator=generator())
    error = bound.standard_error.square().mean(0).sqrt() / 500**0.5
    assert ((bound.log_prob.mean(0) - truth).abs() < 4.5 * error).all()
    assert (error < 0.1).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_bound_of_a_uniform_source_leaves_a_gap(schedule: Schedule) -> None:
    """Data may jump again, so that the end does not tell the way: the bound is strict."""
    path = MixturePath(UniformSource(3), schedule)
    for x1, log_prob in zip(TABLE.support, TABLE.log_prob(TABLE.support), strict=True):
        bound = exact_bound(TABLE, path, TABLE.denoiser(path), x1)
        assert float(log_prob) - 2 < bound < float(log_prob) - 0.02


def test_bound_of_an_inconsistent_denoiser_is_below_the_law_of_its_samples() -> None:
    """One token whose posterior drifts from p to q: a jump at a uniform time samples their mean, and the bound is
    the mean of the logarithms."""
    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([0.7, 0.2, 0.1], [0.1, 0.2, 0.7]))
    path, n = MixturePath(MaskSource(3)), 50_000

    def drifting(t: Time, x: Tensor, cond: Tensor | None = None) -> Probabilities:
        return Probabilities(torch.lerp(p, q, float(t)).expand(*x.shape, 3))

    law = (p + q) / 2
    flow = TokenFlow(drifting, path, (1,), steps=100)
    assert agrees(frequencies(flow.sample((n,), generator=generator()), 3), law, n, sigmas=6)
    table = TokenTable(law)
    for token in range(3):
        bound = exact_bound(table, path, drifting, torch.tensor([token]))
        a, b = float(p[token]), float(q[token])
        mean = math.log(a) if a == b else (b * math.log(b) - a * math.log(a)) / (b - a) - 1
        assert bound == pytest.approx(mean, abs=1e-5)
        assert bound <= math.log(float(law[token])) + 1e-5
        assert (bound < math.log(float(law[token])) - 0.05) == (token != 1)


@pytest.mark.parametrize("source", SOURCES)
def test_estimate_of_the_bound_is_unbiased_and_its_error_is_right(
    source: type[MaskSource] | type[UniformSource],
) -> None:
    path = MixturePath(source(3), PolynomialSchedule(2))
    flow = TokenFlow(TABLE.denoiser(path), path, (2,))
    x1 = torch.tensor([0, 1])
    truth = exact_bound(TABLE, path, flow.denoiser, x1)
    bound = flow.elbo(x1.expand(4000, 2), samples=16, generator=generator())
    spread, error = float(bound.log_prob.std()), float(bound.standard_error.square().mean().sqrt())
    assert float(bound.log_prob.mean()) == pytest.approx(truth, abs=5 * spread / 4000**0.5)
    assert 0.9 * spread < error < 1.5 * spread


def test_bound_has_the_tail_of_the_cube_root() -> None:
    """Of one masked token of probability 1/e the terms are -3/r with probability r^3: P(term < -w) = (3/w)^4 / 4.

    So the moments below the fourth are finite. With two strata the lower term is the estimate minus its error, and
    comes from r < 1/2 where w > 6.
    """
    n, path = 500_000, MixturePath(MaskSource(2))
    law = Logits(torch.tensor([-1.0, math.log(1 - math.exp(-1))], dtype=torch.float64))
    flow = TokenFlow(lambda t, x, cond: Logits(law.values.expand(*x.shape, 2)), path, (1,))
    bound = flow.elbo(torch.zeros(n, 1, dtype=torch.long), samples=2, generator=generator())
    lower = bound.log_prob - bound.standard_error
    for w in (8.0, 16.0):
        assert abs(z_scores((lower < -w).double(), 2 * (3 / w) ** 4 / 4)) < BOUND


def test_bound_of_a_deterministic_language_is_zero_and_carries_gradients() -> None:
    path = MixturePath(MaskSource(3))
    denoiser = Rows(path, torch.zeros(16, 2, 3, dtype=torch.float64))
    TokenFlow(denoiser, path, (2,)).elbo(torch.tensor([[0, 1]]), generator=generator()).log_prob.sum().backward()
    assert denoiser.values.grad is not None
    assert denoiser.values.grad.abs().sum() > 0
    sure = TokenTable(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    two = MixturePath(MaskSource(2))
    bound = TokenFlow(sure.denoiser(two), two, (2,)).elbo(torch.tensor([[0, 1]]), generator=generator())
    close(bound.log_prob, torch.zeros(1), check_dtype=False)


def test_perplexity_and_bits_of_a_uniform_language() -> None:
    log_prob = torch.full((5,), -7 * math.log(8.0), dtype=torch.float64)
    assert float(perplexity(log_prob, 7)) == pytest.approx(8)
    close(bits_per_dim(log_prob, 7), torch.full((5,), 3.0).double(), check_dtype=False)
    entropy = -(TABLE.probabilities * TABLE.probabilities.log()).sum()
    n, path = 2000, MixturePath(MaskSource(3))
    bound = TokenFlow(TABLE.denoiser(path), path, (2,)).elbo(TABLE.sample((n,), generator()), generator=generator(1))
    assert float(perplexity(bound.log_prob, 2)) == pytest.approx(math.exp(float(entropy) / 2), rel=0.03)


def test_bad_arguments_of_the_flow_are_named() -> None:
    path = MixturePath(MaskSource(3))
    flow = TokenFlow(TABLE.denoiser(path), path, (2,))
    with pytest.raises(ValueError, match=r"steps is 0, but should be at least 1\."):
        TokenFlow(TABLE.denoiser(path), path, (2,), steps=0)
    with pytest.raises(ValueError, match=r"samples is 1, but should be at least 2 for a standard error\."):
        flow.elbo(TABLE.support, samples=1)
    with pytest.raises(ValueError, match=r"value has shape \(4, 3\), but should be of shape \(4, 2\)\."):
        flow.elbo(torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"cond has a batch of shape \(3,\), but should have one"):
        flow.elbo(torch.zeros(4, 2, dtype=torch.long), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"has shape \(2, 2, 3\), but should be of shape \(2, 2, 2\)\."):
        generalised_kl_loss(TABLE.denoiser(path), MixturePath(UniformSource(2)), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the source of path has 4 tokens, but should have 3, as the table\."):
        TABLE.marginal(MixturePath(MaskSource(4)), 0.5)
    with pytest.raises(ValueError, match=r"values of Logits has shape \(2,\) and dtype torch\.int64, but should"):
        Logits(torch.tensor([0, 1]))


@pytest.mark.parametrize("loss", [generalised_kl_loss, cross_entropy_loss])
def test_a_time_of_a_loss_may_be_one_number_and_a_mistake_in_its_call_is_named(loss: Callable[..., Tensor]) -> None:
    path, x1 = MixturePath(MaskSource(3)), TABLE.sample((6,), generator())
    times = (0.5, torch.full((6,), 0.5, dtype=torch.float64))
    losses = [loss(TABLE.denoiser(path), path, x1, time=t, generator=generator()) for t in times]
    close(losses[0], losses[1])
    with pytest.raises(ValueError, match=r"x1 has dtype torch\.float32, but should hold tokens of dtype torch\.int64"):
        loss(TABLE.denoiser(path), path, x1.float())
    with pytest.raises(ValueError, match=r"denoiser takes the arguments .*, but is called as denoiser\(t, x, cond\)"):
        loss(lambda t, x: x, path, x1)
