"""Cases of POT: optimal transport between samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

from flowmatch_core import MinibatchOT, Sinkhorn, emd, sliced_wasserstein, wasserstein2
from flowmatch_core.transport import entropic_plan, optimal_permutation, optimal_plan
from peers.cases import Suite, agree, normal, raises, seeded

suite = Suite("POT", "PythonOT/POT", "aed0120")


def cost(x: Tensor, y: Tensor, power: float = 2) -> Any:
    return ot.dist(x.numpy(), y.numpy()) ** (power / 2)


@suite.case("test/test_ot.py::test_emd_dimension_and_mass_mismatch")
def dimensions() -> None:
    x, y = normal(10, 2), normal(10, 3)
    weights = ot.unif(11)
    raises(AssertionError, lambda: ot.emd(weights, weights, cost(x, x)))
    raises(ValueError, lambda: emd(x, y))
    raises(ValueError, lambda: MinibatchOT()(x, y))


@suite.case("test/test_ot.py::test_emd_emd2", ("identity", "two samples", "two sizes"))
def exact(kind: str) -> None:
    x = normal(60, 2)
    y = {"identity": x, "two samples": normal(60, 2), "two sizes": normal(40, 2)}[kind]
    weights = ot.unif(60), ot.unif(len(y))
    agree(emd(x, y), ot.emd2(*weights, cost(x, y, 1)), 1e-6)
    agree(wasserstein2(x, y).square(), ot.emd2(*weights, cost(x, y)), 1e-6)
    plan = ot.emd(*weights, cost(x, y))
    agree(torch.as_tensor(optimal_plan(cost(x, y))) / (60 * len(y)), plan, 1e-12)
    if len(y) == 60:
        agree(torch.as_tensor(np.eye(60)[optimal_permutation(cost(x, y))]) / 60, plan, 1e-12)


@suite.case("test/test_ot.py::test_emd_empty")
def uniform_weights() -> None:
    x, y = normal(60, 2), normal(60, 2)
    i0, i1 = MinibatchOT().pairs(x, y)
    assert (ot.emd([], [], cost(x, y))[i0.numpy(), i1.numpy()] > 0).all()


@suite.case("test/test_ot.py::test_emd_backends", (torch.float32, torch.float64))
def dtypes(dtype: torch.dtype) -> None:
    x, y = normal(60, 2).to(dtype), normal(60, 2).to(dtype)
    value = emd(x, y)
    assert value.dtype == dtype
    agree(value, ot.emd2(ot.unif(60), ot.unif(60), cost(x.double(), y.double(), 1)), 1e-5)


REGS = (0.5, 1.0, 10.0)
METHODS = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")


@suite.case("test/test_bregman.py::test_sinkhorn", REGS)
def marginals(reg: float) -> None:
    x = normal(60, 2)
    plan = torch.as_tensor(entropic_plan(cost(x, x), reg, tolerance=1e-9)) / 60
    agree(plan.sum(1), 1 / 60, 1e-9)
    agree(plan.sum(0), 1 / 60, 1e-8)
    agree(plan, ot.sinkhorn([], [], cost(x, x), reg, method="sinkhorn_log", stopThr=1e-10, numItermax=5000), 1e-6)


@suite.case("test/test_bregman.py::test_sinkhorn_variants_log", METHODS, (0.5, 5.0))
def variants(method: str, reg: float) -> None:
    x, y = normal(60, 2), normal(60, 2)
    theirs = ot.sinkhorn(ot.unif(60), ot.unif(60), cost(x, y), reg, method=method, stopThr=1e-11, numItermax=20_000)
    agree(torch.as_tensor(entropic_plan(cost(x, y), reg, tolerance=1e-9)) / 60, theirs, 1e-6)


@suite.case("test/test_bregman.py::test_sinkhorn_stabilization", (1e-2, 1e-3, 1e-5))
def small_regularisation(reg: float) -> None:
    x, y = normal(64, 2), normal(64, 2)
    plan = entropic_plan(cost(x, y), reg) / 64
    assert np.isfinite(plan).all()
    # the peer's Sinkhorn iterations do not converge within thousands of rounds here, so its exact cost is the truth
    exact = ot.emd2(ot.unif(64), ot.unif(64), cost(x, y))
    agree(torch.as_tensor((plan * cost(x, y)).sum()), exact, max(3e-3, 5 * reg))


@suite.case("test/test_bregman.py::test_nan_warning", (1e-6, 1e-9))
def vanishing_regularisation(reg: float) -> None:
    """Where the peer warns of NaN, the pairs are those of exact transport."""
    x, y = normal(64, 2), normal(64, 2)
    assert torch.equal(Sinkhorn(reg)(x, y, generator=seeded())[0], MinibatchOT()(x, y)[0])


@suite.case("test/test_1d_solver.py::test_emd_1d_emd2_1d", (1, 2), (60, 40))
@suite.case("test/test_1d_solver.py::test_wasserstein_1d", (1, 2), (60, 40))
def one_dimension(order: int, rows: int) -> None:
    x, y = normal(60, 1), normal(rows, 1)
    theirs = ot.wasserstein_1d(x[:, 0], y[:, 0], p=order)
    ours = emd(x, y) if order == 1 else wasserstein2(x, y).square()
    agree(ours, theirs, 1e-8)
    agree(sliced_wasserstein(x, y, 3, order, seeded()) ** order, theirs, 1e-8)


SLICED = "test/sliced/test_sliced_distances.py"


@suite.case(f"{SLICED}::test_sliced_same_dist")
def sliced_of_one_sample() -> None:
    x = normal(60, 2)
    agree(sliced_wasserstein(x, x), ot.sliced_wasserstein_distance(x, x, seed=0), 1e-8)


@suite.case(f"{SLICED}::test_sliced_bad_shapes")
def sliced_of_two_widths() -> None:
    raises(ValueError, lambda: sliced_wasserstein(normal(10, 2), normal(10, 3)))
    raises(ValueError, lambda: ot.sliced_wasserstein_distance(normal(10, 2), normal(10, 3)))


@suite.case(f"{SLICED}::test_sliced_different_dists", (1, 2), (60, 40))
def sliced(order: int, rows: int) -> None:
    x, y = normal(60, 3), normal(rows, 3) + 1
    theirs = ot.sliced_wasserstein_distance(x, y, n_projections=20_000, p=order, seed=0)
    agree(sliced_wasserstein(x, y, 20_000, order, seeded()), theirs, 1e-2)


@suite.case(f"{SLICED}::test_1d_sliced_equals_emd")
def sliced_in_one_dimension() -> None:
    x, y = normal(60, 1), normal(40, 1)
    expected = ot.emd2_1d(x[:, 0].numpy(), y[:, 0].numpy(), metric="sqeuclidean")
    agree(sliced_wasserstein(x, y).square(), expected, 1e-8)


@suite.case(f"{SLICED}::test_sliced_same_proj")
def sliced_by_given_projections() -> None:
    x, y = normal(8, 2), normal(8, 2)
    directions = torch.randn(2, 10, generator=seeded(), dtype=torch.float64)
    projections = directions / directions.norm(dim=0)
    agree(
        sliced_wasserstein(x, y, 10, 2, seeded()), ot.sliced_wasserstein_distance(x, y, projections=projections), 1e-8
    )
    same: Callable[[], Tensor] = lambda: sliced_wasserstein(x, y, 10, 2, seeded(1))  # noqa: E731
    agree(same(), same(), 0.0)


suite.not_applicable(
    "points have equal weights",
    "test/test_ot.py::test_emd2_multi",
    "test/test_1d_solver.py::test_emd_1d_emd2_1d_with_weights",
    "test/test_bregman.py::test_sinkhorn_multi_b",
    "test/test_bregman.py::test_sinkhorn_empty",
)
suite.not_applicable(
    "tensors are those of torch",
    "test/test_ot.py::test_emd_emd2_devices_tf",
    "test/test_bregman.py::test_sinkhorn_backends",
    f"{SLICED}::test_sliced_backend",
    "test/test_backend.py",
)
suite.not_applicable(
    "plans and distances have no gradients",
    "test/test_ot.py::test_emd2_gradients",
    "test/test_bregman.py::test_sinkhorn2_gradients",
)
suite.not_applicable(
    "prices are not returned",
    "test/test_ot.py::test_dual_variables",
    "test/test_1d_solver.py::test_emd1d_dual_with_weights",
    f"{SLICED}::test_sliced_log",
)
suite.not_applicable(
    "not offered",
    f"{SLICED}::test_max_sliced_same_dist",
    f"{SLICED}::test_max_sliced_different_dists",
    "test/sliced/test_sliced_plans.py",
    "test/sliced/test_spherical_sliced.py",
    "test/test_ot.py::test_free_support_barycenter",
    "test/test_ot.py::test_lp_barycenter",
    "test/test_bregman.py::test_barycenter",
    "test/test_bregman.py::test_screenkhorn",
    "test/test_bregman.py::test_unmix",
    "test/batch",
    "test/gromov",
    "test/unbalanced",
    "test/test_circle_solver.py",
    "test/test_coot.py",
    "test/test_da.py",
    "test/test_dr.py",
    "test/test_factored.py",
    "test/test_gaussian.py",
    "test/test_gmm.py",
    "test/test_lowrank.py",
    "test/test_mapping.py",
    "test/test_optim.py",
    "test/test_partial.py",
    "test/test_smooth.py",
    "test/test_stochastic.py",
    "test/test_ucoot.py",
    "test/test_weak.py",
)
