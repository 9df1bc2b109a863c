"""Every defect that was reproduced in another library, absent here: one test each.

TDQ is torchdiffeq, ZK zuko, FM flow_matching, TC torchcfm, LQ rectified-flow, SiT the library of that name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import flowmatch_core
from flowmatch_core._tensors import expand_time
from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.discrete import Logits, MaskSource, MixturePath, Source, UniformSource, solve_ctmc
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import VP, AffinePath, CondOT, Cosine, Quantity, Rescheduled
from flowmatch_core.solvers import SOLVERS, SolverError, solve
from tests.support.random import generator, randn, tensor
from tests.support.truths import PATHS, mixture, on_every_path
from tests.support.waiting import NeverWaits

FILES = sorted(Path(flowmatch_core.__path__[0]).rglob("*.py"))


def public() -> Iterator[tuple[str, Any]]:
    """Everything that a module of the library offers."""
    for info in pkgutil.walk_packages(flowmatch_core.__path__, "flowmatch_core."):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("flowmatch_core"):
                yield f"{info.name}.{name}", value


def stiff(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
    assert cond is not None
    return -cond * (x - torch.sin(8 * expand_time(t, x)))


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) & {"dopri5", "dopri5_per_sample"}))
def test_a_stiff_sample_does_not_hide_in_its_batch(solver: str) -> None:
    """TDQ controls the root mean square over the batch: an error of 0.0026 alone was 1.8 among 4096."""
    rate = torch.ones(512, 1, dtype=torch.float64)
    rate[0] = 200.0
    x = torch.ones(512, 1, dtype=torch.float64)
    exact = solve(stiff, x[:1], cond=rate[:1], solver="rk4", steps=4000).x
    for n in (1, 16, 512):
        end = solve(stiff, x[:n], cond=rate[:n], solver=solver, rtol=1e-3, atol=1e-3).x
        assert (end[:1] - exact).abs() < 3e-3


@pytest.mark.parametrize("solver", ["rk4", "dopri5_per_sample"])
def test_the_likelihood_of_a_row_does_not_depend_on_its_batch(solver: str) -> None:
    """The same in TDQ makes the likelihoods of FM, FFJORD and SiT a matter of whom a row is scored with."""
    law, x = mixture(), randn(40, 2)
    flow = ContinuousFlow(law.velocity_field(), (2,), solver, 20, rtol=1e-4, atol=1e-4)
    together = flow.log_prob(x)
    for rows in (slice(0, 1), slice(5, 9), slice(39, None)):
        torch.testing.assert_close(flow.log_prob(x[rows]), together[rows], rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_field_of_nan_ends_in_a_sentence(solver: str) -> None:
    """ZK never returns; TDQ says "underflow in dt 0.0"."""

    def spoiled(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.where(expand_time(t, x) > 0.5, math.nan, -x)

    with pytest.raises(SolverError, match=r"solver '.*(NaN|not finite)") as raised:
        solve(spoiled, randn(3, 2), solver=solver)
    assert str(raised.value).endswith(".") and len(str(raised.value).split()) > 8


def test_the_default_likelihood_is_accurate() -> None:
    """FM solves by Euler's method unless told otherwise: a log-determinant of 3.30 for 3.00."""
    x = randn(8, 6)
    flow = ContinuousFlow(lambda t, x, cond: -expand_time(t, x) * x, event_shape=(6,))
    x0 = x * math.exp(0.5)
    start: Tensor = torch.distributions.Normal(tensor(0.0), 1.0).log_prob(x0)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(flow.log_prob(x) - start.sum(1), torch.full((8,), 3.0).double(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", ["rk4", "adams", "dopri5"])
def test_the_gradient_of_a_likelihood_reaches_the_field(solver: str) -> None:
    """FM detaches the velocity and the divergence in every evaluation: `enable_grad=True` trains nothing."""
    field, x = MLPField(2, (8, 8), generator=generator()).double(), randn(6, 2)
    directions = [randn(*parameter.shape, seed=3) for parameter in field.parameters()]

    def log_prob() -> Tensor:
        return ContinuousFlow(field, (2,), solver, 20, rtol=1e-8, atol=1e-8).log_prob(x).mean()

    gradients = torch.autograd.grad(log_prob(), list(field.parameters()))
    slope = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
    values = []
    for shift in (1e-4, -2e-4):  # to +1e-4 and then to -1e-4
        with torch.no_grad():
            for parameter, direction in zip(field.parameters(), directions, strict=True):
                parameter.add_(shift * direction)
        values.append(log_prob().detach())  # with gradients enabled, as the slope: without them the rule is another
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("event", [(1, 4, 4), (2, 3, 3)])
def test_the_exact_divergence_of_images_is_exact(event: tuple[int, ...]) -> None:
    """FM raises an IndexError on (batch, channels, height, width)."""
    scale = torch.arange(1.0, 1 + math.prod(event), dtype=torch.float64).reshape(event)
    x = randn(3, *event)
    _, result = divergence(lambda t, x, cond: scale * x + x.roll(1, -1), 0.0, x, method="exact")
    torch.testing.assert_close(result, scale.sum().expand(3))
    assert ContinuousFlow(lambda t, x, cond: scale * x / 100, event, "rk4").log_prob(x).shape == (3,)


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    """FM keeps `create_graph=True` for every dimension, gradients or not: its memory grows with them."""
    x, modes = randn(4, 5), set()

    def watched(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        y = torch.sin(x)
        y.register_hook(lambda gradient: modes.add(torch.is_grad_enabled()))
        return y * x.sum(1, keepdim=True)

    with torch.no_grad():
        velocity, result = divergence(watched, 0.3, x, method="exact")
    assert velocity.grad_fn is None and result.grad_fn is None
    assert modes == {False}


def test_no_function_swallows_a_misspelt_argument() -> None:
    """FM's `**model_extras` let `sample(..., methodd="rk4")` pass."""
    checked = 0
    for name, value in public():
        members = [value] if inspect.isfunction(value) else []
        if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
            members = [m for n, m in vars(value).items() if inspect.isfunction(m) and (n == "__init__" or n[0] != "_")]
        for member in members:
            kinds = {p.kind for p in inspect.signature(member).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name
            checked += 1
    assert checked > 100
    with pytest.raises(TypeError, match="methodd"):
        ContinuousFlow(mixture().velocity_field(), (2,)).sample((3,), methodd="rk4")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="time_gird"):
        solve(mixture().velocity_field(), randn(3, 2), time_gird=None)  # type: ignore[call-arg]


@pytest.mark.parametrize("solver", ["rk4", "heun", "dopri5"])
@pytest.mark.parametrize(("trained", "wanted"), [(CondOT(), VP()), (Cosine(), CondOT())], ids=["to-vp", "to-line"])
def test_a_changed_schedule_samples_up_to_both_ends(solver: str, trained: AffinePath, wanted: AffinePath) -> None:
    """FM's ScheduleTransformedModel is not finite under rk4 and heun, and dopri5 gives up."""
    law = GaussianMixture(tensor(1.0), torch.zeros(1, 2).double(), 0.5 * torch.eye(2).double()[None])
    x = randn(50, 2)
    field = Rescheduled(law.velocity_field(trained), trained, wanted)
    end = solve(field, wanted.sigma(0.0) * x, solver=solver, steps=100).x
    assert torch.isfinite(end).all()
    torch.testing.assert_close(end, math.sqrt(0.5) * x, rtol=0, atol=2e-2)


@on_every_path
def test_conversions_are_finite_at_both_ends(path: AffinePath) -> None:
    """FM divides by alpha or sigma: NaN at t = 0 and t = 1, for a velocity too."""
    x, value = randn(4, 3), randn(4, 3, seed=1)
    for t in (0.0, 1.0, 0.5):
        # a path that starts at rest tells nothing there: its velocity is zero, whatever the data
        still = path.d_alpha(t) == 0 and path.alpha(t) == 0 and path.d_sigma(t) == 0
        for target in ("data", "noise"):
            result = path.convert(value, t, x, "velocity", target)
            assert result.isfinite().all() or (still and target == "data")
        for source in ("data", "velocity"):
            assert path.convert(value, t, x, source, "velocity").isfinite().all()
    for source in get_args(Quantity):
        assert path.convert(value, 0.5, x, source, "velocity").isfinite().all()


@on_every_path
def test_conversions_put_time_along_the_batch_whatever_the_width(path: AffinePath) -> None:
    """FM's target_to_velocity raises for t of shape (batch,), or broadcasts along the event if it is as wide."""
    x, value, t = randn(3, 3), randn(3, 3, seed=1), tensor(0.2, 0.5, 0.8)
    together = path.convert(value, t, x, "data", "velocity")
    for i in range(3):
        alone = path.convert(value[i : i + 1], float(t[i]), x[i : i + 1], "data", "velocity")
        torch.testing.assert_close(together[i : i + 1], alone)


def sure(t: Time, x: Tensor, cond: Tensor | None) -> Logits:
    """Every position is the token 1 with probability 0.99."""
    return Logits(tensor(0.005, 0.99, 0.005).log().expand(*x.shape, 3))


@pytest.mark.parametrize("source", [MaskSource(3), UniformSource(3)], ids=["mask", "uniform"])
def test_tokens_are_sampled_in_a_single_step(source: Source) -> None:
    """FM asserts that the interval is longer than a step."""
    start = source.sample((500, 8), generator())
    end = solve_ctmc(sure, start, path=MixturePath(source), steps=1, generator=generator(1))
    assert end.nfe == 1
    assert (end.x == 1).double().mean() == pytest.approx(0.99, abs=0.01)


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_token_times_need_no_equality_of_floats(steps: int) -> None:
    """FM looks times up by `t in time_grid`, which rounding can miss."""
    seen: list[float] = []

    def watched(t: Time, x: Tensor, cond: Tensor | None) -> Logits:
        seen.append(float(t))
        return sure(t, x, cond)

    path = MixturePath(MaskSource(3))
    solution = solve_ctmc(watched, path.source.sample((2, 4)), path=path, t0=0.1, t1=0.7, steps=steps, save=True)
    assert solution.t is not None and solution.path is not None and len(solution.path) == steps + 1
    assert seen == pytest.approx([0.1 + 0.6 * k / steps for k in range(steps)])
    assert solution.t.tolist() == pytest.approx([*seen, 0.7])


def test_token_sampler_makes_no_one_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    """FM holds one-hot states and rates of shape (batch, length, vocabulary) in every step."""
    for owner, name in ((torch.nn.functional, "one_hot"), (MixturePath, "velocity"), (Tensor, "scatter_add")):
        monkeypatch.setattr(owner, name, None)
    path = MixturePath(UniformSource(3))
    solve_ctmc(sure, path.source.sample((2, 4), generator()), path=path, steps=3, generator=generator())
    with pytest.raises(TypeError):
        path.velocity(sure(0.5, torch.zeros(2, 4), None), 0.5, torch.zeros(2, 4))


def test_the_line_without_sigma_min_trains_at_its_end() -> None:
    """TC's TargetConditionalFlowMatcher(0) gives NaN at t = 1."""
    x1, x0 = randn(8, 2), randn(8, 2, seed=1)
    field = MLPField(2, (8,), generator=generator()).double()
    loss = cfm_loss(field, CondOT(sigma_min=0.0), x1, x0, time=torch.ones(8, dtype=torch.float64))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in field.parameters())
    torch.testing.assert_close(loss, (field(1.0, x1) - (x1 - x0)).square().mean())


def test_no_formula_is_blurred_by_a_small_number() -> None:
    """TC adds 1e-8 to a variance: the limit is then wrong instead of undefined."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        rounded = [
            n for c in ast.walk(tree) if isinstance(c, ast.Call) and ast.unparse(c.func) == "int" for n in ast.walk(c)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and node not in rounded:
                for side in (node.left, node.right):
                    small = isinstance(side, ast.Constant) and isinstance(side.value, float) and 0 < side.value < 1e-3
                    assert not small, f"{path.name}:{node.lineno}"


def test_couplings_keep_the_shape_of_an_event() -> None:
    """TC's sample_plan_with_scipy returns flattened images."""
    x0, x1 = randn(6, 1, 4, 4), randn(6, 1, 4, 4, seed=1)
    assert MinibatchOT()(x0, x1)[0].shape == x1.shape


def test_exact_transport_loses_no_row() -> None:
    """TC draws pairs from the plan with replacement: 157 of 256 rows survive."""
    x0, x1 = randn(256, 2), randn(256, 2, seed=1)
    paired, data, _ = MinibatchOT()(x0, x1)
    assert torch.equal(data, x1)
    assert torch.equal(paired.sort(0).values, x0.sort(0).values) and len(paired.unique(dim=0)) == 256


def test_no_global_randomness_is_drawn() -> None:
    """TC draws pairs from numpy's global generator, whatever the seed of torch."""
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    x1 = randn(16, 2)
    losses = [cfm_loss(MLPField(2, (8,), generator=generator()).double(), CondOT(), x1, coupling=MinibatchOT(),
                       generator=generator(3)) for _ in range(2)]  # fmt: skip
    assert losses[0] == losses[1]
    assert (np.random.get_state()[1] == before).all() and torch.equal(torch.get_rng_state(), torch_before)  # type: ignore[index]
    for path in FILES:
        text = path.read_text()
        assert not any(name in text for name in ("np.random", "import random", "torch.manual_seed", "torch.seed(")), (
            path
        )


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"dopri5", "dopri5_per_sample"}))
def test_a_step_does_not_wait_for_the_device(solver: str) -> None:
    """ZK, FM and TDQ ask the device for a number in every step."""
    field = mixture().velocity_field()
    with NeverWaits():
        solve(field, randn(8, 2), solver=solver, steps=8, check=False)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_probes_are_drawn_once_a_solve(solver: str) -> None:
    """SiT draws them anew in every evaluation, so an adaptive solver chases noise."""
    field = MLPField(4, (16, 16, 16), generator=generator()).double()
    field.last.weight.data *= 30
    flow = ContinuousFlow(field, (4,), solver, 8, "hutchinson", rtol=1e-6, atol=1e-6)
    x, state = randn(5, 4), generator(1)
    state.manual_seed(1)
    flow.log_prob(x, generator=state)
    once = generator(1)
    torch.randint(0, 2, (1, 5, 4), generator=once)
    assert torch.equal(state.get_state(), once.get_state())


def test_a_divergence_evaluates_the_field_once() -> None:
    """SiT runs the network twice, for the velocity and for the divergence."""
    calls = 0

    def counted(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(x) * x.sum(1, keepdim=True)

    for method in ("exact", "hutchinson"):
        calls = 0
        divergence(counted, 0.0, randn(3, 4), method=method)
        assert calls == 1


def raises() -> Iterator[tuple[str, ast.Raise]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield f"{path.name}:{node.lineno}", node


def test_every_error_is_one_whole_sentence() -> None:
    """LQ crashes while it makes three of its messages."""
    count = 0
    for place, node in raises():
        assert isinstance(node.exc, ast.Call) and len(node.exc.args) == 1, place
        (message,) = node.exc.args
        if not isinstance(message, ast.Constant | ast.JoinedStr):
            continue  # a sentence that was made elsewhere
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        text = "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in parts)
        assert text.endswith(".") and not text.endswith("..") and "\n" not in text, f"{place}: {text}"
        count += 1
    assert count > 50


@pytest.mark.parametrize("call", [
    lambda: solve(mixture().velocity_field(), randn(3, 2), solver="rk5"),
    lambda: MLPField(2, ()),
    lambda: CondOT(sigma_min=2.0),
    lambda: PATHS[0].convert(randn(3, 2), 0.5, randn(3, 2), "speed", "data"),  # type: ignore[arg-type]
    lambda: ContinuousFlow(mixture().velocity_field(), (2,), scale=tensor(1.0, -1.0)),
])  # fmt: skip
def test_errors_of_users_can_be_made(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"should .*\.$"):
        call()
