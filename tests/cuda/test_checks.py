"""The checks of `benchmarks.gpu_checks`, on the CPU and on a CUDA card where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_checks
from benchmarks.gpu_checks import CHECKS, LOSSES, Check, Place, Resident, SameDraws, Trainee, against_float64, run_check

CPU = torch.device("cpu")
NO_CARD = not torch.cuda.is_available()
CUDA = [pytest.mark.cuda, pytest.mark.skipif(NO_CARD, reason="torch sees no CUDA device")]
REHEARSED = pytest.mark.slow  # the rehearsal of the command runs it on the CPU too, where it has to pass


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *(
            pytest.param(name, "cpu", marks=[REHEARSED] if check.needs is None else [])
            for name, check in CHECKS.items()
        ),
        *(pytest.param(name, "cuda", marks=CUDA) for name in CHECKS),
    ],
)
def test_a_check_passes(name: str, device: str) -> None:
    outcome = run_check(name, torch.device(device))
    if outcome.left_out:
        pytest.skip(outcome.reason)
    assert outcome.passed, str(outcome)


def test_draws_are_the_same_numbers_in_every_dtype() -> None:
    drawn = []
    for dtype in (torch.float32, torch.float64):
        with SameDraws(3):
            signs = torch.randint(0, 2, (5,))
            drawn.append((torch.randn(5, dtype=dtype), torch.rand((2, 3), dtype=dtype), signs))
    for small, large in zip(*drawn, strict=True):
        assert torch.equal(small, large.to(small.dtype))
    assert drawn[0][0].dtype == torch.float32


def test_an_error_of_float32_alone_is_seen() -> None:
    def compute(place: Place) -> list[Tensor]:
        x = torch.randn(100, dtype=place.dtype)
        return [x, x * (1 + 1e-4 * (place.dtype == torch.float32))]

    assert against_float64(compute)(CPU) == pytest.approx(1e-4, rel=1e-2)


def test_a_result_that_is_not_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = against_float64(lambda place: [torch.ones(2), torch.full((2,), math.nan), torch.ones(2)])
    monkeypatch.setitem(CHECKS, "nan", Check(error, 1.0))
    assert not run_check("nan", CPU).passed


def test_a_result_on_another_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a result is on meta, but should be on cpu"):
        against_float64(lambda place: [torch.ones(2, device="meta")])(CPU)


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (lambda loss: loss * loss.item(), "item"),
        (lambda loss: loss + torch.ones(3).to(loss.device).sum(), "copied from cpu to meta"),
        (lambda loss: (loss + torch.ones(3)).sum(), "device"),
    ],
    ids=["reads a value", "copies", "mixes devices"],
)
def test_a_step_that_waits_or_leaves_the_device_is_an_error(disturb, message: str) -> None:
    def make(place: Place) -> Trainee:
        trainee = LOSSES["cfm"](place)

        def loss(network: nn.Module) -> Tensor:
            total = trainee.loss(network)
            assert isinstance(total, Tensor)
            return disturb(total)

        return Trainee(trainee.network, loss)

    with pytest.raises(RuntimeError, match=message):
        gpu_checks.waits(make, CPU)


def test_products_of_tensors_on_one_device_are_no_copies() -> None:
    with Resident():
        assert float((torch.ones(3) * torch.tensor(2.0)).to(torch.float64).sum()) == 6


def test_a_run_that_goes_on_from_other_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    from pipelines.training import checkpoints

    load = checkpoints.load

    def disturbed(path):
        found = load(path)
        if found is not None:
            found[0]["average.last.bias"] += 1e-3
        return found

    monkeypatch.setattr(checkpoints, "load", disturbed)
    outcome = run_check("checkpoint and resume", CPU)
    assert 0 < outcome.error < math.inf
    assert not outcome.passed


def test_an_exception_is_a_failure_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> float:
        raise ValueError("no such thing\nand more")

    monkeypatch.setitem(CHECKS, "broken", Check(broken, 1e-3))
    outcome = run_check("broken", CPU)
    assert not outcome.passed
    assert str(outcome) == "broken: error inf, tolerance 0.001 (ValueError: no such thing)"


def test_a_check_whose_package_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "missing", Check(lambda device: 1.0, 0.0, needs="no_such_package"))
    outcome = run_check("missing", CPU)
    assert outcome.passed
    assert outcome.reason == "no_such_package is not installed"
