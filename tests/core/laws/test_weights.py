"""Laws of the weights of rows: linear, and the same as draws from another law (importance sampling)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.discrete import Logits, MaskSource, MixturePath, cross_entropy_loss, generalised_kl_loss
from flowmatch_core.field import Time
from flowmatch_core.objectives import cfm_loss, interpolant_loss, posterior_cfm_loss, sb_cfm_loss, sf2m_loss
from flowmatch_core.paths import CondOT
from flowmatch_core.successor import (
    HorizonGAN,
    HorizonVAE,
    IntentionDecoder,
    IntentionEncoder,
    IntentionLoss,
    Loss,
    Particles,
    Transitions,
    gan_loss,
    intention_loss,
    mc_cfm_loss,
    td2_cfm_loss,
    td2_dd_loss,
    td_cfm_coupled_loss,
    td_cfm_loss,
    td_dd_loss,
    vae_loss,
)
from tests.support.random import generator, randn, tensor

N = 12
X1 = randn(N, 2, seed=1)
TOKENS = MixturePath(MaskSource(2))


def shifted(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    assert cond is not None
    return torch.tanh(x) + cond


def wavy(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    assert cond is not None
    return torch.tanh(x) + cond[:, :2] * cond[:, 2:]


def token_logits(t: Time, x: Tensor, cond: Tensor | None) -> Logits:
    assert cond is not None
    return Logits(cond[:, None].expand(*x.shape, 2))


def of_density(loss: Callable[..., Tensor], cond: Tensor, weight: Tensor | None) -> Tensor:
    return loss(X1, None, cond, coupling=MinibatchOT(), weight=weight, generator=generator())


def of_tokens(loss: Callable[..., Tensor], cond: Tensor, weight: Tensor | None) -> Tensor:
    x1 = torch.randint(2, (N, 3), generator=generator())
    return loss(token_logits, TOKENS, x1, None, cond, weight=weight, generator=generator())


def intention(decoder: IntentionDecoder | None, batch: Transitions, **options: Any) -> IntentionLoss:
    encoder = IntentionEncoder(2, 2, (8,), generator()).double()
    return intention_loss(wavy, wavy, batch, batch.state, encoder, decoder=decoder, **options)


def of_successor(loss: Callable[..., Loss | IntentionLoss], cond: Tensor, weight: Tensor | None) -> Tensor:
    batch = Transitions(cond, None, X1, None, terminal=torch.arange(N) % 4 == 0)
    return loss(batch, gamma=0.8, weight=weight, generator=generator()).total


LOSSES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "cfm": partial(of_density, partial(cfm_loss, shifted, CondOT())),
    "interpolant": partial(of_density, partial(interpolant_loss, shifted, CondOT())),
    "sb_cfm": partial(of_density, partial(sb_cfm_loss, shifted)),
    "sf2m": partial(of_density, partial(sf2m_loss, shifted, shifted)),
    "generalised_kl": partial(of_tokens, generalised_kl_loss),
    "cross_entropy": partial(of_tokens, cross_entropy_loss),
    "mc_cfm": lambda cond, weight: (
        mc_cfm_loss(shifted, Transitions(cond, None, X1, None), X1, weight=weight, generator=generator()).total
    ),
    **{
        f"{loss.__name__}{'' if fused else ' in two'}": partial(
            of_successor, partial(loss, shifted, shifted, fused=fused)
        )
        for loss in (td_cfm_loss, td_cfm_coupled_loss, td2_cfm_loss, td_dd_loss, td2_dd_loss)
        for fused in (True, False)
    },
    "vae": partial(of_successor, partial(vae_loss, *2 * [HorizonVAE(2, 2, 8, generator=generator()).double()])),
    **{
        f"intention{'' if decoder is None else ' decoded'}": partial(of_successor, partial(intention, decoder))
        for decoder in (None, IntentionDecoder(4, 2, (8,), generator()).double())
    },
    "gan": partial(of_successor, partial(gan_loss, *2 * [HorizonGAN(2, 2, 8, generator=generator()).double()])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_each_row_is_multiplied_by_its_weight(name: str) -> None:
    cond, weight = randn(N, 2, seed=5).requires_grad_(), randn(N, seed=6)
    weight[2] = 0
    values = [LOSSES[name](cond, w) for w in (None, torch.ones(N), weight, 3 * weight)]
    plain, ones, weighted, threefold = (torch.autograd.grad(value, cond)[0] for value in values)
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(ones, plain)
    torch.testing.assert_close(weighted, weight[:, None] * plain)
    torch.testing.assert_close(threefold, 3 * weighted)
    torch.testing.assert_close(values[3], 3 * values[2])
    assert (plain.abs().sum(1) > 0).sum() > N / 2


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_of_another_shape_is_named(name: str) -> None:
    for weight in (torch.ones(3), torch.ones(N, 1)):
        with pytest.raises(ValueError, match=r"weight has shape .*, but should be of shape \(12,\)"):
            LOSSES[name](randn(N, 2), weight)


@pytest.mark.parametrize("loss", [cfm_loss, partial(interpolant_loss, gamma=torch.zeros_like)], ids=["cfm", "latent"])
@pytest.mark.parametrize("time", [0.2, 0.9])
def test_importance_weights_train_the_field_of_the_other_law(loss: Callable[..., Tensor], time: float) -> None:
    """Data of N(0, 1) with the weights of N(m, s^2) have the marginal velocity of the latter, by quadrature."""
    m, s = 0.4, 0.8
    nodes, mass = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    x0, x1 = (part.reshape(-1, 1) for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    law, other = (torch.distributions.Normal(*parameters) for parameters in (tensor(0.0, 1.0), tensor(m, s)))
    ratio = (other.log_prob(nodes) - law.log_prob(nodes)).exp()
    weight = torch.outer(mass, mass * ratio).flatten()
    weight = weight / weight.mean()

    variance = time**2 * s**2 + (1 - time) ** 2
    theta = tensor(m, (time * s**2 - (1 - time)) / variance).requires_grad_()

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return theta[0] + theta[1] * (x - time * m)

    given = {"time": tensor(time).expand(len(x1)), "weight": weight}
    (gradient,) = torch.autograd.grad(loss(field, CondOT(), x1, x0, **given), theta)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    (without,) = torch.autograd.grad(loss(field, CondOT(), x1, x0, time=given["time"]), theta)
    assert without.abs().max() > 0.1


def test_importance_weights_train_the_denoiser_of_the_other_law() -> None:
    """Where all is masked the posterior is the law of the data, here one row of each token with its probability."""
    law = tensor(0.5, 0.2, 0.3)
    path, x1 = MixturePath(MaskSource(3)), torch.arange(3)[:, None]
    logits = law.log().requires_grad_()
    for loss in (cross_entropy_loss, generalised_kl_loss):
        value = loss(
            lambda t, x, cond: Logits(logits.expand(*x.shape, 3)), path, x1, time=torch.zeros(3), weight=3 * law
        )
        gradient = torch.autograd.grad(value, logits)[0]
        torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    entropy = cross_entropy_loss(
        lambda t, x, cond: Logits(law.log().expand(*x.shape, 3)), path, x1, time=torch.zeros(3), weight=3 * law
    )
    torch.testing.assert_close(entropy, -(law * law.log()).sum())


def test_particles_keep_the_weights_of_their_transitions() -> None:
    """A slot's bootstrap term has the weight of the transition that it took when its path began."""
    steps, calls = 3, 9
    theta = torch.zeros(2 * N, 2, dtype=torch.float64, requires_grad=True)

    def gradients(weights: list[Tensor | None]) -> Tensor:
        particles, g, found = Particles(N, 2, 2, steps).double(), generator(), []
        for call, weight in enumerate(weights):
            batch = Transitions(randn(N, 2, seed=call), None, X1, None)
            loss = particles.td2_cfm_loss(
                lambda t, x, cond: torch.tanh(x) + theta,
                lambda t, x, cond: x,
                batch,
                gamma=0.8,
                weight=weight,
                generator=g,
            )
            found.append(torch.autograd.grad(loss.total, theta)[0])
        return torch.stack(found)

    plain = gradients([None] * calls)
    weights = [randn(N, seed=100 + call).square() for call in range(calls)]
    weighted = gradients(list(weights))
    for slot in range(N):
        torch.testing.assert_close(
            weighted[:, slot], torch.stack([weights[call][slot] * plain[call, slot] for call in range(calls)])
        )
        # slot i begins its paths at the calls where (call - i) is a multiple of steps + 1, or at the first one before
        begin = slot % (steps + 1)
        for call in range(calls):
            if call > begin:
                taken = begin + (call - begin) // (steps + 1) * (steps + 1)
                torch.testing.assert_close(weighted[call, N + slot], weights[taken][slot] * plain[call, N + slot])
            else:
                assert (plain[call, N + slot] == 0).all()
    with pytest.raises(ValueError, match=r"weight has shape \(1,\)"):
        gradients([torch.ones(1)])


def test_the_posterior_average_takes_weights_of_ones_as_none() -> None:
    x1, t = X1, torch.full((N,), 0.4)
    values = [
        posterior_cfm_loss(lambda t, x, cond: x, CondOT(), x1, time=t, weight=w, generator=generator())
        for w in (None, torch.ones(N), torch.zeros(N))
    ]
    torch.testing.assert_close(values[1], values[0])
    assert values[2] == 0
