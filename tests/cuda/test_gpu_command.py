"""`python -m benchmarks.gpu`: what it prints, writes and returns, with what is installed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.gpu import FORMATS, QUICK, Budget
from benchmarks.gpu_checks import CHECKS, Check
from benchmarks.td_scale import ACTION, STATE, operations, stepper, transitions
from flowmatch_core.networks import MLPField
from flowmatch_core.successor import Loss, Transitions

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NOT_NEEDED = (
    "pandas",
    "pyarrow",
    "pydantic",
    "yaml",
    "mlflow",
    "dvc",
    "prefect",
    "pytest",
    "safetensors",
    "ot",
    "zuko",
)
WITHOUT = f"""
import sys
for name in {NOT_NEEDED}:
    sys.modules[name] = None  # an import of it fails as if it were not installed
from benchmarks.gpu import main
sys.exit(main(sys.argv[1:]))
"""
COMPILED = next(f for f in FORMATS if f.compiled)


def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, without its head."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_without_a_card_it_says_so_in_one_sentence() -> None:
    before = gpu.PAGE.read_bytes()
    finished = run("-m", "benchmarks.gpu")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == 1
    assert "sees no CUDA device, so nothing was measured" in finished.stdout
    assert gpu.PAGE.read_bytes() == before


@pytest.mark.slow
def test_a_rehearsal_has_all_rows_without_the_packages_that_it_does_not_need(tmp_path: Path) -> None:
    before, page = gpu.PAGE.read_bytes(), tmp_path / "deep" / "gpu.md"
    finished = run("-c", WITHOUT, "--device", "cpu", "--quick", "--out", str(page))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    text = page.read_text()
    assert gpu.REHEARSAL in text
    assert gpu.REHEARSAL in finished.stdout
    assert gpu.PAGE.read_bytes() == before
    assert list(page.parent.iterdir()) == [page]

    verdicts = {name: verdict for name, _, _, verdict in rows(text, "Checks")}
    assert list(verdicts) == list(CHECKS)
    left_out = {name for name, verdict in verdicts.items() if verdict != "passed"}
    assert left_out == {name for name, check in CHECKS.items() if check.needs is not None}
    assert [row[0] for row in rows(text, "Plain matrix products")] == ["float32", "TF32", "bfloat16"]
    trained = rows(text, "Training on a tiny network")
    assert [row[:2] for row in trained] == [[m, f.name] for m in ("TD²-CFM", "CFM") for f in FORMATS]
    assert all(float(row[2].replace(",", "")) > 0 for row in trained)
    assert len(rows(text, "CFM beside flow_matching")) >= 1


def test_a_failed_check_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "CHECKS", {"wrong": None})
    monkeypatch.setattr(gpu, "FORMATS", FORMATS[:1])
    monkeypatch.setitem(CHECKS, "wrong", Check(lambda device: 0.5, 1e-3))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "page.md")]) == 1
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("FAILED")] == [
        "FAILED wrong: error 0.5, tolerance 0.001"
    ]
    assert rows((tmp_path / "page.md").read_text(), "Checks") == [["wrong", "0.5", "0.001", "FAILED"]]


def test_a_check_that_no_time_is_left_for_has_not_passed() -> None:
    budget = Budget(1e-9)
    outcomes = gpu.run_checks(CPU, budget)
    assert len(outcomes) == len(CHECKS)
    assert not any(outcome.passed for outcome in outcomes)
    assert outcomes[0].reason == "not run: out of time"


def tiny() -> MLPField:
    return MLPField(STATE, (8,), STATE + ACTION, frequencies=2, generator=torch.Generator().manual_seed(0))


def test_operations_are_those_of_a_hand_count() -> None:
    """A product counts twice its multiplications; the backward pass has one for each weight and each hidden input."""
    width, batch, network = 8, 32, MLPField(STATE, (8, 8), STATE + ACTION, frequencies=2)
    first = (STATE + (STATE + ACTION) + network.embedding.features) * width
    later = width * width + width * STATE
    step = stepper(network, gpu.cfm, transitions(100), batch)
    assert operations(step) == 2 * batch * (first + later) + 2 * batch * (first + 2 * later)


def test_a_compiler_that_fails_is_a_row_with_its_reason() -> None:
    def no_compiler(graph: object, inputs: object) -> object:
        raise RuntimeError("no compiler here\nsecond line")

    scale = dataclasses.replace(QUICK, backend=no_compiler)
    result = gpu.training_speed(scale, CPU, dict.fromkeys(gpu.PRODUCT_DTYPES, (1000000000.0, 1000000000.0)), Budget(60))
    row = next(row for row in result.rows if row["numbers"] == COMPILED.name)
    assert str(row["steps/s"]).startswith("not run: ")
    assert "no compiler here" in str(row["steps/s"])
    assert "second line" not in str(row["steps/s"])
    assert all(isinstance(row["steps/s"], float) for row in result.rows if row["numbers"] != COMPILED.name)


def test_a_compilation_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError, match="longer than the 0 s"), gpu.limit(0.05):
        while True:
            pass
    with gpu.limit(100):
        pass


def test_a_limit_leaves_the_one_around_it() -> None:
    with pytest.raises(TimeoutError, match="longer than the 1 s"), gpu.limit(1):
        with gpu.limit(100):
            pass
        while True:
            pass


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for inductor")
def test_the_compiled_loss_is_the_loss() -> None:
    network, data = tiny(), transitions(16)

    def loss(field: nn.Module, target: nn.Module, batch: Transitions) -> Loss:
        time = torch.linspace(0, 1, len(batch.state))
        value: Tensor = field(time, batch.next_state, batch.condition).square().mean()
        return Loss(value, value, value)

    results = []
    for numbers in (next(f for f in FORMATS if f.name == COMPILED.product), COMPILED):
        network.zero_grad()
        total = gpu.in_format(loss, numbers, CPU, "inductor")(network, network, data).total
        total.backward()
        results.append([total.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=3e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "'gpu' is no device; expected cuda, cuda:N or cpu."),
        (["--device", "meta"], "'meta' is not supported; expected cuda, cuda:N or cpu."),
        (["--seconds", "0"], "0 is not positive; expected a number of seconds."),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        gpu.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
