"""Check and time training on one CUDA device.

Runs the checks of `benchmarks.gpu_checks`, then trains TD²-CFM and CFM on the paper's network in several number
formats, beside plain matrix products and the loop of flow_matching where that is installed. Needs torch, torchdiffeq,
NumPy, SciPy and this source tree; checks that need POT, zuko or safetensors are left out where these are missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from benchmarks.gpu_checks import CHECKS, Outcome, first_lines, run_check
from benchmarks.results import Cell, Result
from benchmarks.td_scale import ACTION, STATE, Method, operations, stepper, transitions
from benchmarks.timing import Timings, side_by_side
from flowmatch_core.networks import UNetMLPField
from flowmatch_core.objectives import cfm_loss
from flowmatch_core.paths import CondOT
from flowmatch_core.successor import Loss, Transitions, td2_cfm_loss

__all__ = ["FULL", "QUICK", "Budget", "Scale", "main"]

PAGE = Path(__file__).parent / "results" / "gpu.md"
"""Where the figures of a CUDA device go."""
SECONDS = 480.0
REHEARSAL = "This is a rehearsal on the CPU: none of its figures is a figure of a GPU."
CHECK_SHARE, COMPILE_SHARE = 0.4, 0.5
"""The largest shares of the time left that the checks, and the compilation of one method, may take."""


@dataclass(frozen=True)
class Scale:
    """The sizes of a run.

    Args:
        batch: The rows of a batch.
        ode_steps: The midpoint steps of TD²-CFM.
        stages: The widths of the network.
        time_width: The width of its embedding of time.
        data: The number of transitions in memory.
        products: The shapes `(m, k, n)` of the plain matrix products: the network's own, and a large one.
        backend: The backend of `torch.compile`.
        block: The seconds between two readings of the clock.
        rounds: The number of such blocks of each alternative.
    """

    batch: int
    ode_steps: int
    stages: tuple[int, ...]
    time_width: int
    data: int
    products: tuple[tuple[int, int, int], tuple[int, int, int]]
    backend: str = "inductor"
    block: float = 0.25
    rounds: int = 11

    def network(self, device: torch.device) -> UNetMLPField:
        """Return a new network, with the same weights each time."""
        generator = torch.Generator().manual_seed(0)
        network = UNetMLPField(STATE, self.stages, 1, STATE + ACTION, self.stages, self.time_width, generator)
        return network.to(device)


FULL = Scale(1024, 10, (512, 512, 512), 256, 1_000_000, ((1024, 512, 512), (8192, 8192, 8192)))
"""The network and the batch of the paper for one policy (Temporal Difference Flows, Tables 5 and 6)."""
# inductor would take minutes to compile for a CPU
QUICK = Scale(32, 1, (16,), 8, 1_000, ((32, 16, 16), (128, 128, 128)), "aot_eager", block=0.05, rounds=5)


class Budget:
    """The seconds that a run may take.

    Args:
        seconds: Their number, counted from now.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left, at least 0."""
        return max(0.0, self.end - time.monotonic())


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise a `TimeoutError` in the block after so many seconds; only in the main thread."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than the {seconds:.0f} s that were left for it")

    before, began = signal.signal(signal.SIGALRM, expire), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # of a limit around this one, as tests have
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3) if left else 0)
        signal.signal(signal.SIGALRM, before)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- methods and number formats ----


@dataclass(frozen=True)
class Format:
    """How numbers are multiplied, and whether the loss is compiled."""

    name: str
    precision: str = "highest"  # of `torch.set_float32_matmul_precision`; "high" is TF32 on CUDA
    autocast: bool = False
    compiled: bool = False

    @property
    def product(self) -> str:
        """The name of the plain matrix product that it is compared with."""
        return self.name.split(",")[0]


FORMATS = (
    Format("float32"),
    Format("TF32", precision="high"),
    Format("bfloat16", autocast=True),
    Format("bfloat16, torch.compile", autocast=True, compiled=True),
)
PRODUCT_DTYPES = {"float32": torch.float32, "TF32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set the precision of products of float32 within the block."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def cfm(field: nn.Module, target: nn.Module, batch: Transitions) -> Loss:
    """Return the flow matching loss of the next state given the state and the action; the target has no part in it."""
    loss = cfm_loss(field, CondOT(), batch.next_state, cond=batch.condition)
    return Loss(loss, loss, loss)


def flow_matching_loss(field: nn.Module, target: nn.Module, batch: Transitions) -> Loss:
    """Return the same loss as flow_matching's documentation writes it."""
    from flow_matching.path import CondOTProbPath  # optional

    x_1 = batch.next_state
    t = torch.rand(len(x_1), device=x_1.device)
    sample = CondOTProbPath().sample(t=t, x_0=torch.randn_like(x_1), x_1=x_1)
    loss = (field(sample.t, sample.x_t, batch.condition) - sample.dx_t).pow(2).mean()
    return Loss(loss, loss, loss)


def methods(scale: Scale) -> dict[str, Method]:
    """Return the losses that are trained."""
    return {"TD²-CFM": partial(td2_cfm_loss, gamma=0.99, steps=scale.ode_steps), "CFM": cfm}


def in_format(loss: Method, numbers: Format, device: torch.device, backend: str) -> Method:
    """Return the loss in a number format, compiled as a whole if the format says so."""

    def formatted(field: nn.Module, target: nn.Module, batch: Transitions) -> Loss:
        with torch.autocast(device.type, torch.bfloat16, enabled=numbers.autocast):
            return loss(field, target, batch)

    return torch.compile(formatted, fullgraph=True, backend=backend) if numbers.compiled else formatted


# ---- measurements ----


@dataclass(frozen=True)
class Runner:
    """A training step that is ready to be timed.

    Args:
        block: A function that takes `steps` steps and waits for the device.
        steps: The number of steps between two readings of the clock.
        memory: The bytes on the device at the worst moment of a step, network and optimiser included; None on a CPU.
        ready: The seconds of the first three steps, with their compilation.
    """

    block: Callable[[], None]
    steps: int
    memory: int | None
    ready: float


def prepare(scale: Scale, loss: Method, data: Transitions, numbers: Format) -> Runner:
    """Take the first steps, measure their memory and choose the number of steps of a block."""
    device = data.state.device
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if cuda else 0
    step = stepper(scale.network(device), in_format(loss, numbers, device, scale.backend), data, scale.batch)

    def some(steps: int) -> float:
        with matmul_precision(numbers.precision):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronise(device)
            return time.perf_counter() - start

    ready = some(3)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = min(some(1), some(3) / 3)
    memory = torch.cuda.max_memory_allocated(device) - held if cuda else None
    steps = max(1, round(scale.block / seconds))
    return Runner(lambda: void(some(steps)), steps, memory, ready)


def void(value: object) -> None:
    """Ignore a value."""


def timed(runners: Mapping[str, Runner], rounds: int, seconds: float) -> Timings:
    """Time blocks of steps side by side, round after round; the seconds are those of a step."""
    blocks = {name: runner.block for name, runner in runners.items()}
    known = dict.fromkeys(blocks, math.inf)  # a block is long enough: never repeat it
    timings = side_by_side(blocks, rounds=rounds, budget=seconds, known=known, clock=time.perf_counter)
    return Timings({name: [s / runners[name].steps for s in times] for name, times in timings.rounds.items()})


def spread(rounds: list[float]) -> str:
    """Return the middle half of the rates of some rounds.

    Example:
        >>> spread([0.1, 0.1, 0.2, 0.2, 0.2])
        '5 to 10'
    """
    low, _, high = statistics.quantiles((1 / s for s in rounds), n=4, method="inclusive")
    return f"{low:.4g} to {high:.4g}"


def matrix_products(scale: Scale, device: torch.device) -> tuple[Result, dict[str, tuple[float, float]]]:
    """Return the rates of plain matrix products, as a table and by format, in operations per second."""
    rates: dict[str, tuple[float, float]] = {}
    for numbers in FORMATS:
        if numbers.product not in rates:
            dtype = PRODUCT_DTYPES[numbers.product]
            with matmul_precision(numbers.precision):
                small, large = (product_rate(shape, dtype, device, scale.block / 5) for shape in scale.products)
            rates[numbers.product] = small, large
    names = ["×".join(map(str, shape)) for shape in scale.products]
    rows: list[dict[str, Cell]] = [
        {"numbers": name, **{f"{n}, TFLOP/s": rate / 1e12 for n, rate in zip(names, pair, strict=True)}}
        for name, pair in rates.items()
    ]
    note = (
        "`torch.mm` of m×k times k×n numbers, written m×k×n: a layer of the network, and a product large enough to "
        "fill a card. The median of blocks of repeated products."
    )
    return Result("Plain matrix products", rows, notes=[note]), rates


def product_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, block: float) -> float:
    """Return the rate of a product of `(m, k)` with `(k, n)` numbers, in operations per second.

    Args:
        shape: The sizes `m`, `k` and `n`.
        dtype: The dtype of the numbers.
        device: The device.
        block: The seconds between two readings of the clock.
    """
    m, k, n = shape
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    out = torch.empty(m, n, dtype=dtype, device=device)

    def some(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b, out=out)
        synchronise(device)
        return (time.perf_counter() - start) / calls

    some(3)
    calls = max(3, round(block / some(3)))
    return 2 * m * k * n / statistics.median(some(calls) for _ in range(7))


def training_speed(
    scale: Scale, device: torch.device, rates: Mapping[str, tuple[float, float]], budget: Budget
) -> Result:
    """Train each method in each format, and compare its arithmetic with the plain products."""
    rows: list[dict[str, Cell]] = []
    data = on_device(transitions(scale.data), device)
    small, large = ("×".join(map(str, shape)) for shape in scale.products)
    last = list(methods(scale))[-1]
    for method, loss in methods(scale).items():
        count = operations(stepper(scale.network(device), loss, data, scale.batch))
        runners: dict[str, Runner] = {}
        failures: dict[str, str] = {}
        for numbers in FORMATS:
            try:
                with limit(COMPILE_SHARE * budget.left()):
                    runners[numbers.name] = prepare(scale, loss, data, numbers)
            except Exception as error:  # a compiler may fail in any way; the other rows do not depend on it
                if not numbers.compiled and not isinstance(error, TimeoutError):
                    raise
                failures[numbers.name] = first_lines(error)
        share = 0.6 if method == last else 0.3
        timings = timed(runners, scale.rounds, seconds=min(20.0, share * budget.left()))
        for numbers in FORMATS:
            row: dict[str, Cell] = {"method": method, "numbers": numbers.name}
            if numbers.name in failures:
                rows.append(row | {"steps/s": f"not run: {failures[numbers.name]}"})
                continue
            rate, runner = 1 / timings.median(numbers.name), runners[numbers.name]
            plain, peak = rates[numbers.product]
            rows.append(
                row
                | {
                    "steps/s": rate,
                    "middle half": spread(timings.rounds[numbers.name]),
                    "rows/s": rate * scale.batch,
                    "GFLOP a step": count / 1e9,
                    "TFLOP/s": rate * count / 1e12,
                    f"of {small}": f"{rate * count / plain:.0%}",
                    f"of {large}": f"{rate * count / peak:.0%}",
                    "MiB": None if runner.memory is None else runner.memory / 2**20,
                    "s to the third step": runner.ready,
                }
            )
    columns = max((list(row) for row in rows), key=len)
    rows = [{column: row.get(column) for column in columns} for row in rows]
    weights = sum(weight.numel() for weight in scale.network(device).parameters())
    notes = [
        f"UNetMLPField with stages {', '.join(map(str, scale.stages))} ({weights / 1e6:.3g} M weights), {STATE} + "
        f"{ACTION} dimensions of state and action, batch {scale.batch}, {scale.ode_steps} midpoint steps in TD²-CFM, "
        f"batches drawn from {scale.data:,} transitions on the device, fused Adam and the average included.",
        "steps/s are the median over rounds of blocks of steps, all formats of a method in turn, with the middle half. "
        "GFLOP are those of the matrix products of the loss and its gradient as they run without `torch.compile`, two "
        "for a multiplication and addition. The shares are of the plain products of the same format.",
        f"bfloat16 is `torch.autocast` around the loss, the weights stay in float32. torch.compile compiles the whole "
        f"loss with the backend {scale.backend}. MiB are the most that a step allocates, weights and optimiser "
        "included; the last column is the time of the first three steps, with their compilation.",
    ]
    return Result(
        "Training on the paper's network" if scale == FULL else "Training on a tiny network", rows, notes=notes
    )


def on_device(data: Transitions, device: torch.device) -> Transitions:
    """Return transitions on a device."""
    assert data.action is not None
    assert data.next_action is not None
    return Transitions(
        data.state.to(device), data.action.to(device), data.next_state.to(device), data.next_action.to(device)
    )


def beside_flow_matching(scale: Scale, device: torch.device, budget: Budget) -> Result:
    """Time our loop of flow matching and flow_matching's, on the same network, data and batch."""
    title = "CFM beside flow_matching"
    if importlib.util.find_spec("flow_matching") is None:
        rows: list[dict[str, Cell]] = [{"numbers": "–", "ratio": "not run: flow_matching is not installed"}]
        return Result(title, rows)
    data = on_device(transitions(scale.data), device)
    rows = []
    for numbers in (f for f in FORMATS if not f.compiled):
        losses: dict[str, Method] = {"flowmatch_core": cfm, "flow_matching": flow_matching_loss}
        runners = {name: prepare(scale, loss, data, numbers) for name, loss in losses.items()}
        timings = timed(runners, scale.rounds, seconds=min(10.0, 0.3 * budget.left()))
        ratio = timings.ratio("flow_matching", "flowmatch_core")
        rates: dict[str, Cell] = {f"{name}, steps/s": 1 / timings.median(name) for name in runners}
        rows.append({"numbers": numbers.name, **rates, "ours / theirs [middle half]": str(ratio)})
    version = importlib.metadata.version("flow_matching")
    note = f"The same steps around `CondOTProbPath.sample` and a squared error, flow_matching {version}; paired ratios."
    return Result(title, rows, notes=[note])


# ---- the page ----


def run_checks(device: torch.device, budget: Budget) -> list[Outcome]:
    """Run all checks; those that no time is left for count as failed."""
    mine = Budget(CHECK_SHARE * budget.left())
    outcomes = []
    for name, check in CHECKS.items():
        if mine.left():
            outcomes.append(run_check(name, device))
        else:
            outcomes.append(Outcome(name, math.nan, check.tolerance, "not run: out of time"))
    return outcomes


def checks_table(outcomes: list[Outcome]) -> Result:
    """Return the checks as a table."""
    rows: list[dict[str, Cell]] = [
        {
            "check": outcome.name,
            "error": outcome.reason or f"{outcome.error:.2g}",
            "tolerance": f"{outcome.tolerance:.2g}",
            "verdict": "left out" if outcome.left_out else "passed" if outcome.passed else "FAILED",
        }
        for outcome in outcomes
    ]
    notes = [
        "Errors of float32 on the device against float64 on the CPU, with the same random numbers: of each result the "
        "Euclidean norm of the error over that of the truth, and the largest of these. A loss is compared together "
        "with its gradient. Checks with tolerance 0 count broken laws."
    ]
    return Result("Checks", rows, notes=notes)


def machine(device: torch.device) -> str:
    """Return one line on the device, its driver, the versions and the commit."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB), driver {_driver()}, "
        card += f"CUDA {torch.version.cuda}"
    else:
        card = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{card}, torch {torch.__version__}, Python {platform.python_version()}, commit {_commit()}."


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"


def _commit() -> str:
    folder = str(Path(__file__).parent)
    return _output("git", "-C", folder, "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _output(*command: str) -> str:
    """Return what a program prints, nothing if it cannot be run."""
    if shutil.which(command[0]) is None:
        return ""
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return finished.stdout.strip() if finished.returncode == 0 else ""


def page(device: torch.device, scale: Scale, results: list[Result], seconds: float) -> str:
    """Return all tables as one page."""
    head = [f"# Training on {'a GPU' if device.type == 'cuda' else 'a CPU: a rehearsal'}", machine(device)]
    if device.type != "cuda":
        head.append(REHEARSAL)
    if scale != FULL:
        head.append("The sizes are tiny (`--quick`): the figures say that the command works, not how fast it is.")
    head.append(f"Made by `python -m benchmarks.gpu` in {seconds:.0f} s.")
    return "\n\n".join([*head, *(result.markdown() for result in results)])


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status, 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a rehearsal in a minute; always so on a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"the time limit (default: {SECONDS:.0f})")
    parser.add_argument("--out", type=Path, help=f"the page to write (default with a card: {PAGE.name} in results/)")
    given = parser.parse_args(arguments)
    try:
        device = torch.device(given.device)
    except RuntimeError:
        parser.error(f"argument --device: {given.device!r} is no device; expected cuda, cuda:N or cpu.")
    if device.type not in ("cuda", "cpu"):
        parser.error(f"argument --device: {given.device!r} is not supported; expected cuda, cuda:N or cpu.")
    if not given.seconds > 0:
        parser.error(f"argument --seconds: {given.seconds:g} is not positive; expected a number of seconds.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print(
                f"torch {torch.__version__} sees no CUDA device, so nothing was measured; "
                "rehearse the command with `--device cpu --quick`."
            )
            return 0
        if (device.index or 0) >= torch.cuda.device_count():
            parser.error(
                f"argument --device: {given.device!r} is not there, torch sees {torch.cuda.device_count()} CUDA "
                "devices; expected a lower number."
            )
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return run(device, QUICK if given.quick or device.type == "cpu" else FULL, Budget(given.seconds), given.out)


def run(device: torch.device, scale: Scale, budget: Budget, out: Path | None) -> int:
    """Check, measure, print the tables as they come and write the page."""
    start = time.monotonic()
    if device.type != "cuda":
        print(f"{REHEARSAL}\n", flush=True)
    results = []

    def add(result: Result) -> None:
        results.append(result)
        print(result.markdown(), flush=True)

    with matmul_precision("highest"):
        outcomes = run_checks(device, budget)
        add(checks_table(outcomes))
        products, rates = matrix_products(scale, device)
        add(products)
        add(beside_flow_matching(scale, device, budget))
        add(training_speed(scale, device, rates, budget))
    seconds = time.monotonic() - start
    path = out or (PAGE if device.type == "cuda" and scale == FULL else None)
    if path is not None:
        write(path, page(device, scale, results, seconds))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        print(f"FAILED {outcome}")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} checks did not fail; {seconds:.0f} s on {machine(device)}")
    if path is not None:
        print(f"Written to {path}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
