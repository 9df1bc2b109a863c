"""Distances between samples, and units of likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowmatch_core.transport import optimal_plan

__all__ = ["bits_per_dim", "emd", "energy_distance", "mmd", "sliced_wasserstein"]


def emd(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the exact 1-Wasserstein distance :math:`\min_\pi E_\pi \lVert x - y \rVert` of two samples.

    The ground cost is Euclidean and the weights are uniform. Computed on the CPU in float64, in about
    :math:`n^3` time; no gradients.

    Arguments:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.

    Example:
        >>> emd(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]))
        tensor(5.)
    """
    a, b = _rows(x, y)
    cost = _distances(a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)).numpy()
    return x.new_tensor((optimal_plan(cost) * cost).sum() / cost.size)


def sliced_wasserstein(
    x: Tensor, y: Tensor, projections: int = 256, order: int = 2, generator: torch.Generator | None = None
) -> Tensor:
    r"""Return the sliced Wasserstein distance :math:`(E_\theta W_p^p(\theta^T x, \theta^T y))^{1/p}`.

    References:
        | Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
          https://doi.org/10.1007/s10851-014-0506-3

    Arguments:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.
        projections: The number of random directions :math:`\theta`, uniform on the sphere.
        order: The order :math:`p`.
        generator: The source of randomness.

    Example:
        >>> sliced_wasserstein(torch.zeros(4, 1), torch.ones(2, 1))
        tensor(1.)
    """
    a, b = _rows(x, y)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=a.dtype, device=a.device)
    directions = directions / directions.norm(dim=0)
    n, m = len(a), len(b)
    # on a scale where 1 is n * m, both quantile functions are constant between multiples of m and n
    levels = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values.to(a.device)
    widths = levels.diff(prepend=levels.new_zeros(1)).to(a.dtype) / (n * m)
    quantiles_a = (a @ directions).sort(0).values[(levels - 1) // m]
    quantiles_b = (b @ directions).sort(0).values[(levels - 1) // n]
    powers: Tensor = widths @ (quantiles_a - quantiles_b).abs() ** order
    return powers.mean().pow(1 / order)


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Tensor:
    r"""Return the squared maximum mean discrepancy :math:`E k(x, x') + E k(y, y') - 2 E k(x, y)`.

    The kernel is :math:`k(x, y) = \exp(-\lVert x - y \rVert^2 / 2 h^2)`; pairs of a point with itself
    count, so the result is not negative and is zero for equal samples.

    References:
        | A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html

    Arguments:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.
        bandwidth: The bandwidth :math:`h`; the median distance within the pooled sample by default.

    Example:
        >>> mmd(torch.zeros(1, 2), torch.ones(1, 2), bandwidth=1.0)  # 2 - 2 / e
        tensor(1.2642)
    """
    a, b = _rows(x, y)
    pooled = torch.cat([a, b])
    distances = _distances(pooled, pooled)
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}, but should be positive.")
    if bandwidth is None:
        i, j = torch.triu_indices(len(pooled), len(pooled), 1, device=a.device)
        median = distances[i, j].median()
    kernel = (-(distances / (median if bandwidth is None else bandwidth)).square() / 2).exp()
    return _two_sample(kernel, len(a))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the energy distance :math:`2 E \lVert x - y \rVert - E \lVert x - x' \rVert - E \lVert y - y'
    \rVert`.

    Pairs of a point with itself count, so the result is not negative and is zero for equal samples.

    References:
        | Energy Statistics: A Class of Statistics Based on Distances (Székely & Rizzo, 2013),
          https://doi.org/10.1016/j.jspi.2013.03.018

    Arguments:
        x: A sample, with shape `(n, *event)`.
        y: A sample, with shape `(m, *event)`.

    Example:
        >>> energy_distance(torch.zeros(2, 1), torch.ones(3, 1))
        tensor(2.)
    """
    a, b = _rows(x, y)
    pooled = torch.cat([a, b])
    return _two_sample(-_distances(pooled, pooled), len(a))


def bits_per_dim(log_prob: Tensor, dims: int, bin_width: float = 1.0) -> Tensor:
    r"""Return :math:`-(\log p / d + \log w) / \log 2`, the bits per dimension of data in bins of width `w`.

    For uniformly dequantised data this bounds the code length of the discrete value from above. The width
    is in the units of the density: 8-bit pixels scaled to [0, 1] have `w = 1/256`, scaled to [-1, 1] they
    have `w = 2/256`.

    Arguments:
        log_prob: The log-densities in nats, of any shape.
        dims: The number :math:`d` of dimensions.
        bin_width: The width :math:`w` of a bin.

    Example:
        >>> bits_per_dim(torch.tensor(0.0), dims=3, bin_width=1 / 256)  # uniform on [0, 1]^3
        tensor(8.)
    """
    return -(log_prob / dims + math.log(bin_width)) / math.log(2)


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, sample in (("x", x), ("y", y)):
        if sample.ndim < 2 or len(sample) == 0:
            raise ValueError(f"{name} has shape {tuple(sample.shape)}, but should have shape (n, *event) with n > 0.")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"y has shape {tuple(y.shape)}, but should have the event shape of x, {tuple(x.shape[1:])}.")
    return x.flatten(1), y.flatten(1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # by differences: the shortcut through an inner product loses the small distances
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _two_sample(kernel: Tensor, n: int) -> Tensor:
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
