"""The optional methods of a field agree with its velocity, and plain callables need none of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core.divergence import divergence, prepared
from flowmatch_core.field import (
    Field,
    Time,
    at_condition,
    at_times,
    has_closed_form_divergence,
    velocity_and_divergence,
)
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import (
    ConcatSquashField,
    ConvUNetField,
    FiLMField,
    MLPField,
    NoisePrediction,
    Preconditioned,
    ResidualField,
    UNetMLPField,
)
from flowmatch_core.paths import VE, VP, CondOT, Cosine, Rescheduled, VelocityOf

DIM, COND = 3, 2
NETWORKS: dict[str, Callable[..., Field]] = {
    "mlp": lambda g: MLPField(DIM, (8, 8), COND, generator=g),
    "mlp_deep": lambda g: MLPField(DIM, (8, 8, 8), COND, generator=g),
    "film": lambda g: FiLMField(DIM, (8, 8), COND, generator=g),
    "concat_squash": lambda g: ConcatSquashField(DIM, (8, 8), COND, generator=g),
    "concat_squash_deep": lambda g: ConcatSquashField(DIM, (8, 8, 8), COND, generator=g),
    "residual": lambda g: ResidualField(DIM, 8, 1, COND, generator=g),
    "unet_mlp": lambda g: UNetMLPField(DIM, (8,), 1, COND, (8,), 8, generator=g),
}
WRAPPERS: dict[str, Callable[[Field], Field]] = {
    "alone": lambda network: network,
    "velocity_of": lambda network: VelocityOf(network, VP(), "noise"),
    "noise_prediction": lambda network: NoisePrediction(network, VP()),
    "preconditioned": lambda network: Preconditioned(network, VE(), data_scale=2.0),
    "rescheduled": lambda network: Rescheduled(network, CondOT(), Cosine()),
}
every = pytest.mark.parametrize(("network", "wrapper"), [(n, w) for n in NETWORKS for w in WRAPPERS])


def make(network: str, wrapper: str) -> Field:
    """The field with weights as large as after training, so that its divergence is far from zero."""
    built = NETWORKS[network](torch.Generator().manual_seed(1)).double()
    for parameter in built.parameters():
        parameter.data *= 3
    return WRAPPERS[wrapper](built)


def batch(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    draw = {"generator": g, "dtype": torch.float64}
    return 0.1 + 0.8 * torch.rand(rows, **draw), torch.randn(rows, DIM, **draw), torch.randn(rows, COND, **draw)


def test_the_image_network_is_a_field_too() -> None:
    assert isinstance(ConvUNetField(channels=1, widths=(4,)), Field)


@every
def test_velocity_and_divergence_agrees_with_differentiation(network: str, wrapper: str) -> None:
    field, (t, x, cond) = make(network, wrapper), batch()
    for time in (t, 0.3):
        expected = divergence(lambda t, x, cond: field(t, x, cond), time, x, cond, "exact")
        assert expected[1].abs().max() > 1e-3
        torch.testing.assert_close(field.velocity_and_divergence(time, x, cond), expected)
        torch.testing.assert_close(velocity_and_divergence(field, time, x, cond), expected)


@every
def test_a_prepared_field_is_the_same_field(network: str, wrapper: str) -> None:
    field, (t, x, cond) = make(network, wrapper), batch()
    ready = field.prepared()
    torch.testing.assert_close(ready(t, x, cond), field(t, x, cond), rtol=0, atol=0)
    assert has_closed_form_divergence(ready) == has_closed_form_divergence(field)
    torch.testing.assert_close(ready.velocity_and_divergence(t, x, cond), field.velocity_and_divergence(t, x, cond))


@every
def test_a_field_at_a_condition_or_at_times_is_the_same_field(network: str, wrapper: str) -> None:
    field, (t, x, cond) = make(network, wrapper), batch()
    torch.testing.assert_close(field.at_condition(cond)(t, x, cond), field(t, x, cond), rtol=0, atol=0)
    times = [t, t / 2]
    for time, there in zip(times, field.at_times(times, x), strict=True):
        torch.testing.assert_close(there(time, x, cond), field(time, x, cond))


class Plain(nn.Module):
    """A module of a user that has methods of the same names, but is no `Field`."""

    has_closed_form_divergence = True

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return 3 * x

    def velocity_and_divergence(self, *arguments: object) -> tuple[Tensor, Tensor]:
        raise AssertionError

    prepared = at_condition = at_times = velocity_and_divergence


@pytest.mark.parametrize("field", [Plain(), lambda t, x, cond: 3 * x])
def test_a_plain_callable_is_only_called(field: Callable[..., Tensor]) -> None:
    _, x, cond = batch()
    assert not has_closed_form_divergence(field)
    assert prepared(field, "auto") is field
    assert at_condition(field, cond) is field
    assert at_times(field, [0.0, 0.5], x) == [field, field]
    assert (velocity_and_divergence(field, 0.0, x)[1] == 3 * DIM).all()
    flow = ContinuousFlow(field, (DIM,), "rk4", steps=40)
    torch.testing.assert_close(
        flow.log_prob(x), ContinuousFlow(lambda t, x, cond: 3 * x, (DIM,), "rk4", 40).log_prob(x)
    )


def test_a_field_has_to_define_its_velocity() -> None:
    with pytest.raises(TypeError, match="forward"):
        Field()  # type: ignore[abstract]


def test_a_subclass_that_only_defines_its_velocity_works_everywhere() -> None:
    class Rotation(Field):
        def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
            return torch.stack([-x[:, 1], x[:, 0] + x[:, 1]], 1)

    field, x = Rotation(), torch.ones(4, 2)
    assert (field.velocity_and_divergence(0.0, x)[1] == 1).all()
    assert field.prepared() is field is field.at_condition(x)
    flow = ContinuousFlow(field, (2,), "rk4", steps=20)
    expected = ContinuousFlow(lambda t, x, cond: field(t, x, cond), (2,), "rk4", steps=20).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=0)
