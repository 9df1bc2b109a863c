"""Cases: what a test or tutorial of a peer asserts, to be computed by the peer and by this library."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Case", "NotApplicable", "Outcome", "Suite", "agree", "normal", "raises", "run", "seeded"]

Status = Literal["pass", "fail", "not applicable"]


class NotApplicable(Exception):
    """Raised by a case about something that this library does not have; the message says why."""


@dataclass(frozen=True)
class Case:
    """One case: the peer's test that it adapts, with its parameters, and the adapter."""

    source: str
    call: Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a case: an empty detail, the reason why it is not applicable, or the error."""

    source: str
    status: Status
    detail: str
    seconds: float


class Suite:
    """The cases of one peer.

    Args:
        distribution: The name of its distribution, as installed.
        repository: The repository whose tests and tutorials are adapted.
        commit: The commit at which they were read.
    """

    def __init__(self, distribution: str, repository: str, commit: str) -> None:
        self.distribution, self.repository, self.commit = distribution, repository, commit
        self.cases: dict[str, Case] = {}

    def case(self, source: str, *parameters: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Return a decorator that registers an adapter.

        Args:
            source: The peer's test, `file::test`, or tutorial, `file: topic`.
            parameters: The values of each argument of the adapter; each combination is a case.
        """

        def register(adapter: Callable[..., None]) -> Callable[..., None]:
            for values in itertools.product(*parameters):
                label = "-".join(str(getattr(value, "__name__", value)) for value in values)
                self._add(f"{source}[{label}]" if values else source, functools.partial(adapter, *values))
            return adapter

        return register

    def not_applicable(self, reason: str, *sources: str) -> None:
        """Register tests of the peer about something that this library does not have."""
        for source in sources:
            self._add(source, functools.partial(_raise, NotApplicable(reason)))

    def _add(self, source: str, call: Callable[[], None]) -> None:
        if source in self.cases:
            raise ValueError(f"source is {source!r}, but should be new: a case of this name exists.")
        self.cases[source] = Case(source, call)


def run(case: Case) -> Outcome:
    """Run a case from fixed seeds of the global generators, from which the peers draw."""
    torch.manual_seed(0)
    np.random.seed(0)
    start, detail = time.perf_counter(), ""
    status: Status = "pass"
    try:
        with warnings.catch_warnings(action="ignore"):  # of the peers
            case.call()
    except NotApplicable as reason:
        status, detail = "not applicable", str(reason)
    except Exception as error:  # whatever a peer or this library raises fails this case alone
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return Outcome(case.source, status, detail, time.perf_counter() - start)


def agree(ours: Tensor, theirs: Any, tolerance: float = 1e-10) -> None:
    """Raise an `AssertionError` unless all values agree within an absolute and relative tolerance."""
    expected = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, expected.expand_as(ours), rtol=tolerance, atol=tolerance)


def normal(*shape: int) -> Tensor:
    """Return standard normal inputs in float64, from the global generator."""
    return torch.randn(*shape, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a generator for this library; its draws are not those of the global generator, which gives the inputs."""
    return torch.Generator().manual_seed(1000 + seed)


def raises(error: type[Exception], call: Callable[[], object]) -> None:
    """Raise an `AssertionError` unless the call raises the given error."""
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__} was raised")


def _raise(error: Exception) -> None:
    raise error
