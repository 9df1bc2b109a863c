"""What lets training and sampling run large: whole graphs, no waiting for the device, any dtype, light imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flowmatch_core._tensors import check_numbered
from flowmatch_core.couplings import Independent
from flowmatch_core.discrete import (
    Denoiser,
    Logits,
    MaskSource,
    MixturePath,
    Source,
    UniformSource,
    cross_entropy_loss,
    generalised_kl_loss,
)
from flowmatch_core.divergence import divergence
from flowmatch_core.field import Time
from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives import (
    cfm_loss,
    interpolant_loss,
    nll_loss,
    posterior_cfm_loss,
    sb_cfm_loss,
    sf2m_loss,
)
from flowmatch_core.paths import VP, CondOT, Cosine
from flowmatch_core.solvers import EDM, SOLVERS, Nodes, Power, TimeGrid, Uniform, Warped, solve
from tests.support.random import randn
from tests.support.truths import PATHS
from tests.support.waiting import NeverWaits


def rand(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(9), dtype=dtype)


def network(dtype: torch.dtype = torch.float32) -> MLPField:
    return MLPField(3, (16, 16), generator=torch.Generator().manual_seed(0)).to(dtype)


FIXED = [name for name in SOLVERS if not name.startswith("dopri5")]
GRIDS = [Uniform(), Warped(), Power(), EDM(), Nodes([0.0, 0.2, 0.7, 1.0])]

Field = Callable[..., Tensor]
Loss = Callable[[Field, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    f"cfm-{type(path).__name__}": lambda field, x1, x0, t, path=path: cfm_loss(field, path, x1, x0, time=t)
    for path in PATHS
} | {
    "noise": lambda field, x1, x0, t: cfm_loss(field, VP(), x1, x0, time=t, prediction="noise"),
    "score": lambda field, x1, x0, t: cfm_loss(field, Cosine(), x1, x0, time=t, prediction="score"),
    "data": lambda field, x1, x0, t: cfm_loss(field, CondOT(), x1, x0, time=t, prediction="data"),
    "interpolant": lambda field, x1, x0, t: interpolant_loss(field, CondOT(), x1, x0, time=t, gamma=torch.zeros_like),
    "posterior": lambda field, x1, x0, t: posterior_cfm_loss(field, CondOT(), x1, x0=x0, time=t),
}


def denoiser(table: Tensor, path: MixturePath) -> Denoiser:
    return lambda t, x, cond: Logits(table[:, None, : path.source.vocabulary] * (1 + x[..., None]))


def tokens(loss: Callable[..., Tensor], source: Source) -> Loss:
    path = MixturePath(source)
    data = torch.arange(24).reshape(8, 3) % 4
    return lambda field, x1, x0, t: loss(
        denoiser(field(t, x1) @ torch.arange(15.0).reshape(3, 5), path), path, data, time=t
    )


# These draw within the loss, where a compiled region takes no generator: their values are not compared.
DRAWING: dict[str, Loss] = {
    "likelihood": lambda field, x1, x0, t: nll_loss(field, x1, solver="rk4", steps=2),
    "bridge": lambda field, x1, x0, t: sb_cfm_loss(field, x1, x0, coupling=Independent(), time=t),
    "score-and-flow": lambda field, x1, x0, t: sf2m_loss(field, field, x1, x0, coupling=Independent(), time=t),
    "masked-tokens": tokens(cross_entropy_loss, MaskSource(4)),
    "uniform-tokens": tokens(generalised_kl_loss, UniformSource(4)),
}


@contextmanager
def whole_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, backend=backend, fullgraph=True)
    return result


def gradients(loss: Tensor, field: MLPField) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(field.parameters()))


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        float,
        bool,
        torch.nonzero,
        torch.unique,
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
    ],
)
def test_the_guard_sees_a_host_that_waits(wait: Callable[[Tensor], object]) -> None:
    with NeverWaits(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(1))
    with NeverWaits():
        (torch.ones(3)[torch.arange(2)] + 1).sum()


@pytest.mark.parametrize("name", ["cfm-CondOT", "cfm-CustomPath", "noise", "score", "data", "interpolant", "posterior"])
def test_losses_compile_into_one_graph(name: str) -> None:
    field, x1, x0, t = network(), randn(8, 3, dtype=torch.float32), randn(8, 3, seed=1, dtype=torch.float32), rand(8)
    with whole_graphs():
        loss = compiled(lambda x1, x0, t: LOSSES[name](field, x1, x0, t))(x1, x0, t)
        expected = LOSSES[name](field, x1, x0, t)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, field), gradients(expected, field))


@pytest.mark.parametrize("name", DRAWING)
def test_losses_that_draw_compile_and_never_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, x1, x0, t = network(), randn(8, 3, dtype=torch.float32), randn(8, 3, seed=1, dtype=torch.float32), rand(8)
    for module in ("objectives", "sources"):  # which look at tokens on the CPU alone
        monkeypatch.setattr(f"flowmatch_core.discrete.{module}.check_numbered", lambda *arguments: None)
    with NeverWaits():
        DRAWING[name](field, x1, x0, t).backward()
    with whole_graphs():
        loss = compiled(lambda x1, x0, t: DRAWING[name](field, x1, x0, t))(x1, x0, t)
        assert all(gradient.isfinite().all() for gradient in (loss, *gradients(loss, field)))


def test_numbers_on_a_device_are_not_looked_at() -> None:
    check_numbered("tokens", torch.empty(3, dtype=torch.long, device="meta"), 2)  # which has no values
    with pytest.raises(ValueError, match="tokens holds 2"):
        check_numbered("tokens", torch.tensor([2]), 2)


@pytest.mark.slow
def test_the_loss_compiles_to_machine_code() -> None:
    field, x1, x0, t = network(), randn(8, 3, dtype=torch.float32), randn(8, 3, seed=1, dtype=torch.float32), rand(8)
    with whole_graphs():
        loss = compiled(lambda x1, x0, t: cfm_loss(field, CondOT(), x1, x0, time=t), "inductor")(x1, x0, t)
        torch.testing.assert_close(loss, cfm_loss(field, CondOT(), x1, x0, time=t))
        end = compiled(lambda x: solve(field, x, solver="rk4", steps=4, check=False).x, "inductor")(x0)
        torch.testing.assert_close(end, solve(field, x0, solver="rk4", steps=4).x)


@pytest.mark.parametrize("solver", FIXED)
def test_fixed_grid_solves_compile_into_one_graph(solver: str) -> None:
    field, x, t1 = network(), randn(8, 3, dtype=torch.float32), rand(8)
    with whole_graphs():
        end = compiled(lambda x, t1: solve(field, x, t1=t1, solver=solver, steps=3, check=False).x)(x, t1)
    torch.testing.assert_close(end, solve(field, x, t1=t1, solver=solver, steps=3).x)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: type(grid).__name__)
def test_solves_on_any_grid_are_whole_and_never_wait(grid: TimeGrid) -> None:
    field, x = network(), randn(8, 3, dtype=torch.float32)

    def end(x: Tensor) -> Tensor:
        return solve(field, x, solver="euler", steps=3, grid=grid, check=False).x

    with NeverWaits():
        expected = end(x)
    with whole_graphs():
        torch.testing.assert_close(compiled(end)(x), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_step_never_waits_for_the_device(name: str) -> None:
    field, x1, x0, t = network(), randn(8, 3, dtype=torch.float32), randn(8, 3, seed=1, dtype=torch.float32), rand(8)
    with NeverWaits():
        LOSSES[name](field, x1, x0, t).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in field.parameters())


def test_drawing_noise_and_times_never_waits_for_the_device() -> None:
    field, g = network(), torch.Generator().manual_seed(0)
    with NeverWaits():
        cfm_loss(field, CondOT(), randn(8, 3, dtype=torch.float32), generator=g).backward()
        cfm_loss(field, CondOT(), randn(8, 3, dtype=torch.float32)).backward()


@pytest.mark.parametrize("solver", FIXED)
def test_a_fixed_grid_solve_never_waits_for_the_device(solver: str) -> None:
    with NeverWaits():
        solve(network(), randn(8, 3, dtype=torch.float32), t1=rand(8), solver=solver, steps=3, save=True, check=False)


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
def test_a_divergence_never_waits_for_the_device(method: Any) -> None:
    with NeverWaits(), torch.no_grad():
        divergence(
            network(), 0.5, randn(8, 3, dtype=torch.float32), method=method, generator=torch.Generator().manual_seed(0)
        )


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"posterior"}))  # which names its device to autocast
def test_losses_run_where_there_are_no_values(name: str) -> None:
    """On the meta device: no value is read, and nothing is made on another device."""
    field = network().to("meta")
    x1, x0 = torch.empty(2, 8, 3, device="meta")
    loss = LOSSES[name](field, x1, x0, torch.empty(8, device="meta"))
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize("solver", FIXED)
def test_solves_run_where_there_are_no_values(solver: str) -> None:
    x = torch.empty(8, 3, device="meta")
    solution = solve(network().to("meta"), x, solver=solver, steps=3, save=True, check=False)
    assert solution.path is not None and solution.t is not None
    assert {solution.x.device.type, solution.path.device.type, solution.t.device.type} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_keep_the_dtype_and_agree(name: str, dtype: torch.dtype) -> None:
    def value(dtype: torch.dtype) -> Tensor:
        args = (randn(8, 3, dtype=torch.float32), randn(8, 3, seed=1, dtype=torch.float32), rand(8))
        return LOSSES[name](network(dtype), *(a.to(dtype) for a in args))

    loss = value(dtype)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), value(torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_flows_keep_the_dtype_and_agree(solver: str, dtype: torch.dtype) -> None:
    x = randn(5, 3, dtype=torch.float32)

    def value(dtype: torch.dtype) -> Tensor:
        flow = ContinuousFlow(network(dtype), (3,), solver, 8, loc=torch.zeros((), dtype=dtype))
        assert flow.sample((2,), generator=torch.Generator().manual_seed(0)).dtype == dtype
        return flow.log_prob(x.to(dtype)).detach()

    assert value(dtype).dtype == dtype
    torch.testing.assert_close(value(dtype).double(), value(torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_train_under_bfloat16(name: str) -> None:
    """The network multiplies in bfloat16; the point, the target and the mean stay in float32."""
    field, args = network(), (randn(512, 3, dtype=torch.float32), randn(512, 3, seed=1, dtype=torch.float32), rand(512))
    seen: list[torch.dtype] = []

    def watched(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        velocity: Tensor = field(t, x, cond)
        seen.extend([x.dtype, velocity.dtype])
        return velocity

    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](watched, *args)
    assert seen == [torch.float32, torch.bfloat16] and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in field.parameters())
    torch.testing.assert_close(loss, LOSSES[name](field, *args), rtol=5e-2, atol=0)


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson"])
def test_divergences_stay_exact_under_bfloat16(method: Any) -> None:
    field, x, noise = network(), randn(16, 3, dtype=torch.float32), randn(1, 16, 3, seed=2, dtype=torch.float32).sign()
    noise = noise if method == "hutchinson" else None
    expected = divergence(field, 0.5, x, method=method, noise=noise)[1]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(divergence(field, 0.5, x, method=method, noise=noise)[1], expected)


@pytest.mark.parametrize("solver", ["midpoint", "rk4", "dopri5"])
def test_log_densities_stay_exact_under_bfloat16(solver: str) -> None:
    flow, x = ContinuousFlow(network(), (3,), solver, 6), randn(16, 3, dtype=torch.float32)
    expected = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flow.log_prob(x), expected)


def test_samples_stay_in_float32_under_bfloat16() -> None:
    flow = ContinuousFlow(network(), (3,), "rk4", 6)
    expected = flow.sample((64,), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        x = flow.sample((64,), generator=torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, expected, rtol=2e-2, atol=2e-2)


def test_imports_are_light() -> None:
    """Optimal transport, discrete-time flows, statistics and plots are imported by who uses them."""
    code = """
import pkgutil, sys, flowmatch_core
for module in pkgutil.walk_packages(flowmatch_core.__path__, "flowmatch_core."):
    __import__(module.name)
heavy = {"ot", "zuko", "scipy", "torchdiffeq", "sklearn", "pandas", "matplotlib", "mlflow", "prefect", "dvc"}
print(*sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
