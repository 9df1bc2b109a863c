"""Laws of the call of a field: one sentence for each way to write it wrongly, and no false alarm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core._call import call_field
from flowmatch_core._tensors import expand_time
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.networks import MLPField
from flowmatch_core.paths import CondOT
from flowmatch_core.solvers import solve, solve_sde
from tests.support.random import generator, randn

CALLS: list[Callable[[Any, Tensor], object]] = [
    lambda field, x: call_field(field, 0.5, x),
    lambda field, x: solve(field, x),
    lambda field, x: solve(field, x, solver="dopri5_per_sample"),
    lambda field, x: solve_sde(field, x, path=CondOT(), generator=generator()),
    lambda field, x: divergence(field, 0.5, x),
    lambda field, x: divergence(field, 0.5, x, method="hutchinson"),
]


class Scaled(nn.Module):
    """Learns a rate and spreads the time as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.rate * t * x


class ByRow(Scaled):
    def forward(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.rate * expand_time(t, x) * x


class WithTwo(nn.Module):
    def forward(self, t: Time, x: Tensor) -> Tensor:
        return x


class Methods:
    def field(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return -x

    def two(self, t: Time, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def swapped(x: Tensor, t: Time, cond: Tensor | None) -> Tensor:
        return -x

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return -x


def of_four(rate: float, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    return rate * x


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda t, x: x, r"field takes the arguments \(t, x\).*let it take a third one"),
        (lambda x: x, "let it take these three"),
        (lambda t, x, cond, more: x, "let it take these three"),
        (lambda x, t, cond: x, r"t comes first; wrap it as lambda t, x, cond: field\(x, t\)"),
        (lambda x_t, time: x_t, "t comes first"),
        (WithTwo(), "let it take a third one"),
        (Methods().two, "let it take a third one"),
        (Methods.swapped, "t comes first"),
        (of_four, "let it take these three"),
        (functools.partial(of_four, 1.0, 0.5), "let it take"),
        (Scaled, r"field is the class Scaled, but should be an object: pass Scaled\(...\)"),
        (3.0, "field is a float, but should be a callable"),
        (lambda t, x, cond: x[:, :1], r"the result of field has shape \(3, 1\), but should be of shape \(3, 2\)"),
        (lambda t, x, cond: x[None], r"the result of field has shape \(1, 3, 2\)"),
    ],
)
def test_a_field_written_wrongly_is_named(call: Callable[[Any, Tensor], object], field: Any, message: str) -> None:
    for _ in range(2):  # what was refused once stays refused
        with pytest.raises(ValueError, match=message):
            call(field, randn(3, 2))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "field",
    [
        lambda t, x, cond: -x,
        lambda t, x, cond=None, *more, **options: -x,
        lambda *arguments: -arguments[1],
        lambda s, y, c: -y,
        Methods().field,
        Methods(),
        functools.partial(of_four, -1.0),
        ByRow(),
        MLPField(2, (4,)).double(),
    ],
)
def test_every_way_to_take_three_arguments_is_a_field(call: Callable[[Any, Tensor], object], field: Any) -> None:
    call(field, randn(3, 2))


SPREADING = [lambda t, x, cond: t**3 * x, Scaled(), lambda t, x, cond: x + torch.sin(5 * torch.as_tensor(t))]


@pytest.mark.parametrize("field", SPREADING)
def test_a_time_spread_over_the_last_dimension_is_named(field: Any) -> None:
    x, t = randn(4, 4), torch.linspace(0, 1, 4, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"field spreads a time of shape \(4,\) over the last dimension"):
            call_field(type(field)() if isinstance(field, nn.Module) else lambda *a: field(*a), t, x)
    with pytest.raises(ValueError, match="field spreads a time"):
        solve(lambda *a: field(*a), x, t1=t)
    with pytest.raises(ValueError, match="field spreads a time"):
        divergence(lambda *a: field(*a), t, x)
    call_field(field, 0.5, x)  # one time is the same for every row


def test_a_field_by_row_is_not_taken_for_one_that_spreads() -> None:
    x, t = randn(4, 4), torch.linspace(0, 1, 4, dtype=torch.float64)
    network = nn.Linear(5, 4).double()

    def concatenated(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return network(torch.cat([x, expand_time(t, x).expand(len(x), 1)], 1))

    def ignoring(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return -x

    def centred(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return x - x.mean(0)  # depends on the other rows, though not on the time

    def noisy(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return x + torch.randn(x.shape, generator=noise, dtype=x.dtype)

    noise = generator()
    for field in (ByRow(), concatenated, ignoring, centred, noisy, MLPField(4, (4,)).double()):
        assert call_field(field, t, x).shape == x.shape  # type: ignore[arg-type]
    row_by_row = torch.stack([call_field(ByRow(), t[i], x[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(call_field(ByRow(), t, x), row_by_row)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)])
def test_layers_of_chance_and_of_batches_are_left_alone(layer: nn.Module) -> None:
    """In training they see each batch once: neither the seed nor the running mean moves for the check."""
    calls = 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
            nonlocal calls
            calls += 1
            out: Tensor = self.layer(x)
            return out

    with torch.random.fork_rng():
        call_field(Net(), torch.linspace(0, 1, 4), randn(4, 4).float())
    assert calls == 1


def test_the_rows_of_an_object_are_compared_once() -> None:
    calls = 0

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return expand_time(t, x) * x

    x = randn(4, 4)
    for t in (torch.zeros(4), torch.linspace(0, 1, 4), torch.linspace(0, 1, 4), torch.rand(4, generator=generator())):
        call_field(field, t.double(), x)
    assert calls == 5  # equal times cannot tell rows from dimensions


def test_a_call_compiles_whole() -> None:
    field = ByRow().float()
    x, t = torch.ones(4, 4), torch.linspace(0, 1, 4)
    compiled = torch.compile(lambda t, x: call_field(field, t, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(t, x), t[:, None] * x)
    assert call_field(lambda t, x, cond: x, t.to("meta"), x.to("meta")).is_meta


def test_conditions_follow_the_first_row() -> None:
    cond = {"a": randn(4, 1), "b": torch.arange(4)}
    seen: list[tuple[int, int]] = []

    def field(t: Time, x: Tensor, cond: Any) -> Tensor:
        seen.append((len(x), len(cond["b"])))
        return expand_time(t, x) * x * cond["a"]

    call_field(field, torch.linspace(0, 1, 4, dtype=torch.float64), randn(4, 4), cond)
    assert seen == [(4, 4), (1, 1)]
