"""Cases of torchsde: solvers of stochastic differential equations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

from flowmatch_core import CondOT, GaussianMixture, solve_sde
from flowmatch_core.solvers import Constant
from peers.cases import Suite, agree, seeded

suite = Suite("torchsde", "google-research/torchsde", "eb3a00e")

START, END = 0.1, 0.9
"""The interval: the drift of the peer's form is infinite at 0 and 1."""


def law() -> GaussianMixture:
    means = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.full((2, 1, 1), 0.09, dtype=torch.float64))


def start(n: int) -> Tensor:
    """Draws of the marginal at `START`."""
    noise = torch.randn(n, 1, dtype=torch.float64)
    return START * law().sample(n) + (1 - START) * noise


class Flow(nn.Module):
    """The SDE with the marginals of the flow, in the peer's form."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = w

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        velocity = law().velocity(float(t), y)
        score = CondOT().convert(velocity, float(t), y, source="velocity", target="score")
        drift: Tensor = velocity + self.w**2 / 2 * score
        return drift

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self.w)


def simulate(w: float, n: int, steps: int, solver: str) -> tuple[Tensor, Tensor]:
    """Return ends by this library and by the peer, from the same starts."""
    x = start(n)
    options: Any = {"path": CondOT(), "diffusion": Constant(w), "t0": START, "t1": END, "generator": seeded()}
    ours = solve_sde(law().velocity_field(), x, steps=steps, solver=solver, **options).x
    times = torch.tensor([START, END], dtype=torch.float64)
    theirs = torchsde.sdeint(Flow(w), x, times, dt=(END - START) / steps, method="euler")[-1]
    return ours, theirs


@suite.case("diagnostics/ito_diagonal.py: the law of the ends", ("euler_maruyama", "heun"), (0.3, 1.0))
def ends(solver: str, w: float) -> None:
    ours, theirs = simulate(w, 20_000, 100, solver)
    x = END * law().sample(20_000, generator=seeded()) + (1 - END) * torch.randn(20_000, 1).double()
    for power in (1, 2, 3):
        expected = x.pow(power).mean()
        error = 5 * float(x.pow(power).std()) * math.sqrt(2 / 20_000) + 0.03
        for found in (ours, theirs):
            assert abs(float(found.pow(power).mean() - expected)) < error


@suite.case("diagnostics/ito_diagonal.py: no diffusion, the same path", (50, 200))
def without_noise(steps: int) -> None:
    ours, theirs = simulate(0.0, 100, steps, "euler_maruyama")
    agree(ours, theirs, 1e-8)  # both are Euler's method on the straight path


@suite.case("tests/test_sdeint.py::test_reversibility")
def there_and_back() -> None:
    """The law comes back under the SDE of the flow backward in time."""
    velocity = law().velocity_field()

    def score(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        return CondOT().convert(velocity(t, x, None), t, x, source="velocity", target="score")

    x = start(20_000)
    there = simulate(0.5, 20_000, 100, "euler_maruyama")[0]
    options: Any = {"score": score, "diffusion": Constant(0.5), "t0": END, "t1": START, "generator": seeded(1)}
    back = solve_sde(velocity, there, steps=100, **options).x
    for power in (1, 2):
        assert abs(float(back.pow(power).mean() - x.pow(power).mean())) < 0.06


@suite.case("tests/test_sdeint.py::test_sdeint_run_shape_method: output times", ("euler_maruyama", "heun"))
def saved_path(solver: str) -> None:
    x = start(10)
    options: Any = {"path": CondOT(), "t0": START, "t1": END, "steps": 8, "save": True, "generator": seeded()}
    ours = solve_sde(law().velocity_field(), x, solver=solver, diffusion=Constant(0.5), **options)
    times = torch.linspace(START, END, 9, dtype=torch.float64)
    theirs = torchsde.sdeint(Flow(0.5), x, times, dt=0.1, method="euler")
    assert ours.path is not None and ours.t is not None and ours.path.shape == theirs.shape
    agree(ours.t, times, 1e-9)
    assert torch.equal(ours.path[0], x) and torch.equal(ours.path[-1], ours.x)


suite.not_applicable(
    "noise is diagonal and the same for every entry, in Ito's form",
    "tests/test_sdeint.py::test_specialised_functions",
    "diagnostics/ito_additive.py",
    "diagnostics/ito_scalar.py",
    "diagnostics/ito_general.py",
    *(f"diagnostics/stratonovich_{kind}.py" for kind in ("additive", "diagonal", "scalar", "general")),
)
suite.not_applicable(
    "no divergence between two path laws is integrated",
    "tests/test_sdeint.py::test_rename_methods",
    "tests/test_sdeint.py::test_rename_methods_logqp",
    "tests/test_sdeint.py::test_sdeint_dependencies",
    "examples/latent_sde.py",
    "examples/latent_sde_lorenz.py",
)
suite.not_applicable(
    "the gradient of a simulation is that of its steps",
    "tests/test_adjoint.py::test_against_numerical",
    "tests/test_adjoint.py::test_against_sdeint",
    "tests/test_adjoint.py::test_basic",
)
suite.not_applicable(
    "Brownian paths are not objects: the generator gives the increments",
    *(
        f"tests/test_brownian_interval.py::{name}"
        for name in (
            *("test_shape", "test_determinism_simple", "test_determinism_large", "test_normality_simple"),
            *("test_normality_conditional", "test_consistency", "test_entropy_determinism"),
        )
    ),
    *(
        f"tests/test_brownian_{kind}.py::{name}"
        for kind in ("path", "tree")
        for name in ("test_basic", "test_determinism", "test_normality")
    ),
)
suite.not_applicable("needs downloads and a graphics card", "examples/cont_ddpm.py")
suite.not_applicable("a generative adversarial network of paths", "examples/sde_gan.py")
