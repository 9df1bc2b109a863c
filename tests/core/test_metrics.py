"""Laws of the distances and units, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import ot
import pytest
import torch
from scipy import stats
from torch import Tensor

from flowmatch_core import transport
from flowmatch_core.metrics import bits_per_dim, emd, energy_distance, mmd, sliced_wasserstein

METRICS = [emd, sliced_wasserstein, mmd, energy_distance]
Metric = Callable[[Tensor, Tensor], Tensor]


def points(n: int, dim: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_samples_are_at_distance_zero(metric: Metric) -> None:
    x = points(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert float(metric(x, x[order])) == pytest.approx(0, abs=1e-12)
    assert float(metric(x, torch.cat([x, x]))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", [emd, mmd, energy_distance])
def test_distances_are_symmetric_and_grow_with_a_shift(metric: Metric) -> None:
    x, y = points(60), points(45, seed=1)
    assert float(metric(x, y)) == pytest.approx(float(metric(y, x)))
    assert 0 < metric(x, y) < metric(x, y + 1) < metric(x, y + 2)


@pytest.mark.parametrize("metric", METRICS)
def test_events_of_any_shape_are_flattened(metric: Metric) -> None:
    x, y = points(10, 6), points(10, 6, seed=1)
    g = {"generator": torch.Generator().manual_seed(0)} if metric is sliced_wasserstein else {}
    h = {"generator": torch.Generator().manual_seed(0)} if metric is sliced_wasserstein else {}
    assert metric(x.reshape(10, 1, 2, 3), y.reshape(10, 1, 2, 3), **g) == metric(x, y, **h)


def test_emd_in_one_dimension_is_that_of_the_sorted_samples() -> None:
    x, y = points(200, 1), 2 * points(200, 1, seed=1) + 1
    expected = (x.sort(0).values - y.sort(0).values).abs().mean()
    torch.testing.assert_close(emd(x, y), expected)
    other = points(130, 1, seed=2)
    scipy = stats.wasserstein_distance(x[:, 0].numpy(), other[:, 0].numpy())
    assert float(emd(x, other)) == pytest.approx(scipy)


def test_emd_of_a_translation_is_its_length() -> None:
    x = points(150, 3) + 1e5
    shift = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    assert float(emd(x, x + shift)) == pytest.approx(3, rel=1e-9)


def test_emd_keeps_the_dtype() -> None:
    assert emd(torch.zeros(2, 1), torch.ones(2, 1)).dtype == torch.float32


def test_an_unsolved_emd_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ITERATIONS", 1)
    with pytest.raises(RuntimeError, match="was not solved"):
        emd(points(50), points(50, seed=1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("m", [80, 55])
def test_sliced_wasserstein_matches_pot_on_the_same_projections(order: int, m: int) -> None:
    x, y = points(80, 3), 0.5 * points(m, 3, seed=1) + 0.3
    directions = torch.randn(3, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions.numpy(), p=order)
    result = sliced_wasserstein(x, y, projections=64, order=order, generator=torch.Generator().manual_seed(5))
    assert float(result) == pytest.approx(float(expected))


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension() -> None:
    x = points(20, 4)
    result = sliced_wasserstein(x, x + 1.0, projections=20_000, generator=torch.Generator().manual_seed(0))
    assert float(result) == pytest.approx(2 / math.sqrt(4), rel=0.02)


def test_energy_distance_matches_scipy() -> None:
    x, y = points(50, 1), points(70, 1, seed=1) + 0.5
    assert float(energy_distance(x, y)) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2)


def test_mmd_of_gaussians_is_known() -> None:
    n, shift, h = 3000, 1.0, 0.7
    x, y = points(n, 1), points(n, 1, seed=1) + shift

    def kernel(mean: float) -> float:  # E k(x, y) for x - y ~ N(mean, 2)
        return h / math.sqrt(h**2 + 2) * math.exp(-(mean**2) / (2 * (h**2 + 2)))

    expected = 2 * kernel(0) - 2 * kernel(shift)
    assert float(mmd(x, y, bandwidth=h)) == pytest.approx(expected, abs=0.02)


def test_mmd_bandwidth_defaults_to_the_median_distance() -> None:
    x, y = points(30), points(31, seed=1) + 1
    median = torch.pdist(torch.cat([x, y])).median()
    torch.testing.assert_close(mmd(x, y), mmd(x, y, bandwidth=float(median)))
    torch.testing.assert_close(mmd(x, y), mmd(10 * x, 10 * y))


@pytest.mark.parametrize("metric", [sliced_wasserstein, mmd, energy_distance])
def test_gradients_pull_the_samples_together(metric: Metric) -> None:
    x, y = points(30).requires_grad_(), points(30, seed=1) + 2
    (gradient,) = torch.autograd.grad(metric(x, y), x)
    assert torch.isfinite(gradient).all() and (gradient.mean(0) < 0).all()


def test_bits_per_dim_of_a_uniform_image_are_its_bit_depth() -> None:
    for low, high in ((0, 1), (-1, 1), (0, 256)):
        dims, width = 12, (high - low) / 256
        log_prob = torch.tensor([-dims * math.log(high - low)])
        torch.testing.assert_close(bits_per_dim(log_prob, dims, bin_width=width), torch.tensor([8.0]))


def test_bits_per_dim_do_not_depend_on_the_units() -> None:
    log_prob, dims = points(5)[:, 0], 7
    rescaled = log_prob - dims * math.log(127.5)  # the density of 127.5 times the data
    torch.testing.assert_close(bits_per_dim(log_prob, dims, 2 / 255), bits_per_dim(rescaled, dims, 1.0))


@pytest.mark.parametrize("metric", METRICS)
def test_bad_arguments_are_named(metric: Metric) -> None:
    with pytest.raises(ValueError, match="y has shape"):
        metric(points(3, 2), points(3, 3))
    with pytest.raises(ValueError, match="x has shape"):
        metric(points(3)[:, 0], points(3)[:, 0])
    with pytest.raises(ValueError, match="x has shape"):
        metric(points(0), points(3))
    with pytest.raises(ValueError, match="bandwidth is 0"):
        mmd(points(3), points(3), bandwidth=0)
