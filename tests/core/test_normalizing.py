"""Laws of flows in discrete time, over a list of all architectures, in float64."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from flowmatch_core.normalizing import (
    MADE,
    MAF,
    NAF,
    NSF,
    Architecture,
    DiscreteTimeFlow,
    Glow,
    Planar,
    RealNVP,
    Residual,
)
from flowmatch_core.normalizing.planar import PlanarTransform
from tests.support.checks import close
from tests.support.random import generator, randn

KINDS: list[Architecture] = [
    Planar(transforms=4, hidden=(16,)),
    Residual(blocks=3, hidden=(16, 16)),
    RealNVP(transforms=4, hidden=(16,)),
    Glow(steps=3, hidden=(16,)),
    MADE(hidden=(16,)),
    MAF(transforms=2, hidden=(16, 16)),
    NSF(transforms=2, hidden=(16,), bins=5),
    NAF(transforms=2, hidden=(16,), signal=4, monotonic=(8,)),
]
LOC = torch.tensor([3.0, -40.0], dtype=torch.float64)
SCALE = torch.tensor([0.5, 7.0], dtype=torch.float64)

every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)


def make(kind: Architecture, dim: int = 2, cond_dim: int = 0, loc: Tensor | None = None, scale: Tensor | None = None):
    """A flow in float64 whose weights are larger than at first, so that it is far from a linear map."""
    flow = DiscreteTimeFlow(kind, dim, cond_dim, loc=loc, scale=scale, generator=generator(1)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.2).add_(torch.randn(parameter.shape, generator=generator(2)) * 0.05)
    return flow


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of each row, by autograd."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = function(x)
        return torch.stack([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])], 1)


@every
@pytest.mark.parametrize(("dim", "cond_dim"), [(1, 0), (2, 0), (3, 2)])
def test_a_sample_is_mapped_back_to_its_noise(kind: Architecture, dim: int, cond_dim: int) -> None:
    flow = make(kind, dim, cond_dim, scale=torch.tensor(2.0).double())
    cond = randn(50, cond_dim) if cond_dim else None
    x = flow.sample((50,) if cond is None else (), cond, generator(3))
    noise = torch.randn(50, dim, generator=generator(3), dtype=torch.float64)
    with torch.no_grad():
        close(flow.transform(cond)(x / 2), noise, 1e-8)
        back = flow.transform(cond).inv(flow.transform(cond)(noise))
    close(back, noise, 1e-8)
    assert (x / 2 - noise).abs().max() > 0.05


@every
@pytest.mark.parametrize("cond_dim", [0, 2])
def test_density_is_that_of_the_noise_times_the_autograd_jacobian(kind: Architecture, cond_dim: int) -> None:
    flow = make(kind, 3, cond_dim)
    x, cond = randn(20, 3), randn(20, cond_dim, seed=1) if cond_dim else None
    z = flow.transform(cond)(x)
    volume = torch.linalg.slogdet(jacobian(flow.transform(cond), x)).logabsdet
    close(flow.log_prob(x, cond), Normal(torch.zeros(3).double(), 1).log_prob(z).sum(1) + volume, tolerance=1e-09)
    assert volume.std() > 1e-3


@every
def test_density_integrates_to_one(kind: Architecture) -> None:
    flow = make(kind, loc=LOC, scale=SCALE)
    x = flow.sample((2000,), generator=generator())
    low, high = x.amin(0) - 3 * x.std(0), x.amax(0) + 3 * x.std(0)
    n = 301
    sides = [torch.linspace(float(a), float(b), n, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(*sides)).exp().reshape(n, n)
    total = torch.trapezoid(torch.trapezoid(density, sides[1]), sides[0])
    assert float(total) == pytest.approx(1, abs=3e-3)


@every
def test_samples_follow_the_density(kind: Architecture) -> None:
    """The mean of a smooth function by sampling, and by the density on a grid."""
    flow, n = make(kind), 5000
    x = flow.sample((n,), generator=generator())
    low, high = x.amin(0) - 3 * x.std(0), x.amax(0) + 3 * x.std(0)
    sides = [torch.linspace(float(a), float(b), 201, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*sides)
    with torch.no_grad():
        density = flow.log_prob(grid).exp()
    for function in (lambda x: torch.tanh(x[:, 0]), lambda x: torch.cos(x[:, 0] * x[:, 1]), lambda x: x[:, 1].sin()):
        values = function((x - x.mean(0)) / x.std(0))
        truth = (density * function((grid - x.mean(0)) / x.std(0))).sum() / density.sum()
        assert abs(float(values.mean() - truth)) < 5 * float(values.std()) / math.sqrt(n) + 2e-3


@every
def test_standardisation_shifts_and_scales_the_density(kind: Architecture) -> None:
    plain, moved, x = make(kind), make(kind, loc=LOC, scale=SCALE), randn(10, 2)
    close(moved.log_prob(x * SCALE + LOC), plain.log_prob(x) - SCALE.log().sum(), tolerance=1e-09)
    close(
        moved.sample((5,), generator=generator()),
        plain.sample((5,), generator=generator()) * SCALE + LOC,
        tolerance=1e-09,
    )
    assert {"loc", "scale"} <= set(moved.state_dict())
    single = make(kind, scale=torch.tensor(3.0).double())
    close(single.log_prob(3 * x), plain.log_prob(x) - 2 * math.log(3), tolerance=1e-09)


@every
def test_rows_and_conditions_do_not_mix(kind: Architecture) -> None:
    flow, x, cond = make(kind, 2, 2), randn(4, 3, 2), randn(3, 2, seed=1)
    whole = flow.log_prob(x, cond)
    assert whole.shape == (4, 3)
    close(whole[1, 2], flow.log_prob(x[1, 2], cond[2]), tolerance=1e-09)
    assert (flow.log_prob(x, cond.flip(0)) - whole).abs().max() > 1e-3
    samples = flow.sample((4,), cond, generator(3))
    noise = torch.randn(12, 2, generator=generator(3), dtype=torch.float64).reshape(4, 3, 2)
    with torch.no_grad():
        close(flow.transform(cond[2:].expand(4, 2)).inv(noise[:, 2]), samples[:, 2], tolerance=1e-09)


@every
def test_gradients_reach_every_parameter_from_density_and_from_samples(kind: Architecture) -> None:
    for mode in (True, False):
        flow = make(kind, 2, 2).train(mode)
        x, cond = randn(64, 2).requires_grad_(), randn(64, 2, seed=1).requires_grad_()
        for value in (flow.log_prob(x, cond).mean(), flow.rsample((), cond, generator()).square().mean()):
            names, parameters = zip(*flow.named_parameters(), strict=True)
            gradients = torch.autograd.grad(value, (*parameters, cond), allow_unused=True)
            for name, gradient in zip((*names, "cond"), gradients, strict=True):
                assert gradient is not None, name
                assert gradient.isfinite().all(), name
                assert gradient.abs().max() > 0, name


@every
def test_gradients_of_samples_are_those_of_finite_differences(kind: Architecture) -> None:
    flow = make(kind, 2, 2)
    cond = randn(4, 2, seed=1)
    direction = randn(4, 2, seed=5)
    moving = cond.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow.rsample((), moving, generator()).sum(), moving)
    h = 1e-4
    ahead, behind = (flow.sample((), cond + s * h * direction, generator()).sum() for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-4, abs=1e-6)


@every
def test_gradients_of_samples_and_densities_reach_the_weights_rightly(kind: Architecture) -> None:
    """By finite differences along a random direction of each parameter. Weights that shape one dimension's map
    also move the dimensions after it: neither way may be lost, nor counted twice."""
    flow, h, x = make(kind), 1e-4, randn(4, 2, seed=6)
    for value in (
        lambda flow: flow.rsample((4,), generator=generator()).sum(),
        lambda flow: flow.log_prob(x).sum(),
    ):
        for k, gradient in enumerate(torch.autograd.grad(value(flow), tuple(flow.parameters()))):
            direction, values = randn(*gradient.shape, seed=5), []
            for sign in (1, -1):
                moved = copy.deepcopy(flow)
                list(moved.parameters())[k].data += sign * h * direction
                with torch.no_grad():
                    values.append(value(moved).item())
            found = float((gradient * direction).sum())
            assert found == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-5)


@every
def test_training_by_maximum_likelihood_approaches_the_entropy(kind: Architecture) -> None:
    """Correlated Gaussian data far from the origin: the negative log-likelihood is bounded by the entropy."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    law = torch.distributions.MultivariateNormal(torch.tensor([100.0, 0.0]), covariance)
    g, root = generator(), torch.linalg.cholesky(covariance)
    data = torch.randn(2048, 2, generator=g) @ root.T + law.mean
    flow = DiscreteTimeFlow(kind, 2, loc=data.mean(0), scale=data.std(0), generator=generator(1))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
        optimizer.zero_grad()
        batch = data[torch.randint(len(data), (256,), generator=g)]
        (-flow.log_prob(batch).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        nll = -float(flow.log_prob(data).mean())
    best = -float(law.log_prob(data).mean())
    independent = best - 0.5 * float(torch.linalg.slogdet(covariance).logabsdet)  # without the correlation
    assert nll - best < 0.3 * (independent - best)


@every
def test_weights_and_samples_depend_on_the_generator_alone(kind: Architecture) -> None:
    state = torch.get_rng_state()
    a, b, c = (DiscreteTimeFlow(kind, 3, generator=generator(seed)) for seed in (1, 1, 2))
    assert "DiscreteTimeFlow" in repr(a)
    x = a.sample((7,), generator=generator())
    a.log_prob(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, b.sample((7,), generator=generator()))
    assert not torch.equal(x, c.sample((7,), generator=generator()))
    assert x.dtype == torch.float32
    b.load_state_dict(c.state_dict())
    assert torch.equal(b.sample((7,), generator=generator()), c.sample((7,), generator=generator()))
    assert len(a.sample((0,))) == 0
    assert a.log_prob(x[:0]).shape == (0,)


def test_building_a_flow_leaves_the_validation_of_torch_on() -> None:
    """The import of zuko alone switches it off for every distribution in the process."""
    code = """
from torch.distributions import Distribution
from flowmatch_core.normalizing import MADE, DiscreteTimeFlow
DiscreteTimeFlow(MADE(), 2)
print(Distribution._validate_args)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "True\n"


@every
def test_every_dimension_depends_on_every_other(kind: Architecture) -> None:
    """But for MADE, whose single layer looks at earlier dimensions only."""
    flow = make(kind, 3)
    entries = jacobian(flow.transform(None), randn(20, 3)).abs().amax(0) > 0
    assert torch.equal(entries, torch.ones(3, 3).bool().tril() if isinstance(kind, MADE) else torch.ones(3, 3).bool())


def test_glow_mixes_by_permutations_that_the_generator_draws() -> None:
    flow = DiscreteTimeFlow(Glow(steps=2), 20, generator=generator())
    orders = [buffer for buffer in flow.transform.buffers() if buffer.dtype == torch.long]
    assert len(orders) == 2
    for order in orders:
        assert order.sort().values.tolist() == list(range(20))
        assert order.tolist() != list(range(20))


# --- planar and residual, which are not zuko's ------------------------------------------------------------------------


@pytest.mark.parametrize("steep", [-0.999, -0.5, 0.0, 3.0, 50.0])
def test_planar_map_is_the_formula_and_its_inverse_is_exact(steep: float) -> None:
    w, b, z = randn(3, seed=1), randn(1, seed=2), 3 * randn(100, 3)
    u = steep * w / w.square().sum() + torch.linalg.cross(w, randn(3, seed=3))
    planar = PlanarTransform(u, w, b)
    x = planar(z)
    close(x, torch.stack([row + u * math.tanh(float(w @ row + b)) for row in z]), tolerance=1e-09)
    close(planar(planar.inv(x)), x, 1e-11)
    if steep > -0.9:
        close(planar.inv(x), z, 1e-11)
    volume = torch.linalg.slogdet(torch.eye(3) + jacobian(lambda p: planar(p) - p, z)).logabsdet
    close(planar.log_abs_det_jacobian(z, x), volume, tolerance=1e-09)


@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_planar_layers_and_residual_blocks_stay_invertible_whatever_their_weights(factor: float) -> None:
    for kind in (Planar(transforms=1), Residual(blocks=1, hidden=(8, 8))):
        flow = make(kind, 3)
        with torch.no_grad():
            for name, parameter in flow.named_parameters():
                parameter.mul_(1 if name.endswith("bias") else factor)
            x = randn(200, 3)
            matrices = jacobian(flow.transform(None), x)
            assert (torch.linalg.det(matrices) > 0).all()
            close(flow.transform(None)(flow.transform(None).inv(x)), x, 1e-6)
        if isinstance(kind, Residual):
            norms = torch.linalg.matrix_norm(matrices - torch.eye(3), ord=2)
            assert norms.max() <= 0.9


def test_planar_layer_bends_a_shift_that_would_fold_space() -> None:
    flow = make(Planar(transforms=1))
    (values,) = flow.parameters()
    values.data = torch.tensor([-6.0, 3.0, 4.0, -2.0, 0.0], dtype=torch.float64)  # u, w, b with w.u = -30
    z = randn(200, 2)
    with torch.no_grad():
        x = flow.transform(None).inv(z)
        assert (flow.transform(None).inv.log_abs_det_jacobian(z, x) < 1).all()
        close(flow.transform(None).inv(flow.transform(None)(z)), z, 1e-9)


def test_residual_blocks_use_their_bound() -> None:
    """One neuron of a large weight: its slope is the bound where the activation is steepest."""
    block = make(Residual(blocks=1, hidden=(1,), lipschitz=0.7), 1)
    with torch.no_grad():
        for parameter in block.transform.transforms[0].layers.parameters():
            parameter.mul_(1e3 if parameter.ndim > 1 else 0)
    slope = jacobian(block.transform(None), torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]) - 1
    assert 0.699 < float(slope.abs().max()) <= 0.7


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: DiscreteTimeFlow(MAF(), 0), r"event_dim is 0, but should be at least 1\."),
        (lambda: DiscreteTimeFlow(MAF(), 2, -1), r"cond_dim is -1, but should be at least 0\."),
        (lambda: DiscreteTimeFlow(MAF(), 2, scale=torch.tensor(0.0)), r"scale holds values that are not positive"),
        (
            lambda: DiscreteTimeFlow(MAF(), 2, loc=torch.zeros(3)),
            r"loc has shape \(3,\), but should broadcast to shape",
        ),
        (lambda: DiscreteTimeFlow(MAF(), 2).log_prob(torch.zeros(4, 3)), r"value has shape \(4, 3\), but should be of"),
        (lambda: DiscreteTimeFlow(MAF(), 2, 1).sample((3,)), r"cond has shape None, but should be a tensor that"),
        (
            lambda: DiscreteTimeFlow(MAF(), 2).log_prob(torch.zeros(4, 2), torch.zeros(4, 1)),
            r"cond has shape \(4, 1\), but should be None\.",
        ),
        (
            lambda: DiscreteTimeFlow(MAF(), 2, 2).log_prob(torch.zeros(4, 2), torch.zeros(3, 2)),
            r"cond has a batch of shape \(3,\), but should have one that broadcasts with \(4,\) of value;",
        ),
        (lambda: MAF(transforms=0), r"transforms is 0, but should be at least 1\."),
        (lambda: RealNVP(hidden=()), r"hidden is \(\), but should hold at least one positive width\."),
        (lambda: Residual(lipschitz=1.0), r"lipschitz is 1\.0, but should be above 0 and below 1\."),
        (lambda: NSF(bins=1), r"bins is 1, but should be at least 2\."),
        (lambda: NAF(monotonic=(8, 7)), r"monotonic is \(8, 7\), but should hold at least one width, all even\."),
        (lambda: NAF(signal=0), r"signal is 0, but should be at least 1\."),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
