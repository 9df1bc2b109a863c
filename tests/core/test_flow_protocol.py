"""Laws of the interface that the three kinds of flow and the horizon models share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from flowmatch_core.discrete import Logits, MaskSource, MixturePath, TokenFlow
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow, Flow
from flowmatch_core.networks import MLPField
from flowmatch_core.normalizing import MAF, DiscreteTimeFlow
from flowmatch_core.solvers import Uniform, solve
from flowmatch_core.successor import GeometricHorizonModel, HorizonModel, HorizonVAE, LatentHorizonModel
from tests.support.random import generator

COND = 3


class TokenNetwork(nn.Module):
    """Logits of the tokens 0 to 3 that depend on all that a denoiser is given."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COND + 2, 4, generator=generator))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None) -> Logits:
        assert cond is not None
        time = torch.as_tensor(t, dtype=cond.dtype, device=cond.device).reshape(-1, 1).expand(len(x), 1)
        rows = torch.cat([time, cond], 1)[:, None].expand(-1, x.shape[1], -1)
        return Logits(torch.cat([rows, x[..., None].to(cond.dtype)], -1) @ self.weight)


def units(seed: int) -> dict[str, Tensor]:
    g = generator(seed)
    return {"loc": torch.randn(2, generator=g), "scale": 1 + torch.rand(2, generator=g)}


FLOWS: dict[str, Callable[[int], Flow]] = {
    "continuous": lambda seed: ContinuousFlow(
        MLPField(2, (8, 8), COND, generator=generator(seed)), (2,), steps=5, **units(seed)
    ),
    "discrete_time": lambda seed: DiscreteTimeFlow(MAF(2, (8,)), 2, COND, generator=generator(seed), **units(seed)),
    "tokens": lambda seed: TokenFlow(TokenNetwork(generator(seed)), MixturePath(MaskSource(4)), (2,), steps=5),
}
every = pytest.mark.parametrize("kind", FLOWS)


def values(flow: Flow, n: int = 6) -> Tensor:
    if isinstance(flow, TokenFlow):
        return torch.randint(4, (n, 2), generator=generator(7))
    return torch.randn(n, 2, generator=generator(7))


def conditions(n: int = 6) -> Tensor:
    return torch.randn(n, COND, generator=generator(8))


@every
def test_samples_and_log_probabilities_have_the_shapes_of_the_draws_and_the_batch(kind: str) -> None:
    flow = FLOWS[kind](0)
    assert isinstance(flow, Flow) and flow.event_shape == (2,)
    assert flow.sample((4, 5), conditions(), generator()).shape == (4, 5, 6, 2)
    assert flow.log_prob(values(flow), conditions(), generator=generator()).shape == (6,)


@every
def test_a_state_dict_carries_all_of_a_flow(kind: str) -> None:
    flow, other = FLOWS[kind](0), FLOWS[kind](1)
    x, cond = values(flow), conditions()

    def results(of: Flow) -> tuple[Tensor, Tensor]:
        return of.sample((50,), cond, generator()), of.log_prob(x, cond, generator=generator())

    before = results(other)
    assert all(not torch.equal(a, b) for a, b in zip(results(flow), before, strict=True))
    kept = copy.deepcopy(other)
    other.load_state_dict(flow.state_dict())
    for a, b in zip(results(flow), results(other), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results(kept), before, strict=True):
        assert torch.equal(a, b)


@every
def test_an_optimiser_of_the_parameters_improves_the_likelihood(kind: str) -> None:
    flow = FLOWS[kind](0)
    x, cond = values(flow), conditions()
    optimiser = torch.optim.Adam(flow.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = -flow.log_prob(x, cond, generator=generator()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@every
def test_to_changes_the_dtype_of_all_of_a_flow_and_returns_it(kind: str) -> None:
    flow = FLOWS[kind](0)
    x, cond = values(flow), conditions()
    single = flow.log_prob(x, cond, generator=generator())
    assert flow.to(torch.float64) is flow
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    cond = cond.double()
    x = x.double() if x.is_floating_point() else x
    double = flow.log_prob(x, cond, generator=generator())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, single.double(), rtol=1e-4, atol=1e-4)
    sample = flow.sample((4,), cond, generator())
    assert sample.dtype == (torch.long if isinstance(flow, TokenFlow) else torch.float64)


@every
def test_to_changes_the_device_of_all_of_a_flow(kind: str) -> None:
    flow = FLOWS[kind](0).to("meta")
    assert {tensor.device.type for tensor in (*flow.parameters(), *flow.state_dict().values())} == {"meta"}
    cond = conditions().to("meta")
    value = values(flow).to("meta")
    if isinstance(flow, ContinuousFlow | DiscreteTimeFlow):
        flow.check = False  # which would read the values
    assert flow.log_prob(value, cond).device.type == "meta"


def plain(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return x


def test_a_flow_of_a_plain_callable_has_no_parameters_and_follows_its_dtype() -> None:
    flow = ContinuousFlow(plain, (2,), **units(0))
    assert list(flow.parameters()) == [] and set(flow.state_dict()) == {"loc", "scale"}
    bare = ContinuousFlow(plain, (2,))
    assert dict(bare.state_dict()) == {}
    assert bare.sample((3,)).dtype == torch.float32
    assert bare.to(torch.float64).sample((3,)).dtype == torch.float64
    assert bare.to("meta").sample((3,), check=False).device.type == "meta"
    tokens = TokenFlow(lambda t, x, cond: Logits(torch.zeros(*x.shape, 4)), MixturePath(MaskSource(4)), (2,))
    assert list(tokens.parameters()) == [] and dict(tokens.state_dict()) == {}


def test_loading_a_state_leaves_the_tensors_that_a_flow_was_given() -> None:
    given = units(0)
    flow = ContinuousFlow(plain, (2,), **given)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    flow.load_state_dict(ContinuousFlow(plain, (2,), **units(1)).state_dict())
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert flow.loc is not None and torch.equal(flow.loc, units(1)["loc"])


def test_a_location_that_is_a_parameter_is_learned() -> None:
    loc = nn.Parameter(torch.zeros(2))
    flow = ContinuousFlow(plain, (2,), loc=loc)
    assert [*flow.parameters()] == [loc]
    flow.log_prob(torch.ones(3, 2)).sum().backward()
    assert loc.grad is not None and (loc.grad > 0).all()


def test_a_continuous_flow_is_a_distribution() -> None:
    flow = FLOWS["continuous"](0)
    assert isinstance(flow, Distribution)
    assert flow.batch_shape == () and flow.has_rsample
    independent = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
    assert independent.event_shape == flow.event_shape


# ---------------------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("solver", ["midpoint", "adams", "dopri5"])
def test_a_trajectory_goes_from_the_noise_to_the_sample(solver: str) -> None:
    flow = ContinuousFlow(MLPField(2, (8,), COND, generator=generator()), (2,), solver, 6, base_scale=2.0, **units(0))
    path = flow.trajectory((3, 4), conditions(), generator())
    assert path.shape == (7, 3, 4, 6, 2) and not path.requires_grad
    assert flow.loc is not None and flow.scale is not None
    noise = 2 * torch.randn(3, 4, 6, 2, generator=generator())
    torch.testing.assert_close(path[0], noise * flow.scale + flow.loc, rtol=0, atol=0)
    sample = flow.sample((3, 4), conditions(), generator())
    tolerance = 1e-2 if solver == "dopri5" else 0.0  # whose steps end at the times of the path
    torch.testing.assert_close(path[-1], sample, rtol=tolerance, atol=tolerance)


def test_a_trajectory_is_a_solve_in_standardised_units() -> None:
    field, given = MLPField(2, (8,), generator=generator()), units(0)
    flow = ContinuousFlow(field, (2,), "rk4", 3, **given)
    path = flow.trajectory((500,), generator=generator(), solver="midpoint", steps=20, grid=Uniform())
    noise = torch.randn(500, 2, generator=generator())
    with torch.no_grad():
        expected = solve(field, noise, solver="midpoint", steps=20, save=True).path
    assert expected is not None
    assert torch.equal(path, given["loc"] + given["scale"] * expected)
    assert torch.equal(flow.trajectory(x0=noise, solver="midpoint", steps=20), path)


def test_a_trajectory_has_one_start() -> None:
    flow = ContinuousFlow(plain, (2,))
    with pytest.raises(ValueError, match=r"sample_shape is \(3,\), but should be \(\) where x0 is given"):
        flow.trajectory((3,), x0=torch.zeros(3, 2))


# ---------------------------------------------------------------------------------------------------- horizon models

MODELS: dict[str, Callable[[int], HorizonModel]] = {
    "geometric": lambda seed: GeometricHorizonModel(
        MLPField(2, (8,), COND, generator=generator(seed)), (2,), 0.9, steps=3, **units(seed)
    ),
    "latent": lambda seed: LatentHorizonModel(HorizonVAE(2, COND, 8, generator=generator(seed)), 0.9, **units(seed)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_horizon_model_is_a_module(kind: str) -> None:
    model, other = MODELS[kind](0), MODELS[kind](1)
    state, action = torch.randn(5, 2, generator=generator(3)), torch.randn(5, 1, generator=generator(4))

    def sample(of: Any) -> Tensor:
        result: Tensor = of.sample(state, action, 4, generator=generator())
        return result

    assert not torch.equal(sample(model), sample(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(sample(model), sample(other))
    assert len(list(model.parameters())) > 0
    state, action = state.double(), action.double()
    assert model.to(torch.float64) is model and sample(model).dtype == torch.float64
