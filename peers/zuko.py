"""Cases of zuko: normalizing flows as distributions."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from flowmatch_core import ContinuousFlow, DiscreteTimeFlow, GaussianMixture, MLPField, nll_loss, solve
from flowmatch_core.normalizing import MAF, NSF, RealNVP
from peers.cases import Suite, agree, normal, raises, seeded

suite = Suite("zuko", "probabilists/zuko", "1063ae4")

TIGHT: Any = {"rtol": 1e-8, "atol": 1e-9}
DISCRETE = ("RealNVP", "MAF", "NSF")
FLOWS = ("CNF", *DISCRETE)


class Reversed(nn.Module):
    """The network of zuko's CNF, which maps data to noise, as a velocity field from noise to data."""

    def __init__(self, cnf: Any) -> None:
        super().__init__()
        self.transform = cnf.transform

    def forward(self, t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        velocity: Tensor = -self.transform.f(1 - torch.as_tensor(t, dtype=x.dtype), x, cond)
        return velocity


def pair(name: str, features: int = 3, context: int = 5) -> tuple[Any, Any]:
    """Return a flow of the peer and ours with the same weights, both in float64."""
    if name == "CNF":
        # smooth, unlike the default ELU, whose kinks limit the accuracy of every gradient of a divergence
        theirs = zuko.flows.CNF(features, context, hidden_features=(32, 32), activation=nn.SiLU, **TIGHT).double()
        return theirs, ContinuousFlow(Reversed(theirs), (features,), solver="dopri5", **TIGHT).double()
    kinds: dict[str, RealNVP | MAF | NSF] = {"RealNVP": RealNVP(4), "MAF": MAF(2), "NSF": NSF(2)}
    kind = kinds[name]
    ours = DiscreteTimeFlow(kind, features, context).double()
    make = partial(getattr(zuko.flows, name), features, context, hidden_features=(64, 64), activation=nn.SiLU)
    theirs = make(transforms=kind.transforms).double()
    theirs.transform.load_state_dict(ours.transform.state_dict())
    return theirs, ours


def data(n: int = 16, features: int = 3, context: int = 5) -> tuple[Tensor, Tensor]:
    return normal(n, features), normal(context)


@suite.case("tests/test_flows.py::test_flows: log_prob and its gradients", FLOWS)
def log_prob(name: str) -> None:
    theirs, ours = pair(name)
    x, c = data()
    values = ours.log_prob(x, c), theirs(c).log_prob(x)
    assert values[0].shape == (16,) and values[0].requires_grad
    agree(*values, 1e-7)
    parameters = list(theirs.transform.parameters())
    mine = parameters if name == "CNF" else list(ours.transform.parameters())
    found = torch.autograd.grad(-values[0].mean(), mine)
    expected = torch.autograd.grad(-values[1].mean(), parameters)
    for a, b in zip(found, expected, strict=True):
        agree(a, b, 1e-6)


@suite.case("tests/test_flows.py::test_flows: evaluation mode", FLOWS)
def evaluation_mode(name: str) -> None:
    _, ours = pair(name)
    x, c = data()
    trained = ours.log_prob(x, c)
    with torch.no_grad():
        agree(ours.eval().log_prob(x, c), trained, 1e-9)


@suite.case("tests/test_flows.py::test_flows: sampling and the reparametrisation", FLOWS)
def sampling(name: str) -> None:
    theirs, ours = pair(name)
    c = data()[1]
    assert ours.sample((32,), c).shape == theirs(c).sample((32,)).shape == (32, 3)
    assert ours.has_rsample
    x = ours.rsample((), c, seeded())
    z = torch.randn((1, 3), generator=seeded(), dtype=torch.float64)[0]
    agree(x, theirs(c).transform.inv(z), 1e-6)
    gradients = torch.autograd.grad(x.square().sum().sqrt(), [p for p in ours.parameters() if p.requires_grad])
    assert all(bool(g.abs().sum() > 0) for g in gradients if g.ndim > 1)


@suite.case("tests/test_flows.py::test_flows: invertibility", FLOWS)
def invertibility(name: str) -> None:
    theirs, ours = pair(name)
    c = normal(16, 5)
    x = ours.given(c).rsample((), seeded())
    z = torch.randn((16, 3), generator=seeded(), dtype=torch.float64)
    agree(theirs(c).transform(x), z, 1e-5)
    if name == "CNF":
        transform = ours.given(c).transform
        agree(transform(z), x, 1e-6)
        agree(transform.inv(x), z, 1e-6)


@suite.case("tests/test_flows.py::test_flows: Jacobian", FLOWS)
def jacobian(name: str) -> None:
    theirs, ours = pair(name)
    x, c = normal(3), normal(5)
    expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(theirs(c).transform, x)).logabsdet
    agree(ours.log_prob(x, c) - theirs(c).base.log_prob(theirs(c).transform(x)), expected, 1e-6)
    if name != "CNF":
        return
    transform = ours.given(c).transform
    z = transform.inv(x)
    forward = torch.autograd.functional.jacobian(lambda z: transform(z), z.detach())
    backward = torch.autograd.functional.jacobian(lambda x: transform.inv(x), x)
    agree(forward, torch.linalg.inv(backward), 1e-5)
    agree(backward, torch.autograd.functional.jacobian(theirs(c).transform, x), 1e-5)
    agree(transform.log_abs_det_jacobian(z, x), torch.linalg.slogdet(forward).logabsdet, 1e-6)


@suite.case("tests/test_flows.py::test_flows: saving and loading", FLOWS)
def saving(name: str) -> None:
    _, ours = pair(name)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x, c = data(1)
    agree(torch.load(file, weights_only=False).log_prob(x, c), ours.log_prob(x, c), 1e-12)


@suite.case("tests/test_flows.py::test_flows: printing", FLOWS)
def printing(name: str) -> None:
    theirs, ours = pair(name)
    assert "3" in repr(ours) and repr(theirs)


@suite.case("tests/test_flows.py::test_triangular_transforms: MaskedAutoregressiveTransform", ("MAF", "NSF"))
def autoregressive(name: str) -> None:
    ours = DiscreteTimeFlow({"MAF": MAF(1), "NSF": NSF(1)}[name], 5).double()

    def sample(z: Tensor) -> Tensor:
        """Return the sample of given noise: the flow draws its noise from torch's generator."""
        with mock.patch.object(torch, "randn", lambda *args, **options: z.reshape(*args)):
            x: Tensor = ours.rsample()
        return x

    z = normal(5)
    matrix = torch.autograd.functional.jacobian(sample, z)
    assert (matrix.triu(1) == 0).all()
    volume = matrix.diagonal().abs().log().sum()
    agree(ours.log_prob(sample(z)), Normal(0.0, 1.0).log_prob(z).sum() - volume, 1e-8)


def gaussians() -> dict[str, tuple[Distribution, float]]:
    """Flows of ours and half the width of a box that holds their mass."""
    law = GaussianMixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.2 * torch.eye(2).expand(2, 2, 2)
    )
    continuous = ContinuousFlow(law.velocity_field(), (2,), solver="rk4", steps=20)
    autoregressive = DiscreteTimeFlow(MAF(2), 2, generator=seeded())
    return {"CNF": (continuous, 4.0), "MAF": (autoregressive, 8.0)}


@suite.case("tests/test_distributions.py::test_distributions: shapes", ("CNF", "MAF"))
def shapes(name: str) -> None:
    flow, _ = gaussians()[name]
    reference = zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2))
    x = flow.sample((2**10,))
    assert flow.batch_shape == reference.batch_shape == ()
    assert flow.event_shape == reference.event_shape == (2,)
    assert x.shape == reference.sample((2**10,)).shape
    assert flow.log_prob(x).shape == reference.log_prob(x).shape


@suite.case("tests/test_distributions.py::test_distributions: the density integrates to one", ("CNF", "MAF"))
def normalisation(name: str) -> None:
    flow, half = gaussians()[name]
    side = torch.linspace(-half, half, 161)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    agree(mass, 1.0, 1e-2)


@suite.case("tests/test_distributions.py::test_distributions: expand", ("CNF", "MAF"))
def expansion(name: str) -> None:
    flow, _ = gaussians()[name]
    expanded = flow.expand((32,))
    reference = zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2)).expand((32,))
    x = expanded.sample()
    assert expanded.batch_shape == reference.batch_shape == (32,)
    assert x.shape == reference.sample().shape and expanded.log_prob(x).shape == (32,)
    agree(expanded.log_prob(x), flow.log_prob(x), 1e-5)


@suite.case("tests/test_distributions.py::test_distributions: NormalizingFlow")
def normalizing_flow() -> None:
    base = torch.distributions.Gamma(torch.full((1,), 2.0), torch.ones(1))
    ours = ContinuousFlow(lambda t, x, cond: x, (1,), solver="dopri5", base=Independent(base, 1), **TIGHT)
    scaling = torch.distributions.AffineTransform(torch.zeros(1), torch.full((1,), 1 / math.e))
    theirs = zuko.distributions.NormalizingFlow(scaling, Independent(base, 1))
    x = theirs.sample((64,))
    agree(ours.log_prob(x), theirs.log_prob(x), 1e-4)


@suite.case("tests/test_mixtures.py::test_mixtures: log_prob", ("full", "diagonal", "spherical"))
def mixture(covariance: str) -> None:
    theirs = zuko.mixtures.GMM(3, components=4, covariance_type=covariance).double()()
    parts = theirs.base
    matrices = parts.covariance_matrix if covariance == "full" else parts.variance.diag_embed()
    means = parts.loc if covariance == "full" else parts.base_dist.loc
    ours = GaussianMixture(theirs.logits.softmax(-1), means.expand(4, 3), matrices.expand(4, 3, 3))
    x = normal(64, 3)
    agree(ours.log_prob(x), theirs.log_prob(x), 1e-8)


@suite.case("tests/test_mixtures.py::test_mixtures: sampling")
def mixture_samples() -> None:
    theirs = zuko.mixtures.GMM(2, components=3).double()()
    covariance = theirs.base.covariance_matrix.expand(3, 2, 2)
    ours = GaussianMixture(theirs.logits.softmax(-1), theirs.base.loc, covariance)
    with torch.no_grad():
        drawn = (ours.sample(40_000), theirs.sample((40_000,)))
        for x in drawn:
            agree(x.mean(0), ours.mean, 0.05)
        agree(drawn[0].T.cov(), drawn[1].T.cov(), 0.1)


def free_form() -> tuple[Any, Any]:
    """A free-form transform of the peer, from data to noise, and ours from noise to data, by the same field."""
    first, second = normal(5, 16), normal(16, 5) / 4

    def field(t: float | Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.sigmoid(x @ first) @ second

    one = torch.ones((), dtype=torch.float64)
    theirs = zuko.transforms.FreeFormJacobianTransform(field, 0 * one, one, **TIGHT)
    flow = ContinuousFlow(field, (5,), solver="dopri5", **TIGHT).double()
    return theirs, flow.transform


@suite.case(
    "tests/test_transforms.py::test_multivariate_transforms: FreeFormJacobianTransform",
    ("value", "inverse", "Jacobian", "compound call", "inverse Jacobian"),
)
def transform(aspect: str) -> None:
    theirs, ours = free_form()
    x = normal(5)
    y = theirs(x)
    if aspect == "value":
        rows = normal(64, 5)
        agree(ours(rows), theirs(rows), 1e-7)
    elif aspect == "inverse":
        agree(ours.inv(y), x, 1e-7)
    elif aspect == "Jacobian":
        matrix = torch.autograd.functional.jacobian(lambda x: ours(x), x)
        agree(ours.log_abs_det_jacobian(x, y), torch.linalg.slogdet(matrix).logabsdet, 1e-6)
        agree(ours.log_abs_det_jacobian(x, y), theirs.log_abs_det_jacobian(x, y), 1e-6)
    elif aspect == "compound call":
        for a, b in zip(ours.call_and_ladj(x), theirs.call_and_ladj(x), strict=True):
            agree(a, b, 1e-6)
    else:
        matrix = torch.autograd.functional.jacobian(lambda y: ours.inv(y), y)
        agree(ours.inv.log_abs_det_jacobian(y, x), torch.linalg.slogdet(matrix).logabsdet, 1e-6)
        agree(ours.inv.log_abs_det_jacobian(y, x), theirs.inv.log_abs_det_jacobian(y, x), 1e-6)


@suite.case("tests/test_utils.py::test_odeint", ("dopri5", "dopri5_per_sample", "adams", "rk4"))
def odeint(solver: str) -> None:
    rate, end = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 3.0))
    x = torch.randn(64, 1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    expected = zuko.utils.odeint(lambda t, x: -rate * x, x, zero, end, phi=(rate,), atol=1e-9, rtol=1e-8)
    found = solve(lambda t, x, cond: -rate * x, x, t1=end, solver=solver, steps=400, rtol=1e-8, atol=1e-9).x
    agree(found, expected, 1e-6)
    agree(found, x * (-rate * end).exp(), 1e-6)
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, rate, end)) for y in (found, expected)), strict=True):
        agree(a, b, 1e-5)


@suite.case("docs/tutorials/basics.ipynb: distributions and transformations")
def basics() -> None:
    shift, scale = torch.tensor([2.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    affine = torch.distributions.AffineTransform(shift, scale)
    base = Independent(Normal(torch.zeros(1).double(), torch.ones(1).double()), 1)
    theirs = zuko.distributions.NormalizingFlow(affine, base)
    still = ContinuousFlow(lambda t, x, cond: torch.zeros_like(x), (1,), loc=-shift / scale, scale=1 / scale)
    x = normal(16, 1)
    agree(still.log_prob(x), theirs.log_prob(x), 1e-12)


def two_moons(n: int) -> tuple[Tensor, Tensor]:
    """Two half circles with noise, and which of them a point is from."""
    angle = 2 * math.pi * torch.rand(n, dtype=torch.float64)
    label = (angle > math.pi).double()
    centres = torch.stack([angle.cos() + label - 0.5, angle.sin() + label / 2 - 0.25], 1)
    return centres + 0.1 * normal(n, 2), label[:, None]


def train(loss: Callable[[Tensor, Tensor], Tensor], parameters: list[Tensor], steps: int = 20) -> list[Tensor]:
    """Return the losses of a few steps of Adam, on the same data for every caller."""
    torch.manual_seed(1)
    optimizer, values = torch.optim.Adam(parameters, lr=1e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(*two_moons(64))
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return values


@suite.case("docs/tutorials/forward_kl.ipynb: training", ("NSF", "MAF", "RealNVP"), ("unconditional", "conditional"))
def forward_kl(name: str, kind: str) -> None:
    context = int(kind == "conditional")
    theirs, ours = pair(name, 2, context)

    def expected(x: Tensor, label: Tensor) -> Tensor:
        return -theirs(label if context else None).log_prob(x).mean()

    def found(x: Tensor, label: Tensor) -> Tensor:
        return -ours.log_prob(x, label if context else None).mean()

    a, b = train(found, list(ours.parameters())), train(expected, list(theirs.parameters()))
    agree(torch.stack(a), torch.stack(b), 1e-8)
    assert b[-1] < b[0]


@suite.case("docs/tutorials/forward_kl.ipynb: training a CNF", ("unconditional", "conditional"))
def forward_kl_of_cnf(kind: str) -> None:
    context = int(kind == "conditional")
    theirs, _ = pair("CNF", 2, context)
    twin = copy.deepcopy(theirs)
    ours = ContinuousFlow(Reversed(twin), (2,), solver="rk4", steps=16)
    a = train(lambda x, label: -ours.log_prob(x, label if context else None).mean(), list(twin.parameters()), 5)
    b = train(lambda x, label: -theirs(label if context else None).log_prob(x).mean(), list(theirs.parameters()), 5)
    agree(torch.stack(a), torch.stack(b), 1e-5)


@suite.case("docs/tutorials/forward_kl.ipynb: the training loss is the likelihood", ("backprop", "adjoint"))
def honest_likelihood(method: str) -> None:
    field = MLPField(2, (32, 32), generator=seeded()).double()
    options: Any = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    generator = seeded()
    steps = 60 if method == "backprop" else 5

    def loss(x: Tensor, label: Tensor) -> Tensor:
        return nll_loss(field, x, generator=generator, **options)

    losses = train(loss, list(field.parameters()), steps)
    x = two_moons(500)[0]
    with torch.no_grad():
        tight = -ContinuousFlow(field, (2,), solver="dopri5", rtol=1e-7, atol=1e-7).log_prob(x).mean()
        claimed = nll_loss(field, x, generator=generator, **options)
        # the same field through zuko's solver
        transform = zuko.transforms.FreeFormJacobianTransform(
            lambda t, x: field(t, x), torch.tensor(1.0).double(), torch.tensor(0.0).double(), **TIGHT
        )
        base = zuko.distributions.DiagNormal(torch.zeros(2).double(), torch.ones(2).double())
        theirs = -zuko.distributions.NormalizingFlow(transform, base).log_prob(x).mean()
    agree(tight, theirs, 1e-5)
    agree(claimed, theirs, 0.05)
    assert losses[-1] < losses[0]


def log_energy(x: Tensor) -> Tensor:
    """A two-dimensional energy with a ring of modes."""
    return torch.sin(math.pi * x[..., 0]) - 2 * (x.square().sum(-1) - 2) ** 2


@suite.case("docs/tutorials/reverse_kl.ipynb: sample and density in one solve", FLOWS)
def sample_and_density(name: str) -> None:
    theirs, ours = pair(name, 2, 0)
    x, log_p = ours.rsample_and_log_prob((16,), generator=seeded())
    agree(log_p, theirs().log_prob(x), 1e-4 if name == "CNF" else 1e-7)
    z = torch.randn((16, 2), generator=seeded(), dtype=torch.float64)
    y, volume = theirs().transform.inv.call_and_ladj(z)
    expected = theirs().base.log_prob(z) - volume
    agree(x, y, 1e-5)
    agree(log_p, expected, 1e-4)
    mine = list(theirs.parameters()) if name == "CNF" else list(ours.transform.parameters())
    found = torch.autograd.grad((log_p - log_energy(x)).mean(), mine)
    wanted = torch.autograd.grad((expected - log_energy(y)).mean(), list(theirs.transform.parameters()))
    for a, b in zip(found, wanted, strict=True):
        agree(a, b, 1e-3)


@suite.case("docs/tutorials/reverse_kl.ipynb: the objective after training")
def reverse_kl() -> None:
    field = MLPField(2, (32, 32), generator=seeded()).double()
    flow = ContinuousFlow(field, (2,))
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    generator = seeded()
    for _ in range(60):
        x, log_p = flow.rsample_and_log_prob((64,), generator=generator)
        optimizer.zero_grad()
        (log_p - log_energy(x)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        x, log_p = flow.rsample_and_log_prob((2000,), generator=generator)
        exact = ContinuousFlow(field, (2,), solver="dopri5", rtol=1e-7, atol=1e-7).log_prob(x)
    agree(log_p.mean(), exact.mean(), 0.05)


@suite.case("tests/test_flows.py::test_flows: a wrong condition raises", FLOWS)
def wrong_condition(name: str) -> None:
    _, ours = pair(name)
    x = data()[0]
    raises(Exception if name == "CNF" else ValueError, lambda: ours.log_prob(x, torch.randn(4).double()))


suite.not_applicable(
    "the architecture is not offered: masked autoregressive, coupling, spline, monotonic and planar ones are",
    *(f"tests/test_flows.py::test_flows[{name}]" for name in ("SOSPF", "UNAF", "GF", "BPF")),
)
suite.not_applicable(
    "layers are not assembled by hand: an architecture is built as a whole, from zuko's layers",
    "tests/test_flows.py::test_triangular_transforms: other layers",
    "tests/test_flows.py::test_adjacency_matrix",
    "tests/test_flows.py::test_context_adjacency_matrix",
    "tests/test_transforms.py::test_univariate_transforms[False]",
    "tests/test_transforms.py::test_univariate_transforms[True]",
    "tests/test_transforms.py::test_multivariate_transforms: permutations, rotations, LU",
    "docs/tutorials/basics.ipynb: custom flows",
)
suite.not_applicable(
    "no Bayesian networks",
    "tests/test_bayesian.py::test_bayesian_MLP",
    "tests/test_bayesian.py::test_bayesian_MaskedMLP",
    "tests/test_bayesian.py::test_bayesian_flows",
    "docs/tutorials/bayesian_flows.ipynb",
)
suite.not_applicable(
    "distributions other than flows are those of torch",
    *(
        f"tests/test_distributions.py::test_distributions[{name}]"
        for name in (
            *("Joint", "Mixture", "GeneralizedNormal", "BoxUniform", "TransformedUniform", "Truncated", "Sort"),
            *("TopK", "Minimum", "Maximum"),
        )
    ),
)
suite.not_applicable(
    "the Gaussian mixture is an oracle with given parameters, not a model",
    "tests/test_mixtures.py::test_mixtures: gradients, saving",
    "tests/test_mixtures.py::test_gmm_shapes",
    "tests/test_mixtures.py::test_gmm_tied_covariance",
    "tests/test_mixtures.py::test_gmm_insufficient_samples",
    "tests/test_mixtures.py::test_gmm_unknown_strategy",
    "tests/test_mixtures.py::test_gmm_unknown_covariance_type",
)
suite.not_applicable(
    "a building block of the peer's own networks and solvers",
    "tests/test_nn.py::test_Linear",
    "tests/test_nn.py::test_MLP",
    "tests/test_nn.py::test_MaskedMLP",
    "tests/test_nn.py::test_MonotonicMLP",
    "tests/test_utils.py::test_bisection",
    "tests/test_utils.py::test_broadcast",
    "tests/test_utils.py::test_gauss_legendre",
    "tests/test_utils.py::test_unpack",
)
suite.not_applicable("needs a download of MNIST", "docs/tutorials/vae.ipynb")
