"""Laws of the time grids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from flowmatch_core.solvers import EDM, Nodes, Power, TimeGrid, Uniform, Warped

ROUGH = Nodes([0.0, 0.01, 0.5, 0.52, 0.9, 1.0])
GRIDS = (Uniform(), Warped(), Warped(0.0), Warped(1.0), Power(1), Power(3), EDM(), EDM(3.0, 10.0, 0.1), ROUGH)
GRIDS += tuple(grid.backward() for grid in GRIDS)

each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@each_grid
def test_it_maps_the_interval_onto_itself_and_increases(grid: TimeGrid) -> None:
    times = grid.nodes(1000)
    assert (times[0], times[-1]) == (0, 1)
    assert all(a < b for a, b in itertools.pairwise(times))


@each_grid
def test_rate_is_the_derivative(grid: TimeGrid) -> None:
    step = 1e-6
    for i in range(1, 60):
        s = i / 61  # on no node
        slope = (grid.time(s + step) - grid.time(s - step)) / (2 * step)
        assert grid.rate(s) == pytest.approx(slope, rel=1e-5, abs=1e-9)


@each_grid
def test_rate_is_right_at_both_ends(grid: TimeGrid) -> None:
    step = 1e-7
    assert grid.rate(0) == pytest.approx((grid.time(step) - grid.time(0)) / step, rel=1e-3, abs=1e-5)
    assert grid.rate(1) == pytest.approx((grid.time(1) - grid.time(1 - step)) / step, rel=1e-3, abs=1e-5)


@each_grid
def test_rate_is_continuous(grid: TimeGrid) -> None:
    for i in range(1, 5):
        assert grid.rate(i / 5 - 1e-9) == pytest.approx(grid.rate(i / 5 + 1e-9), rel=1e-4, abs=1e-9)


@each_grid
def test_backward_is_the_mirror_image(grid: TimeGrid) -> None:
    for s in (0.0, 0.1, 0.5, 0.77, 1.0):
        assert grid.backward().time(s) == pytest.approx(1 - grid.time(1 - s), abs=1e-12)
        assert grid.backward().rate(s) == pytest.approx(grid.rate(1 - s), abs=1e-12)
        assert grid.backward().backward().time(s) == pytest.approx(grid.time(s), abs=1e-12)


@each_grid
def test_position_is_the_inverse(grid: TimeGrid) -> None:
    for s in (0.0, 1e-3, 0.2, 0.5, 0.77, 1.0):
        assert grid.time(grid.position(grid.time(s))) == pytest.approx(grid.time(s), abs=1e-12)
        assert 0 <= grid.position(grid.time(s)) <= 1


@pytest.mark.parametrize("steps", [5, 49, 50])
def test_nodes_are_met_exactly(steps: int) -> None:
    times = torch.rand(steps - 1, generator=torch.Generator().manual_seed(steps), dtype=torch.float64).sort().values
    times = torch.cat([times.new_zeros(1), times, times.new_ones(1)])
    assert Nodes(times).nodes(steps) == pytest.approx(times.tolist(), abs=1e-12)
    assert Nodes(times) == Nodes(times.tolist())


def test_equal_nodes_are_the_uniform_grid() -> None:
    grid = Nodes([0.0, 0.25, 0.5, 0.75, 1.0])
    for s in (0.0, 0.1, 0.3, 0.99):
        assert grid.time(s) == pytest.approx(s) and grid.rate(s) == pytest.approx(1)


def test_noise_levels_of_edm() -> None:
    """The levels of the paper's equation 5, with their ends stretched to 0 and 1."""
    grid, steps = EDM(rho=7.0, noisiest=80.0, cleanest=0.002), 10
    roots = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps + 1, dtype=torch.float64)
    times = 1 / (1 + roots**7)
    stretched = (times - times[0]) / (times[-1] - times[0])
    assert grid.nodes(steps) == pytest.approx(stretched.tolist())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Warped(1.5), "p is 1.5"),
        (lambda: Power(0), "rho is 0"),
        (lambda: Power(1.5), "rho is 1.5"),  # type: ignore[arg-type]
        (lambda: EDM(rho=0.5), "rho is 0.5"),
        (lambda: EDM(noisiest=0.001), "cleanest and noisiest are 0.002 and 0.001"),
        (lambda: Nodes([0.0, 0.5]), "times is"),
        (lambda: Nodes([0.0, 0.5, 0.5, 1.0]), "should increase"),
        (lambda: Uniform().nodes(0), "steps is 0"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_nodes_that_do_not_increase_are_named() -> None:
    for times, pair in (([0.0, math.nan, 1.0], "0.0 before nan"), ([0.0, 0.6, 0.5, 1.0], "0.6 before 0.5")):
        with pytest.raises(ValueError, match=f"times holds {pair}"):
            Nodes(times)
