"""Laws of n-step returns and of the data of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import SuccessorLoss, Transitions, n_step, td2_cfm_loss, td_cfm_loss
from tests.support.checks import BOUND, z_scores
from tests.support.processes import Chain, Probe, random_chain, scalar_process
from tests.support.random import generator, randn, tensor

GAMMA = 0.8


def windows(mdp: LinearGaussianMDP, rows: int, n: int) -> tuple[Tensor, Tensor]:
    """States and actions of n steps; only the first action is not the policy's."""
    state, action = randn(rows, 1, seed=1), 1.5 * randn(rows, 1, seed=2)
    states, actions, g = [state], [action], generator(3)
    for _ in range(n):
        state = mdp.step(state, action, generator=g)
        action = mdp.policy(state)
        states.append(state)
        actions.append(action)
    return torch.stack(states, 1), torch.stack(actions, 1)


def walk(chain: Chain, start: int, rows: int, n: int) -> Tensor:
    state, g, visited = torch.full((rows,), start), generator(4), [torch.full((rows,), start)]
    for _ in range(n):
        state = torch.multinomial(chain.P[state], 1, generator=g)[:, 0]
        visited.append(state)
    return torch.stack(visited, 1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
def test_states_on_the_way_are_drawn_with_discounted_chances(gamma: float) -> None:
    """P(K = k) = gamma^(k-1) (1 - gamma) / (1 - gamma^n) on 1..n."""
    rows, n = 50_000, 4
    states = torch.arange(n + 1.0).expand(rows, -1)[..., None]
    k = n_step(states, None, gamma, generator=generator()).visited[:, 0]
    for step in range(n + 1):
        p = gamma ** (step - 1) * (1 - gamma) / (1 - gamma**n) if step else 0.0
        assert abs(int((k == step).sum()) - rows * p) <= BOUND * math.sqrt(rows * p * (1 - p))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_both_terms_together_have_the_law_of_the_measure(n: int) -> None:
    """m = (1-g) sum_{k<=n} g^(k-1) P^k + g^n P^n m, as shares of the states of a chain."""
    chain, rows = random_chain(), 20_000
    M = chain.successor(GAMMA)
    exact = sum((1 - GAMMA) * GAMMA ** (k - 1) * torch.linalg.matrix_power(chain.P, k) for k in range(1, n + 1))
    torch.testing.assert_close(exact + GAMMA**n * torch.linalg.matrix_power(chain.P, n) @ M, M)
    batch = n_step(chain.places[walk(chain, 0, rows, n)], None, GAMMA, generator=generator())
    direct, later = chain.nearest(batch.visited), M[chain.nearest(batch.next_state)]
    mixed = (1 - GAMMA**n) * torch.nn.functional.one_hot(direct, 5) + GAMMA**n * later
    assert z_scores(mixed, M[0]).abs().max() < BOUND


@pytest.mark.parametrize("td_loss", [td_cfm_loss, td2_cfm_loss], ids=lambda loss: loss.__name__)
def test_oracle_is_stationary_for_n_step_returns(td_loss: SuccessorLoss) -> None:
    mdp, rows = scalar_process(), 6_000
    batch = n_step(*windows(mdp, rows, 3), GAMMA, generator=generator(8))
    oracle = mdp.velocity_field(GAMMA, tolerance=1e-4)
    probe = Probe(oracle, rows)
    loss = td_loss(probe, oracle, batch, gamma=GAMMA, generator=generator())
    assert z_scores(probe.gradients(loss.total), 0.0).abs().max() < BOUND


def test_loss_weighs_its_terms_by_the_discount_of_all_steps() -> None:
    mdp = scalar_process()
    batch, oracle = n_step(*windows(mdp, 64, 3), GAMMA, generator=generator()), mdp.velocity_field(GAMMA)
    loss = td2_cfm_loss(lambda t, x, cond: -x, oracle, batch, gamma=GAMMA, generator=generator())
    torch.testing.assert_close(loss.total, (1 - GAMMA**3) * loss.direct + GAMMA**3 * loss.bootstrap)


def test_one_step_is_the_plain_transition() -> None:
    states, actions = windows(scalar_process(), 64, 1)
    batch = n_step(states, actions, GAMMA, generator=generator())
    assert batch.direct_state is None
    assert batch.terminal is None
    assert batch.steps == 1
    for mine, expected in zip(
        (batch.state, batch.action, batch.next_state, batch.next_action),
        (states[:, 0], actions[:, 0], states[:, 1], actions[:, 1]),
        strict=True,
    ):
        assert torch.equal(mine, expected)  # type: ignore[arg-type]


def test_a_window_stays_where_it_meets_a_terminal_state() -> None:
    """Four steps that end after none, one, two and four: what is stored behind the end is never used."""
    rows, n = 5_000, 4
    states = torch.arange(n + 1.0).expand(4 * rows, -1)[..., None]
    terminal = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    batch = n_step(states, 10 * states, GAMMA, terminal=terminal.repeat(rows, 1), generator=generator())
    assert batch.terminal is not None
    assert batch.next_action is not None
    assert batch.terminal[:4].tolist() == [False, True, True, True]
    assert batch.next_state[:4, 0].tolist() == [4, 1, 2, 4]
    assert torch.equal(batch.next_action, 10 * batch.next_state)
    for row, last in enumerate((4, 1, 2, 4)):
        visited = batch.visited[row::4, 0]
        assert set(visited.tolist()) == set(range(1, last + 1))
        p = (1 - GAMMA ** (last - 1)) / (1 - GAMMA**n)  # of a step before the last one
        assert abs(int((visited < last).sum()) - rows * p) <= BOUND * math.sqrt(rows * p * (1 - p))


def test_standardising_moves_all_states() -> None:
    states, actions = windows(scalar_process(), 8, 3)
    batch = n_step(states, actions, GAMMA, generator=generator())
    moved = batch.standardise(tensor(2.0), tensor(3.0))
    for name in ("state", "next_state", "visited"):
        torch.testing.assert_close(getattr(moved, name), (getattr(batch, name) - 2) / 3)
    assert moved.steps == 3
    assert moved.action is batch.action


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: n_step(torch.zeros(3, 1, 2), None, 0.9), r"states had shape \(3, 1, 2\)"),
        (lambda: n_step(torch.zeros(3, 2, 2), torch.zeros(3, 3, 1), 0.9), r"actions had shape \(3, 3, 1\)"),
        (lambda: n_step(torch.zeros(3, 2, 2), None, 1.0), "gamma was 1.0"),
        (
            lambda: n_step(torch.zeros(3, 3, 2), None, 0.9, terminal=torch.zeros(3, 3, dtype=torch.bool)),
            r"terminal had shape \(3, 3\) and dtype torch.bool, but should have shape \(3, 2\)",
        ),
        (
            lambda: Transitions(*[torch.zeros(3, 1)] * 4, terminal=torch.zeros(3)),
            r"terminal had shape \(3,\) and dtype torch.float32",
        ),
        (lambda: Transitions(*[torch.zeros(3, 1)] * 4, steps=2), "steps was 2 and direct_state was None"),
        (
            lambda: Transitions(*[torch.zeros(3, 1)] * 4, direct_state=torch.zeros(3, 1)),
            "steps was 1 and direct_state was not None",
        ),
        (
            lambda: Transitions(*[torch.zeros(3, 1)] * 4, direct_state=torch.zeros(3, 2), steps=2),
            r"direct_state had shape \(3, 2\)",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
