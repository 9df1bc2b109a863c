"""Laws of the ensemble of one-step models: its likelihood, and the successor measure of its rollouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import EnsembleHorizonModel, GaussianEnsemble, Transitions, ensemble_loss, n_step
from flowmatch_core.successor.losses.ensemble import HIGH, LOW
from tests.support.checks import BOUND, close, z_scores
from tests.support.processes import scalar_process, transitions
from tests.support.random import generator, randn, tensor

GAMMA, NOISE = 0.8, 0.1
NEVER, ALWAYS = -1e4, 1e4


def spiral() -> LinearGaussianMDP:
    """A walk around the origin: actions displace, and the policy rotates."""
    cos, sin = math.cos(0.3), math.sin(0.3)
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    turn = tensor([cos - 1, -sin], [sin, cos - 1])
    return LinearGaussianMDP(A=0.95 * eye, B=0.95 * eye, c=zero, W=NOISE**2 * eye, K=turn, k=zero)


def raw(std: float) -> float:
    """What a network must say for a standard deviation."""
    return HIGH - math.log(math.expm1(HIGH - (LOW + math.log(math.expm1(math.log(std) - LOW)))))


def ensemble(
    *changes: tuple[Tensor, Tensor], std: float, policy: tuple[Tensor, Tensor] | None = None
) -> GaussianEnsemble:
    """Linear members whose step is (matrix, offset) of a state and an action, with no terminal state."""
    d, inputs = changes[0][0].shape
    network = GaussianEnsemble(d, inputs, len(changes), hidden=()).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for layers, (matrix, offset) in zip(network.steps, changes, strict=True):
            layers[0].weight[1 : d + 1], layers[0].bias[1 : d + 1] = matrix, offset  # type: ignore[index]
            layers[0].bias[0], layers[0].bias[d + 1 :] = NEVER, raw(std)  # type: ignore[index]
        for layers in network.policies if policy else ():
            assert policy is not None
            p = len(policy[1])
            layers[0].weight[:p], layers[0].bias[:p] = policy  # type: ignore[index]
            layers[0].bias[p:] = -1e3  # type: ignore[index]
    return network


def exact(mdp: LinearGaussianMDP, members: int = 2) -> GaussianEnsemble:
    """Members that all are the process."""
    step = torch.cat([mdp.A - torch.eye(len(mdp.c)), mdp.B], 1), mdp.c
    return ensemble(*[step] * members, std=float(mdp.W[0, 0].sqrt()), policy=(mdp.K, mdp.k))


def counting(*changes: float) -> GaussianEnsemble:
    """Members without actions that add a number to a state."""
    return ensemble(*[(torch.zeros(1, 1, dtype=torch.float64), tensor(change)) for change in changes], std=1.001e-3)


def law(n: int) -> Tensor:
    return (1 - GAMMA) * GAMMA ** torch.arange(n, dtype=torch.float64)


def check_shares(found: Tensor, expected: Tensor) -> None:
    """Check the counts of 1, 2, ... against their chances."""
    n = len(found)
    shares = torch.bincount(found.round().long(), minlength=len(expected) + 1)[1 : len(expected) + 1] / n
    assert bool(((shares - expected).abs() < BOUND * (expected * (1 - expected) / n).sqrt()).all()), shares - expected


# The likelihood


@pytest.mark.parametrize("ends", [False, True])
def test_the_loss_is_the_likelihood_of_steps_terminals_and_actions(ends: bool) -> None:
    network = GaussianEnsemble(1, 2, members=3, hidden=(8,), generator=generator()).double()
    batch = transitions(scalar_process(), 50)
    if ends:
        batch = replace(batch, terminal=batch.next_state[:, 0] > 0)
    total = 0.0
    assert batch.next_action is not None
    for step, policy in zip(network.steps, network.policies, strict=True):
        logit, mean, log_std = step(batch.condition).unbind(1)
        action, log_spread = policy(batch.next_state).unbind(1)
        here = torch.distributions.Normal(batch.state[:, 0] + mean, _std(log_std)).log_prob(batch.next_state[:, 0])  # type: ignore[no-untyped-call]
        here = here + torch.distributions.Normal(action, _std(log_spread)).log_prob(batch.next_action[:, 0])  # type: ignore[no-untyped-call]
        if batch.terminal is not None:
            here = here - F.binary_cross_entropy_with_logits(logit, batch.terminal.double(), reduction="none")
        total = total - float(here.detach().mean()) / 3
    loss = ensemble_loss(network, batch)
    assert loss.total.item() == pytest.approx(total, rel=1e-12)
    assert (loss.direct.item(), loss.bootstrap.item()) == (loss.total.item(), 0.0)


def _std(raw: Tensor) -> Tensor:
    upper = HIGH - torch.log1p(torch.exp(HIGH - raw))
    return (LOW + torch.log1p(torch.exp(upper - LOW))).exp()


def test_standard_deviations_have_bounds_and_are_what_the_network_says_between_them() -> None:
    assert float(_std(tensor(-1e2))) == pytest.approx(math.exp(LOW))
    for std in (0.01, 0.1, 1.0):
        assert float(_std(tensor(raw(std)))) == pytest.approx(std)
        assert raw(std) == pytest.approx(math.log(std), abs=0.2)


def test_integer_weights_are_repeated_rows() -> None:
    network = GaussianEnsemble(1, 2, members=2, hidden=(8,), generator=generator()).double()
    batch, times = transitions(scalar_process(), 5), torch.tensor([0, 1, 2, 3, 1])
    repeated = ensemble_loss(network, batch[torch.arange(5).repeat_interleave(times)]).total * times.sum()
    close(ensemble_loss(network, batch, weight=times.double()).total * 5, repeated)


def noisy(mdp: LinearGaussianMDP, n: int, seed: int) -> Transitions:
    """Transitions of the process under a policy with the noise of the process."""
    batch = transitions(mdp, n, seed)
    assert batch.next_action is not None
    return replace(batch, next_action=batch.next_action + NOISE * randn(n, 2, seed=seed + 9))


def test_maximum_likelihood_finds_the_process_and_its_entropy() -> None:
    """Linear members on the spiral: the NLL of new steps is the entropy of the noise, and rollouts are the process."""
    mdp = spiral()
    network = GaussianEnsemble(2, 4, members=2, hidden=(), generator=generator()).double()
    batch = noisy(mdp, 4_000, seed=1)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ensemble_loss(network, batch).total
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        found = network.log_prob(noisy(mdp, 20_000, seed=50))
    entropy = math.log(2 * math.pi * math.e * NOISE**2)
    for log_prob in found:
        for member in log_prob:
            assert abs(float(z_scores(-member, entropy))) < BOUND
    check_occupancy(EnsembleHorizonModel(network, GAMMA, policy=mdp.policy), mdp, n=2_000)


# Rollouts


def check_occupancy(model: EnsembleHorizonModel, mdp: LinearGaussianMDP, n: int = 20_000) -> None:
    """Check the mean and the covariance of samples against the closed form."""
    state, action = tensor([1.0, 0.0], [-0.5, 1.5]), tensor([0.2, 0.1], [-0.3, 0.4])
    for given in (action, None):
        truth = mdp.successor(state, given, GAMMA)
        x = model.sample(state, given, n, generator=generator(5))
        assert x.shape == (n, 2, 2)
        assert float(z_scores(x, truth.mean).abs().max()) < BOUND
        squares = torch.einsum("nbd,nbe->nbde", x, x)
        assert float(z_scores(squares, truth.second_moment).abs().max()) < BOUND


@pytest.mark.parametrize("own", [False, True])
def test_rollouts_of_the_process_have_its_successor_measure(own: bool) -> None:
    mdp = spiral()
    check_occupancy(EnsembleHorizonModel(exact(mdp), GAMMA, policy=None if own else mdp.policy), mdp)


def test_the_number_of_steps_is_geometric_and_begins_at_one() -> None:
    x = EnsembleHorizonModel(counting(1.0), GAMMA).sample(
        torch.zeros(1, 1).double(), None, 20_000, generator=generator()
    )
    check_shares(x[:, 0, 0], law(12))


def test_a_rollout_follows_one_member() -> None:
    """Members that go opposite ways: steps of both would cancel."""
    model = EnsembleHorizonModel(counting(1.0, -1.0), GAMMA)
    x = model.sample(torch.zeros(1, 1).double(), None, 20_000, generator=generator())[:, 0, 0]
    check_shares(x.abs(), law(12))
    assert abs(float(z_scores((x > 0).double(), 0.5))) < BOUND


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_state_absorbs_where_states_may_be_terminal(terminal: bool) -> None:
    network = counting(1.0)
    with torch.no_grad():  # the step from 2 to 3 ends the episode
        network.steps[0][0].weight[0, 0], network.steps[0][0].bias[0] = ALWAYS, -1.5 * ALWAYS  # type: ignore[index]
    model = EnsembleHorizonModel(network, GAMMA, terminal=terminal)
    x = model.sample(torch.zeros(1, 1).double(), None, 20_000, generator=generator())[:, 0, 0]
    check_shares(x, torch.tensor([1 - GAMMA, (1 - GAMMA) * GAMMA, GAMMA**2]).double() if terminal else law(12))


def test_units_are_those_of_states_and_actions() -> None:
    """A process in other units: the same draws, moved and scaled."""
    mdp = spiral()
    loc, scale, shift, spread = tensor(1e8, -40.0), tensor(5.0, 1e-3), tensor(300.0, 0.0), tensor(100.0, 1e3)
    plain = EnsembleHorizonModel(exact(mdp), GAMMA, policy=mdp.policy)
    model = EnsembleHorizonModel(
        exact(mdp),
        GAMMA,
        policy=lambda s: mdp.policy((s - loc) / scale) * spread + shift,
        loc=loc,
        scale=scale,
        action_loc=shift,
        action_scale=spread,
    )
    state, action = randn(3, 2), randn(3, 2, seed=1)
    x = model.sample(state * scale + loc, action * spread + shift, 50, generator=generator())
    torch.testing.assert_close(
        (x - loc) / scale, plain.sample(state, action, 50, generator=generator()), atol=1e-6, rtol=0
    )


def test_samples_repeat_and_values_are_means_of_the_reward() -> None:
    model, state = EnsembleHorizonModel(exact(spiral()), GAMMA), randn(4, 2)
    first, second = (model.sample(state, None, 9, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    value = model.value(lambda x: x[..., 0], state, None, 9, generator=generator(3))
    close(value, first[..., 0].mean(0) / (1 - GAMMA))


@pytest.mark.parametrize("where", [math.inf, math.nan])
def test_a_rollout_that_diverges_ends(where: float) -> None:
    """It neither runs on nor asks the policy for an action there."""
    network = exact(spiral(), members=1)
    with torch.no_grad():
        network.steps[0][0].bias[1] = where  # type: ignore[index]

    def policy(state: Tensor) -> Tensor:
        raise AssertionError(state)

    x = EnsembleHorizonModel(network, 0.99, policy=policy).sample(randn(3, 2), randn(3, 2), 5, generator=generator())
    assert not x.isfinite().all(-1).any()


def test_what_an_ensemble_does_not_take() -> None:
    network, batch = GaussianEnsemble(1, 2, members=2, hidden=(4,)).double(), transitions(scalar_process(), 4)
    assert batch.action is not None
    windows = n_step(batch.state[:, None].expand(-1, 3, -1), batch.action[:, None].expand(-1, 3, -1), GAMMA)
    with pytest.raises(ValueError, match="batch has steps 2, but should have 1"):
        ensemble_loss(network, windows)
    with pytest.raises(ValueError, match=r"batch.condition.* \(4, 2\)"):
        ensemble_loss(network, Transitions(batch.state, None, batch.next_state, None))
    with pytest.raises(ValueError, match="members is 0"):
        GaussianEnsemble(1, 2, members=0)
    with pytest.raises(ValueError, match="cond_dim is 1, but should be at least event_dim, which is 2"):
        GaussianEnsemble(2, 1)
    with pytest.raises(TypeError, match="no log_prob"):
        EnsembleHorizonModel(network, GAMMA).log_prob(batch.state, batch.state, None)
