"""Laws of the networks, in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.metrics import sliced_wasserstein
from flowmatch_core.networks import (
    ACTIVATIONS,
    ConcatSquashField,
    ConvUNetField,
    FiLMField,
    FlatUNetField,
    FourierTime,
    MLPField,
    Preconditioned,
    ResidualField,
    UNetMLPField,
    conv_unet,
)
from flowmatch_core.networks.film_mlp import LogitTime
from flowmatch_core.networks.layers import precondition
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import VE, AffinePath, CondOT, Quantity
from tests.support.random import randn
from tests.support.truths import on_every_path

Build = Callable[[int, torch.Generator | None], nn.Module]

# Every network, small, for events of shape (3,) or (2, 4, 3): how it is built, and the layers that start near zero.
VECTORS: dict[str, Build] = {
    "mlp-1": lambda c, g: MLPField(3, (16,), c, generator=g),
    "mlp-2": lambda c, g: MLPField(3, (16, 12), c, generator=g),
    "mlp-3": lambda c, g: MLPField(3, (16, 12, 8), c, generator=g),
    "film-1": lambda c, g: FiLMField(3, (16,), c, cond_hidden=(7,), generator=g),
    "film-2": lambda c, g: FiLMField(3, (16, 12), c, cond_hidden=(7, 5), generator=g),
    "film-plain": lambda c, g: FiLMField(3, (16, 12), c, cond_hidden=(), activation="tanh", generator=g),
    "squash-1": lambda c, g: ConcatSquashField(3, (16,), c, generator=g),
    "squash-2": lambda c, g: ConcatSquashField(3, (16, 12), c, frequencies=2, generator=g),
    "squash-3": lambda c, g: ConcatSquashField(3, (16, 12, 8), c, activation="silu", generator=g),
    "residual": lambda c, g: ResidualField(3, 16, 2, c, generator=g),
    "unet-mlp": lambda c, g: UNetMLPField(3, (16, 12, 8), 2, c, (8, 6), 12, generator=g),
}
IMAGES: dict[str, Build] = {"conv-unet": lambda c, g: ConvUNetField(2, (8, 12, 4), c, generator=g)}
ALL = {**VECTORS, **IMAGES}
CLOSED = [name for name in VECTORS if name[-1] in "12" or name == "film-plain"]

every = pytest.mark.parametrize("name", ALL)
closed = pytest.mark.parametrize("name", CLOSED)
conditions = pytest.mark.parametrize("cond_dim", [0, 2])


def make(name: str, cond_dim: int = 0, seed: int = 0) -> nn.Module:
    """The network with weights as large as after training: nothing hides behind a layer that is nearly linear."""
    field = ALL[name](cond_dim, torch.Generator().manual_seed(seed)).double()
    for module in field.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 2
    last = field.last.linear if isinstance(field, ConcatSquashField) else field.last
    last.weight.data *= 10
    return field


def batch(name: str, n: int, cond_dim: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    x = randn(n, *((3,) if name in VECTORS else (2, 4, 3)), seed=1)
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    return t, x, randn(n, cond_dim, seed=2) if cond_dim else None


def trace_of_jacobian(field: nn.Module, t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
    """Row by row, by differentiation."""
    traces = []
    for i in range(len(x)):
        row = slice(i, i + 1)

        def alone(x: Tensor, row: slice = row) -> Tensor:
            return field(t[row], x, None if cond is None else cond[row])

        size = x[0].numel()
        traces.append(torch.func.jacrev(alone)(x[row]).reshape(size, size).trace())
    return torch.stack(traces)


# ------------------------------------------------------------------------------------------- divergence in closed form


@closed
@conditions
def test_closed_form_divergence_is_the_trace_of_the_jacobian(name: str, cond_dim: int) -> None:
    field, (t, x, cond) = make(name, cond_dim), batch(name, 5, cond_dim)
    expected = trace_of_jacobian(field, t, x, cond)
    velocity, div = field.velocity_and_divergence(t, x, cond)
    torch.testing.assert_close(velocity, field(t, x, cond), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-11)
    assert expected.abs().mean() > 0.05 and expected.std() > 0.02  # far from zero, and of each row its own
    for i in range(5):  # one time for the whole batch, where gates and gains have no rows
        velocity, div = field.velocity_and_divergence(t[i], x, cond)
        torch.testing.assert_close(velocity, field(t[i], x, cond), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(div[i], expected[i], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [MLPField, FiLMField, ConcatSquashField])
def test_slopes_of_all_activations_are_their_derivatives(activation: str, kind: type[nn.Module]) -> None:
    field = kind(3, (16, 12), activation=activation, generator=torch.Generator().manual_seed(0)).double()
    t, x = torch.linspace(0, 1, 5, dtype=torch.float64), 2 * randn(5, 3, seed=1)
    expected = trace_of_jacobian(field, t, x, None)
    torch.testing.assert_close(field.velocity_and_divergence(t, x)[1], expected, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(field.velocity_and_divergence(t, x)[1], expected, rtol=1e-10, atol=1e-11)


@closed
@conditions
@pytest.mark.parametrize("shared", [False, True])
def test_closed_form_divergence_has_the_gradients_of_the_trace(name: str, cond_dim: int, shared: bool) -> None:
    field, (t, x, cond) = make(name, cond_dim), batch(name, 4, cond_dim)
    t = t[1] if shared else t
    weights = randn(4, seed=3)
    inputs = [x.requires_grad_(), *([] if cond is None else [cond.requires_grad_()]), *field.parameters()]
    gradients = [
        torch.autograd.grad((weights * div).sum(), inputs, allow_unused=True, materialize_grads=True)
        for div in (divergence(field, t, x, cond, method)[1] for method in ("auto", "exact"))
    ]
    for closed, differentiated in zip(*gradients, strict=True):
        torch.testing.assert_close(closed, differentiated, rtol=1e-10, atol=1e-11)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0][: len(inputs) - len(list(field.parameters()))])


@every
def test_networks_say_whether_their_divergence_has_a_closed_form(name: str) -> None:
    field, (t, x, cond) = make(name, 2), batch(name, 2, 2)
    assert field.has_closed_form_divergence == (name in CLOSED)
    torch.testing.assert_close(divergence(field, t, x, cond)[1], trace_of_jacobian(field, t, x, cond))


# ------------------------------------------------------------------------------------------------ laws of all networks


@every
@conditions
def test_float_scalar_and_batch_times_agree(name: str, cond_dim: int) -> None:
    field, (_, x, cond) = make(name, cond_dim), batch(name, 3, cond_dim)
    expected = field(torch.full((3,), 0.4, dtype=torch.float64), x, cond)
    assert expected.shape == x.shape
    torch.testing.assert_close(field(0.4, x, cond), expected)
    torch.testing.assert_close(field(torch.tensor(0.4, dtype=torch.float64), x, cond), expected)
    assert (field(0.5, x, cond) - expected).abs().max() > 1e-3
    if cond is not None:
        assert (field(0.4, x, cond + 1) - expected).abs().max() > 1e-3


@every
@conditions
def test_rows_do_not_see_each_other(name: str, cond_dim: int) -> None:
    field, (t, x, cond) = make(name, cond_dim), batch(name, 4, cond_dim)
    rows = field(t, x, cond)
    for i in range(4):
        row = slice(i, i + 1)
        alone = field(t[row], x[row], None if cond is None else cond[row])
        torch.testing.assert_close(alone, rows[row], rtol=1e-10, atol=1e-11)
    assert field(t[:0], x[:0], None if cond is None else cond[:0]).shape == x[:0].shape


@every
def test_every_time_and_condition_belongs_to_its_own_row(name: str) -> None:
    """The derivative of row `i` by the time and the condition of row `j` is zero exactly where `i` is not `j`."""
    field, (t, x, cond) = make(name, 2), batch(name, 3, 2)
    t = 0.25 + t / 2
    by_time = torch.func.jacrev(lambda t: field(t, x, cond).flatten(1).square().sum(1))(t)
    by_cond = torch.func.jacrev(lambda c: field(t, x, c).flatten(1).square().sum(1))(cond).abs().sum(-1)
    for jacobian in (by_time, by_cond):
        assert jacobian.diagonal().abs().min() > 1e-6
        assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))


@every
def test_velocity_is_smooth_in_time(name: str) -> None:
    """Central differences meet the derivative at second order: no kink and no jump, up to both ends."""
    field, (_, x, cond) = make(name, 2), batch(name, 2, 2)
    for at in (1e-3, 0.2, 0.5, 0.8, 1 - 1e-3):
        t = torch.tensor(at, dtype=torch.float64)
        _, slope = torch.func.jvp(lambda t: field(t, x, cond), (t,), (torch.ones_like(t),))
        errors = [
            ((field(t + h, x, cond) - field(t - h, x, cond)) / (2 * h) - slope).norm().item() for h in (2e-4, 1e-4)
        ]
        assert slope.norm() > 1e-3
        assert errors[1] < 1e-3 * slope.norm()
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@every
def test_velocity_is_defined_where_an_adaptive_solver_may_step(name: str) -> None:
    field, (_, x, cond) = make(name, 2), batch(name, 2, 2)
    for end, beyond in ((0.0, -0.1), (1.0, 1.1)):
        assert field(beyond, x, cond).isfinite().all()
        torch.testing.assert_close(field(end - 1e-9, x, cond), field(end + 1e-9, x, cond), rtol=0, atol=1e-5)


@every
@conditions
def test_velocity_starts_near_the_linear_guess_and_every_parameter_learns(name: str, cond_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    field, (t, x, cond) = ALL[name](cond_dim, generator).double(), batch(name, 50, cond_dim)
    velocity = field(t, x, cond)
    guess = precondition(t)[0] * x if name.startswith(("film", "residual")) else torch.zeros_like(x)
    assert 0 < (velocity - guess).std() < 0.25
    (velocity - 1).square().mean().backward()
    for key, parameter in field.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@every
def test_weights_come_from_the_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    fields = [ALL[name](1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    a, b, c = (torch.cat([p.flatten() for p in field.parameters()]) for field in fields)
    assert a.isfinite().all() and torch.equal(a, b)
    assert torch.equal(torch.isclose(a, c), a == 0) and (a == 0).sum() <= 3  # only the last bias of FiLMField
    fields[2].reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(a, torch.cat([p.flatten() for p in fields[2].parameters()]))


@every
def test_copies_and_saved_weights_give_the_same_velocity(name: str) -> None:
    field, (t, x, cond) = make(name, 2), batch(name, 3, 2)
    other = make(name, 2, seed=1)
    assert not torch.allclose(other(t, x, cond), field(t, x, cond))
    other.load_state_dict(field.state_dict())
    assert torch.equal(other(t, x, cond), field(t, x, cond))
    assert torch.equal(copy.deepcopy(field)(t, x, cond), field(t, x, cond))


@every
def test_dtype_of_the_state_is_kept_whatever_the_time(name: str) -> None:
    field, (_, x, cond) = make(name, 2).float(), batch(name, 3, 2)
    for t in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)):
        assert field(t, x.float(), cond.float()).dtype == torch.float32


@every
def test_all_tensors_live_on_the_device_of_the_network(name: str) -> None:
    """On a device without values a tensor left on the CPU, or a look at a value, is an error."""
    field = make(name, 2).to("meta")
    t, x, cond = (tensor.to("meta") for tensor in batch(name, 3, 2))
    for time in (0.5, t[0], t):
        assert field(time, x, cond).device.type == "meta"
        if name in CLOSED:
            assert field.velocity_and_divergence(time, x, cond)[1].shape == (3,)


@every
def test_bfloat16_autocast_is_close_to_single_precision(name: str) -> None:
    field, (t, x, cond) = make(name, 2).float(), batch(name, 8, 2)
    t, x, cond = t.float(), x.float(), cond.float()
    expected = field(t, x, cond)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = field(t, x, cond)
    assert rounded.dtype in (torch.bfloat16, torch.float32)
    assert 0 < (rounded - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["mlp-2", "film-2", "squash-2", "residual", "unet-mlp", "conv-unet"])
def test_networks_compile_into_one_graph(name: str) -> None:
    field, (t, x, cond) = make(name, 2), batch(name, 3, 2)
    torch.compiler.reset()
    method = field.velocity_and_divergence if name in CLOSED else field.forward
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t, x, cond), method(t, x, cond))


@pytest.mark.parametrize(
    "build",
    [
        lambda g: MLPField(2, (64, 64), 1, generator=g),
        lambda g: FiLMField(2, (64, 64), 1, generator=g),
        lambda g: ConcatSquashField(2, (64, 64), 1, frequencies=4, activation="silu", generator=g),
        lambda g: ResidualField(2, 48, 2, 1, generator=g),
        lambda g: UNetMLPField(2, (32, 32), 1, 1, (32,), 16, generator=g),
    ],
    ids=["mlp", "film", "squash", "residual", "unet-mlp"],
)
def test_networks_learn_a_field_of_time_and_condition(build: Callable[[torch.Generator], nn.Module]) -> None:
    """The rotation `cos(2 pi t) R x + c`, which neither time, point nor condition explain alone."""
    generator = torch.Generator().manual_seed(0)
    field = build(generator)
    optimizer = torch.optim.Adam(field.parameters(), 5e-3)
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    for _ in range(200):
        t, cond = torch.rand(256, generator=generator), torch.randn(256, 1, generator=generator)
        x = torch.randn(256, 2, generator=generator)
        target = (2 * math.pi * t).cos()[:, None] * x @ rotation + cond
        loss = (field(t, x, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # the target has 1.5


# -------------------------------------------------------------------------------------------------- embeddings, scales


def test_embedding_holds_time_and_unit_circles_of_growing_speed() -> None:
    t = torch.linspace(-0.1, 1.1, 7, dtype=torch.float64)
    features = FourierTime(8).double()(t)
    torch.testing.assert_close(features[:, 0], t)
    cos, sin = features[:, 1:9], features[:, 9:]
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(7, 8, dtype=torch.float64))
    torch.testing.assert_close(cos[:, 0], (math.pi * t).cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[:, 7], (30 * math.pi * t).sin(), rtol=0, atol=1e-4)
    assert torch.equal(FourierTime(0)(t), t[:, None])


def test_embedding_of_both_ends_holds_its_sixteen_functions() -> None:
    for at in (0.0, 1e-3, 0.3, 0.5, 0.999, 1.0):
        u = (math.log(at + 0.02) - math.log(1 - at + 0.02)) / math.log(51)
        angles = [math.pi * k * at for k in (1, 2, 3)] + [math.pi * k * (u + 1) / 2 for k in (1, 2, 3, 4)]
        expected = [at, u, *map(math.cos, angles), *map(math.sin, angles)]
        features = LogitTime().double()(torch.tensor(at, dtype=torch.float64))
        torch.testing.assert_close(features, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_embedding_of_both_ends_continues_beyond_them() -> None:
    """Its second feature advances by 2 in each unit of time and has one slope from both sides of each end."""
    embed, t = LogitTime().double(), torch.linspace(-2, 3, 501, dtype=torch.float64)
    torch.testing.assert_close(embed(t + 1)[:, 1], embed(t)[:, 1] + 2)
    slope = (1 / 0.02 + 1 / 1.02) / math.log(51)
    for end in (-1.0, 0.0, 1.0, 2.0):
        there = torch.tensor([end - 1e-7, end, end + 1e-7], dtype=torch.float64)
        torch.testing.assert_close(
            embed(there)[:, 1].diff() / 1e-7, torch.full((2,), slope).double(), rtol=1e-4, atol=0
        )


@every
def test_intervals_of_time_are_told_apart(name: str) -> None:
    """As in a model of several intervals, `field(t + k)`: no two of them are alike, and none is constant in time."""
    field, (_, x, cond) = make(name, 2), batch(name, 3, 2)
    values = [[field(k + t, x, cond) for t in (0.25, 0.75)] for k in (-2, -1, 0, 1, 2, 3)]
    for early, late in values:
        assert early.isfinite().all() and (early - late).abs().max() > 1e-3
    for one, other in itertools.combinations(values, 2):
        assert (one[0] - other[0]).abs().max() > 1e-3


def test_scales_leave_unit_variance_to_the_network() -> None:
    """Over the four pairs of a fair sign and a fair sign, of unit variance each."""
    pairs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    for t in torch.linspace(-0.2, 1.2, 15, dtype=torch.float64):
        x0, x1 = pairs.T
        x_t, velocity = t * x1 + (1 - t) * x0, x1 - x0
        skip, scale = precondition(t)
        left = (velocity - skip * x_t) / scale
        one = torch.ones((), dtype=torch.float64)
        torch.testing.assert_close((scale * x_t).square().mean(), one)
        torch.testing.assert_close(left.square().mean(), one)
        torch.testing.assert_close((left * x_t).mean(), 0 * one)  # nothing linear is left


@pytest.mark.parametrize("name", ["film-1", "film-2", "residual"])
def test_silent_network_is_the_exact_field_of_standard_data(name: str) -> None:
    field, (t, x, _) = make(name), batch(name, 7)
    for parameter in field.last.parameters():
        parameter.data.zero_()
    normal = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64)[None],
    )
    torch.testing.assert_close(field(t, x), normal.velocity_field(CondOT())(t, x, None), rtol=1e-10, atol=1e-11)
    if name in CLOSED:
        for i in range(7):
            exact = torch.full((7,), 3 * (2 * t[i] - 1) / (t[i] ** 2 + (1 - t[i]) ** 2), dtype=torch.float64)
            torch.testing.assert_close(field.velocity_and_divergence(t[i], x)[1], exact, rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------- one network


def test_mlp_draws_its_weights_in_a_fixed_order() -> None:
    """Saved models and seeds of old runs rely on these names and on this order of draws."""
    field = MLPField(3, (16, 12), 2, frequencies=4, generator=torch.Generator().manual_seed(5))
    shapes = {
        "from_x.weight": (16, 3),
        "from_time.weight": (16, 9),
        "from_time.bias": (16,),
        "from_cond.weight": (16, 2),
        "layers.0.weight": (12, 16),
        "layers.0.bias": (12,),
        "last.weight": (3, 12),
        "last.bias": (3,),
    }
    assert {key: tuple(p.shape) for key, p in field.named_parameters()} == shapes
    assert list(field.state_dict()) == list(shapes)
    generator, inputs = torch.Generator().manual_seed(5), {"from_time.bias": 9, "layers.0.bias": 16, "last.bias": 12}
    for key, shape in shapes.items():
        bound = inputs.get(key, shape[-1]) ** -0.5 * (0.1 if key.startswith("last") else 1)
        expected = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        assert torch.equal(field.get_parameter(key), expected), key


def test_network_learns_a_fast_function_of_time() -> None:
    field = MLPField(1, (32, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    t = torch.linspace(0, 1, 128)
    x, target = torch.zeros(128, 1), (10 * math.pi * t).sin()[:, None]
    for _ in range(200):
        loss = (field(t, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01  # a constant has 0.5


def test_film_field_is_its_equation() -> None:
    field, (t, x, cond) = make("film-2", 2), batch("film-2", 4, 2)
    w = dict(field.named_parameters())
    for i in range(4):
        n = t[i] ** 2 + (1 - t[i]) ** 2
        c = cond[i]
        for layer in range(2):
            c = torch.nn.functional.silu(w[f"encoder.layers.{layer}.weight"] @ c + w[f"encoder.layers.{layer}.bias"])
        features = LogitTime().double()(t[i])
        a = x[i] / n.sqrt()
        for layer in range(2):
            m = f"modulations.{layer}.from_"
            both = w[f"{m}time.weight"] @ features + w[f"{m}time.bias"] + w[f"{m}cond.weight"] @ c
            half = len(both) // 2
            a = torch.nn.functional.silu((1 + both[:half]) * (w[f"layers.{layer}.weight"] @ a) + both[half:])
        expected = (2 * t[i] - 1) / n * x[i] + (w["last.weight"] @ a + w["last.bias"]) / n.sqrt()
        torch.testing.assert_close(field(t, x, cond)[i], expected, rtol=1e-10, atol=1e-11)


def test_film_layers_start_near_unit_variance() -> None:
    field = FiLMField(20, (400, 400), generator=torch.Generator().manual_seed(0)).double()
    x0, x1 = randn(2000, 20, seed=1), randn(2000, 20, seed=2)
    for t in (0.0, 0.1, 0.5, 1.0):
        inputs = (t * x1 + (1 - t) * x0) * (t**2 + (1 - t) ** 2) ** -0.5
        first = field.layers[0](inputs)
        second = field.layers[1](torch.nn.functional.silu(first))
        assert first.std().item() == pytest.approx(1, rel=0.1)
        assert second.std().item() == pytest.approx(0.77, rel=0.1)  # sqrt(1.7 E[silu(z)^2])
        last = (field(t, t * x1 + (1 - t) * x0) - precondition(torch.tensor(t))[0] * (t * x1 + (1 - t) * x0)).std()
        assert 0.02 < last < 0.12


def test_concat_squash_is_its_equation() -> None:
    """As in FFJORD, with the raw time and with a condition beside it; the last gate sees time alone."""
    field = ConcatSquashField(3, (16, 12), 2, generator=torch.Generator().manual_seed(0)).double()
    x, cond, t = randn(4, 3, seed=1), randn(4, 2, seed=2), torch.linspace(0, 1, 4, dtype=torch.float64)
    w = dict(field.named_parameters())
    for i in range(4):
        a, context = x[i], torch.cat([t[i : i + 1], cond[i]])
        for layer in ("layers.0", "layers.1", "last"):
            seen = context[:1] if layer == "last" else context
            gate = 1 / (1 + (-(w[f"{layer}.gate.weight"] @ seen + w[f"{layer}.gate.bias"])).exp())
            z = (w[f"{layer}.linear.weight"] @ a + w[f"{layer}.linear.bias"]) * gate + w[
                f"{layer}.shift.weight"
            ] @ context
            a = (1 + z.exp()).log()
        torch.testing.assert_close(field(t, x, cond)[i], z, rtol=1e-10, atol=1e-11)


def test_residual_blocks_add_to_the_stream() -> None:
    """Silent blocks leave a network with one hidden layer, whatever their number."""
    field, (t, x, cond) = make("residual", 2), batch("residual", 4, 2)
    for block in field.blocks:
        for parameter in block.outer.parameters():
            parameter.data.zero_()
    skip, scale = precondition(t)
    hidden = torch.nn.functional.silu(scale * x @ field.first.weight.T + field.first.bias)
    expected = skip * x + scale * (hidden @ field.last.weight.T + field.last.bias)
    torch.testing.assert_close(field(t, x, cond), expected, rtol=1e-10, atol=1e-11)


def test_unet_mlp_has_the_layers_of_the_paper() -> None:
    """Every layer of the default network, counted by hand."""
    field = UNetMLPField(4, cond_dim=6)
    time = (257 * 256 + 256) + (256 * 256 + 256)  # 256 sinusoids and the time itself
    cond = (6 * 512 + 512) + 2 * (512 * 512 + 512)
    film = (256 + 512) * 2 * 512 + 2 * 512
    block = 512 * 512 + 512 + film
    upward = 1024 * 512 + 512 + film + 1024 * 512  # the last one is the shortcut
    ends = (4 * 512 + 512) + (512 * 4 + 4)
    assert sum(p.numel() for p in field.parameters()) == time + cond + 4 * block + 3 * upward + ends


@pytest.mark.parametrize("shared", [True, False], ids=["one time", "times"])
def test_field_at_a_condition_is_the_field_there_to_the_last_bit(shared: bool) -> None:
    """The rest of a solve changes the time and the point only."""
    field, (t, x, cond) = make("unet-mlp", 2), batch("unet-mlp", 5, 2)
    assert cond is not None
    there = field.at_condition(cond)
    for time in (t, 0.3 * t) if not shared else (0.0, 0.3):
        assert torch.equal(there(time, x, None), field(time, x, cond))
    with pytest.raises(ValueError, match="cond has shape"):
        field.at_condition(cond[:, :1])


@pytest.mark.parametrize("name", ["unet-mlp", "conv-unet"])
def test_skip_connections_join_each_stage_with_its_counterpart(name: str) -> None:
    """What a stage going down puts out reaches its counterpart even where all that lies between is silent."""
    for level in range(3):
        field, (t, x, cond) = make(name, 2), batch(name, 3, 2)
        between = [field.middle, *list(field.down)[level + 1 :], *list(field.up)[: 2 - level]]
        for parameter in (p for stage in between for p in stage.parameters()):
            parameter.data.zero_()
        field.up[2 - level].register_forward_pre_hook(_only_beside) if name == "conv-unet" else (
            field.up[2 - level][0].register_forward_pre_hook(_only_beside)
        )
        before = field(t, x, cond)
        assert (field(t, x + 1e-2, cond) - before).abs().max() > 1e-7, level
        for parameter in field.down[level].parameters():
            parameter.data.mul_(1.1)
        assert (field(t, x, cond) - before).abs().max() > 1e-7, level


def _only_beside(stage: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Silence the half of a stage's input that comes from below."""
    h, *rest = inputs
    outputs = stage.linear.out_features if hasattr(stage, "linear") else stage.outer.out_channels
    below = h.shape[1] - outputs
    return (torch.cat([torch.zeros_like(h[:, :below]), h[:, below:]], 1), *rest)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 7), (8, 8), (28, 28)])
def test_conv_unet_takes_images_of_any_size(size: tuple[int, int]) -> None:
    field = make("conv-unet")
    x = randn(2, 2, *size, seed=1)
    assert field(0.5, x).shape == x.shape
    assert field(0.5, x).isfinite().all()


@pytest.mark.parametrize(("widths", "far"), [((4,), False), ((4, 8, 4), True)])
def test_coarse_levels_carry_a_pixel_across_the_image(
    widths: tuple[int, ...], far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any corner to the opposite one, which the convolutions of a single level do not reach."""
    monkeypatch.setattr(conv_unet, "_norm", lambda h: h)  # the group norms spread their means over the image
    field = ConvUNetField(2, widths, generator=torch.Generator().manual_seed(0)).double()
    x = randn(1, 2, 20, 20, seed=1)
    for row, column in itertools.product((0, -1), repeat=2):
        moved = x.clone()
        moved[0, 0, row, column] += 100
        change = (field(0.5, moved) - field(0.5, x))[0, :, -1 - row, -1 - column].abs()
        assert (change > 0).all() if far else (change == 0).all()


@pytest.mark.parametrize("patch", [1, 2])
def test_the_unet_of_vectors_is_that_of_images_whose_squares_are_channels(patch: int) -> None:
    field = FlatUNetField(48, (2, 4, 6), (8, 12), patch, cond_dim=3, generator=torch.Generator().manual_seed(0))
    field = field.double()
    x, cond, t = randn(5, 48, seed=1), randn(5, 3, seed=2), torch.linspace(0, 1, 5, dtype=torch.float64)

    def places() -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Each place in a vector, with that of its pixel in the image of the network."""
        for channel, row, column in itertools.product(range(2), range(4), range(6)):
            within = (row % patch) * patch + column % patch
            yield (channel * 4 + row) * 6 + column, (channel * patch**2 + within, row // patch, column // patch)

    images = torch.zeros(5, 2 * patch**2, 4 // patch, 6 // patch, dtype=torch.float64)
    for place, pixel in places():
        images[(slice(None), *pixel)] = x[:, place]
    velocity, found = field.unet(t, images, cond), field(t, x, cond)
    for place, pixel in places():
        torch.testing.assert_close(found[:, place], velocity[(slice(None), *pixel)], rtol=1e-12, atol=1e-12)


def test_the_divergence_of_images_is_estimated_without_bias() -> None:
    field = FlatUNetField(16, (1, 4, 4), (8,), 2, generator=torch.Generator().manual_seed(0)).double()
    field.unet.last.weight.data *= 10
    x = randn(2, 16, seed=1)
    exact = ContinuousFlow(field, (16,), "rk4", 2).estimate(x)
    generator = torch.Generator().manual_seed(2)
    flow = ContinuousFlow(field, (16,), "rk4", 2, divergence="hutchinson", probes=30)
    found = flow.estimate(x, generator=generator)
    gap = (found.log_prob - exact.log_prob).abs()
    assert (found.standard_error > 1e-3).all() and (gap < 5 * found.standard_error).all()
    assert (exact.log_prob - flow.base.log_prob(x)).abs().min() > 1e-3  # the field moves the density


@pytest.mark.parametrize(
    ("image", "patch", "message"),
    [((1, 4, 5), 2, r"image is \(1, 4, 5\), but should have 16 pixels"), ((1, 2, 8), 3, "patch is 3, but should div")],
)
def test_images_that_do_not_fit_a_vector_are_named(image: tuple[int, ...], patch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatUNetField(16, image, patch=patch)


def test_conv_unet_learns_to_move_an_image_by_its_label() -> None:
    generator = torch.Generator().manual_seed(0)
    field = ConvUNetField(1, (8, 16), 2, generator=generator)
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    for _ in range(120):
        x, t = torch.randn(32, 1, 6, 6, generator=generator), torch.rand(32, generator=generator)
        label = torch.randint(2, (32,), generator=generator)
        cond = torch.nn.functional.one_hot(label, 2).float()
        target = torch.where(label[:, None, None, None] == 0, x.roll(1, -1), (1 - 2 * t)[:, None, None, None] * x)
        target[..., 0] = 0  # what rolls in from the other side is unseen
        loss = (field(t, x, cond) - target).square()[..., 1:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.12  # the target has 0.67


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation is 'relu'"):
        MLPField(2, activation="relu")
    with pytest.raises(ValueError, match="activation is 'relu'"):
        FiLMField(2, activation="relu")
    with pytest.raises(ValueError, match="activation is 'relu'"):
        ConcatSquashField(2, activation="relu")
    with pytest.raises(ValueError, match="hidden is empty"):
        MLPField(2, hidden=())
    with pytest.raises(ValueError, match="hidden is empty"):
        ConcatSquashField(2, hidden=())
    with pytest.raises(ValueError, match="hidden has 3 layers, but should have one or two"):
        FiLMField(2, hidden=(8, 8, 8))
    with pytest.raises(ValueError, match="hidden has 0 layers, but should have one or two"):
        FiLMField(2, hidden=())
    with pytest.raises(ValueError, match="blocks is 0"):
        ResidualField(2, blocks=0)
    with pytest.raises(ValueError, match="blocks is 0"):
        UNetMLPField(2, blocks=0)
    with pytest.raises(ValueError, match="stages is empty"):
        UNetMLPField(2, stages=())
    for widths in ((), (8, 6), (0,)):
        with pytest.raises(ValueError, match=r"widths is \(.*multiple of 4"):
            ConvUNetField(1, widths)
    with pytest.raises(TypeError):
        MLPField(2, hiden=(8,))  # type: ignore[call-arg]


@every
def test_bad_inputs_are_named(name: str) -> None:
    field, conditional, (t, x, cond) = make(name), make(name, 2), batch(name, 4, 2)
    with pytest.raises(ValueError, match=r"x has shape \(4, 5.*but should have shape \(batch, "):
        field(0.0, x.new_zeros(4, 5, *x.shape[2:]))
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        field(0.0, x.new_zeros(3))
    with pytest.raises(ValueError, match="cond has shape None"):
        conditional(0.0, x)
    with pytest.raises(ValueError, match=r"cond has shape \(4, 2\), but should have shape None"):
        field(0.0, x, cond)
    with pytest.raises(ValueError, match=r"cond has shape \(1, 2\)"):
        conditional(0.0, x, cond[:1])
    with pytest.raises(ValueError, match=r"t has shape \(4, 1\)"):
        field(t[:, None], x)
    with pytest.raises(ValueError, match=r"t has shape \(1,\)"):
        field(t[:1], x)


# ------------------------------------------------------------------------------------------------------ preconditioning


def finite(path: AffinePath, prediction: Quantity) -> bool:
    if prediction == "score":
        return bool(path.sigma(1.0) > 0)
    return prediction != "velocity" or bool(path.d_sigma(1.0).isfinite())


@on_every_path
@pytest.mark.parametrize("prediction", get_args(Quantity))
@pytest.mark.parametrize("data_scale", [0.2, 1.0, 5.0])
def test_a_preconditioned_network_sees_and_predicts_unit_variance(
    path: AffinePath, prediction: Quantity, data_scale: float
) -> None:
    """Over the four pairs of a fair sign times the scale and a fair sign: nothing linear is left to the network."""
    if not finite(path, prediction):
        with pytest.raises(ValueError, match=f"prediction is '{prediction}', whose residual is infinite at an end"):
            Preconditioned(MLPField(1), path, data_scale, prediction)
        return
    seen: list[Tensor] = []

    def silent(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    def one(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.ones_like(x)

    pairs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    x0, x1 = pairs[:, :1], data_scale * pairs[:, 1:]
    for t in torch.linspace(0.01, 0.99, 9, dtype=torch.float64):
        sample = path.sample(x0, x1, t)
        target = {"velocity": sample.velocity, "noise": x0, "data": x1, "score": -x0 / path.sigma(t)}[prediction]
        skip = Preconditioned(silent, path, data_scale, prediction)(t, sample.x_t)
        size = Preconditioned(one, path, data_scale, prediction)(t, sample.x_t) - skip
        left = (target - skip) / size
        unit = torch.ones((), dtype=torch.float64)
        torch.testing.assert_close(seen[-1].square().mean(), unit)
        torch.testing.assert_close(left.square().mean(), unit)
        torch.testing.assert_close((left * sample.x_t).mean(), 0 * unit, rtol=0, atol=1e-10)


@on_every_path
def test_a_silent_preconditioned_network_is_the_exact_field_of_normal_data(path: AffinePath) -> None:
    if not finite(path, "velocity"):
        pytest.skip("its velocity is infinite")
    normal = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), 9 * torch.eye(2)[None].double())
    field = Preconditioned(lambda t, x, cond: 0 * x, path, data_scale=3.0)
    t, x = torch.linspace(0, 1, 7, dtype=torch.float64), 3 * randn(7, 2)
    torch.testing.assert_close(field(t, x), normal.velocity_field(path)(t, x, None))


def test_preconditioning_trains_a_path_of_growing_noise() -> None:
    """VE, whose inputs reach 50 times the data: the same network and steps come closer to the data."""
    path, truth = VE(), torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]])

    def distance(scaled: bool) -> float:
        g = torch.Generator().manual_seed(0)
        network = MLPField(2, (64, 64), generator=g)
        field = Preconditioned(network, path) if scaled else network
        optimizer = torch.optim.Adam(field.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            x1 = truth[torch.randint(3, (256,), generator=g)] + 0.2 * torch.randn(256, 2, generator=g)
            optimizer.zero_grad()
            cfm_loss(field, path, x1, generator=g).backward()
            optimizer.step()
            schedule.step()
        flow = ContinuousFlow(field, (2,), steps=60, base_scale=path.sigma_max)
        data = truth[torch.randint(3, (2000,), generator=g)] + 0.2 * torch.randn(2000, 2, generator=g)
        return float(sliced_wasserstein(flow.sample((2000,), generator=g), data, generator=g))

    plain, scaled = distance(scaled=False), distance(scaled=True)
    assert scaled < 0.85 * plain, (plain, scaled)  # 0.41 and 0.64


def test_bad_scales_are_named() -> None:
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"data_scale is .*, but should be positive and finite\."):
            Preconditioned(MLPField(2), CondOT(), data_scale=scale)
    with pytest.raises(ValueError, match="prediction is 'flow'"):
        Preconditioned(MLPField(2), CondOT(), prediction="flow")  # type: ignore[arg-type]
