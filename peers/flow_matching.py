"""Cases of flow_matching: paths, schedulers, solvers and discrete flows.

The library is under CC BY-NC 4.0: its installed package is called, and nothing is copied.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from flow_matching.loss import MixturePathGeneralizedKL
from flow_matching.path import AffineProbPath, CondOTProbPath, MixtureDiscreteProbPath
from flow_matching.path.scheduler import (
    CondOTScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    ScheduleTransformedModel,
    VPScheduler,
)
from flow_matching.solver import MixtureDiscreteEulerSolver, ODESolver
from flow_matching.utils import ModelWrapper, gradient, unsqueeze_to_match
from torch import Tensor, nn

from flowmatch_core import (
    VP,
    AffinePath,
    CondOT,
    ContinuousFlow,
    Cosine,
    CustomPath,
    Logits,
    MaskSource,
    MixturePath,
    MLPField,
    Nodes,
    Polynomial,
    PolynomialSchedule,
    Probabilities,
    Rescheduled,
    Source,
    TokenFlow,
    UniformSource,
    cfm_loss,
    cross_entropy_loss,
    generalised_kl_loss,
    jump_divergence,
    solve,
    solve_ctmc,
)
from flowmatch_core.divergence import divergence
from peers.cases import Suite, agree, normal, raises, seeded

suite = Suite("flow_matching", "facebookresearch/flow_matching", "11568d3")

Pair = tuple[Any, AffinePath]
MIXTURE = "tests/path/test_path.py::TestMixtureDiscreteProbPath"

PATHS: dict[str, Callable[[], Pair]] = {
    "cond_ot_scheduler": lambda: (CondOTScheduler(), CondOT()),
    "cosine_scheduler": lambda: (CosineScheduler(), Cosine()),
    "scheduler_vp": lambda: (VPScheduler(), VP()),
    "scheduler_vp_linear": lambda: (
        LinearVPScheduler(),
        CustomPath(alpha=lambda t: t, sigma=lambda t: (1 - t**2).sqrt()),
    ),
    "polynomial_convex_scheduler": lambda: (PolynomialConvexScheduler(n=2.0), Polynomial(2.0)),
}


def times(n: int = 10) -> Tensor:
    return 0.05 + 0.9 * torch.rand(n, dtype=torch.float64)


class Wrapped(ModelWrapper):  # type: ignore[misc]
    """A field of ours as a model of the peer."""

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        velocity: Tensor = self.model(t, x)
        return velocity


@suite.case("tests/path/test_path.py::TestAffineProbPath::test_affine_prob_path_sample", PATHS)
@suite.case("tests/path/test_path.py::TestAffineProbPath::test_cond_ot_prob_path_sample", ("cond_ot_scheduler",))
def sample(name: str) -> None:
    scheduler, path = PATHS[name]()
    x0, x1, t = normal(10, 5), normal(10, 5), times()
    theirs, ours = AffineProbPath(scheduler).sample(x_0=x0, x_1=x1, t=t), path.sample(x0, x1, t)
    agree(ours.x_t, theirs.x_t)
    agree(ours.velocity, theirs.dx_t, 1e-8)
    assert torch.equal(ours.t, theirs.t)
    if name == "cond_ot_scheduler":
        agree(ours.x_t, CondOTProbPath().sample(x_0=x0, x_1=x1, t=t).x_t)


@suite.case("tests/path/test_path.py::TestAffineProbPath::test_assert_sample_shape")
def wrong_shapes() -> None:
    x0, x1 = normal(10, 5), normal(10, 5)
    raises(AssertionError, lambda: CondOTProbPath().sample(x_0=x0, x_1=x1, t=times(5)))
    raises(ValueError, lambda: CondOT().sample(x0, x1, times(5)))
    raises(ValueError, lambda: CondOT().sample(x0[:5], x1, times()))


CONVERSIONS = {
    "test_to_velocity": ("data", "velocity"),
    "test_to_epsilon": ("data", "noise"),
    "test_epsilson_velocity": ("noise", "velocity"),
}
WORDS = {"data": "target", "noise": "epsilon", "velocity": "velocity"}


def convert(test: str, name: str) -> None:
    source, target = CONVERSIONS[test]
    scheduler, path = PATHS[name]()
    peer, value, x, t = AffineProbPath(scheduler), normal(10, 5), normal(10, 5), times()
    whole = t[:, None].expand(10, 5)  # the peer wants a time for every entry
    for a, b in ((source, target), (target, source)):
        expected = getattr(peer, f"{WORDS[a]}_to_{WORDS[b]}")(value, x, whole)
        agree(path.convert(value, t, x, source=a, target=b), expected, 1e-8)  # type: ignore[arg-type]
    there = path.convert(value, t, x, source=source, target=target)  # type: ignore[arg-type]
    agree(path.convert(there, t, x, source=target, target=source), value, 1e-8)  # type: ignore[arg-type]


for test in CONVERSIONS:
    suite.case(f"tests/path/test_path.py::TestAffineProbPath::{test}", (test,), PATHS)(convert)


@suite.case(f"{MIXTURE}::test_mixture_discrete_prob_path_sample", (0.0, 0.3, 1.0))
def mixture_sample(t: float) -> None:
    peer, path = MixtureDiscreteProbPath(CondOTScheduler()), MixturePath(UniformSource(5), PolynomialSchedule(1.0))
    x0, x1 = torch.zeros(4000, 5, dtype=torch.long), torch.ones(4000, 5, dtype=torch.long)
    theirs = peer.sample(x_0=x0, x_1=x1, t=torch.full((4000,), t)).x_t
    ours = path.sample(x0, x1, t, seeded())
    if t in (0.0, 1.0):
        assert torch.equal(ours, theirs)
    agree(ours.double().mean(), theirs.double().mean(), 0.02)
    agree(ours.double().mean(), t, 0.015)


@suite.case(f"{MIXTURE}::test_posterior_to_velocity", (1.0, 2.0))
def posterior_to_velocity(power: float) -> None:
    logits, x, t = normal(10, 1, 5), torch.randint(5, (10, 1)), times()
    peer = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=power))
    expected = peer.posterior_to_velocity(logits, x, t)
    path = MixturePath(UniformSource(5), PolynomialSchedule(power))
    agree(path.velocity(Logits(logits), t, x), expected, 1e-9)


SCHEDULE = "tests/path/test_schedule_transform.py::TestScheduleTransformedModel"


@suite.case(f"{SCHEDULE}::test_schedule_transformation", ("euler", "rk4", "dopri5"))
def changed_schedule(solver: str) -> None:
    def field(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype)
        return x * t.reshape(-1, *[1] * (x.ndim - 1)) ** 2 if t.ndim else x * t**2

    model = ScheduleTransformedModel(Wrapped(field), CondOTScheduler(), CosineScheduler())
    ours, x = Rescheduled(field, CondOT(), Cosine()), normal(10, 2)
    for t in (0.1, 0.5, 0.9):
        agree(ours(t, x), model(x=x, t=torch.tensor(t, dtype=torch.float64)), 1e-8)
    original = ODESolver(Wrapped(field)).sample(x_init=x, step_size=0.001, method="midpoint")
    agree(solve(ours, x, solver=solver, steps=1000).x, original, 1e-2 if solver == "euler" else 1e-4)


def scheduler(name: str) -> None:
    peer, path = PATHS[name]()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    out = peer(t)
    agree(path.alpha(t), out.alpha_t)
    agree(path.sigma(t), out.sigma_t)
    agree(path.d_alpha(t), out.d_alpha_t)
    agree(path.d_sigma(t), out.d_sigma_t)
    ratio = out.alpha_t / out.sigma_t
    agree(path.time_of_ratio(ratio, torch.ones_like(ratio)), t, 1e-9)
    agree(path.time_of_ratio(ratio, torch.ones_like(ratio)), peer.snr_inverse(ratio), 1e-5)
    if hasattr(peer, "kappa_inverse"):
        agree(path.time_of_ratio(path.alpha(t), 1 - path.alpha(t)), peer.kappa_inverse(out.alpha_t), 1e-9)


for test in PATHS:
    suite.case(f"tests/path/test_scheduler.py::TestScheduler::test_{test}", (test,))(scheduler)


class Sure(nn.Module):
    """A denoiser that is sure of the last of three tokens."""

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return torch.tensor([0.0, 0.0, 1.0]).expand(*x.shape, 3)


def sure(t: Any, x: Tensor, cond: Any = None) -> Probabilities:
    return Probabilities(torch.tensor([0.0, 0.0, 1.0]).expand(*x.shape, 3))


def euler(model: nn.Module, path: Any, vocabulary: int, source: Tensor | None = None) -> Any:
    return MixtureDiscreteEulerSolver(model=model, path=path, vocabulary_size=vocabulary, source_distribution_p=source)


SOLVER = "tests/solver/test_discrete_solver.py::TestMixtureDiscreteEulerSolver"
SOURCE = torch.tensor([0.5, 0.5, 0.0])


@suite.case(f"{SOLVER}::test_sample", (1, 10, 100))
def tokens(steps: int) -> None:
    path = MixturePath(UniformSource(3), PolynomialSchedule(1.0))
    x = torch.zeros(200, 1, dtype=torch.long)
    ours = solve_ctmc(sure, x, path=path, steps=steps, generator=seeded()).x
    assert (ours == 2).all()
    if steps > 1:  # the peer asserts that an interval is longer than a step
        peer = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))
        assert torch.equal(
            ours, euler(Sure(), peer, 3, SOURCE).sample(x, 1 / steps, time_grid=torch.tensor([0.0, 1.0]))
        )


@suite.case(f"{SOLVER}::test_sample_with_sym_term")
def tokens_with_jumps_back() -> None:
    path = MixturePath(UniformSource(3), PolynomialSchedule(1.0))
    x = torch.zeros(500, 1, dtype=torch.long)
    ours = solve_ctmc(sure, x, path=path, steps=50, stochasticity=1.0, generator=seeded()).x
    peer = euler(Sure(), MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0)), 3, SOURCE)
    theirs = peer.sample(x, 0.02, time_grid=torch.tensor([0.0, 1.0]), div_free=1.0)
    for end in (ours, theirs):
        assert end.shape == x.shape and ((end >= 0) & (end < 3)).all()
    assert (ours == 2).double().mean() > 0.9


@suite.case(f"{SOLVER}::test_sample_time_grid")
@suite.case(f"{SOLVER}::test_sample_return_intermediate")
def token_path() -> None:
    path, x = MixturePath(UniformSource(3), PolynomialSchedule(1.0)), torch.zeros(300, dtype=torch.long)
    ours = solve_ctmc(sure, x, path=path, steps=10, save=True, generator=seeded())
    peer = euler(Sure(), MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0)), 3, SOURCE)
    theirs = peer.sample(x, step_size=None, time_grid=torch.linspace(0, 1, 11), return_intermediates=True)
    assert ours.path is not None and ours.t is not None and ours.path.shape == theirs.shape == (11, 300)
    agree(ours.t, torch.linspace(0, 1, 11, dtype=torch.float64), 1e-12)
    assert (ours.path[-1] == 2).all() and (theirs[-1] == 2).all()
    # each token has moved with probability t
    agree((ours.path == 2).double().mean(1), ours.t, 0.12)
    agree((ours.path == 2).double().mean(1), (theirs == 2).double().mean(1), 0.15)


def power(t: Any, x: Tensor, cond: Any = None) -> Tensor:
    """A velocity of time alone, `3 t^2`."""
    return x * 0 + 3 * t**2


class Constant(nn.Module):
    """A trainable constant velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t: Any, x: Tensor, cond: Any = None) -> Tensor:
        return x * 0 + self.rate


ODE = "tests/solver/test_ode_solver.py::TestODESolver"
METHODS = {
    "euler": "euler",
    "dopri5": "dopri5",
    "midpoint": "midpoint",
    "heun2": "heun",
    "rk4": "rk4",
    "heun3": "adams3",
}
"""Methods of the peer and ours of the same order."""


def grid(method: str, step: float = 0.001) -> dict[str, Any]:
    return {"method": method, "step_size": None if method == "dopri5" else step, "time_grid": torch.tensor([0.0, 1.0])}


@suite.case(f"{ODE}::test_sample", METHODS)
def constant_velocity(method: str) -> None:
    x, field = torch.zeros(2, dtype=torch.float64), Constant()
    theirs = ODESolver(Wrapped(field)).sample(x_init=x, **grid(method, 0.1))
    with torch.no_grad():
        agree(solve(field, x, solver=METHODS[method], steps=10).x, theirs, 1e-6)


@suite.case(f"{ODE}::test_sample_with_different_methods", METHODS)
def methods(method: str) -> None:
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    theirs = ODESolver(Wrapped(power)).sample(x_init=x, **grid(method))
    ours = solve(power, x, solver=METHODS[method], steps=1000).x
    agree(ours, theirs, 1e-5)
    agree(ours, x + 1, 1e-2)


@suite.case(f"{ODE}::test_gradients", METHODS)
def gradients(method: str) -> None:
    x, field = torch.tensor([1.0, 0.0], dtype=torch.float64), Constant()
    theirs = ODESolver(Wrapped(field)).sample(x_init=x, enable_grad=True, **grid(method, 0.1))
    ours = solve(field, x, solver=METHODS[method], steps=10).x
    (found,), (expected,) = (torch.autograd.grad(end.sum(), field.rate) for end in (ours, theirs))
    agree(found, expected, 1e-5)
    agree(found, 2.0, 1e-5)


@suite.case(f"{ODE}::test_no_gradients")
def no_gradients() -> None:
    field, x = Constant(), torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    theirs = ODESolver(Wrapped(field)).sample(x_init=x, **grid("euler", 0.1))
    ours = ContinuousFlow(field, (2,)).sample((3,), generator=seeded())
    assert not ours.requires_grad and not theirs.requires_grad
    raises(RuntimeError, lambda: ours.sum().backward())


def log_normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(1) - x.shape[1] / 2 * math.log(2 * math.pi)


@suite.case(f"{ODE}::test_compute_likelihood", (True, False))
def likelihood_of_a_shift(exact: bool) -> None:
    x = normal(6, 2).float()  # the peer draws probes in single precision
    backward = {**grid("midpoint", 0.01), "time_grid": torch.tensor([1.0, 0.0])}
    _, theirs = ODESolver(Wrapped(power)).compute_likelihood(
        x_1=x, log_p0=log_normal, exact_divergence=exact, **backward
    )
    flow = ContinuousFlow(power, (2,), "midpoint", 100, "exact" if exact else "hutchinson")
    with torch.no_grad():
        ours = flow.log_prob(x, generator=seeded())
    assert not ours.requires_grad and ours.shape == theirs.shape
    agree(ours, theirs, 1e-5)
    agree(ours, log_normal(x - 1), 1e-4)


@suite.case(f"{ODE}::test_compute_likelihood_gradients_non_zero", (True, False))
def likelihood_gradient(exact: bool) -> None:
    found, expected = torch.zeros(1, 2), torch.zeros(1, 2)
    for x in (found, expected):
        x.requires_grad_()
    backward = {**grid("midpoint", 0.01), "time_grid": torch.tensor([1.0, 0.0])}
    _, theirs = ODESolver(Wrapped(power)).compute_likelihood(
        x_1=expected, log_p0=log_normal, exact_divergence=exact, enable_grad=True, **backward
    )
    theirs.backward()
    flow = ContinuousFlow(power, (2,), "midpoint", 100, "exact" if exact else "hutchinson")
    flow.log_prob(found, generator=seeded()).backward()
    assert found.grad is not None
    agree(found.grad, expected.grad, 1e-5)
    agree(found.grad, 1.0, 1e-3)


@suite.case(f"{ODE}::test_compute_likelihood_exact_divergence")
def likelihood_of_a_constant() -> None:
    field, x = Constant(), torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    start, theirs = ODESolver(Wrapped(field)).compute_likelihood(
        x_1=x,
        log_p0=log_normal,
        exact_divergence=True,
        enable_grad=True,
        **{**grid("euler", 0.1), "time_grid": torch.tensor([1.0, 0.0])},
    )
    flow = ContinuousFlow(field, (2,), "euler", 10, "exact")
    ours = flow.log_prob(x)
    agree(ours, theirs)
    agree(ours, log_normal(x - 1))
    agree(solve(field, x, t0=1.0, t1=0.0, solver="euler", steps=10).x, start)
    agree(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(theirs.sum(), x)[0])


@suite.case("tests/utils/test_utils.py::TestUtils::test_unsqueeze_to_match_suffix")
@suite.case("tests/utils/test_utils.py::TestUtils::test_expand_tensor_like")
def a_time_per_row_acts_along_the_batch() -> None:
    x1, t = normal(3, 4, 5), times(3)
    agree(CondOT().sample(torch.zeros_like(x1), x1, t).x_t, unsqueeze_to_match(source=t, target=x1) * x1)


@suite.case("tests/utils/test_utils.py::TestUtils::test_gradient")
def gradient_of_a_square() -> None:
    x = normal(6, 3).requires_grad_()
    theirs = gradient(x**2, x, grad_outputs=torch.ones_like(x))
    agree(theirs, 2 * x)
    agree(divergence(lambda t, x, cond: x**2, 0.0, x, method="exact")[1], theirs.sum(1))


def checkerboard(n: int) -> Tensor:
    """Points of the dark squares of a 4 x 4 board."""
    x = torch.rand(n, dtype=torch.float64) * 4 - 2
    y = torch.rand(n, dtype=torch.float64) - torch.randint(2, (n,)) * 2 + x.floor() % 2
    return torch.stack([x, y], 1) / 0.45


def network(seed: int = 0) -> MLPField:
    return MLPField(2, (32, 32), generator=seeded(seed)).double()


@cache
def trained() -> MLPField:
    """A field trained on the checkerboard by the objective of this library."""
    field, generator = network(), seeded()
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        cfm_loss(field, CondOT(), checkerboard(256), generator=generator).backward()
        optimizer.step()
    return field.requires_grad_(False)


CONTINUOUS = "examples/2d_flow_matching.ipynb"


@suite.case(f"{CONTINUOUS}: training", PATHS)
def training(name: str) -> None:
    """The losses and the weights of a few steps are those of the peer's loop."""
    scheduler, path = PATHS[name]()
    peer, fields = AffineProbPath(scheduler), (network(), network())
    optimizers = [torch.optim.Adam(field.parameters(), lr=1e-3) for field in fields]
    for _ in range(25):
        x1, x0, t = checkerboard(128), normal(128, 2), times(128)
        point = peer.sample(t=t, x_0=x0, x_1=x1)
        losses = (
            cfm_loss(fields[0], path, x1, x0, time=t),
            (fields[1](point.t, point.x_t) - point.dx_t).square().mean(),
        )
        agree(losses[0], losses[1], 1e-8)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(fields[0].parameters(), fields[1].parameters(), strict=True):
        agree(a, b, 1e-8)


@suite.case(f"{CONTINUOUS}: samples at output times", ("midpoint", "euler", "heun2", "dopri5"))
def samples_at_times(method: str) -> None:
    x, at = normal(200, 2), torch.linspace(0, 1, 11, dtype=torch.float64)
    options = {**grid(method, 0.05), "time_grid": at, "return_intermediates": True}
    tight: Any = {"rtol": 1e-7, "atol": 1e-7}
    theirs = ODESolver(Wrapped(trained())).sample(x_init=x, **options, **tight)
    ours = solve(trained(), x, times=at, solver=METHODS[method], steps=20, **tight).path
    assert ours is not None
    agree(ours, theirs, 1e-4 if method == "dopri5" else 1e-9)


@suite.case(f"{CONTINUOUS}: samples on a grid of ten times")
def samples_between_steps() -> None:
    x, at = normal(200, 2), torch.linspace(0, 1, 10, dtype=torch.float64)
    options = {**grid("midpoint", 0.05), "time_grid": at, "return_intermediates": True}
    theirs = ODESolver(Wrapped(trained())).sample(x_init=x, **options)
    ours = solve(trained(), x, times=at, steps=20).path
    assert ours is not None
    agree(ours, theirs, 0.05)  # the peer interpolates between its steps linearly


@suite.case(f"{CONTINUOUS}: steps on given nodes", ("euler", "midpoint", "heun2"))
def given_nodes(method: str) -> None:
    x, nodes = normal(200, 2), torch.tensor([0.0, 0.05, 0.3, 0.75, 1.0], dtype=torch.float64)
    theirs = ODESolver(Wrapped(trained())).sample(x_init=x, step_size=None, method=method, time_grid=nodes)
    agree(solve(trained(), x, solver=METHODS[method], grid=Nodes(nodes), steps=4).x, theirs, 1e-9)


def theirs(field: MLPField, x: Tensor, method: str, exact: bool = True) -> Tensor:
    """Return log-densities by the peer, whose probes are in single precision."""
    if not exact:
        field, x = copy.deepcopy(field).float(), x.float()
    options = {**grid(method, 0.01), "time_grid": torch.tensor([1.0, 0.0])}
    _, log_p = ODESolver(Wrapped(field)).compute_likelihood(
        x_1=x, log_p0=log_normal, exact_divergence=exact, rtol=1e-8, atol=1e-8, **options
    )
    found: Tensor = log_p.detach()
    return found


@suite.case(f"{CONTINUOUS}: the likelihood on a grid", ("exact", "hutchinson"), ("midpoint", "dopri5", "adams"))
def likelihood(divergence: str, solver: str) -> None:
    side = torch.linspace(-5, 5, 6, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    tight: Any = {"rtol": 1e-7, "atol": 1e-7}
    if divergence == "exact":
        method = "midpoint" if solver == "midpoint" else "dopri5"
        flow = ContinuousFlow(trained(), (2,), solver, 200, **tight)
        agree(flow.log_prob(x), theirs(trained(), x, method), 1e-2 if method == "midpoint" else 1e-3)
    else:
        draws = torch.stack([theirs(trained(), x, "midpoint", exact=False).double() for _ in range(20)])
        flow = ContinuousFlow(trained(), (2,), solver, 60, "hutchinson", probes=20, **tight)
        ours = flow.estimate(x, generator=seeded())
        error = (ours.standard_error.square() + draws.var(0) / 20).sqrt()
        assert ((ours.log_prob - draws.mean(0)).abs() < 5 * error + 0.02).all()


MAXIMUM = "examples/2d_cnf_maximum_likelihood.ipynb"


@suite.case(f"{MAXIMUM}: the loss and its gradient", ("rk4", "dopri5", "adams"))
def maximum_likelihood(solver: str) -> None:
    """The peer detaches its rates, so its gradient is a finite difference of its loss."""
    field, x = network(1), checkerboard(24)
    directions = [torch.randn_like(parameter) for parameter in field.parameters()]

    def loss(shift: float) -> Tensor:
        moved = copy.deepcopy(field)
        with torch.no_grad():
            for parameter, direction in zip(moved.parameters(), directions, strict=True):
                parameter.add_(shift * direction)
        return -theirs(moved, x, "dopri5").mean()

    ours = -ContinuousFlow(field, (2,), solver, 60, rtol=1e-8, atol=1e-8).log_prob(x).mean()
    agree(ours, loss(0.0), 1e-5)
    gradients = torch.autograd.grad(ours, list(field.parameters()))
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert isinstance(slope, Tensor)
    agree(slope, (loss(1e-3) - loss(-1e-3)) / 2e-3, 1e-3)


@suite.case(f"{MAXIMUM}: the Hutchinson estimate of the loss")
def maximum_likelihood_by_probes() -> None:
    field, x = network(1), checkerboard(24)
    draws = torch.stack([theirs(field, x, "midpoint", exact=False).double() for _ in range(30)])
    with torch.no_grad():
        ours = ContinuousFlow(field, (2,), "rk4", 50, "hutchinson", probes=30).estimate(x, generator=seeded())
    error = (ours.standard_error.square() + draws.var(0) / 30).sqrt()
    assert ((ours.log_prob - draws.mean(0)).abs() < 5 * error + 0.01).all()


@suite.case(f"{MAXIMUM}: samples", ("dopri5", "midpoint"))
def maximum_likelihood_samples(method: str) -> None:
    x, field = normal(200, 2), network(1)
    tight: Any = {"rtol": 1e-7, "atol": 1e-7}
    theirs = ODESolver(Wrapped(field)).sample(x_init=x, **grid(method, 0.02), **tight)
    with torch.no_grad():
        ours = solve(field, x, solver=METHODS[method], steps=50, **tight).x
    agree(ours, theirs, 1e-5 if method == "dopri5" else 1e-9)


@suite.case("examples/standalone_flow_matching.ipynb: eight steps by hand")
def steps_by_hand() -> None:
    field, x = trained(), normal(200, 2)
    end, at = solve(field, x, steps=8).x, torch.linspace(0, 1, 9).double()
    theirs = ODESolver(Wrapped(field)).sample(x_init=x, step_size=None, method="midpoint", time_grid=at)
    agree(end, theirs, 1e-9)
    for start, stop in itertools.pairwise(at):
        half = x + (stop - start) / 2 * field(start, x)
        x = x + (stop - start) * field((start + stop) / 2, half)
    agree(end, x, 1e-9)


class Tokens(nn.Module):
    """A denoiser of two tokens, as a module of the peer and, by `ours`, as one of this library."""

    def __init__(self, states: int, vocabulary: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(states, 16)
        self.layers = nn.Sequential(nn.Linear(33, 32), nn.SiLU(), nn.Linear(32, 2 * vocabulary))
        self.double()

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        features = torch.cat([self.embedding(x).flatten(1), t[:, None]], 1)
        logits: Tensor = self.layers(features).reshape(len(x), 2, self.vocabulary)
        return logits

    def ours(self, t: Any, x: Tensor, cond: Any = None) -> Logits:
        return Logits(self(x, t))


class Softmax(ModelWrapper):  # type: ignore[misc]
    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return torch.softmax(self.model(x, t), -1)


TOKENS = "examples/2d_discrete_flow_matching.ipynb"
VOCABULARY = 8


def token_data(n: int) -> Tensor:
    first = torch.randint(VOCABULARY, (n,))
    return torch.stack([first, (first + torch.randint(2, (n,))) % VOCABULARY], 1)


def sources() -> dict[str, Source]:
    return {"uniform": UniformSource(VOCABULARY), "mask": MaskSource(VOCABULARY)}


@suite.case(f"{TOKENS}: the generalised KL loss", sources(), (1.0, 2.0))
def token_loss(kind: str, degree: float) -> None:
    """The same points, so the same loss; on a masked path a known token counts as zero in ours."""
    source = sources()[kind]
    net, x1, t = Tokens(source.states, VOCABULARY), token_data(64), times(64)
    path = MixturePath(source, PolynomialSchedule(degree))
    x_t = path.sample(source.sample(x1.shape, seeded()), x1, t, seeded(1))
    peer = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=degree))
    loss = MixturePathGeneralizedKL(path=peer, reduction="none")
    logits = net(x_t, t)
    if kind == "mask":  # the peer's network also predicts the mask
        logits = torch.cat([logits, torch.full((64, 2, 1), -1e9, dtype=torch.float64)], -1)
    theirs = loss(logits=logits, x_1=x1, x_t=x_t, t=t).masked_fill(source.is_data(x_t), 0.0)
    ours = path.rate(t)[:, None] * jump_divergence(net.ours(t, x_t), path, x_t, x1)
    agree(ours, theirs, 1e-8)
    whole = generalised_kl_loss(_fixed(net, x_t), path, x1, x_t, time=t, generator=seeded(1))
    assert whole.isfinite()


def _fixed(net: Tokens, x_t: Tensor) -> Callable[..., Logits]:
    return lambda t, x, cond=None: net.ours(t, x_t)


@suite.case(f"{TOKENS}: training", sources())
def token_training(kind: str) -> None:
    source = sources()[kind]
    path, peer = MixturePath(source, PolynomialSchedule(2.0)), MixtureDiscreteProbPath(PolynomialConvexScheduler(n=2.0))
    nets = (Tokens(source.states, VOCABULARY), Tokens(source.states, VOCABULARY))
    optimizers = [torch.optim.Adam(net.parameters(), lr=3e-3) for net in nets]
    loss = MixturePathGeneralizedKL(path=peer, reduction="none")
    for step in range(20):
        x1, t = token_data(64), times(64)
        x0 = source.sample(x1.shape, seeded(step))
        ours = generalised_kl_loss(nets[0].ours, path, x1, x0, time=t, generator=seeded(step))
        x_t = path.sample(x0, x1, t, seeded(step))
        logits = nets[1](x_t, t)
        if kind == "mask":
            logits = torch.cat([logits, torch.full((64, 2, 1), -1e9, dtype=torch.float64)], -1)
        theirs = loss(logits=logits, x_1=x1, x_t=x_t, t=t).masked_fill(source.is_data(x_t), 0.0).mean()
        agree(ours, theirs, 1e-7)
        for optimizer, value in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        agree(a, b, 1e-6)


@cache
def trained_tokens() -> Tokens:
    net, path, generator = Tokens(VOCABULARY, VOCABULARY), MixturePath(UniformSource(VOCABULARY)), seeded()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy_loss(net.ours, path, token_data(256), generator=generator).backward()
        optimizer.step()
    return net.requires_grad_(False)


def shares(x: Tensor) -> Tensor:
    counts = torch.bincount(x[:, 0] * VOCABULARY + x[:, 1], minlength=VOCABULARY**2)
    return counts.double() / len(x)


@suite.case(f"{TOKENS}: the law of the samples")
@suite.case("examples/standalone_discrete_flow_matching.ipynb: the law of the samples")
def token_samples() -> None:
    net, path = trained_tokens(), MixturePath(UniformSource(VOCABULARY))
    x = torch.randint(VOCABULARY, (10_000, 2))
    peer = euler(Softmax(net), MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0)), VOCABULARY)
    theirs = peer.sample(x_init=x, step_size=1 / 50, time_grid=torch.tensor([0.0, 1 - 1e-3]))
    ours = solve_ctmc(net.ours, x, path=path, steps=50, generator=seeded()).x
    distance = (shares(ours) - shares(theirs)).abs().sum() / 2
    assert distance < 0.05, float(distance)  # two samples of one law differ by about 0.03


@suite.case(f"{TOKENS}: the evidence bound")
def evidence_bound() -> None:
    net, path = trained_tokens(), MixturePath(UniformSource(VOCABULARY))
    flow = TokenFlow(net.ours, path, (2,))
    x1 = token_data(12)
    ours = flow.elbo(x1, samples=2000, generator=seeded())
    peer = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))
    loss = MixturePathGeneralizedKL(path=peer, reduction="none")
    draws, rows = 4000, x1.repeat(4000, 1)
    t = (torch.rand(1) + torch.arange(draws) / draws) % 1 * (1 - 1e-4)  # stratified, as the peer's
    t = t.double().repeat_interleave(12)
    x_t = peer.sample(t=t, x_0=torch.randint_like(rows, VOCABULARY), x_1=rows).x_t
    terms = -loss(logits=net(x_t, t), x_1=rows, x_t=x_t, t=t).sum(1).reshape(draws, 12)
    error = (ours.standard_error.square() + terms.var(0) / draws).sqrt()
    assert ((ours.log_prob - terms.mean(0)).abs() < 5 * error + 0.05).all()


MANIFOLDS = "flows on manifolds are not offered"
suite.not_applicable(
    MANIFOLDS,
    "tests/path/test_path.py::TestGeodesicProbPath::test_sphere",
    "tests/path/test_path.py::TestGeodesicProbPath::test_torus",
    *(
        f"tests/solver/test_riemannian_ode_solver.py::TestRiemannianODESolver::test_{name}"
        for name in (
            *("init", "sample_euler", "sample_midpoint", "sample_rk4", "zero_velocity_euler", "zero_velocity_midpoint"),
            *("zero_velocity_rk4", "sample_euler_step_size_none", "sample_euler_verbose"),
            *("sample_return_intermediates_euler", "model_extras", "gradient", "no_gradient"),
        )
    ),
    "examples/2d_riemannian_flow_matching_flat_torus.ipynb",
    "examples/2d_riemannian_flow_matching_sphere.ipynb",
)
suite.not_applicable(
    "a solve is a function: there is no object whose attributes could be read",
    f"{SOLVER}::test_init",
    f"{SOLVER}::test_init_p_none",
)
suite.not_applicable(
    "a helper of the peer about the last dimensions",
    "tests/utils/test_utils.py::TestUtils::test_unsqueeze_to_match_prefix",
)
suite.not_applicable(
    "needs downloads and a graphics card",
    "examples/image/train.py",
    "examples/image/load_model_checkpoint.ipynb",
    "examples/text/train.py",
)
