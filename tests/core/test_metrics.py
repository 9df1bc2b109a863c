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
from flowmatch_core._tensors import expand_time
from flowmatch_core.field import Time
from flowmatch_core.metrics import (
    Floor,
    bits_per_dim,
    emd,
    energy_distance,
    mmd,
    normalised_path_energy,
    path_energy,
    sampling_floor,
    sliced_wasserstein,
    wasserstein2,
)
from flowmatch_core.oracles import GaussianMixture
from flowmatch_core.paths import CondOT
from flowmatch_core.solvers import SOLVERS
from tests.support.random import randn

METRICS = [emd, wasserstein2, sliced_wasserstein, mmd, energy_distance]
Metric = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("metric", METRICS)
def test_equal_samples_are_at_distance_zero(metric: Metric) -> None:
    x = randn(60, 2)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert float(metric(x, x[order])) == pytest.approx(0, abs=1e-12)
    assert float(metric(x, torch.cat([x, x]))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("metric", [emd, wasserstein2, mmd, energy_distance])
def test_distances_are_symmetric_and_grow_with_a_shift(metric: Metric) -> None:
    x, y = randn(60, 2), randn(45, 2, seed=1)
    assert float(metric(x, y)) == pytest.approx(float(metric(y, x)))
    assert 0 < metric(x, y) < metric(x, y + 1) < metric(x, y + 2)


@pytest.mark.parametrize("metric", METRICS)
def test_events_of_any_shape_are_flattened(metric: Metric) -> None:
    x, y = randn(10, 6), randn(10, 6, seed=1)
    g = {"generator": torch.Generator().manual_seed(0)} if metric is sliced_wasserstein else {}
    h = {"generator": torch.Generator().manual_seed(0)} if metric is sliced_wasserstein else {}
    assert metric(x.reshape(10, 1, 2, 3), y.reshape(10, 1, 2, 3), **g) == metric(x, y, **h)


def test_emd_in_one_dimension_is_that_of_the_sorted_samples() -> None:
    x, y = randn(200, 1), 2 * randn(200, 1, seed=1) + 1
    expected = (x.sort(0).values - y.sort(0).values).abs().mean()
    torch.testing.assert_close(emd(x, y), expected)
    other = randn(130, 1, seed=2)
    scipy = stats.wasserstein_distance(x[:, 0].numpy(), other[:, 0].numpy())
    assert float(emd(x, other)) == pytest.approx(scipy)


@pytest.mark.parametrize("metric", [emd, wasserstein2])
def test_transport_of_a_translation_is_its_length(metric: Metric) -> None:
    x = randn(150, 3) + 1e5
    shift = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    assert float(metric(x, x + shift)) == pytest.approx(3, rel=1e-9)


@pytest.mark.parametrize("metric", [emd, wasserstein2])
def test_transport_keeps_the_dtype(metric: Metric) -> None:
    assert metric(torch.zeros(2, 1), torch.ones(2, 1)).dtype == torch.float32


def test_wasserstein2_in_one_dimension_is_that_of_the_sorted_samples() -> None:
    x, y = randn(200, 1), 2 * randn(200, 1, seed=1) + 1
    expected = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    torch.testing.assert_close(wasserstein2(x, y), expected)


def test_wasserstein2_matches_pot_for_samples_of_different_sizes() -> None:
    x, y = randn(40, 3), 0.5 * randn(25, 3, seed=1) + 1
    cost = ot.dist(x.numpy(), y.numpy())
    assert float(wasserstein2(x, y)) == pytest.approx(math.sqrt(ot.emd2([], [], cost)))


def test_wasserstein2_of_large_gaussian_samples_nears_the_distance_of_the_gaussians() -> None:
    x, y = randn(1500, 2), 2 * randn(1500, 2, seed=1) + torch.tensor([3.0, 0.0], dtype=torch.float64)
    # |m|^2 + d (2 - 1)^2 between N(0, I) and N(m, 4 I)
    assert float(wasserstein2(x, y)) == pytest.approx(math.sqrt(9 + 2), rel=0.03)


@pytest.mark.parametrize("metric", [emd, wasserstein2])
def test_an_unsolved_transport_fails(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ITERATIONS", 1)
    with pytest.raises(RuntimeError, match="was not solved"):
        metric(randn(50, 2), randn(50, 2, seed=1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("m", [80, 55])
def test_sliced_wasserstein_matches_pot_on_the_same_projections(order: int, m: int) -> None:
    x, y = randn(80, 3), 0.5 * randn(m, 3, seed=1) + 0.3
    directions = torch.randn(3, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions.numpy(), p=order)
    result = sliced_wasserstein(x, y, projections=64, order=order, generator=torch.Generator().manual_seed(5))
    assert float(result) == pytest.approx(float(expected))


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension() -> None:
    x = randn(20, 4)
    result = sliced_wasserstein(x, x + 1.0, projections=20_000, generator=torch.Generator().manual_seed(0))
    assert float(result) == pytest.approx(2 / math.sqrt(4), rel=0.02)


@pytest.mark.parametrize("metric", [emd, wasserstein2, mmd, energy_distance])
def test_distances_far_from_the_origin_keep_their_digits(metric: Metric) -> None:
    x, y = (randn(200, 3, seed=seed).float() + 1e4 for seed in (0, 1))  # the data are what float32 keeps of it
    assert float(metric(x, y)) == pytest.approx(float(metric(x.double(), y.double())), rel=1e-4)


def test_sliced_wasserstein_keeps_its_digits_far_from_the_origin() -> None:
    x = randn(200, 3).float() + 1e4
    y = x + 0.01 * randn(200, 3, seed=1).float()
    directions = torch.randn(3, 256, generator=torch.Generator().manual_seed(5))
    directions = (directions / directions.norm(dim=0)).double().numpy()
    expected = ot.sliced_wasserstein_distance(x.double().numpy(), y.double().numpy(), projections=directions)
    result = sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(5))
    assert float(result) == pytest.approx(float(expected), rel=1e-4)


def test_energy_distance_matches_scipy() -> None:
    x, y = randn(50, 1), randn(70, 1, seed=1) + 0.5
    assert float(energy_distance(x, y)) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2)


def test_mmd_of_gaussians_is_known() -> None:
    n, shift, h = 3000, 1.0, 0.7
    x, y = randn(n, 1), randn(n, 1, seed=1) + shift

    def kernel(mean: float) -> float:  # E k(x, y) for x - y ~ N(mean, 2)
        return h / math.sqrt(h**2 + 2) * math.exp(-(mean**2) / (2 * (h**2 + 2)))

    expected = 2 * kernel(0) - 2 * kernel(shift)
    assert float(mmd(x, y, bandwidth=h)) == pytest.approx(expected, abs=0.02)


def test_mmd_bandwidth_defaults_to_the_median_distance() -> None:
    x, y = randn(30, 2), randn(31, 2, seed=1) + 1
    median = torch.pdist(torch.cat([x, y])).median()
    torch.testing.assert_close(mmd(x, y), mmd(x, y, bandwidth=float(median)))
    torch.testing.assert_close(mmd(x, y), mmd(10 * x, 10 * y))


def test_mmd_of_repeated_rows_is_a_number() -> None:
    x, y = torch.zeros(20, 2, dtype=torch.float64), torch.zeros(20, 2, dtype=torch.float64)
    assert mmd(x, y) == 0
    y[:3] = 2.0  # most pairs of the pooled sample coincide, the others are sqrt(8) apart
    expected = mmd(x, y, bandwidth=math.sqrt(8))
    assert 0 < expected == mmd(x, y)
    assert mmd(x[:1], x[:1]) == 0


@pytest.mark.parametrize("metric", [sliced_wasserstein, mmd, energy_distance])
def test_gradients_pull_the_samples_together(metric: Metric) -> None:
    x, y = randn(30, 2).requires_grad_(), randn(30, 2, seed=1) + 2
    (gradient,) = torch.autograd.grad(metric(x, y), x)
    assert torch.isfinite(gradient).all() and (gradient.mean(0) < 0).all()


def test_bits_per_dim_of_a_uniform_image_are_its_bit_depth() -> None:
    for low, high in ((0, 1), (-1, 1), (0, 256)):
        dims, width = 12, (high - low) / 256
        log_prob = torch.tensor([-dims * math.log(high - low)])
        torch.testing.assert_close(bits_per_dim(log_prob, dims, bin_width=width), torch.tensor([8.0]))


def test_bits_per_dim_do_not_depend_on_the_units() -> None:
    log_prob, dims = randn(5, 2)[:, 0], 7
    rescaled = log_prob - dims * math.log(127.5)  # the density of 127.5 times the data
    torch.testing.assert_close(bits_per_dim(log_prob, dims, 2 / 255), bits_per_dim(rescaled, dims, 1.0))


@pytest.mark.parametrize("metric", METRICS)
def test_bad_arguments_are_named(metric: Metric) -> None:
    with pytest.raises(ValueError, match="y has shape"):
        metric(randn(3, 2), randn(3, 3))
    with pytest.raises(ValueError, match="x has shape"):
        metric(randn(3, 2)[:, 0], randn(3, 2)[:, 0])
    with pytest.raises(ValueError, match="x has shape"):
        metric(randn(0, 2), randn(3, 2))
    with pytest.raises(ValueError, match="bandwidth is 0"):
        mmd(randn(3, 2), randn(3, 2), bandwidth=0)


# --- the energy of a flow --------------------------------------------------------------------------------------------


def growth(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
    """x_t = e^t x_0, with the energy |x_0|^2 (e^2 - 1) / 2."""
    return x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("event", [(2,), (1, 2, 2), ()])
def test_path_energy_of_a_linear_flow_is_known(solver: str, event: tuple[int, ...]) -> None:
    x0 = torch.randn(30, *event, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = float(x0.square().reshape(30, -1).sum(1).mean()) * (math.e**2 - 1) / 2
    result = path_energy(growth, x0, solver=solver, steps=4000 if solver == "euler" else 100)
    assert float(result) == pytest.approx(expected, rel=1e-3)
    assert float(path_energy(growth, x0, solver="rk4", steps=100)) == pytest.approx(expected, rel=1e-8)


def test_path_energy_sees_the_time_and_the_condition() -> None:
    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return expand_time(t, x) * cond.expand_as(x)

    x0, cond = randn(4, 2), torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    # integral of t^2 is 1/3, two dimensions, mean of c^2 is 14/4
    assert float(path_energy(field, x0, cond)) == pytest.approx(2 / 3 * 14 / 4)


def test_the_flow_of_the_optimal_transport_has_no_excess_energy() -> None:
    def optimal(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        """The flow of T(x) = 2 x + 3 between N(0, 1) and N(3, 4)."""
        s = expand_time(t, x)
        return 3 + (x - 3 * s) / (1 + s)

    x0 = randn(4000, 1)
    w2 = float((x0 + 3).square().mean().sqrt())  # of the sample and its image
    assert float(normalised_path_energy(optimal, x0, w2)) < 1e-8


def test_independent_pairs_waste_the_energy_that_is_known() -> None:
    # CondOT from N(0, 1) to N(0, 4): x_t = c_t x_0 with c_t^2 = (1 - t)^2 + 4 t^2, so the energy is the integral of
    # c_t'^2, here by quadrature, and W_2^2 = (2 - 1)^2
    one = torch.ones(1, dtype=torch.float64)
    mixture = GaussianMixture(one, torch.zeros(1, 1, dtype=torch.float64), 4 * one[:, None, None])
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    expected = (((5 * t - 1) ** 2) / ((1 - t) ** 2 + 4 * t**2)).mean()
    x0 = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # of unit variance
    field = mixture.velocity_field(CondOT())
    assert float(path_energy(field, x0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(normalised_path_energy(field, x0, 1.0)) == pytest.approx(float(expected) - 1, rel=1e-4)


def test_too_little_energy_counts_as_too_much() -> None:
    def still(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        return torch.zeros_like(x)

    assert normalised_path_energy(still, randn(5, 2), torch.tensor(2.0)) == 1
    with pytest.raises(ValueError, match=r"w2 is 0\.0, but should be positive"):
        normalised_path_energy(still, randn(5, 2), 0.0)


# --- floors ----------------------------------------------------------------------------------------------------------


def test_the_floor_covers_the_mean_of_the_metric_between_fresh_samples() -> None:
    def metric(x: Tensor, y: Tensor) -> Tensor:
        return (x.mean(0) - y.mean(0)).square().sum()  # of mean 2 * 2 / n for standard normal rows

    n, inside = 50, 0
    for seed in range(100):
        floor = sampling_floor(metric, randn(2000, 2, seed=seed), n, torch.Generator().manual_seed(seed))
        assert floor.pairs == 20
        inside += abs(floor.mean - 4 / n) < 2.09 * floor.standard_error  # the t interval of 19 degrees of freedom
    assert 85 <= inside <= 99


def test_the_samples_of_a_floor_share_no_row() -> None:
    truth, seen = torch.arange(23.0)[:, None], []

    def metric(x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == y.shape == (3, 1)
        seen.extend([*x.flatten().tolist(), *y.flatten().tolist()])
        return x.sum()

    floor = sampling_floor(metric, truth, n=3, generator=torch.Generator().manual_seed(0))
    assert floor.pairs == 3 and len(seen) == len(set(seen)) == 18 and seen != sorted(seen)
    assert floor == sampling_floor(metric, truth, n=3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", METRICS)
def test_every_distance_has_a_floor_that_falls_with_the_size_of_the_samples(metric: Metric) -> None:
    truth = randn(800, 2)
    small, large = (sampling_floor(metric, truth, n, torch.Generator().manual_seed(0)) for n in (20, 200))
    assert small.mean > large.mean + 2 * small.standard_error > 0


def test_a_floor_of_one_pair_has_no_error_and_too_many_rows_are_refused() -> None:
    floor = sampling_floor(emd, randn(20, 2), n=10)
    assert isinstance(floor, Floor) and floor.pairs == 1 and math.isnan(floor.standard_error)
    for n in (0, 11):
        with pytest.raises(ValueError, match=f"n is {n}, but should be at least 1 and at most half of the 20 rows"):
            sampling_floor(emd, randn(20, 2), n=n)


@pytest.mark.parametrize("metric", [emd, wasserstein2, sliced_wasserstein, mmd, energy_distance])
def test_whole_numbers_are_refused_not_truncated(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        metric(torch.tensor([[0, 0]]), torch.tensor([[1, 1]]))


@pytest.mark.parametrize("metric", [emd, wasserstein2])
def test_transport_of_nan_is_refused(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="y holds values that are not finite"):
        metric(torch.zeros(2, 1), torch.tensor([[0.0], [math.nan]]))


def test_settings_without_meaning_are_refused() -> None:
    x = torch.zeros(2, 2)
    for call, name in (
        (lambda: sliced_wasserstein(x, x, projections=0), "projections is 0"),
        (lambda: sliced_wasserstein(x, x, order=0), "order is 0"),
        (lambda: bits_per_dim(torch.zeros(1), 0), "dims is 0"),
        (lambda: bits_per_dim(torch.zeros(1), 2, bin_width=-1.0), "bin_width is -1.0"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
