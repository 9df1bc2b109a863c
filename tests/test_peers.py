"""The adapters of other libraries' tests: what can be checked in the project's own environment, and what runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from peers import __main__ as program
from peers.cases import Case, NotApplicable, Suite, agree, raises, run
from tests.support.random import tensor

ROOT = Path(__file__).parents[1]
FAST = {
    "pot": ("test_emd_emd2", "test_sinkhorn_variants_log", "test_1d_sliced_equals_emd"),
    "torchdiffeq": ("TestNoIntegration", "TestDiscontinuities"),
    "zuko": ("test_mixtures", "test_flows: evaluation mode", "test_utils.py::test_odeint"),
}
"""Peers that the library depends on, and words of cases that take a moment."""


@pytest.mark.parametrize(("peer", "word"), [(peer, word) for peer, words in FAST.items() for word in words])
@pytest.mark.filterwarnings("ignore")
def test_cases_of_what_the_library_depends_on_pass(peer: str, word: str) -> None:
    outcomes = program.run_suite(program.suite(peer), word)
    assert any(outcome.status == "pass" for outcome in outcomes)
    assert [outcome for outcome in outcomes if outcome.status == "fail"] == []


def test_every_file_is_a_peer_that_is_run() -> None:
    files = {path.stem for path in (ROOT / "peers").glob("*.py")} - {"__init__", "__main__", "cases"}
    assert files == set(program.PEERS)
    assert all(importlib.util.find_spec(f"peers.{name}") for name in files)


def example() -> Suite:
    suite = Suite("torch", "owner/name", "abc")

    @suite.case("tests/a.py::test_sum", (1, 2), (3, 4))
    def total(a: int, b: int) -> None:
        agree(tensor(a + b), 5.0)

    suite.not_applicable("no manifolds", "tests/a.py::test_sphere")
    return suite


def test_a_case_is_counted_by_what_it_does() -> None:
    outcomes = {outcome.source: outcome for outcome in program.run_suite(example())}
    assert [o.status for o in outcomes.values()] == ["fail", "pass", "pass", "fail", "not applicable"]
    assert "close" in outcomes["tests/a.py::test_sum[1-3]"].detail
    assert outcomes["tests/a.py::test_sphere"].detail == "no manifolds"
    assert "| p | 5 | 2 | 2 | 1 |" in program.table({"p": list(outcomes.values())})


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="test_sphere"):
        example().not_applicable("again", *["tests/a.py::test_sphere"] * 2)


def test_a_case_starts_from_the_same_seed() -> None:
    import numpy as np
    import torch

    drawn = []
    case = Case("", lambda: drawn.append((float(torch.rand(())), np.random.rand())))
    run(case), run(case)
    assert drawn[0] == drawn[1]


def test_comparisons_can_fail() -> None:
    agree(tensor(1.0, 1.0), 1.0)
    with pytest.raises(AssertionError):
        agree(tensor(1.0), 1.0 + 1e-6)
    with pytest.raises(AssertionError, match="KeyError"):
        raises(KeyError, lambda: None)
    raises(NotApplicable, lambda: (_ for _ in ()).throw(NotApplicable("no")))


@pytest.mark.parametrize("bad", [False, True])
def test_the_program_fails_with_a_case_and_writes_its_page(
    bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = Suite("torch", "owner/name", "abc")
    suite.case("tests/a.py::test_it")(lambda: agree(tensor(1.0), 2.0 if bad else 1.0))
    suite.not_applicable("no manifolds", "tests/a.py::test_sphere")
    monkeypatch.setattr(program, "suite", lambda name: suite)
    monkeypatch.setattr(program, "PEERS", ("torch",))
    page = tmp_path / "results.md"
    monkeypatch.setattr(sys, "argv", ["peers", "--out", str(page)])
    assert program.main() == int(bad)
    assert f"| all | 2 | {int(not bad)} | {int(bad)} | 1 |" in capsys.readouterr().out
    text = page.read_text()
    assert "| no manifolds | `tests/a.py::test_sphere` |" in text and ("`tests/a.py::test_it`" in text) == bad
    page.unlink()
    monkeypatch.setattr(sys, "argv", ["peers", "--match", "sphere", "--out", str(page)])
    assert program.main() == 0
    assert not page.exists()
