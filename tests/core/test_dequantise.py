"""Laws of dequantisation, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.distributions import Categorical

from flowmatch_core.dequantise import Dequantiser, importance_bound
from flowmatch_core.metrics import bits_per_dim

DEQUANTISERS = (Dequantiser(8), Dequantiser(8, -1.0, 1.0), Dequantiser(8, logit=0.05))
each = pytest.mark.parametrize("dequantiser", DEQUANTISERS, ids=str)


def draw(dequantiser: Dequantiser, levels: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return dequantiser(levels, torch.Generator().manual_seed(seed), torch.float64)


@each
def test_levels_come_back(dequantiser: Dequantiser) -> None:
    levels = torch.arange(8).repeat(1000, 1)
    assert (dequantiser.quantise(draw(dequantiser, levels)[0]) == levels).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [3, 256, 65_536])
@pytest.mark.parametrize("options", [{}, {"low": -1.0}, {"low": 100.0, "high": 103.0}, {"logit": 1e-3}], ids=str)
def test_levels_come_back_from_the_ends_of_their_bins(
    options: dict[str, float], levels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dequantiser, k = Dequantiser(levels, **options), torch.arange(levels)[None]
    largest = 1 - torch.finfo(dtype).eps / 2  # that torch.rand may return
    for u in (0.0, torch.finfo(dtype).eps, 0.5, 1 - 2e-7, largest):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **other: torch.full(shape, u, dtype=other["dtype"]))
        x, log_det = dequantiser(k, dtype=dtype)
        assert (dequantiser.quantise(x) == k).all() and x.dtype == dtype and log_det.isfinite().all()
        exact = Dequantiser(levels, **options)._data(k.double() + u)
        width = (exact - dequantiser._data(k.double())).abs().max() + 1e-3
        assert float((x - exact).abs().max()) < 0.02 * max(1.0, float(width))  # it stays where it was drawn


def test_levels_out_of_range_are_an_error() -> None:
    for bad in (-1, 8, 2.5):
        with pytest.raises(ValueError, match=f"levels holds {bad}, but should hold whole numbers from 0 to 7"):
            Dequantiser(8)(torch.tensor([[0, bad]]))
    fine = Dequantiser(65_536, 1000.0, 1003.0), torch.arange(65_536)[None]  # bins of less than a float32
    with pytest.raises(ValueError, match=r"which data of dtype torch\.float32 cannot tell from the next one"):
        fine[0](fine[1])
    assert (fine[0].quantise(fine[0](fine[1], dtype=torch.float64)[0]) == fine[1]).all()


@each
def test_log_det_is_that_of_autograd(dequantiser: Dequantiser) -> None:
    levels = torch.tensor([[0.0, 3.0, 7.0]], dtype=torch.float64, requires_grad=True)
    log_det = draw(dequantiser, levels)[1]
    jacobian = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
        lambda levels: draw(dequantiser, levels)[0][0], levels
    )[:, 0]
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)


@each
def test_noise_fills_its_bin_evenly(dequantiser: Dequantiser) -> None:
    x, _ = draw(dequantiser, torch.full((100_000, 1), 3))
    y = (x - dequantiser.low) / (dequantiser.high - dequantiser.low)
    if dequantiser.logit is not None:
        y = (x.sigmoid() - dequantiser.logit) / (1 - 2 * dequantiser.logit)
    u = 8 * y - 3
    assert float(u.min()) == pytest.approx(0, abs=1e-3) and float(u.max()) == pytest.approx(1, abs=1e-3)
    assert float(u.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / 100_000))


def test_bits_of_a_uniform_law_do_not_depend_on_the_range() -> None:
    """A density that is uniform on its range codes 256 levels in eight bits, whatever the range."""
    levels = torch.randint(0, 256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 256.0)):
        x, log_det = draw(Dequantiser(256, low, high), levels)
        log_prob = torch.full((50,), -48 * math.log(high - low), dtype=torch.float64)
        torch.testing.assert_close(bits_per_dim(log_prob + log_det, 48), torch.full((50,), 8.0, dtype=torch.float64))
        assert x.shape == levels.shape
    x, log_det = draw(Dequantiser(256, logit=0.05), levels)
    # the density that the logit gives to uniform noise on [margin, 1 - margin]
    log_prob = (torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x) - math.log(0.9)).sum((1, 2, 3))
    torch.testing.assert_close(bits_per_dim(log_prob + log_det, 48), torch.full((50,), 8.0, dtype=torch.float64))


def test_bound_is_below_the_log_probability_and_tightens() -> None:
    """Levels of a known law under a density whose mass in each bin is that law, spread unevenly."""
    law, n = Categorical(torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)), 20_000
    levels = torch.arange(4).repeat(n)[:, None]

    def log_density(x: torch.Tensor) -> torch.Tensor:
        """On [0, 1): each bin holds its probability, twice as dense in its right half as the left is on average."""
        place = 4 * x - (4 * x).floor()
        uneven = torch.where(place < 0.5, 0.5, 1.5)
        return (law.log_prob((4 * x).floor()) + math.log(4) + uneven.log()).squeeze(-1)

    exact = law.log_prob(torch.arange(4))
    bounds = []
    for draws in (1, 4, 32):
        each_draw = []
        for i in range(draws):
            x, log_det = draw(Dequantiser(4), levels, seed=i)
            each_draw.append(log_density(x) + log_det)
        bounds.append(importance_bound(torch.stack(each_draw)).reshape(n, 4).mean(0))
    assert (bounds[0] < bounds[1]).all() and (bounds[1] < bounds[2]).all() and (bounds[2] < exact + 1e-3).all()
    # E log of 0.5 or 1.5 with equal chances
    torch.testing.assert_close(bounds[0], exact + math.log(0.75) / 2, atol=0.02, rtol=0)
    torch.testing.assert_close(bounds[2], exact, atol=0.02, rtol=0)


def test_randomness_comes_from_the_generator_alone() -> None:
    levels, state = torch.zeros(3, 2, dtype=torch.uint8), torch.get_rng_state()
    a, b, c = (draw(Dequantiser(), levels, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dequantiser(0), "levels is 0"),
        (lambda: Dequantiser(low=1.0), "low and high are 1.0 and 1.0"),
        (lambda: Dequantiser(logit=0.7), "logit is 0.7"),
        (lambda: Dequantiser(low=-1.0, logit=0.1), "low and high are -1.0 and 1.0"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
