"""The training loop: resumed runs end at the same bits, the average is the average, a bad loss stops it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.base import device, files
from pipelines.base.errors import UserError
from pipelines.config.params import Fit
from pipelines.training import loop
from pipelines.training.loop import Progress, Trained, Validation

FIT = Fit(
    network="mlp", steps=40, batch=16, lr=1e-2, warmup=5, weight_decay=0.01,
    adam_betas=(0.9, 0.999), adam_beta2_end=0.8, adam_eps=1e-8, ema_step=0.1, log_every=7,
)  # fmt: skip


class Killed(Exception):
    pass


def terms(network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float) -> Mapping[str, Tensor]:
    """Bootstraps from the average and looks at the share that is done: both must come back from a checkpoint."""
    x = torch.randn(16, 2, generator=generator)
    with torch.no_grad():
        target = (1 + progress) * x.sum(1, keepdim=True) + 0.5 * average(x)
    loss = (network(x) - target).square().mean()
    return {"loss": loss, "twice": 2 * loss.detach()}


def fitted(
    checkpoint: Path, stop_at: int | None = None, fit: Fit = FIT, validation: Validation | None = None
) -> tuple[Trained, list[Progress]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
    rows: list[Progress] = []

    def report(row: Progress) -> None:
        rows.append(row)

    def step(
        network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        if stop_at is not None and rows and rows[-1].step >= stop_at:
            raise Killed
        return terms(network, average, generator, progress)

    generator = torch.Generator().manual_seed(1)
    return loop.train(network, step, fit, generator, checkpoint, report, validation=validation), rows


def norm(network: nn.Module) -> float:
    """A validation loss that is a function of the network alone."""
    return float(sum(parameter.square().sum() for parameter in network.parameters()))


def falls_until(step: int) -> Callable[[nn.Module], float]:
    """A validation loss that falls until a step of training, with a check every 4 steps, and then rises."""
    checks = iter(range(4, 1000, 4))
    return lambda network: abs(next(checks) - step)


@pytest.mark.parametrize("stop_at", [7, 21, 35])
def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    whole, _ = fitted(tmp_path / "whole")
    with pytest.raises(Killed):
        fitted(tmp_path / "killed", stop_at)
    resumed, rows = fitted(tmp_path / "killed")
    assert rows[0].step == stop_at + 7 or rows[0].step == FIT.steps
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert resumed.curve == whole.curve


@pytest.mark.parametrize(("patience", "steps"), [(1, 20), (3, 28), (6, 40), (None, 40)])
def test_training_stops_after_checks_without_an_improvement_and_keeps_the_best_network(
    tmp_path: Path, patience: int | None, steps: int
) -> None:
    trained, rows = fitted(tmp_path / "c", validation=Validation(falls_until(16), 4, patience))
    assert trained.chosen_step == 16
    assert trained.curve[-1]["step"] == rows[-1].step == rows[-1].steps == steps
    assert [row["step"] for row in trained.curve if "val_loss" in row] == list(range(4, steps + 1, 4))
    seen: dict[int, dict[str, Tensor]] = {}
    done = iter(range(4, 1000, 4))

    def noted(network: nn.Module) -> float:
        seen[next(done)] = {name: value.clone() for name, value in network.state_dict().items()}
        return 0.0

    fitted(tmp_path / "n", validation=Validation(noted, 4, None))
    assert all(torch.equal(value, seen[16][name]) for name, value in trained.network.state_dict().items())
    assert not all(torch.equal(value, seen[40][name]) for name, value in trained.network.state_dict().items())


def test_a_check_does_not_change_the_steps(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path / "plain")
    last = [0.0]

    def loss(network: nn.Module) -> float:
        last[0] -= 1.0  # the last network is the best
        return last[0]

    checked, _ = fitted(tmp_path / "checked", validation=Validation(loss, 5, 1))
    assert checked.chosen_step == FIT.steps
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, checked.network.state_dict()[name]), name


@pytest.mark.parametrize("stop_at", [10, 20, 28])
def test_a_killed_run_with_checks_resumes_to_the_same_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """The best network and the checks since it are part of the checkpoint."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    # the weights decay and the average lags behind, so the distance to one of its norms has its minimum on the way
    norms = [row for row in fitted(tmp_path / "n", validation=Validation(norm, 5, None))[0].curve if "val_loss" in row]
    target = norms[3]["val_loss"]

    def loss(network: nn.Module) -> float:
        return abs(norm(network) - target)

    whole, _ = fitted(tmp_path / "whole", validation=Validation(loss, 5, 3))
    assert (whole.chosen_step, whole.curve[-1]["step"]) == (20, 35)
    with pytest.raises(Killed):
        fitted(tmp_path / "killed", stop_at, validation=Validation(loss, 5, 3))
    resumed, rows = fitted(tmp_path / "killed", validation=Validation(loss, 5, 3))
    assert rows[0].step > stop_at
    assert (resumed.chosen_step, resumed.curve) == (whole.chosen_step, whole.curve)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def in_two_phases(folder: Path, second: list[float]) -> tuple[Trained, Trained, list[Progress]]:
    """Train in two phases, the second with the given validation losses every 5 steps, the first one before a step."""
    first, _ = fitted(folder / "first", validation=Validation(falls_until(16), 4, None))
    rows: list[Progress] = []
    losses = iter(second)

    def train_on(network: nn.Module, report: Callable[[Progress], None]) -> Trained:
        checks = Validation(lambda network: next(losses), 5, None, at_start=True)
        fit, generator = FIT.model_copy(update={"steps": 20}), torch.Generator().manual_seed(2)
        return loop.train(network, terms, fit, generator, folder / "second", report, validation=checks)

    return first, loop.tuned(first, train_on, rows.append), rows


def test_a_second_phase_that_makes_nothing_better_leaves_the_network_of_the_first(tmp_path: Path) -> None:
    first, both, _ = in_two_phases(tmp_path, [3.0, 3.5, 3.0, 4.0, 9.0])
    assert both.chosen_step == first.chosen_step == 16
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, both.network.state_dict()[name]), name


def test_a_second_phase_goes_on_from_the_network_that_was_kept_and_counts_on(tmp_path: Path) -> None:
    first, both, rows = in_two_phases(tmp_path, [3.0, 2.5, 2.0, 4.0, 9.0])
    assert both.chosen_step == FIT.steps + 10
    assert any(not torch.equal(v, both.network.state_dict()[n]) for n, v in first.network.state_dict().items())
    steps = [row["step"] for row in both.curve]
    assert steps == sorted(set(steps))
    assert steps[-1] == rows[-1].step == rows[-1].steps == FIT.steps + 20
    checks = {row["step"]: row["tune_val_loss"] for row in both.curve if "tune_val_loss" in row}
    assert checks == {40: 3.0, 45: 2.5, 50: 2.0, 55: 4.0, 60: 9.0}
    assert [row["step"] for row in both.curve if "loss" in row] == [row["step"] for row in first.curve]
    assert both.seconds > first.seconds
    alone, losses = copy.deepcopy(first.network).requires_grad_(True), iter([2.5, 2.0, 4.0, 9.0])
    again = loop.train(
        alone, terms, FIT.model_copy(update={"steps": 20}), torch.Generator().manual_seed(2), tmp_path / "alone",
        lambda row: None, validation=Validation(lambda network: next(losses), 5, None),
    )  # fmt: skip
    for name, value in again.network.state_dict().items():
        assert torch.equal(value, both.network.state_dict()[name]), name


def test_a_validation_loss_that_is_not_finite_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the validation loss is nan at step 10; expected a finite number"):
        fitted(tmp_path / "c", validation=Validation(lambda network: torch.nan, 10, None))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        fitted(path, 21)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint .* is damaged; delete it"):
        fitted(path)


def test_the_curve_holds_means_and_all_steps(tmp_path: Path) -> None:
    trained, rows = fitted(tmp_path / "c")
    assert [row["step"] for row in trained.curve] == [7, 14, 21, 28, 35, 40]
    assert all(row["twice"] == pytest.approx(2 * row["loss"]) for row in trained.curve)
    every, _ = fitted(tmp_path / "d", fit=FIT.model_copy(update={"log_every": 1}))
    losses = [row["loss"] for row in every.curve]
    assert trained.curve[1]["loss"] == pytest.approx(sum(losses[7:14]) / 7)
    assert trained.curve[-1]["loss"] == pytest.approx(sum(losses[35:40]) / 5)
    assert [row.step for row in rows] == [7, 14, 21, 28, 35, 40]


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    """With a step of 1 the average is the network itself; with a small one it stays near the start."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)).state_dict()["0.weight"].clone()
    fast, _ = fitted(tmp_path / "fast", fit=FIT.model_copy(update={"ema_step": 1.0}))
    slow, _ = fitted(tmp_path / "slow", fit=FIT.model_copy(update={"ema_step": 1e-6}))
    moved = (fast.network.state_dict()["0.weight"] - start).abs().max()
    assert moved > 1e-2
    assert (slow.network.state_dict()["0.weight"] - start).abs().max() < 1e-3 * moved


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [loop.learning_rate(step, FIT) for step in range(FIT.steps + 1)]
    assert rates.index(max(rates)) == FIT.warmup
    assert rates[: FIT.warmup] == sorted(rates[: FIT.warmup])
    assert rates[FIT.warmup :] == sorted(rates[FIT.warmup :], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert 0 < rates[0] < FIT.lr


@pytest.mark.parametrize("end", [0.01, 0.5, 1.0])
def test_the_learning_rate_ends_at_its_share_of_the_peak(end: float) -> None:
    fit = FIT.model_copy(update={"lr_end": end, "steps": 10_000})
    rates = [loop.learning_rate(step, fit) for step in range(fit.warmup, fit.steps)]
    assert rates[-1] == pytest.approx(end * fit.lr, rel=1e-4)
    assert rates == sorted(rates, reverse=True)
    middle = loop.learning_rate(fit.steps // 2, fit)
    assert middle == pytest.approx((1 + end) / 2 * fit.lr)


def test_the_weights_of_a_ramped_average_are_the_products_of_its_steps(tmp_path: Path) -> None:
    """Weights after n steps, from the networks of each step: sum_k tau_k prod_(j > k) (1 - tau_j) theta_k."""
    seen: list[Tensor] = []

    def noted(network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float) -> Any:
        seen.append(torch.cat([p.detach().flatten() for p in network.parameters()]).double())
        return terms(network, average, generator, progress)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
    fit = FIT.model_copy(update={"ema_ramp": 4.0, "ema_step": 0.1})
    found = loop.train(network, noted, fit, torch.Generator().manual_seed(1), tmp_path / "c", lambda row: None)
    seen.append(torch.cat([p.detach().flatten() for p in network.parameters()]).double())
    keep = [min(0.9, (1 + n) / (4 + n)) for n in range(fit.steps)]  # the decay, in the words of the recipe
    expected = math.prod(keep) * seen[0]
    for k in range(fit.steps):
        expected = expected + (1 - keep[k]) * math.prod(keep[k + 1 :]) * seen[k + 1]
    average = torch.cat([p.detach().flatten() for p in found.network.parameters()]).double()
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert (keep[0], keep[-1]) == (0.25, 0.9)


def test_the_gradient_is_scaled_down_to_its_largest_norm(tmp_path: Path) -> None:
    """A step of AdamW without memory and with a large epsilon is a step along the gradient, g / eps."""
    eps, lr = 1e6, 1e3
    moved: dict[float | None, Tensor] = {}
    for clip in (None, 0.05, 1e9):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
        before = torch.cat([p.detach().clone().flatten() for p in network.parameters()])
        fit = FIT.model_copy(
            update={"steps": 1, "warmup": 0, "lr": lr, "weight_decay": 0.0, "adam_betas": (0.0, 0.0),
                    "adam_beta2_end": None, "adam_eps": eps, "clip": clip}
        )  # fmt: skip
        loop.train(network, terms, fit, torch.Generator().manual_seed(1), tmp_path / "c", lambda row: None)
        after = torch.cat([p.detach().flatten() for p in network.parameters()])
        moved[clip] = (before - after) * eps / lr
    assert moved[None].norm() > 1
    assert float(moved[0.05].norm()) == pytest.approx(0.05, rel=0.02)  # the weights have 24 bits
    assert torch.equal(moved[1e9], moved[None])
    assert torch.cosine_similarity(moved[0.05], moved[None], dim=0) > 0.999


def test_the_second_beta_goes_along_a_line() -> None:
    fit = FIT.model_copy(update={"adam_betas": (0.25, 0.5), "adam_beta2_end": 0.75, "steps": 8})
    assert [loop.adam_betas(step, fit) for step in (0, 1, 4, 8)] == [
        (0.25, 0.5), (0.25, 0.53125), (0.25, 0.625), (0.25, 0.75)
    ]  # fmt: skip
    constant = FIT.model_copy(update={"adam_beta2_end": None})
    assert {loop.adam_betas(step, constant) for step in range(FIT.steps + 1)} == {FIT.adam_betas}


def test_a_step_knows_the_share_that_is_done(tmp_path: Path) -> None:
    shares = []

    def step(
        network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        shares.append(progress)
        return terms(network, average, generator, progress)

    fit = FIT.model_copy(update={"steps": 8})
    loop.train(nn.Linear(2, 1), step, fit, torch.Generator(), tmp_path / "c", lambda row: None)
    assert shares == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


@pytest.mark.parametrize("end", [None, 0.9])
def test_a_step_is_adams_with_the_betas_of_the_fit(tmp_path: Path, end: float | None) -> None:
    """Kingma and Ba's Algorithm 1, on gradients that are known: those of w * g are g."""
    betas, second = (0.3, 0.6), (0.6, 0.6, 0.6, 0.6) if end is None else (0.6, 0.675, 0.75, 0.825)
    changes = {"adam_betas": betas, "adam_beta2_end": end, "weight_decay": 0.0, "ema_step": 1.0, "steps": 4}
    fit, first = FIT.model_copy(update=changes), betas[0]
    gradients = [1.0, -2.0, 0.5, 3.0]
    left = iter(gradients)

    def terms(
        network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        return {"loss": next(left) * network(torch.ones(1, 1)).sum()}

    network = nn.Linear(1, 1, bias=False)
    mean, square, weight = 0.0, 0.0, float(network.weight.detach())
    for i, g in enumerate(gradients):
        mean, square = first * mean + (1 - first) * g, second[i] * square + (1 - second[i]) * g**2
        step = mean / (1 - first ** (i + 1)) / (square / (1 - second[i] ** (i + 1))) ** 0.5
        weight -= loop.learning_rate(i, fit) * step
    trained = loop.train(network, terms, fit, torch.Generator(), tmp_path / "c", lambda row: None)
    assert float(trained.network.state_dict()["weight"]) == pytest.approx(weight, rel=1e-5)


class Broken:
    """Terms of which some are not finite at one step, counted from 1; `only` in the gradient, if there are none."""

    def __init__(self, step: int, *bad: str) -> None:
        self.step, self.bad, self.done = step, bad, 0

    def __call__(
        self, network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
    ) -> Mapping[str, Tensor]:
        self.done += 1
        factor = torch.nan if self.done == self.step else 1.0
        direct = network(torch.ones(1, 2)).square().sum()
        if self.done == self.step and not self.bad:
            direct.register_hook(lambda gradient: gradient * torch.nan)
        parts = {name: direct * (factor if name in self.bad else 1.0) for name in ("direct", "bootstrap")}
        return {"loss": (factor if "loss" in self.bad else 1.0) * sum(parts.values()), **parts}


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (Broken(1, "loss"), "the loss is nan at step 1; expected a finite number, so lower lr"),
        (Broken(9, "loss"), "the loss is nan at step 9; "),
        (Broken(23, "bootstrap"), "the term 'bootstrap' of the loss is nan at step 23; "),
        (Broken(40, "direct", "bootstrap"), "the term 'direct' of the loss is nan at step 40; "),
        (Broken(21), "network.weight holds a number that is not finite after step 21; "),
        (Broken(40), "network.weight holds a number that is not finite after step 40; "),
    ],
    ids=["first", "loss", "term", "last", "gradient", "last gradient"],
)
def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: Broken, words: str
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    path = tmp_path / "checkpoint"
    network = nn.Linear(2, 1, bias=False)
    with pytest.raises(UserError, match=f"^{words}"):
        loop.train(network, terms, FIT, torch.Generator(), path, lambda row: None)
    good = (terms.step - 1) // FIT.log_every * FIT.log_every
    assert path.exists() == (good > 0)
    if good:
        tensors, meta = files.read_tensors(path)
        assert meta["step"] == good
        assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_a_cuda_device_that_is_not_there_is_named() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"device is 'cuda:{count}', but torch sees {count} CUDA devices"):
        device.resolve(f"cuda:{count}")
    assert device.resolve("cpu").type == "cpu"
    assert device.resolve("auto").type == ("cuda" if count else "cpu")
