"""Steps per second of training, with the data included."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from flow_matching.path import CondOTProbPath
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

from benchmarks.fields import DIM, batches, tabular
from benchmarks.peers import torchcfm_tutorial
from benchmarks.results import Cell, Claim, Result
from benchmarks.timing import side_by_side
from flowmatch_core.couplings import MinibatchOT
from flowmatch_core.field import Time
from flowmatch_core.networks import MLPField
from flowmatch_core.objectives import RegressionBatch, cfm_batch, cfm_loss
from flowmatch_core.paths import CondOT
from flowmatch_core.prefetch import ahead

__all__ = ["benchmark_coupling", "benchmark_training", "benchmark_tutorial"]

BATCH = 256
STEPS = 32
"""Steps between two readings of the clock, and batches that are drawn at once, so that each reading has its draw."""

IN_STEP, AHEAD_OF_STEP = "flowmatch_core, OT in the step", "flowmatch_core, OT ahead"

Step = Callable[[], Tensor]


def run(field: nn.Module, loss: Step, fused: bool = True) -> Callable[[], None]:
    """Return a function that trains a field for `STEPS` steps of Adam on a loss."""
    # fused=None is PyTorch's own default, a loop over the parameters on a CPU
    optimizer = torch.optim.Adam(field.parameters(), 1e-3, fused=True if fused else None)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return steps


def benchmark_training(quick: bool) -> Result:
    """Compare flow matching, data included, with the forward and backward pass and Adam alone."""
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    for name, dim, hidden in (("2-64-64-64-2", 2, (64,) * 3), (f"{DIM}-512-512-{DIM}", DIM, (512,) * 2)):
        generator = torch.Generator().manual_seed(0)
        x = tabular(20_000, generator)[:, :dim].contiguous()
        field = MLPField(dim, hidden, generator=generator)
        runs = {
            "bare loop": run(*_bare(copy.deepcopy(field), x)),
            "flowmatch_core": run(*_ours(copy.deepcopy(field), x, generator)),
            "flowmatch_core, each batch alone": run(*_ours_alone(copy.deepcopy(field), x, generator)),
            "flow_matching": run(*_flow_matching(copy.deepcopy(field), x)),
            "torchcfm": run(*_torchcfm(copy.deepcopy(field), x)),
        }
        timings = side_by_side(runs, rounds=81, budget=3 if quick else 30)
        for library in runs:
            rows.append(
                {
                    "network": name,
                    "loop": library,
                    "steps/s": STEPS / timings.median(library),
                    "of the bare loop's": str(timings.ratio("bare loop", library)),
                }
            )
        claims.append(
            Claim(
                f"CFM steps/s of {name}, data included, over the bare loop's",
                timings.ratio("bare loop", "flowmatch_core"),
                wanted=0.95,
                suspects={"ours": runs["flowmatch_core"], "bare": runs["bare loop"]},
            )
        )
    notes = [
        f"Batches of {BATCH} drawn from 20,000 rows, the same MLPField and fused Adam in all loops; the bare loop "
        "repeats forward pass, `mse_loss`, backward pass and Adam on one batch that never changes.",
        f"flowmatch_core draws {STEPS} batches at once, their rows, noise, times and points on the path "
        "(`cfm_batch(...).split`); `each batch alone` calls `cfm_loss` on every batch, as the peers do.",
    ]
    return Result("Training with independent noise", rows, claims, notes)


def _bare(field: nn.Module, x: Tensor) -> tuple[nn.Module, Step]:
    sample = CondOT().sample(torch.randn_like(x[:BATCH]), x[:BATCH], torch.rand(BATCH))
    return field, lambda: F.mse_loss(field(sample.t, sample.x_t), sample.velocity)


def _ours(field: nn.Module, x: Tensor, generator: torch.Generator) -> tuple[nn.Module, Step]:
    return _drawn(field, _split(x, generator))


def _split(x: Tensor, generator: torch.Generator) -> Iterator[RegressionBatch]:
    for x1 in batches(x, STEPS * BATCH, generator):
        yield from cfm_batch(CondOT(), x1, generator=generator).split(BATCH)


def _drawn(field: nn.Module, data: Iterator[RegressionBatch]) -> tuple[nn.Module, Step]:
    return field, lambda: next(data).loss(field)


def _ours_alone(field: nn.Module, x: Tensor, generator: torch.Generator) -> tuple[nn.Module, Step]:
    data = batches(x, BATCH, generator)
    return field, lambda: cfm_loss(field, CondOT(), next(data), generator=generator)


def _flow_matching(field: nn.Module, x: Tensor) -> tuple[nn.Module, Step]:
    path = CondOTProbPath()

    def loss() -> Tensor:
        x_1 = x[torch.randint(len(x), (BATCH,))]
        sample = path.sample(t=torch.rand(BATCH), x_0=torch.randn_like(x_1), x_1=x_1)
        return cast(Tensor, (field(sample.t, sample.x_t) - sample.dx_t).pow(2).mean())

    return field, loss


def _torchcfm(field: nn.Module, x: Tensor, coupled: bool = False) -> tuple[nn.Module, Step]:
    matcher = (ExactOptimalTransportConditionalFlowMatcher if coupled else ConditionalFlowMatcher)(sigma=0.0)

    def loss() -> Tensor:
        x1 = x[torch.randint(len(x), (BATCH,))]
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return torch.mean((field(t, xt) - ut) ** 2)

    return field, loss


def benchmark_tutorial(quick: bool) -> Result:
    """Run torchcfm's tutorial as it is, and the same task with the same network here."""
    source, target, network = torchcfm_tutorial()
    runs = {
        "torchcfm, as in the tutorial": run(*_tutorial(copy.deepcopy(network), source, target), fused=False),
        "flowmatch_core": run(*_same_task(copy.deepcopy(network)), fused=True),
        "flowmatch_core, Adam as in the tutorial": run(*_same_task(copy.deepcopy(network)), fused=False),
        "bare loop": run(*_bare_tutorial(copy.deepcopy(network))),
    }
    timings = side_by_side(runs, rounds=21, budget=4 if quick else 12)
    theirs, ours, *_ = runs
    rows: list[dict[str, Cell]] = [
        {
            "loop": name,
            "steps/s": STEPS / timings.median(name),
            "over the tutorial": str(timings.ratio(theirs, name)),
        }
        for name in runs
    ]
    claim = Claim(
        "CFM steps/s over torchcfm's tutorial loop",
        timings.ratio(theirs, ours),
        wanted=5,
        suspects={"ours": runs[ours], "tutorial": runs[theirs]},
    )
    notes = [
        f"Eight Gaussians to moons, {BATCH} fresh pairs a step, torchcfm's network 3-64-64-64-2 with SELU in all rows. "
        "The tutorial draws its data in a Python loop with its own functions and takes Adam's defaults; here they are "
        "drawn at once and Adam is fused. The bare loop, on one batch that never changes, bounds what any loop can do."
    ]
    return Result("torchcfm's tutorial", rows, [claim], notes)


def _tutorial(
    network: nn.Module, source: Callable[[int], Tensor], target: Callable[[int], Tensor]
) -> tuple[nn.Module, Step]:
    matcher = ConditionalFlowMatcher(sigma=0.1)

    def loss() -> Tensor:
        t, xt, ut = matcher.sample_location_and_conditional_flow(source(BATCH), target(BATCH))
        return torch.mean((network(torch.cat([xt, t[:, None]], dim=-1)) - ut) ** 2)

    return network, loss


def _same_task(network: nn.Module) -> tuple[nn.Module, Step]:
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(8) * (torch.pi / 4)
    centres = 5 * torch.stack([angle.cos(), angle.sin()], 1)

    def field(t: Time, x: Tensor, cond: Tensor | None) -> Tensor:
        assert isinstance(t, Tensor)
        return cast(Tensor, network(torch.cat([x, t[:, None]], 1)))

    def loss() -> Tensor:
        noise = torch.randn(BATCH, 2, generator=generator)
        x0 = torch.add(centres[torch.randint(8, (BATCH,), generator=generator)], noise, alpha=0.1**0.25)
        return cfm_loss(field, CondOT(sigma_min=0.1), _moons(generator), x0, generator=generator)

    return network, loss


def _bare_tutorial(network: nn.Module) -> tuple[nn.Module, Step]:
    inputs, velocity = torch.randn(BATCH, 3), torch.randn(BATCH, 2)
    return network, lambda: (network(inputs) - velocity).square().mean()


def _moons(generator: torch.Generator) -> Tensor:
    angle = torch.pi * torch.rand(BATCH // 2, generator=generator)
    x, y = angle.cos(), angle.sin()
    moons = torch.stack([torch.cat([x, 1 - x]), torch.cat([y, 0.5 - y])], 1)
    return 3 * torch.add(moons, torch.rand(BATCH, 1, generator=generator), alpha=0.2) - 1


def benchmark_coupling(quick: bool) -> Result:
    """Measure what exact optimal transport adds to a step of training, with a second core and without."""
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    for name, dim, hidden in ((f"{DIM}-512-512-{DIM}", DIM, (512,) * 2), ("2-64-64-64-2", 2, (64,) * 3)):
        generator = torch.Generator().manual_seed(0)
        x = tabular(20_000, generator)[:, :dim].contiguous()
        field = MLPField(dim, hidden, generator=generator)
        runs = {
            "independent": run(*_ours(copy.deepcopy(field), x, generator)),
            IN_STEP: run(*_drawn(copy.deepcopy(field), _paired(x))),
            "torchcfm, OT in the step": run(*_torchcfm(copy.deepcopy(field), x, coupled=True)),
        }
        alone = side_by_side(runs, rounds=41, budget=4 if quick else 15)
        ahead_of_steps = {"independent": runs["independent"], AHEAD_OF_STEP: _in_a_thread(copy.deepcopy(field), x)}
        beside = side_by_side(ahead_of_steps, rounds=41, budget=4 if quick else 15, clock=time.perf_counter)
        for clock, timings in (("CPU", alone), ("wall", beside)):
            rows += [
                {
                    "network": name,
                    "loop": label,
                    "clock": clock,
                    "steps/s": STEPS / timings.median(label),
                    "time, of independent = 1": str(timings.ratio(label, "independent")),
                }
                for label in timings.rounds
            ]
        if dim == DIM:
            step = f"time of a step of {name} with exact OT over one without, batch {BATCH}"
            for text, ratio, wanted, suspect in (
                ("ahead, with a free second core", beside.ratio(AHEAD_OF_STEP, "independent"), 1.1, AHEAD_OF_STEP),
                ("without a second core", alone.ratio(IN_STEP, "independent"), 1.25, IN_STEP),
            ):
                call = (runs | ahead_of_steps)[suspect]
                claims.append(Claim(f"{step}, {text}", ratio, wanted, bound="at most", suspects={suspect: call}))
    notes = [
        "`ahead` computes the batches in a second thread, on the second core, and is timed by the wall: where that "
        "core is busy with other work, as the load average above tells, its ratio is that of a machine with one core. "
        "The CPU time of a step with the transport in it is what it takes where there is no second core. Between "
        f"rounds `ahead` fills its queue, which hides two of the {STEPS} transports of a round.",
    ]
    return Result("Training with exact optimal transport", rows, claims, notes)


def _in_a_thread(field: nn.Module, x: Tensor) -> Callable[[], None]:
    return run(*_drawn(field, ahead(_paired(x), depth=2)))


def _paired(x: Tensor) -> Iterator[RegressionBatch]:
    generator = torch.Generator().manual_seed(1)  # not shared with the training step: a thread draws from it
    for x1 in batches(x, BATCH, generator):
        yield cfm_batch(CondOT(), x1, coupling=MinibatchOT(), generator=generator)
