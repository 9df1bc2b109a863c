"""Temporal difference flows with the paper's network and batch: arithmetic beside the machine's, and more data."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Cell, Claim, Result
from benchmarks.timing import seconds, side_by_side
from flowmatch_core.averaging import polyak_update
from flowmatch_core.networks import MLPField, UNetMLPField
from flowmatch_core.successor import (
    Loss,
    Transitions,
    mc_cfm_loss,
    td2_cfm_loss,
    td_cfm_loss,
)
from flowmatch_core.times import LogitNormalTime

__all__ = ["benchmark_td_data", "benchmark_td_scale"]

STATE, ACTION = 4, 2
"""Dimensions of the maze."""
BATCH, STEPS = 1024, 10
SIZES = (100_000, 2_000_000)
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Method = Callable[..., Loss]


def _monte_carlo(field: Method, target: Method, batch: Transitions, **options: object) -> Loss:
    return mc_cfm_loss(field, batch, batch.next_state)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "TD²-CFM": partial(td2_cfm_loss, gamma=0.99, steps=STEPS),
    "TD-CFM": partial(td_cfm_loss, gamma=0.99, steps=STEPS),
    "MC-CFM": _monte_carlo,
}


def transitions(rows: int) -> Transitions:
    """Return random transitions; only their number matters here."""
    generator = torch.Generator().manual_seed(0)
    sizes = (STATE, ACTION, STATE, ACTION)
    state, action, next_state, next_action = (torch.randn(rows, size, generator=generator) for size in sizes)
    return Transitions(state, action, next_state, next_action)


def take(data: Transitions, n: int, generator: torch.Generator) -> Transitions:
    """Return a batch of random rows."""
    return data[torch.randint(len(data), (n,), generator=generator, device=data.state.device)]


def stepper(network: torch.nn.Module, loss: Method, data: Transitions, batch: int) -> Callable[[], None]:
    """Return a function that draws a batch and takes one step of Adam and of the average, on the device of the data."""
    generator = torch.Generator(data.state.device).manual_seed(0)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss(network, average, take(data, batch, generator)).total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        polyak_update(average, network, 1e-3)

    return step


def precision(name: str) -> AbstractContextManager[object]:
    """Return the context of a number format: `torch.autocast`, or nothing for float32."""
    return nullcontext() if name == "float32" else torch.autocast("cpu", PRECISIONS[name])


def operations(step: Callable[[], None]) -> float:
    """Return the floating-point operations of the matrix products of a step, two for a multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def cpu_seconds(step: Callable[[], None]) -> float:
    """Return the CPU seconds of a call, which other programs on the machine disturb less than its wall time."""
    start = time.process_time()
    step()
    return time.process_time() - start


def matrix_rate(dtype: torch.dtype, threads: int) -> float:
    """Return the machine's rate for a product of this network's usual shape, in operations per second."""
    a, b = torch.randn(BATCH, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
    out = torch.empty(BATCH, 512, dtype=dtype)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    fastest = min(seconds(lambda: torch.mm(a, b, out=out), 5) for _ in range(40))
    torch.set_num_threads(usual)
    return 2 * BATCH * 512 * 512 / fastest


def benchmark_td_scale(quick: bool) -> Result:
    """Measure the steps per second of the paper's network beside what the machine's matrix products allow."""
    rows: list[dict[str, Cell]] = []
    data, cores = transitions(SIZES[0]), os.cpu_count() or 1
    for numbers, dtype in PRECISIONS.items():
        rate, rate_of_all = matrix_rate(dtype, 1), matrix_rate(dtype, cores)
        for method, loss in METHODS.items():
            if quick and method != "MC-CFM":
                continue
            network = UNetMLPField(STATE, cond_dim=STATE + ACTION, generator=torch.Generator().manual_seed(0))
            step = stepper(network, loss, data, BATCH)
            with precision(numbers):
                count = operations(step)
                fastest = min(cpu_seconds(step) for _ in range(3))
            rows.append(
                {
                    "method": method,
                    "numbers": numbers,
                    "steps a CPU s": 1 / fastest,
                    "GFLOP a step": count / 1e9,
                    "GFLOP/s": count / fastest / 1e9,
                    "torch.mm, one thread": rate / 1e9,
                    f"torch.mm, {cores} threads": rate_of_all / 1e9,
                    "share of one thread": f"{count / fastest / rate:.0%}",
                }
            )
    weights = sum(weight.numel() for weight in network.parameters())
    notes = [
        "UNetMLPField with stages 512, 512, 512 and an encoder of the condition of 512, 512, 512 "
        f"({weights / 1e6:.1f} M weights), {STATE} + {ACTION} dimensions of state and action, batch {BATCH}, {STEPS} "
        "midpoint steps, both terms, Adam and the average, on one thread; the quickest of three steps. bfloat16 is "
        "`torch.autocast` around the step; the weights stay in float32.",
        "GFLOP are those of the matrix products as they are run, two for a multiplication and addition. Beside them "
        f"the GFLOP/s of `torch.mm` on {BATCH}×512 times 512×512 numbers of that kind.",
    ]
    return Result("The paper's network", rows, notes=notes)


def benchmark_td_data(quick: bool) -> Result:
    """Measure whether a step takes longer with more data in memory."""
    data = {rows: transitions(rows) for rows in SIZES}
    loss = partial(td2_cfm_loss, gamma=0.99, steps=2, time=LogitNormalTime())
    runs: dict[str, Callable[[], object]] = {}
    for size, table in data.items():
        network = MLPField(STATE, (128,) * 3, cond_dim=STATE + ACTION, generator=torch.Generator().manual_seed(0))
        runs[f"{size:,}"] = stepper(network, loss, table, 128)
    few, many = runs
    timings = side_by_side(runs, rounds=41, budget=2 if quick else 10, block=0.1)
    rows: list[dict[str, Cell]] = [{"transitions": name, "ms a step": 1e3 * timings.median(name)} for name in runs]
    claim = Claim(
        f"time of a TD²-CFM step on {many} transitions, over one on {few}", timings.ratio(many, few), 1.1, "at most"
    )
    notes = ["128 + 128 rows, K=2, a 3×128 network: the smallest step, where drawing the data weighs most."]
    return Result("More data", rows, [claim], notes)
