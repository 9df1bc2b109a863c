"""Particles that forget where they come from: the step from trajectories to a Markov process."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.paths import CondOT

STEPS = 4


def trajectories() -> tuple[Tensor, Tensor, Tensor]:
    """All ways from 13 whole numbers to 4 of them; positions at k / 4 are exact, and many coincide."""
    x0, x1 = torch.cartesian_prod(torch.arange(-6.0, 7.0), torch.tensor([-8.0, -4.0, 4.0, 8.0])).double().T
    x0, x1 = x0[:, None], x1[:, None]
    return x0, x1, torch.stack([CondOT().sample(x0, x1, k / STEPS).x_t[:, 0] for k in range(STEPS + 1)])


def test_chain_of_local_steps_keeps_every_marginal_and_no_memory() -> None:
    """If each step has the law q(x_(t+dt) | x_t) of the trajectories, then p_t = q_t at all times, by induction."""
    path = trajectories()[2]
    n = len(path[0])
    places = [torch.unique(row, return_inverse=True) for row in path]
    marginal = torch.nn.functional.one_hot(places[0][1]).double()  # of the chain, for the start of each trajectory
    for (_, here), (after, there) in itertools.pairwise(places):
        counts = torch.zeros(int(here.max()) + 1, len(after), dtype=torch.float64)
        counts.index_put_((here, there), torch.ones(n, dtype=torch.float64), accumulate=True)
        marginal = marginal @ (counts / counts.sum(1, keepdim=True))
        data = torch.bincount(there).double() / n
        torch.testing.assert_close(marginal.mean(0), data)
    own = marginal[torch.arange(n), places[-1][1]]
    assert own.min() < 0.5  # a particle need not end where its own trajectory does


@pytest.mark.parametrize("k", range(STEPS))
def test_mean_step_is_the_field_that_a_loss_learns(k: int) -> None:
    """The likelihood of a Gaussian step is highest at the mean velocity, where the loss has no gradient."""
    x0, x1, path = trajectories()
    positions, index = torch.unique(path[k], return_inverse=True)
    steps = torch.zeros(len(positions), dtype=torch.float64).index_add_(0, index, path[k + 1] - path[k])
    drift = (STEPS * steps / torch.bincount(index)).requires_grad_()

    def table(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert (as_time(t, x) == k / STEPS).all()
        return drift[torch.searchsorted(positions, x[:, 0])][:, None]

    loss = cfm_loss(table, CondOT(), x1, x0, time=torch.full((len(x0),), k / STEPS, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, drift)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    variance = loss.detach()
    assert variance > 1  # particles do meet
    if k == 0:  # nobody knows yet where a particle goes: the spread is that of the data
        torch.testing.assert_close(variance, x1.var(correction=0))
