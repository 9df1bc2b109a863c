"""The training loop: AdamW with warm-up and cosine decay, an averaged network, early stopping, checkpoints, throughput.

The loop is independent of data and loss: a function returns the terms of the loss for each step. All randomness of a
step comes from one generator, whose state is part of the checkpoint, so a run that was killed and resumed ends with the
same weights, bit for bit, as an uninterrupted one (on CPU). A validation draws nothing from that generator, so it does
not change the steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowmatch_core.averaging import polyak_update, ramped_step
from pipelines.base import ranks
from pipelines.base.errors import UserError
from pipelines.training import checkpoints, distributed

if TYPE_CHECKING:
    from pipelines.config.params import Fit


CHECKPOINT_SECONDS = 1.0  # minimum time between two checkpoints
CHECKPOINT_SHARE = 0.02  # maximum share of the time spent on checkpoints
LINE_SECONDS = 2.0  # minimum time between two log lines of a seed

Step = Callable[[nn.Module, nn.Module, torch.Generator, float], Mapping[str, Tensor]]
"""`(network, averaged network, generator, share of the steps done) -> terms`; "loss" is minimised, all are logged."""


@dataclass(frozen=True)
class Progress:
    """One row of the loss curve: the mean of each term since the previous row."""

    step: int
    steps: int
    terms: Mapping[str, float]
    steps_per_second: float
    seconds: float

    def __str__(self) -> str:
        terms = "  ".join(f"{name} {value:.4f}" for name, value in self.terms.items())
        left = (self.steps - self.step) / self.steps_per_second
        return f"step {self.step}/{self.steps}  {terms}  {self.steps_per_second:.0f} steps/s  {left:.0f} s left"


@dataclass(frozen=True)
class Validation:
    """Checks of the averaged network during training, of which the best one is kept.

    Attributes:
        loss: Validation loss of a network, on the same rows, times and noises at each check.
        every: Steps between two checks.
        patience: Checks without an improvement after which training stops; None: it does not stop.
        at_start: Whether the first check precedes the first step, so that the given network may be the best one.
    """

    loss: Callable[[nn.Module], float]
    every: int
    patience: int | None
    at_start: bool = False


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        network: Averaged network: that of the smallest validation loss, or the last one without validation.
        curve: Loss curve, one row per `log_every` steps and per check; a check has `val_loss`. The terms of a second
            phase begin with `tune_`.
        seconds: Training time.
        chosen_step: Step of the network; None without validation.
    """

    network: nn.Module
    curve: list[dict[str, float]]
    seconds: float
    chosen_step: int | None = None


def learning_rate(step: int, fit: Fit) -> float:
    """Return the learning rate: a half cosine from `fit.lr` to its end at `fit.steps`, with linear warm-up."""
    warm = min(1.0, (step + 1) / (fit.warmup + 1))
    share = 0.5 * (1.0 + math.cos(math.pi * step / fit.steps))
    return fit.lr * warm * (fit.lr_end + (1.0 - fit.lr_end) * share)


def adam_betas(step: int, fit: Fit) -> tuple[float, float]:
    """Return AdamW's betas; the second changes linearly from `fit.adam_betas` to its end at `fit.steps`."""
    first, second = fit.adam_betas
    end = second if fit.adam_beta2_end is None else fit.adam_beta2_end
    return first, second + step / fit.steps * (end - second)


def train(
    network: nn.Module,
    step_terms: Step,
    fit: Fit,
    generator: torch.Generator,
    checkpoint: Path,
    report: Callable[[Progress], None],
    seek: Callable[[int], None] = lambda step: None,
    memory: nn.Module | None = None,
    validation: Validation | None = None,
) -> Trained:
    """Train a network in place and return its averaged copy, the best one if there is a validation.

    Args:
        network: Freshly initialised network on its training device.
        step_terms: Returns the terms of the loss at one step.
        fit: Training settings.
        generator: Only source of randomness in `step_terms`.
        checkpoint: File to resume from and to save to; the caller removes it after the result is written.
        report: Called with every row of the loss curve.
        seek: Called once with the first step, for data that are read in order.
        memory: State that `step_terms` carries between steps; it is part of the checkpoint.
        validation: Checks by which the network is chosen and training stops early.

    Raises:
        UserError: A loss is not finite, or the processes of this training do not begin at the same state.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=fit.lr,
        betas=fit.adam_betas,
        eps=fit.adam_eps,
        weight_decay=fit.weight_decay,
        fused=True,
    )
    curve: list[dict[str, float]] = []
    modules = {"network": network, "average": average, **({} if memory is None else {"memory": memory})}
    if validation is not None:
        modules["best"] = copy.deepcopy(average)
    start, before = _restore(checkpoint, modules, optimizer, generator, curve)
    weights = [float(parameter.detach().double().sum()) for parameter in network.parameters()]
    distributed.agree("the checkpoint or the first weights", [start, *weights], generator.device)
    divided = distributed.sharded(network), distributed.sharded(average)
    if validation is not None and validation.at_start and not curve:
        curve.append({"step": 0, "val_loss": _checked(validation, divided[1], 0, fit)})
    seek(start)
    rows: list[dict[str, Tensor]] = []  # of the steps since the last row of the curve
    began = saved = time.monotonic()
    pause = CHECKPOINT_SECONDS
    for step in range(start, fit.steps):
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = learning_rate(step, fit), adam_betas(step, fit)
        terms = step_terms(*divided, generator, step / fit.steps)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        if fit.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), fit.clip)
        optimizer.step()
        polyak_update(average, network, ramped_step(fit.ema_step, step, fit.ema_ramp))
        rows.append({name: term.detach() for name, term in terms.items()})
        done = step + 1
        checked = validation is not None and (done % validation.every == 0 or done == fit.steps)
        if done % fit.log_every and done != fit.steps and not checked:
            continue
        names = dict.fromkeys(name for row in rows for name in row)
        means = {name: float(sum(row[name] for row in rows if name in row)) / len(rows) for name in names}
        if not math.isfinite(means["loss"]):
            raise _diverged(rows, done - len(rows), fit)
        rows = []
        if validation is not None and checked:
            means["val_loss"] = _checked(validation, divided[1], done, fit)
            if means["val_loss"] < min((row["val_loss"] for row in curve if "val_loss" in row), default=math.inf):
                modules["best"].load_state_dict(average.state_dict())
        now = time.monotonic()
        curve.append({"step": done, **means})
        stopped = validation is not None and checked and _waited(curve) == validation.patience
        last = done if stopped else fit.steps
        report(Progress(done, last, means, (done - start) / (now - began), before + now - began))
        due = now - saved > pause and done < last
        if due or done == last:
            _check_weights(modules, done, fit)
        if due and ranks.is_first():
            _save(checkpoint, modules, optimizer, generator, curve, done, before + now - began)
            saved = time.monotonic()
            pause = max(CHECKPOINT_SECONDS, (saved - now) / CHECKPOINT_SHARE)
        if stopped:
            break
    seconds = before + time.monotonic() - began
    if validation is None:
        return Trained(average, curve, seconds)
    return Trained(modules["best"], curve, seconds, _chosen_step(curve))


def tuned(
    first: Trained,
    train_on: Callable[[nn.Module, Callable[[Progress], None]], Trained],
    report: Callable[[Progress], None],
) -> Trained:
    """Train the network of a first phase on, and return what both phases make together.

    The steps of the second phase are counted on from the last one of the first. Its network is that of the first phase
    if no check was better than the one before its first step.

    Args:
        first: Result of the first phase.
        train_on: Trains a network in place in the second phase, whose validation has `at_start`.
        report: Called with every row of the second phase.
    """
    done = int(first.curve[-1]["step"])

    def named(terms: Mapping[str, float]) -> dict[str, float]:
        return {f"tune_{name}": value for name, value in terms.items()}

    def shifted(row: Progress) -> None:
        last, seconds = done + row.steps, first.seconds + row.seconds
        report(Progress(done + row.step, last, named(row.terms), row.steps_per_second, seconds))

    second = train_on(copy.deepcopy(first.network).requires_grad_(True), shifted)
    rows = [(int(row["step"]), named({k: v for k, v in row.items() if k != "step"})) for row in second.curve]
    (_, start), *later = rows
    curve = [*first.curve[:-1], {**first.curve[-1], **start}]
    curve += [{"step": done + step, **terms} for step, terms in later]
    chosen = first.chosen_step if second.chosen_step == 0 else done + int(second.chosen_step or 0)
    return Trained(second.network, curve, first.seconds + second.seconds, chosen)


def _checked(validation: Validation, network: nn.Module, step: int, fit: Fit) -> float:
    """Return the validation loss of a network.

    Raises:
        UserError: It is not finite.
    """
    loss = validation.loss(network)
    if not math.isfinite(loss):
        raise _advice(f"the validation loss is {loss} at step {step}", fit)
    return loss


def _chosen_step(curve: list[dict[str, float]]) -> int:
    """Return the step of the smallest validation loss; the first one of equals."""
    return int(min((row for row in curve if "val_loss" in row), key=lambda row: row["val_loss"])["step"])


def _waited(curve: list[dict[str, float]]) -> int:
    """Return the number of checks since the best one."""
    best = _chosen_step(curve)
    return sum("val_loss" in row and row["step"] > best for row in curve)


def _diverged(rows: list[dict[str, Tensor]], done: int, fit: Fit) -> UserError:
    """Return the error about the first of some steps whose loss is not finite, and the term that made it so."""
    for step, row in enumerate(rows, done + 1):
        values = {name: float(term) for name, term in row.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if "loss" in bad:
            term = next((name for name in bad if name != "loss"), "loss")
            what = "the loss" if term == "loss" else f"the term {term!r} of the loss"
            return _advice(f"{what} is {values[term]} at step {step}", fit)
    return _advice(f"the mean loss of steps {done + 1} to {done + len(rows)} is not finite", fit)


def _check_weights(modules: Mapping[str, nn.Module], step: int, fit: Fit) -> None:
    """Raise an error for weights that are not finite, before they replace those of the last checkpoint or a result."""
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise _advice(f"{prefix}.{name} holds a number that is not finite after step {step}", fit)


def _advice(problem: str, fit: Fit) -> UserError:
    return UserError(
        f"{problem}; expected a finite number, so lower lr ({fit.lr:g}) in params.yaml or look for extreme values in "
        "the data."
    )


def _save(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    curve: list[dict[str, float]],
    step: int,
    seconds: float,
) -> None:
    tensors = {"generator": generator.get_state()}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    checkpoints.save(path, tensors, {"step": step, "seconds": seconds, "curve": curve})


def _restore(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    curve: list[dict[str, float]],
) -> tuple[int, float]:
    """Restore the state of the checkpoint; return the next step and the seconds spent so far."""
    found = checkpoints.load(path)
    if found is None:
        return 0, 0.0
    tensors, meta = found
    generator.set_state(tensors["generator"])
    for prefix, module in modules.items():
        names = module.state_dict()
        module.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in names})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    curve.extend(meta["curve"])
    return int(meta["step"]), float(meta["seconds"])
