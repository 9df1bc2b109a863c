"""Cases of torchcfm: conditional flow matching, optimal transport and Schrödinger bridges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch
import torchdiffeq
import torchsde
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
)
from torchcfm.models import MLP
from torchcfm.models.unet import UNetModel
from torchcfm.optimal_transport import OTPlanSampler, wasserstein

from flowmatch_core import (
    AffinePath,
    BrownianBridge,
    CondOT,
    ContinuousFlow,
    Cosine,
    CustomPath,
    FiLMField,
    Independent,
    MinibatchOT,
    SchrodingerBridge,
    cfm_loss,
    emd,
    interpolant_loss,
    sb_cfm_loss,
    sf2m_loss,
    solve,
    solve_sde,
    wasserstein2,
)
from flowmatch_core.solvers import Constant
from flowmatch_core.transport import entropic_plan, optimal_permutation
from peers.cases import Suite, agree, normal, raises, seeded

suite = Suite("torchcfm", "atong01/conditional-flow-matching", "cacd4dc")

MATCHERS: dict[str, Callable[[float], Any]] = {
    "vp_cfm": VariancePreservingConditionalFlowMatcher,
    "t_cfm": TargetConditionalFlowMatcher,
    "sb_cfm": lambda sigma: SchrodingerBridgeConditionalFlowMatcher(sigma, ot_method="sinkhorn"),
    "exact_ot_cfm": ExactOptimalTransportConditionalFlowMatcher,
    "i_cfm": ConditionalFlowMatcher,
}


def target_path(sigma: float) -> AffinePath:
    """The path of Lipman et al. with a standard deviation at the data of any size."""
    return CondOT(sigma) if sigma < 1 else CustomPath(alpha=lambda t: t, sigma=lambda t: 1 - (1 - sigma) * t)


def ours(method: str, sigma: float, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point and the velocity of the peer's class by the paths of this library."""
    if method == "sb_cfm":
        bridge = BrownianBridge(sigma).sample(x0, x1, t, noise)
        return bridge.x_t, bridge.velocity
    if method == "t_cfm":
        sample = target_path(sigma).sample(noise, x1, t)
        return sample.x_t, sample.velocity
    sample = (Cosine() if method == "vp_cfm" else CondOT()).sample(x0, x1, t)
    return sample.x_t + sigma * noise, sample.velocity


@suite.case(
    "tests/test_conditional_flow_matcher.py::test_fm",
    MATCHERS,
    (0.0, 5e-4, 0.5, 1.5, 0, 1),
    ((1,), (2,), (1, 2), (3, 4, 5)),
)
def matcher(method: str, sigma: float, shape: tuple[int, ...]) -> None:
    if method == "sb_cfm" and sigma <= 0:
        raises(ValueError, lambda: MATCHERS[method](sigma))
        raises(ValueError, lambda: BrownianBridge(sigma))
        return
    peer, x0, x1 = MATCHERS[method](sigma), normal(128, *shape), normal(128, *shape)
    if method == "exact_ot_cfm":
        x0, x1, _ = MinibatchOT()(x0, x1)
    elif method == "sb_cfm":
        x0, x1, _ = SchrodingerBridge(sigma)(x0, x1, generator=seeded())
    t, noise = torch.rand(128, dtype=torch.float64), normal(128, *shape)
    expected = peer.sample_xt(x0, x1, t, noise)
    velocity = peer.compute_conditional_flow(x0, x1, t, expected)
    x_t, found = ours(method, sigma, x0, x1, t, noise)
    agree(x_t, expected, 1e-12)
    # the peer adds 1e-8 to t (1 - t), and divides what it rounded by a small sigma
    agree(found, velocity, 1e-4 if method == "sb_cfm" else 1e-10)


@suite.case("tests/test_conditional_flow_matcher.py::test_fm: compute_lambda", (5e-4, 0.5, 1.0, 1.5))
def weight_of_the_score(sigma: float) -> None:
    t = torch.rand(128, dtype=torch.float64)
    weight = SchrodingerBridgeConditionalFlowMatcher(sigma).compute_lambda(t)
    # the peer's network is sigma^2 / 2 times the score, and its weight the factor that brings it to -noise
    agree(BrownianBridge(sigma).std(t), weight * sigma**2 / 2, 1e-4 if sigma < 0.1 else 1e-7)


@suite.case("tests/test_conditional_flow_matcher.py::test_fm: the objective at the velocity of the peer", MATCHERS)
def objective(method: str) -> None:
    sigma, x0, x1, t = 0.5, normal(128, 2), normal(128, 2), torch.rand(128, dtype=torch.float64)
    peer = MATCHERS[method](sigma)
    noise = torch.randn(128, 2, dtype=torch.float64, generator=seeded())

    def field(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        agree(x, peer.sample_xt(x0, x1, t, noise), 1e-12)
        velocity: Tensor = peer.compute_conditional_flow(x0, x1, t, x)
        return velocity

    if method == "exact_ot_cfm":
        x0, x1, _ = MinibatchOT()(x0, x1)
    if method == "sb_cfm":
        loss = sb_cfm_loss(field, x1, x0, sigma=sigma, coupling=Independent(), time=t, generator=seeded())
    elif method == "t_cfm":
        loss = cfm_loss(field, CondOT(sigma), x1, noise, time=t)
    else:
        path = Cosine() if method == "vp_cfm" else CondOT()
        loss = interpolant_loss(
            field, path, x1, x0, gamma=lambda t: torch.full_like(t, sigma), time=t, generator=seeded()
        )
    agree(loss, 0.0, 1e-10)


@suite.case("tests/test_optimal_transport.py::test_sample_map")
def every_row_is_used_once() -> None:
    permutation = torch.randperm(128)
    x1 = normal(128, 2)
    i0, i1 = MinibatchOT().pairs(x1[permutation], x1)
    plan = np.zeros((128, 128))
    plan[permutation.argsort(), np.arange(128)] = 1  # partner i1 of row i0
    rows, columns = OTPlanSampler(method="exact").sample_map(plan, batch_size=128, replace=False)
    assert torch.equal(permutation[i0], i1)
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == set(zip(i0.tolist(), i1.tolist(), strict=True))


def distances(x0: Tensor, x1: Tensor) -> Tensor:
    return torch.cdist(x0.flatten(1), x1.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


@suite.case("tests/test_optimal_transport.py::test_get_map", ("exact", "entropic", "small entropic"))
def plan(kind: str) -> None:
    x0, x1 = normal(128, 2, 2, 2), normal(128, 2, 2, 2)
    cost = distances(x0, x1).square().numpy()
    if kind == "exact":
        expected = OTPlanSampler(method="exact").get_map(x0, x1)
        found = np.eye(128)[optimal_permutation(cost)] / 128
        agree(torch.as_tensor(found), ot.emd(ot.unif(128), ot.unif(128), cost), 1e-12)
    else:
        reg = 2.0 if kind == "entropic" else 0.5
        expected = OTPlanSampler(method="sinkhorn", reg=reg).get_map(x0, x1)
        found = entropic_plan(cost, reg, tolerance=1e-10) / 128
    agree(torch.as_tensor(found), expected, 1e-8)


@suite.case("tests/test_optimal_transport.py::test_sample_plan", ("exact", "sinkhorn"))
def samples_follow_the_indices(kind: str) -> None:
    x0, x1 = normal(128, 2, 2, 2), normal(128, 2, 2, 2)
    coupling = MinibatchOT() if kind == "exact" else SchrodingerBridge(1.0)
    i0, i1 = coupling.pairs(x0, x1, generator=seeded())
    a, b, _ = coupling(x0, x1, generator=seeded())
    assert torch.equal(a, x0[i0]) and torch.equal(b, x1[i1])
    plan = OTPlanSampler(method=kind, reg=2.0).get_map(x0, x1)
    if kind == "exact":
        assert (plan[i0.numpy(), i1.numpy()] > 0).all()
    else:  # the mean cost of draws is that of the peer's plan
        cost = distances(x0, x1).square().numpy()
        draws = [coupling.pairs(x0, x1, generator=seeded(seed)) for seed in range(20)]
        mean = float(np.mean([cost[i.numpy(), j.numpy()].mean() for i, j in draws]))
        assert abs(mean - (plan * cost).sum()) < 0.05 * mean


@suite.case("tests/test_optimal_transport.py::test_wasserstein", ("W1", "W2", "entropic"))
def distance(kind: str) -> None:
    x0, x1 = normal(128, 2, 2, 2), normal(128, 2, 2, 2)
    if kind == "W1":
        agree(emd(x0, x1), wasserstein(x0, x1, "exact", power=1), 1e-6)
    elif kind == "W2":
        agree(wasserstein2(x0, x1), wasserstein(x0, x1, "exact"), 1e-6)
    else:
        cost, reg = distances(x0, x1).numpy(), 0.1
        found = (entropic_plan(cost, reg, tolerance=1e-9) * cost).sum() / 128
        agree(torch.tensor(found), wasserstein(x0, x1, "sinkhorn", reg=reg, power=1), 1e-6)


@suite.case("tests/test_time_t.py::test_random_Tensor_t", MATCHERS)
def drawn_times_are_given_times(method: str) -> None:
    x0, x1 = normal(128, 2), normal(128, 2)
    peer = MATCHERS[method](0.1 if method == "sb_cfm" else 0.0)
    torch.manual_seed(1)
    given = torch.rand(128)
    torch.manual_seed(1)
    drawn = peer.sample_location_and_conditional_flow(x0.float(), x1.float())[0]
    assert (given == drawn).any()
    time = torch.rand(128, dtype=torch.float64, generator=seeded(2))

    def loss(**options: Any) -> Tensor:
        field = lambda t, x, cond: torch.sin(x + t[:, None])  # noqa: E731
        if method == "sb_cfm":
            return sb_cfm_loss(field, x1, x0, coupling=Independent(), **options)
        path = Cosine() if method == "vp_cfm" else CondOT()
        coupling = MinibatchOT() if method == "exact_ot_cfm" else Independent()
        return cfm_loss(field, path, x1, x0, coupling=coupling, **options)

    one, other = seeded(2), seeded(2)
    torch.rand(128, dtype=torch.float64, generator=other)  # what the times draw
    agree(loss(generator=one), loss(time=time, generator=other), 1e-12)


@suite.case("tests/test_time_t.py::test_guided_random_Tensor_t", ("exact_ot_cfm", "sb_cfm"), (True, False))
def labels_follow_the_pairs(method: str, return_noise: bool) -> None:
    x0, x1 = normal(128, 2), normal(128, 2)
    y0, y1 = torch.arange(128), torch.randint(10, (128,))
    peer = MATCHERS[method](0.0 if method == "exact_ot_cfm" else 1.0)
    out = peer.guided_sample_location_and_conditional_flow(x0, x1, y0=y0, y1=y1, return_noise=return_noise)
    (t, x_t, u_t, label0), t = out[:4], out[0].double()
    if method == "exact_ot_cfm":
        agree(x_t - t[:, None] * u_t, x0[label0], 1e-6)
    coupling = MinibatchOT() if method == "exact_ot_cfm" else SchrodingerBridge(1.0)
    i0, i1 = coupling.pairs(x0, x1, generator=seeded())
    start, end, cond = coupling(x0, x1, y1[:, None], generator=seeded())
    assert cond is not None and torch.equal(cond[:, 0], y1[i1])
    assert torch.equal(start, x0[y0[i0]]) and torch.equal(end, x1[i1])
    if method == "exact_ot_cfm":  # the peer draws its rows from the same pairs
        partner = torch.empty_like(i0)
        partner[i0] = i1
        agree(x_t + (1 - t[:, None]) * u_t, x1[partner[label0]], 1e-6)


class Tutorial(nn.Module):
    """The network of the peer, `net(cat[x, t])`, as a velocity field."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = MLP(dim=2, w=32, time_varying=True).double()

    def forward(self, t: float | Tensor, x: Tensor, cond: Any = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        velocity: Tensor = self.net(torch.cat([x, t[:, None]], -1))
        return velocity


def eight_gaussians(n: int) -> Tensor:
    angle = torch.randint(8, (n,)) * math.pi / 4
    return 5 * torch.stack([angle.cos(), angle.sin()], 1).double() + 0.3 * normal(n, 2)


def moons(n: int) -> Tensor:
    angle, lower = math.pi * torch.rand(n).double(), torch.randint(2, (n,)).double()
    points = torch.stack([angle.cos() * (1 - 2 * lower) + lower, angle.sin() * (1 - 2 * lower) + lower / 2], 1)
    return 3 * points - 1 + 0.2 * normal(n, 2)


TUTORIAL = "examples/2D_tutorials/Flow_matching_tutorial.ipynb"
EIGHT = "examples/2D_tutorials/tutorial_training_8_gaussians_to_moons.ipynb"


@suite.case(f"{TUTORIAL}: training", MATCHERS)
def training(method: str) -> None:
    """The losses and the weights of a few steps are those of the peer's loop."""
    sigma, fields = 0.1, (Tutorial(), Tutorial())
    optimizers = [torch.optim.Adam(field.parameters()) for field in fields]
    peer, bridge = MATCHERS[method](sigma), BrownianBridge(sigma)
    for step in range(30):
        x0, x1 = eight_gaussians(64), moons(64)
        t = 0.02 + 0.96 * torch.rand(64, dtype=torch.float64)
        noise = torch.randn(64, 2, dtype=torch.float64, generator=seeded(step))
        if method == "exact_ot_cfm":
            permutation = OTPlanSampler(method="exact").get_map(x0, x1).argmax(0)
            paired = x0[torch.as_tensor(permutation)]
        else:
            paired = x0
        x_t = peer.sample_xt(paired, x1, t, noise)
        u_t = peer.compute_conditional_flow(paired, x1, t, x_t)
        expected = (fields[1](t, x_t) - u_t).square().mean()
        options: Any = {"time": t, "generator": seeded(step)}
        if method == "sb_cfm":  # the weight of sb_cfm_loss is not the peer's: the points and velocities are
            sample = bridge.sample(x0, x1, t, noise)
            found = (fields[0](t, sample.x_t) - sample.velocity).square().mean()
        elif method == "t_cfm":
            found = cfm_loss(fields[0], CondOT(sigma), x1, noise, time=t)
        else:
            coupling = MinibatchOT() if method == "exact_ot_cfm" else Independent()
            path = Cosine() if method == "vp_cfm" else CondOT()
            constant = lambda t: torch.full_like(t, sigma)  # noqa: E731
            found = interpolant_loss(fields[0], path, x1, x0, gamma=constant, coupling=coupling, **options)
        agree(found, expected, 1e-5 if method == "sb_cfm" else 1e-9)
        for optimizer, loss in zip(optimizers, (found, expected), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(fields[0].parameters(), fields[1].parameters(), strict=True):
        agree(a, b, 1e-4 if method == "sb_cfm" else 1e-8)


@suite.case(f"{TUTORIAL}: trajectories", ("dopri5", "dopri5_per_sample", "adams", "rk4"))
@suite.case(f"{EIGHT}: trajectories", ("dopri5", "dopri5_per_sample"))
def trajectories(solver: str) -> None:
    field, x, times = Tutorial(), eight_gaussians(64), torch.linspace(0, 1, 100).double()
    with torch.no_grad():
        expected = torchdiffeq.odeint(lambda t, x: field(t, x), x, times, method="dopri5", rtol=1e-8, atol=1e-8)
        path = solve(field, x, times=times, solver=solver, steps=400, rtol=1e-8, atol=1e-8).path
    assert path is not None
    agree(path, expected, 1e-5)


@suite.case(f"{EIGHT}: the transport cost of trained flows", ("i_cfm", "exact_ot_cfm"))
def transport_cost(method: str) -> None:
    """Both train a flow to the same distance from the data, within the noise of the distance."""
    fields = (Tutorial(), Tutorial())
    peer = MATCHERS[method](0.1)
    for field, by_peer in zip(fields, (False, True), strict=True):
        torch.manual_seed(3)
        np.random.seed(3)
        optimizer, generator = torch.optim.Adam(field.parameters(), 5e-3), seeded(3)
        coupling = MinibatchOT() if method == "exact_ot_cfm" else Independent()
        for _ in range(600):
            x0, x1 = eight_gaussians(128), moons(128)
            if by_peer:
                t, x_t, u_t = peer.sample_location_and_conditional_flow(x0, x1)
                loss = (field(t.double(), x_t) - u_t).square().mean()
            else:
                constant = lambda t: torch.full_like(t, 0.1)  # noqa: E731
                loss = interpolant_loss(field, CondOT(), x1, x0, gamma=constant, coupling=coupling, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x0, x1 = eight_gaussians(512), moons(512)
    found, expected = (float(wasserstein2(solve(field, x0, steps=20).x.detach(), x1)) for field in fields)
    assert abs(found - expected) < 0.35 * max(found, expected), (found, expected)


LIKELIHOOD = "examples/2D_tutorials/Maximum_likelihood_CNF_tutorial.ipynb"


def joint(field: nn.Module, probes: Tensor | None, x: Tensor) -> Tensor:
    """Return log-densities by a joint solve of point and divergence with torchdiffeq."""

    def rates(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        def velocity(y: Tensor) -> Tensor:
            row: Tensor = field(t, y[None])[0]
            return row

        if probes is None:
            jacobians = torch.func.vmap(torch.func.jacrev(velocity))(state[0])
            return field(t, state[0]), jacobians.diagonal(dim1=1, dim2=2).sum(1)
        products = torch.func.vmap(lambda y, e: torch.func.jvp(velocity, (y,), (e,))[1])(state[0], probes)
        return field(t, state[0]), (products * probes).sum(1)

    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    start = (x, torch.zeros(len(x), dtype=torch.float64))
    states, integrals = torchdiffeq.odeint(rates, start, times, rtol=1e-6, atol=1e-6)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    log_p: Tensor = prior.log_prob(states[-1]) + integrals[-1]
    return log_p


@suite.case(f"{LIKELIHOOD}: exact", ("dopri5", "adams", "rk4"))
def exact_likelihood(solver: str) -> None:
    field, x = Tutorial(), moons(16)
    expected = joint(field, None, x)
    found = ContinuousFlow(field, (2,), solver, 100, rtol=1e-6, atol=1e-6).log_prob(x)
    agree(found, expected, 1e-3)  # the slope of SELU jumps at zero


@suite.case(f"{LIKELIHOOD}: euler with 100 steps")
def euler_likelihood() -> None:
    field, x = Tutorial(), moons(16)
    found = ContinuousFlow(field, (2,), "euler", 100).log_prob(x)
    agree(found, joint(field, None, x), 0.05)


@suite.case(f"{LIKELIHOOD}: hutch_rademacher")
def hutchinson() -> None:
    field, x = Tutorial(), moons(8)
    flow = ContinuousFlow(field, (2,), "rk4", 50, "hutchinson", probes=128)
    found = flow.estimate(x, generator=seeded())
    error = (found.log_prob - joint(field, None, x)).abs()
    assert (error < 5 * found.standard_error + 1e-3).all()
    probes = torch.randint(0, 2, (1, 8, 2), generator=seeded()) * 2.0 - 1
    one = ContinuousFlow(field, (2,), "dopri5", divergence="hutchinson", rtol=1e-6, atol=1e-6)
    values = [joint(field, sign * probes[0].double(), x) for sign in (1, -1)]
    agree(values[0], values[1], 1e-8)  # a probe and its negative are the same
    choices = torch.stack([values[0], joint(field, probes[0].double() * torch.tensor([1.0, -1.0]), x)])
    gap = (one.log_prob(x, generator=seeded()) - choices).abs().amin(0)
    assert (gap < 1e-3).all()  # in two dimensions there are two probes up to sign


@suite.case(f"{LIKELIHOOD}: hutch_gaussian")
def gaussian_probes() -> None:
    field, x = Tutorial(), moons(8)
    # the peer's Gaussian probes have the mean of our Rademacher ones
    with torch.no_grad():
        mean = joint(field, normal(320, 2), x.repeat(40, 1)).reshape(40, 8)
        found = ContinuousFlow(field, (2,), "rk4", 50, "exact").log_prob(x)
    assert ((mean.mean(0) - found).abs() < 5 * mean.std(0) / math.sqrt(40) + 1e-3).all()


@suite.case(f"{LIKELIHOOD}: the gradient of the loss")
def likelihood_gradient() -> None:
    field, x = Tutorial(), moons(16)
    found = torch.autograd.grad(-ContinuousFlow(field, (2,), "rk4", 100).log_prob(x).mean(), list(field.parameters()))
    wanted = torch.autograd.grad(-joint(field, None, x).mean(), list(field.parameters()))
    for a, b in zip(found, wanted, strict=True):
        agree(a, b, 5e-3)


SF2M = "examples/2D_tutorials/SF2M_tutorial.ipynb"


@suite.case(f"{SF2M}: targets of flow and score")
def sf2m_targets() -> None:
    sigma, x0, x1, t = 1.0, eight_gaussians(128), moons(128), torch.rand(128, dtype=torch.float64)
    peer = SchrodingerBridgeConditionalFlowMatcher(sigma)
    noise = torch.randn(128, 2, dtype=torch.float64, generator=seeded())

    def field(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        velocity: Tensor = peer.compute_conditional_flow(x0, x1, t, x)
        return velocity

    def score(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        # the peer's loss is zero where lambda_t s + noise is, and its s is sigma^2 / 2 times the score
        return -noise / peer.compute_lambda(t)[:, None] * 2 / sigma**2

    agree(sf2m_loss(field, score, x1, x0, sigma=sigma, coupling=Independent(), time=t, generator=seeded()), 0.0, 1e-10)


class _SDE(nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, drift: Callable[[Tensor, Tensor], Tensor], sigma: float) -> None:
        super().__init__()
        self.drift, self.sigma = drift, sigma

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self.sigma)


def gaussian_bridge(start: float, end: float, sigma: float) -> tuple[Callable[[Any], Any], Any, Any]:
    """Return the variance of the bridge between N(0, start^2) and N(0, end^2), its velocity and its score.

    The coupling of the ends has the covariance c with c^2 + sigma^2 c = (start end)^2.
    """
    covariance = (math.sqrt(4 * (start * end) ** 2 + sigma**4) - sigma**2) / 2

    def variance(t: Any) -> Any:
        ends = (1 - t) ** 2 * start**2 + t**2 * end**2
        return ends + 2 * t * (1 - t) * covariance + sigma**2 * t * (1 - t)

    def rate(t: Any) -> Any:
        ends = -2 * (1 - t) * start**2 + 2 * t * end**2
        return ends + (1 - 2 * t) * (2 * covariance + sigma**2)

    def velocity(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        moved: Tensor = rate(t) / (2 * variance(t)) * x
        return moved

    def score(t: Any, x: Tensor, cond: Any = None) -> Tensor:
        gradient: Tensor = -x / variance(t)
        return gradient

    return variance, velocity, score


@suite.case(f"{SF2M}: the SDE of the bridge", ("forward", "backward"), (0.5, 1.0))
def bridge_sde(direction: str, sigma: float) -> None:
    variance, velocity, score = gaussian_bridge(1.0, 0.3, sigma)
    forward = direction == "forward"
    first, last = (0.0, 1.0) if forward else (1.0, 0.0)
    x = normal(40_000, 1) * math.sqrt(variance(first))
    options: Any = {
        "score": score,
        "diffusion": Constant(sigma),
        "t0": first,
        "t1": last,
        "steps": 200,
        "generator": seeded(),
    }
    found = solve_sde(velocity, x, **options).x

    def drift(s: Tensor, y: Tensor) -> Tensor:  # the peer integrates forward only
        t = s if forward else 1 - s
        return (velocity(t, y) if forward else -velocity(t, y)) + sigma**2 / 2 * score(t, y)

    expected = torchsde.sdeint(_SDE(drift, sigma), x, torch.tensor([0.0, 1.0]), dt=0.005, method="euler")[-1]
    for end in (found, expected):
        assert abs(float(end.var()) / variance(last) - 1) < 0.06, float(end.var())


BATCHES = "examples/2D_tutorials/The_unreasonable_performance_of_minibatch_OT.ipynb"


@suite.case(f"{BATCHES}: the plan of all points")
def plan_of_all_points() -> None:
    x0, x1 = eight_gaussians(600), moons(600)
    expected = OTPlanSampler(method="exact").get_map(x0, x1)
    found = np.eye(600)[optimal_permutation(distances(x0, x1).square().numpy())] / 600
    agree(torch.as_tensor(found), expected, 1e-12)


@suite.case(f"{BATCHES}: the mean of plans of batches", ("exact", "entropic"))
def plan_of_batches(kind: str) -> None:
    x0, x1 = eight_gaussians(200), moons(200)
    cost = distances(x0, x1).square().numpy()
    found, expected = np.zeros((200, 200)), np.zeros((200, 200))
    for _ in range(20):
        rows, columns = (np.random.choice(200, 64, replace=False) for _ in range(2))
        block = np.ix_(rows, columns)
        if kind == "exact":
            expected[block] += ot.emd(ot.unif(64), ot.unif(64), cost[block].copy())
            found[block] += np.eye(64)[optimal_permutation(cost[block])] / 64
        else:
            expected[block] += ot.sinkhorn(ot.unif(64), ot.unif(64), cost[block], 5.0, stopThr=1e-12)
            found[block] += entropic_plan(cost[block], 5.0, tolerance=1e-10) / 64
    agree(torch.as_tensor(found), expected, 1e-9)


@suite.case(f"{BATCHES}: entropic plans", (1, 10, 100))
def entropic(reg: float) -> None:
    x0, x1 = eight_gaussians(300), moons(300)
    expected = OTPlanSampler(method="sinkhorn", reg=reg).get_map(x0, x1)
    found = entropic_plan(distances(x0, x1).square().numpy(), reg, tolerance=1e-10) / 300
    agree(torch.as_tensor(found), expected, 1e-7)


@suite.case(f"{BATCHES}: batches of a large plan, without replacement")
def pairs_of_a_large_plan() -> None:
    x0, x1 = eight_gaussians(300), moons(300)
    plan = OTPlanSampler(method="exact").get_map(x0, x1)
    rows, columns = OTPlanSampler(method="exact").sample_map(plan, batch_size=64, replace=False)
    i0, i1 = MinibatchOT().pairs(x0, x1)
    partner = dict(zip(i0.tolist(), i1.tolist(), strict=True))
    assert all(partner[row] == column for row, column in zip(rows.tolist(), columns.tolist(), strict=True))


class _Images(nn.Module):
    """The peer's class-conditional U-Net as a velocity field with labels of shape `(batch,)`."""

    cond_shape = ()

    def __init__(self) -> None:
        super().__init__()
        self.net = UNetModel(
            dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=[1, 2], num_classes=10, class_cond=True
        )

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        velocity: Tensor = self.net(torch.as_tensor(t, dtype=x.dtype).expand(len(x)), x, cond)
        return velocity


@suite.case("tests/test_models.py::test_initialize_models")
@suite.case("examples/images/conditional_mnist.ipynb: the loss")
def image_loss() -> None:
    field, peer = _Images(), ConditionalFlowMatcher(0.0)
    for parameter in field.net.out.parameters():
        nn.init.normal_(parameter, std=0.1)  # zero otherwise
    x0, x1, labels, t = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.arange(8), torch.rand(8)
    x_t = peer.sample_xt(x0, x1, t, torch.zeros_like(x0))
    expected = (field.net(t, x_t, labels) - peer.compute_conditional_flow(x0, x1, t, x_t)).square().mean()
    agree(cfm_loss(field, CondOT(), x1, x0, cond=labels, time=t), expected, 1e-5)


@suite.case("examples/images/conditional_mnist.ipynb: samples of every label")
def image_samples() -> None:
    field = _Images().eval()
    for parameter in field.net.out.parameters():
        nn.init.normal_(parameter, std=0.1)
    labels = torch.arange(10)
    flow = ContinuousFlow(field, (1, 8, 8), "euler", 10)
    found = flow.sample((), labels, seeded())
    noise = torch.randn(10, 1, 8, 8, generator=seeded())
    with torch.no_grad():
        expected = torchdiffeq.odeint(
            lambda t, x: field.net(t.expand(10), x, labels),
            noise,
            torch.tensor([0.0, 1.0]),
            method="euler",
            options={"step_size": 0.1},
        )[-1]
    agree(found, expected, 1e-4)


CELLS = "examples/single_cell/single-cell_example.ipynb"


@suite.case(f"{CELLS}: the loss over pairs of snapshots")
def snapshots() -> None:
    field, peer = Tutorial(), ConditionalFlowMatcher(0.1)
    cells = [eight_gaussians(64) / 5 + k for k in range(4)]
    t, noise = torch.rand(64, dtype=torch.float64), [normal(64, 2) for _ in range(3)]
    parts = []
    for k, (x0, x1) in enumerate(itertools.pairwise(cells)):
        order = torch.as_tensor(OTPlanSampler(method="exact").get_map(x0, x1).argmax(0))
        x_t = peer.sample_xt(x0[order], x1, t, noise[k])
        parts.append((field(t + k, x_t) - peer.compute_conditional_flow(x0[order], x1, t, x_t)).square().mean())
    found = []
    for k, (x0, x1) in enumerate(itertools.pairwise(cells)):
        paired, end, _ = MinibatchOT()(x0, x1)
        x_t = CondOT().sample(paired, end, t).x_t + 0.1 * noise[k]
        found.append((field(t + k, x_t) - (end - paired)).square().mean())
    agree(torch.stack(found), torch.stack(parts), 1e-10)


@suite.case(f"{CELLS}: trajectories beyond time 1", ("dopri5", "rk4", "adams"))
def long_trajectories(solver: str) -> None:
    field, x, times = Tutorial(), eight_gaussians(32) / 5, torch.linspace(0, 3, 40).double()
    with torch.no_grad():
        expected = torchdiffeq.odeint(lambda t, x: field(t, x), x, times, method="dopri5", rtol=1e-8, atol=1e-8)
        found = solve(field, x, times=times, solver=solver, steps=1200, rtol=1e-8, atol=1e-8).path
    assert found is not None
    agree(found, expected, 1e-5)


@suite.case(f"{CELLS}: networks at times beyond 1")
def networks_beyond_one() -> None:
    """A recipe with one network over several intervals evaluates `net(t + k)`."""
    field = FiLMField(2, generator=seeded())
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(16, 2)
    values = torch.stack([field(0.4 + k, x) for k in range(4)])
    assert values.isfinite().all()
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(values, 2))


suite.not_applicable(
    "a test of the peer's training program, configured by Hydra and run by Lightning",
    *(
        f"runner/tests/{name}"
        for name in (
            "test_configs.py::test_train_config",
            "test_configs.py::test_eval_config",
            "test_datamodule.py::test_single_datamodule",
            "test_datamodule.py::test_trajectory_datamodule",
            "test_eval.py::test_train_eval",
            "test_sweeps.py::test_xfail_fast_dev_experiments",
            "test_sweeps.py::test_experiments",
            "test_sweeps.py::test_hydra_sweep",
            "test_sweeps.py::test_hydra_sweep_ddp_sim",
            "test_sweeps.py::test_optuna_sweep",
            "test_sweeps.py::test_optuna_sweep_ddp_sim_wandb",
            "test_train.py::test_train_fast_dev_run",
            "test_train.py::test_train_fast_dev_run_gpu",
            "test_train.py::test_train_epoch_gpu_amp",
            "test_train.py::test_train_epoch_double_val_loop",
            "test_train.py::test_train_ddp_sim",
            "test_train.py::test_train_resume",
        )
    ),
)
suite.not_applicable(
    "needs downloads and a graphics card",
    "examples/images/mnist_example.ipynb",
    "examples/images/cifar10/train_cifar10.py",
    "examples/images/cifar10/compute_fid.py",
)
suite.not_applicable(
    "trains gradient-boosted trees",
    "examples/tabular/Tabular_Data_Generation_with_XGBoost_Conditional_Flow_Matching.ipynb",
)
suite.not_applicable("draws pictures only", "examples/2D_tutorials/model-comparison-plotting.ipynb")
