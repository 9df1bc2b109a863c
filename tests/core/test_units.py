"""Units of data: columns far from 0, networks in single precision, and units that survive every move."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core import ContinuousFlow, DiscreteTimeFlow, Flow
from flowmatch_core.field import Field, Time
from flowmatch_core.normalizing import MAF
from flowmatch_core.successor import GeometricHorizonModel, HorizonVAE, LatentHorizonModel, Transitions
from tests.support.checks import BOUND, close, z_scores
from tests.support.random import generator, randn, tensor

LOC, SCALE = tensor(6.0e6, 1.0e8, 1.7e9), tensor(0.3, 5.0, 60.0)
"""A northing in metres, a large count, and seconds since 1970."""


class Spread(Field):
    """The field x log 2 + c in single precision, whose flow has the law N(c / log 2, 4) in every dimension."""

    def __init__(self, cond_dim: int = 0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((3, 1), math.log(2.0)), requires_grad=False)
        self.cond_shape = (cond_dim,) if cond_dim else None

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert x.dtype == self.rate.dtype and (cond is None or cond.dtype == self.rate.dtype)
        return x * self.rate[:, 0] + (0 if cond is None else cond[:, -3:])


def spread(**options: Any) -> ContinuousFlow:
    return ContinuousFlow(Spread(), (3,), "rk4", 8, loc=LOC, scale=SCALE, **options)


def autoregressive(loc: Tensor | None = LOC, scale: Tensor | None = SCALE) -> DiscreteTimeFlow:
    return DiscreteTimeFlow(MAF(transforms=2), 3, loc=loc, scale=scale, generator=generator(1))


def normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The log-density of independent normal columns."""
    return -(((x - loc) / scale).square() / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1)


def rows(n: int = 200) -> Tensor:
    return LOC + SCALE * randn(n, 3)


@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5"])
def test_a_network_in_single_precision_has_the_exact_density_of_columns_far_from_zero(solver: str) -> None:
    flow, x = spread(), rows()
    flow.solver = solver
    exact = normal(x, LOC, 2 * SCALE)
    for found in (
        flow.log_prob(x),
        flow.given(None).log_prob(x),
        flow.estimate(x).log_prob,
        flow.transform.inv.log_abs_det_jacobian(x, x) + normal(flow.transform.inv(x), LOC * 0, SCALE / SCALE),
    ):
        assert found.dtype == torch.float64
        assert float((found - exact).abs().max()) < 1e-4


def test_samples_of_columns_far_from_zero_are_in_double_precision() -> None:
    flow = spread()
    x = flow.sample((2000,), generator=generator())
    joint, log_prob = flow.rsample_and_log_prob((2000,), generator=generator())
    path = flow.trajectory((2000,), generator=generator())
    back = flow.transform(flow.transform.inv(x))
    assert torch.equal(path[-1], x)
    for drawn in (x, joint, back):
        assert drawn.dtype == torch.float64
        close(drawn - LOC, x - LOC, 1e-3)
        assert all(len(column.unique()) > 1000 for column in drawn.T)
    assert float((log_prob - normal(joint, LOC, 2 * SCALE)).abs().max()) < 1e-4
    assert z_scores(x, LOC).abs().max() < BOUND
    close(x.std(0), 2 * SCALE, 0.1)
    moments = flow.moments(2000, generator=generator())
    close(moments.mean, x.mean(0))
    close(moments.variance, x.var(0))


def test_a_flow_in_discrete_time_is_that_of_the_standardised_variable() -> None:
    flow, standard, x = autoregressive(), autoregressive(None, None), rows()
    close(flow.log_prob(x), standard.log_prob((x - LOC) / SCALE).double() - SCALE.log().sum(), 1e-6)
    drawn, log_prob = flow.rsample_and_log_prob((2000,), generator=generator())
    z, base = standard.rsample_and_log_prob((2000,), generator=generator())
    assert torch.equal(drawn, LOC + SCALE * z) and z.dtype == torch.float32
    close(log_prob, base.double() - SCALE.log().sum(), 1e-6)
    assert all(len(column.unique()) > 1000 for column in drawn.T)


@pytest.mark.parametrize("network", [torch.float32, torch.float64])
@pytest.mark.parametrize("units", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [torch.float32, torch.float64])
def test_every_combination_of_dtypes_has_the_density_of_the_network(
    network: torch.dtype, units: torch.dtype, points: torch.dtype
) -> None:
    """The results are of the finest dtype; the network is evaluated in its own, which `Spread` asserts."""
    loc, scale, x, cond = tensor(1.0, -2.0, 0.5), tensor(2.0, 0.5, 1.0), randn(20, 3), randn(20, 3, seed=1)
    flow = ContinuousFlow(Spread(3).to(network), (3,), "rk4", 16, loc=loc.to(units), scale=scale.to(units))
    log_prob = flow.log_prob(x.to(points), cond)
    exact = normal(x, loc + scale * cond / math.log(2.0), 2 * scale)
    close(log_prob.double(), exact, 1e-4)
    assert log_prob.dtype == torch.promote_types(torch.promote_types(network, units), points)
    assert flow.sample((2,), cond).dtype == torch.promote_types(network, units)


@pytest.mark.parametrize("make", [spread, autoregressive])
def test_no_move_rounds_the_units(make: Any) -> None:
    flow: Flow = make()
    x = rows()
    before = flow.log_prob(x)
    for move in (
        lambda: flow.to(torch.float32),
        lambda: flow.float(),
        lambda: nn.ModuleList([flow]).to(torch.float32),
        lambda: flow.half().float(),
    ):
        move()
        close(flow.state_dict()["loc"], LOC, 0.0)
        close(flow.state_dict()["scale"], SCALE, 0.0)
    close(flow.log_prob(x), before, 1e-2)  # the weights were rounded to half precision
    moved = flow.to("meta").state_dict()["loc"]
    assert moved.device.type == "meta" and moved.dtype == torch.float64


def test_a_state_in_double_precision_is_not_rounded_by_loading_it() -> None:
    """A flow that was made without units has them in single precision at first."""
    flow, other, x = autoregressive(), autoregressive(None, None), rows()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    close(other.state_dict()["loc"], LOC, 0.0)
    coarse = autoregressive(torch.zeros(3), torch.ones(3))
    other.load_state_dict(coarse.state_dict())
    close(other.state_dict()["loc"], torch.zeros(3).double(), 0.0)


def test_a_location_that_is_a_parameter_moves_like_one() -> None:
    loc = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    flow = ContinuousFlow(Spread(), (3,), loc=loc).to(torch.float32)
    assert flow.loc is loc and loc.dtype == torch.float32


def test_states_and_actions_far_from_zero_condition_a_horizon_model_by_their_differences() -> None:
    """X = loc + scale (2 z + (s - loc) / scale / log 2) of the field z log 2 + c, c the standardised state."""
    state = LOC + SCALE * randn(2, 3, seed=2)
    model = GeometricHorizonModel(Spread(3), (3,), 0.9, "rk4", 8, loc=LOC, scale=SCALE)
    mean = LOC + (state - LOC) / math.log(2.0)
    x = model.sample(state, None, 2000, generator=generator())
    assert x.dtype == torch.float64 and z_scores(x, mean).abs().max() < BOUND
    assert float((model.log_prob(x, state, None) - normal(x, mean, 2 * SCALE)).abs().max()) < 1e-4
    particles = model.particles(state, None, 2000, 4, generator=generator())
    assert all(len(column.unique()) > 1000 for column in particles[:, :, 0].flatten(0, 1).T)


ACTIONS = {"unit": (0.0, 1.0), "large": (0.0, 1000.0), "small": (0.0, 0.001), "offset": (400.0, 100.0)}


@pytest.mark.parametrize("units", ACTIONS)
@pytest.mark.parametrize("kind", ["flow", "latent"])
def test_a_model_does_not_depend_on_the_units_of_actions(units: str, kind: str) -> None:
    """The same system with actions in other units has the same samples, values and log-densities."""
    middle, size = ACTIONS[units]
    loc, scale = tensor(middle), tensor(size)
    state, action = randn(4, 3), randn(4, 1, seed=1)

    def model(**options: Any) -> GeometricHorizonModel | LatentHorizonModel:
        if kind == "flow":
            return GeometricHorizonModel(Spread(4), (3,), 0.9, **options)
        return LatentHorizonModel(HorizonVAE(3, 4, generator=generator(2)), 0.9, **options)

    plain, with_units = model(), model(action_loc=loc, action_scale=scale)
    expected = plain.sample(state, action, 5, generator=generator())
    assert not torch.equal(expected, plain.sample(state, action + 1, 5, generator=generator()))
    close(with_units.sample(state, loc + scale * action, 5, generator=generator()), expected, 1e-5)
    with_units.to(torch.float32)
    assert with_units.action_loc is not None and with_units.action_loc.dtype == torch.float64
    assert {"action_loc", "action_scale"} <= set(with_units.state_dict())


def test_standardised_transitions_are_those_of_any_units_of_actions() -> None:
    state, action, loc, scale = randn(5, 2), randn(5, 1, seed=1), tensor(0.0, 0.0), tensor(1.0, 1.0)
    middle, size = tensor(400.0), tensor(100.0)
    raw = Transitions(LOC[:2] + state, middle + size * action, LOC[:2] + state, middle + size * action)
    batch = raw.standardise(LOC[:2], scale, middle, size, dtype=torch.float32)
    close(batch.condition, torch.cat([state, action], 1).float(), 1e-5)
    close(batch.next_condition, batch.condition)
    assert raw.standardise(loc, scale).action is raw.action


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loc": tensor(0.0, math.nan, 0.0)}, "loc holds 1 numbers that are not finite"),
        ({"loc": tensor(0.0, math.inf, 0.0)}, "loc holds 1 numbers that are not finite"),
        ({"scale": tensor(1.0, math.inf, math.nan)}, "scale holds 2 numbers that are not finite"),
        ({"scale": tensor(1.0, -1.0, 1.0)}, "scale holds values that are not positive"),
    ],
)
@pytest.mark.parametrize("kind", ["flow", "discrete time", "horizon", "latent", "actions", "transitions"])
def test_units_that_are_not_numbers_are_refused(options: dict[str, Any], message: str, kind: str) -> None:
    both: dict[str, Any] = {"loc": torch.zeros(3), "scale": torch.ones(3), **options}
    if kind in ("actions", "transitions"):
        both = {f"action_{name}": unit for name, unit in both.items()}
        message = f"action_{message}"
    state = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        if kind == "flow":
            ContinuousFlow(Spread(), (3,), **options)
        elif kind == "discrete time":
            DiscreteTimeFlow(MAF(), 3, **options)
        elif kind == "latent":
            LatentHorizonModel(HorizonVAE(3, 3), 0.9, **both)
        elif kind == "transitions":
            Transitions(state, state, state, state).standardise(torch.zeros(3), torch.ones(3), **both)
        else:
            GeometricHorizonModel(Spread(), (3,), 0.9, **both)
