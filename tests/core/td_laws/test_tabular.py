"""Chains on a few states, where every successor measure is a matrix: td-flows 4.4."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmatch_core.paths import CondOT, Cosine
from flowmatch_core.solvers import solve
from flowmatch_core.successor import (
    SuccessorLoss,
    Transitions,
    geometric,
    td2_cfm_loss,
    td_cfm_loss,
)
from tests.support.checks import BOUND, z_scores
from tests.support.processes import TD_LOSSES, Chain, Probe, circle, corridor, flip, random_chain
from tests.support.random import generator, randn

GAMMA = 0.8


def late(n: int, **options: object) -> Tensor:
    return torch.full((n,), 0.999, dtype=torch.float64)


def test_matrix_is_the_sum_over_the_steps_and_its_rows_sum_to_one() -> None:
    chain = random_chain()
    M, power, total = chain.successor(GAMMA), torch.eye(5, dtype=torch.float64), torch.zeros(5, 5)
    for n in range(400):
        power = power @ chain.P
        total = total + (1 - GAMMA) * GAMMA**n * power
    torch.testing.assert_close(M, total, atol=1e-12, rtol=0)
    torch.testing.assert_close(M.sum(1), torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_small_chains_have_the_answers_of_pencil_and_paper() -> None:
    M = flip().successor(GAMMA)
    assert M[0].tolist() == pytest.approx([GAMMA / (1 + GAMMA), 1 / (1 + GAMMA)])
    M = corridor(4).successor(GAMMA)
    weights = [(1 - GAMMA) * GAMMA**j for j in range(3)]
    assert M[0].tolist() == pytest.approx([0, *weights, GAMMA**3])
    assert M[4].tolist() == pytest.approx([0, 0, 0, 0, 1])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
def test_geometric_horizon_starts_at_one_and_has_the_weights_of_theory(gamma: float) -> None:
    """T counts steps from 1: a horizon of 0 would be the state itself."""
    n = 200_000
    T = geometric(gamma, (n,), generator=generator())
    assert int(T.min()) == 1
    for k in range(1, 6):
        p = (1 - gamma) * gamma ** (k - 1)
        assert abs(int((T - k == 0).sum()) - n * p) <= BOUND * math.sqrt(n * p * (1 - p))
    assert abs(z_scores(T.double(), 1 / (1 - gamma)).nan_to_num()) < BOUND


def test_states_after_a_geometric_horizon_follow_the_matrix() -> None:
    """Rollouts of the chain, the state T steps later: never the first one unless the chain returns to it."""
    chain, n = corridor(3), 20_000
    T, state = geometric(GAMMA, (n,), generator=generator()), torch.zeros(n, dtype=torch.long)
    reached = state
    for step in range(1, int(T.max()) + 1):
        state = torch.minimum(state + 1, torch.tensor(3))
        reached = torch.where(T - step == 0, state, reached)
    shares = chain.shares(chain.places[reached])
    error = (shares * (1 - shares) / n).sqrt().clamp_min(1e-9)
    assert ((shares - chain.successor(GAMMA)[0]).abs() <= BOUND * error).all()


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
@pytest.mark.parametrize("chain", [flip(), corridor(4), random_chain()], ids=["flip", "corridor", "random"])
def test_flow_of_the_exact_velocity_visits_the_states_as_the_matrix_says(chain: Chain, path: CondOT | Cosine) -> None:
    n, M = 2_000, chain.successor(GAMMA)
    for start in (0, len(M) - 1):
        x = solve(
            chain.field(GAMMA, path),
            randn(n, 2, seed=start + 1),
            t1=0.999,
            cond=chain.places[start].expand(n, 2),
            solver="heun",
            steps=30,
        ).x
        assert torch.cdist(x, chain.places).amin(1).max() < 1.0
        error = (M[start] * (1 - M[start]) / n).sqrt().clamp_min(1e-9)
        assert ((chain.shares(x) - M[start]).abs() <= BOUND * error).all()


def test_velocity_of_an_absorbing_state_is_straight_to_it() -> None:
    """m = delta_s, so v* = (s - x) / (1 - t)."""
    chain, x, t = corridor(2), randn(20, 2, seed=1), torch.linspace(0, 0.95, 20, dtype=torch.float64)
    end = chain.places[2].expand(20, 2)
    torch.testing.assert_close(chain.field(GAMMA)(t, x, end), (end - x) / (1 - t)[:, None], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=str)
@pytest.mark.parametrize("td_loss", [td_cfm_loss, td2_cfm_loss], ids=lambda loss: loss.__name__)
def test_exact_velocity_is_stationary(td_loss: SuccessorLoss, path: CondOT | Cosine) -> None:
    """Between the atoms too: times to 0.8, before a trajectory is at one of them."""

    def early(n: int, **options: object) -> Tensor:
        return 0.8 * torch.rand(n, generator=generator(9), dtype=torch.float64)

    chain, n = random_chain(), 10_000
    batch, field = chain.transitions(0, n), chain.field(GAMMA, path)
    probe = Probe(field, n)
    loss = td_loss(probe, field, batch, gamma=GAMMA, path=path, time=early, steps=16, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


# Terminal states


class Recorder:
    """A field that keeps the points it was asked for."""

    def __init__(self) -> None:
        self.x = torch.empty(0)

    def __call__(self, t: Tensor, x: Tensor, cond: Tensor | None = None, /) -> Tensor:
        self.x = x
        return torch.zeros_like(x)


@pytest.mark.parametrize("td_loss", TD_LOSSES, ids=lambda loss: loss.__name__)
def test_terminal_states_absorb_and_lose_no_mass(td_loss: SuccessorLoss) -> None:
    """(1-g) delta_{S'} + g X has the row of the matrix as its law; the target knows nothing of terminal states.

    The target is the exact field of a chain that goes back from its end: the flag alone must absorb.
    """
    chain = corridor(2)
    M = chain.successor(GAMMA)
    back = Chain(chain.P.clone(), chain.places)
    back.P[2] = torch.tensor([1.0, 0.0, 0.0])
    terminal, n = torch.tensor([False, False, True]), 2_000
    for start, target in ((1, back.field(GAMMA)), (0, chain.field(GAMMA))):
        batch, field = chain.transitions(start, n, terminal=terminal), Recorder()
        td_loss(field, target, batch, gamma=GAMMA, time=late, steps=16, solver="heun", generator=generator())  # type: ignore[arg-type]
        direct, bootstrap = (chain.shares(x) for x in field.x.chunk(2))
        shares = (1 - GAMMA) * direct + GAMMA * bootstrap
        assert float(shares.sum()) == pytest.approx(1)
        error = GAMMA * (bootstrap * (1 - bootstrap) / n).sqrt().clamp_min(1e-9)
        assert ((shares - M[start]).abs() <= BOUND * error).all()


@pytest.mark.parametrize("td_loss", TD_LOSSES, ids=lambda loss: loss.__name__)
def test_without_terminal_rows_the_flag_changes_nothing(td_loss: SuccessorLoss) -> None:
    chain = random_chain()
    plain = chain.transitions(0, 64)
    flagged = Transitions(plain.state, None, plain.next_state, None, terminal=torch.zeros(64, dtype=torch.bool))
    losses = [
        td_loss(lambda t, x, cond: -x, chain.field(GAMMA), batch, gamma=GAMMA, generator=generator())
        for batch in (plain, flagged)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_only_a_terminal_row_regresses_on_its_own_state() -> None:
    """At a known noise: the row's bootstrap term is that of the path from the noise to S'."""
    s = circle(4)
    batch = Transitions(s, None, s + 1, None, terminal=torch.tensor([True, False, True, False]))
    field = Recorder()
    loss = td2_cfm_loss(field, lambda t, x, cond: x * 0 + 7, batch, gamma=GAMMA, generator=generator())  # type: ignore[arg-type]
    direct, bootstrap = field.x.chunk(2)
    assert torch.equal(direct[[0, 2]], bootstrap[[0, 2]])
    assert not torch.isclose(direct[[1, 3]], bootstrap[[1, 3]]).any()
    assert float(loss.bootstrap) > 49 * 2 / 2


# Horizon composition


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7])
def test_long_horizons_are_made_of_short_ones(beta: float) -> None:
    """m_g = (1-g)/(1-b) m_b + (g-b)/(1-b) m_b m_g, and the same from the next state, td-flows 1.10."""
    chain, gamma = random_chain(), 0.9
    short, long, P = chain.successor(beta), chain.successor(gamma), chain.P
    mixed = (1 - gamma) / (1 - beta) * short + (gamma - beta) / (1 - beta) * short @ long
    torch.testing.assert_close(mixed, long, atol=1e-14, rtol=0)
    from_next = (
        (1 - gamma) * P
        + gamma * (1 - gamma) / (1 - beta) * P @ short
        + gamma * (gamma - beta) / (1 - beta) * P @ short @ long
    )
    torch.testing.assert_close(from_next, long, atol=1e-14, rtol=0)
