"""Distances between samples and their sampling floors, the energy of a flow, and units of likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowmatch_core._call import call_field
from flowmatch_core._conditions import Condition
from flowmatch_core._tensors import check_floating, flatten_event
from flowmatch_core.field import Time, VelocityField
from flowmatch_core.solvers import solve
from flowmatch_core.transport import optimal_plan

__all__ = [
    "Floor",
    "bits_per_dim",
    "emd",
    "energy_distance",
    "mmd",
    "normalised_path_energy",
    "path_energy",
    "sampling_floor",
    "sliced_wasserstein",
    "wasserstein2",
]


def emd(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the exact 1-Wasserstein distance $\min_\pi E_\pi \lVert x - y \rVert$ of two samples.

    The ground cost is Euclidean and the weights are uniform. Computed on the CPU in float64, in about
    $n^3$ time; no gradients.

    Args:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.

    Examples:
        >>> emd(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]))
        tensor(5.)
    """
    return _transport_cost(x, y, power=1)


def wasserstein2(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the exact 2-Wasserstein distance of two samples.

    It is $\sqrt{\min_\pi E_\pi \lVert x - y \rVert^2}$.

    The ground cost is Euclidean and the weights are uniform. Computed on the CPU in float64, in about
    $n^3$ time; no gradients.

    Args:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.

    Examples:
        >>> wasserstein2(torch.zeros(2, 1), torch.tensor([[3.0], [4.0]]))  # the root of (9 + 16) / 2
        tensor(3.5355)
    """
    return _transport_cost(x, y, power=2).sqrt()


def sliced_wasserstein(
    x: Tensor, y: Tensor, projections: int = 256, order: int = 2, generator: torch.Generator | None = None
) -> Tensor:
    r"""Return the sliced Wasserstein distance $(E_\theta W_p^p(\theta^T x, \theta^T y))^{1/p}$.

    References:
        - Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
          https://doi.org/10.1007/s10851-014-0506-3

    Args:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.
        projections: The number of random directions $\theta$, uniform on the sphere.
        order: The order $p$.
        generator: The source of randomness.

    Examples:
        >>> sliced_wasserstein(torch.zeros(4, 1), torch.ones(2, 1))
        tensor(1.)
    """
    a, b = _rows(x, y)
    for name, number in (("projections", projections), ("order", order)):
        if number < 1:
            raise ValueError(f"{name} is {number}, but should be at least 1.")
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=a.dtype, device=a.device)
    directions = directions / directions.norm(dim=0)
    n, m = len(a), len(b)
    centre = a.detach().mean(0)  # projections far from the origin lose digits, and a common shift changes nothing
    a, b = a - centre, b - centre
    # on a scale where 1 is n * m, both quantile functions are constant between multiples of m and n
    levels = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values.to(a.device)
    widths = levels.diff(prepend=levels.new_zeros(1)).to(a.dtype) / (n * m)
    quantiles_a = (a @ directions).sort(0).values[(levels - 1) // m]
    quantiles_b = (b @ directions).sort(0).values[(levels - 1) // n]
    powers: Tensor = widths @ (quantiles_a - quantiles_b).abs() ** order
    return powers.mean().pow(1 / order)


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Tensor:
    r"""Return the squared maximum mean discrepancy $E k(x, x') + E k(y, y') - 2 E k(x, y)$.

    The kernel is $k(x, y) = \exp(-\lVert x - y \rVert^2 / 2 h^2)$; pairs of a point with itself
    count, so the result is not negative and is zero for equal samples.

    References:
        - A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html

    Args:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.
        bandwidth: The bandwidth $h$; by default the median distance between different points of the
            pooled sample.

    Examples:
        >>> mmd(torch.zeros(1, 2), torch.ones(1, 2), bandwidth=1.0)  # 2 - 2 / e
        tensor(1.2642)
    """
    a, b = _rows(x, y)
    pooled = torch.cat([a, b])
    distances = _distances(pooled, pooled)
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}, but should be positive.")
    scale: Tensor | float
    if bandwidth is None:
        i, j = torch.triu_indices(len(pooled), len(pooled), 1, device=a.device)
        apart = distances[i, j]
        # without zeros, which dominate if most rows are repeated; 1 if all distances are zero
        scale = torch.where(apart > 0, apart, math.nan).nanmedian().nan_to_num(1.0)
    else:
        scale = bandwidth
    kernel = (-(distances / scale).square() / 2).exp()
    return _two_sample(kernel, len(a))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the energy distance of two samples.

    It is $2 E \lVert x - y \rVert - E \lVert x - x' \rVert - E \lVert y - y' \rVert$.

    Pairs of a point with itself count, so the result is not negative and is zero for equal samples.

    References:
        - Energy Statistics: A Class of Statistics Based on Distances (Székely & Rizzo, 2013),
          https://doi.org/10.1016/j.jspi.2013.03.018

    Args:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.

    Examples:
        >>> energy_distance(torch.zeros(2, 1), torch.ones(3, 1))
        tensor(2.)
    """
    a, b = _rows(x, y)
    pooled = torch.cat([a, b])
    return _two_sample(-_distances(pooled, pooled), len(a))


def path_energy(
    field: VelocityField, x0: Tensor, cond: Condition = None, *, solver: str = "rk4", steps: int = 50
) -> Tensor:
    r"""Return the energy $E \int_0^1 \lVert v(t, x_t, c) \rVert^2 dt$ of a flow along its trajectories.

    It is at least the squared 2-Wasserstein distance between the distributions at `t = 0` and `t = 1`, with equality
    for the flow of the optimal transport (Benamou-Brenier). It is integrated together with the trajectories, so it
    has the order of the solver.

    Args:
        field: The velocity field $v$.
        x0: Starts of trajectories, with shape `(batch, *event)`.
        cond: Their conditions, whose first dimension is the batch.
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        steps: The number of steps of a fixed-step method.

    Examples:
        >>> path_energy(lambda t, x, cond: 2 * torch.ones_like(x), torch.zeros(5, 3), solver="euler", steps=4)
        tensor(12.)
    """

    def with_energy(t: Time, state: Tensor, cond: Condition) -> Tensor:
        x = state[:, :-1].reshape(-1, *x0.shape[1:])  # a solver may evaluate some rows only
        velocity = call_field(field, t, x, cond)
        flat = flatten_event(velocity)
        return torch.cat([flat, flat.square().sum(1, keepdim=True)], 1)

    start = torch.cat([flatten_event(x0), x0.new_zeros(len(x0), 1)], 1)
    return solve(with_energy, start, cond=cond, solver=solver, steps=steps).x[:, -1].mean()


def normalised_path_energy(
    field: VelocityField,
    x0: Tensor,
    w2: Tensor | float,
    cond: Condition = None,
    *,
    solver: str = "rk4",
    steps: int = 50,
) -> Tensor:
    r"""Return the normalised path energy, zero for the flow of the optimal transport.

    It is $\lvert E \int_0^1 \lVert v \rVert^2 dt - W_2^2 \rvert / W_2^2$.

    The absolute value is part of the definition: the energy may be below $W_2^2$ for a finite sample, or for a model
    whose distribution at `t = 1` is not that of the data.

    References:
        - Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport
          (Tong et al., 2024), https://arxiv.org/abs/2302.00482

    Args:
        field: The velocity field $v$.
        x0: Starts of trajectories, with shape `(batch, *event)`.
        w2: The 2-Wasserstein distance between the source and the data, see `wasserstein2`.
        cond: The conditions of the starts, whose first dimension is the batch.
        solver: One of `flowmatch_core.solvers.SOLVERS`.
        steps: The number of steps of a fixed-step method.

    Examples:
        >>> x0, w2 = torch.zeros(5, 1), 2.0
        >>> normalised_path_energy(lambda t, x, cond: 2 * torch.ones_like(x), x0, w2, solver="euler", steps=4)
        tensor(0.)
    """
    if not w2 > 0:
        raise ValueError(f"w2 is {float(w2)}, but should be positive.")
    return (path_energy(field, x0, cond, solver=solver, steps=steps) - w2**2).abs() / w2**2


@dataclass(frozen=True)
class Floor:
    """The sampling floor of a metric: mean between samples of the truth, standard error, and number of pairs."""

    mean: float
    standard_error: float
    pairs: int


def sampling_floor(
    metric: Callable[[Tensor, Tensor], Tensor], truth: Tensor, n: int, generator: torch.Generator | None = None
) -> Floor:
    r"""Return the value of a metric between two independent samples of `n` rows of the truth.

    The distance between two finite samples of one distribution is not zero: the floor is the score of a perfect
    model, with which other scores are compared. The rows are shuffled and split into disjoint pairs of samples, so
    the values are independent and their standard error is $s / \sqrt{k}$; for a single pair it is `nan`.

    Args:
        metric: A distance between two samples, as those of this module.
        truth: Independent rows of the truth, with shape `(rows, *event)`.
        n: The number of rows of a sample, the same as in the score that is to be compared.
        generator: The source of randomness of the shuffle.

    Examples:
        >>> rows = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        >>> floor = sampling_floor(energy_distance, rows, n=100, generator=torch.Generator().manual_seed(1))
        >>> floor.pairs, 0.02 < floor.mean < 0.05
        (20, True)
    """
    if not 1 <= n <= len(truth) // 2:
        raise ValueError(f"n is {n}, but should be at least 1 and at most half of the {len(truth)} rows of truth.")
    order = torch.randperm(len(truth), generator=generator, device=truth.device)
    pairs = len(truth) // (2 * n)
    samples = truth[order[: 2 * n * pairs]].reshape(pairs, 2, n, *truth.shape[1:])
    values = torch.stack([metric(x, y) for x, y in samples]).to(torch.float64)
    return Floor(float(values.mean()), float(values.std()) / math.sqrt(pairs) if pairs > 1 else math.nan, pairs)


def bits_per_dim(log_prob: Tensor, dims: int, bin_width: float = 1.0) -> Tensor:
    r"""Return $-(\log p / d + \log w) / \log 2$, the bits per dimension of data in bins of width `w`.

    For uniformly dequantised data this is an upper bound on the code length of the discrete value. The width is in
    the units of the density: 8-bit pixels scaled to [0, 1] have `w = 1/256`, scaled to [-1, 1] they have `w = 2/256`.

    Args:
        log_prob: The log-densities in nats, of any shape.
        dims: The number $d$ of dimensions.
        bin_width: The width $w$ of a bin.

    Examples:
        >>> bits_per_dim(torch.tensor(0.0), dims=3, bin_width=1 / 256)  # uniform on [0, 1]^3
        tensor(8.)
    """
    if dims < 1:
        raise ValueError(f"dims is {dims}, but should be at least 1.")
    if not bin_width > 0:
        raise ValueError(f"bin_width is {bin_width}, but should be positive.")
    return -(log_prob / dims + math.log(bin_width)) / math.log(2)


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, sample in (("x", x), ("y", y)):
        if sample.ndim < 2 or len(sample) == 0:
            raise ValueError(f"{name} has shape {tuple(sample.shape)}, but should have shape (n, *event) with n > 0.")
        check_floating(name, sample)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"y has shape {tuple(y.shape)}, but should have the event shape of x, {tuple(x.shape[1:])}.")
    return x.flatten(1), y.flatten(1)


def _transport_cost(x: Tensor, y: Tensor, power: int) -> Tensor:
    """Return the minimal transport cost for a power of the distance."""
    a, b = (rows.detach().to("cpu", torch.float64) for rows in _rows(x, y))
    for name, rows in (("x", a), ("y", b)):
        if not rows.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite, but should hold none.")
    cost = (_distances(a, b) ** power).numpy()
    return x.new_tensor((optimal_plan(cost) * cost).sum() / cost.size)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # by differences: an inner product loses small distances to cancellation
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _two_sample(kernel: Tensor, n: int) -> Tensor:
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
