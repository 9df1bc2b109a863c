"""Laws of the couplings: rows are rearranged, never lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flowmatch_core import transport
from flowmatch_core.couplings import Coupling, Independent, MinibatchOT

COUPLINGS = [Independent(), MinibatchOT()]


def batch(n: int, *event: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(n, *event, generator=g, dtype=torch.float64) for _ in range(2))
    return x0, 2 * x1 + 1, torch.arange(n, dtype=torch.float64)[:, None]


def cost(x0: Tensor, x1: Tensor) -> float:
    return float((x1 - x0).square().sum())


@pytest.mark.parametrize("coupling", COUPLINGS, ids=repr)
@pytest.mark.parametrize("event", [(2,), (1, 3, 3), ()])
def test_no_row_is_lost_and_none_doubled(coupling: Coupling, event: tuple[int, ...]) -> None:
    x0, x1, cond = batch(256, *event)
    y0, y1, y_cond = coupling(x0, x1, cond)
    assert y1 is x1 and y_cond is cond
    rows, kept = (sorted(map(tuple, a.reshape(256, -1).tolist())) for a in (x0, y0))
    assert rows == kept


def test_independent_pairs_rows_as_given() -> None:
    x0, x1, cond = batch(5, 2)
    assert Independent()(x0, x1, cond) == (x0, x1, cond)
    assert Independent()(x0, x1)[2] is None


def test_ot_finds_the_best_permutation() -> None:
    for seed in range(5):
        x0, x1, _ = batch(6, 2, seed=seed)
        best = min(cost(x0[list(p)], x1) for p in itertools.permutations(range(6)))
        assert cost(MinibatchOT()(x0, x1)[0], x1) == pytest.approx(best)


def test_ot_is_cheaper_than_chance() -> None:
    x0, x1, _ = batch(256, 2)
    assert cost(MinibatchOT()(x0, x1)[0], x1) < 0.75 * cost(x0, x1)


def test_ot_undoes_a_shuffle_far_from_the_origin() -> None:
    x0, _, _ = batch(64, 2)
    x0 = x0 + 1e6
    shuffled = x0[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(MinibatchOT()(shuffled, x0)[0], x0, rtol=0, atol=0)


def test_ot_keeps_equal_rows_apart() -> None:
    x1 = torch.zeros(8, 2, dtype=torch.float64)
    x0, _, _ = batch(8, 2)
    assert len({tuple(row) for row in MinibatchOT()(x0, x1)[0].tolist()}) == 8


def test_ot_lets_gradients_through_the_rows() -> None:
    x0, x1, _ = batch(8, 2)
    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(MinibatchOT()(x0, x1)[0].sum(), x0)
    assert (gradient == 1).all()


def test_an_unsolved_transport_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ITERATIONS", 1)
    x0, x1, _ = batch(64, 2)
    with pytest.raises(RuntimeError, match="was not solved"):
        MinibatchOT()(x0, x1)


def test_bad_arguments_are_named() -> None:
    x0, x1, _ = batch(8, 2)
    with pytest.raises(ValueError, match="x0 has shape"):
        MinibatchOT()(x0[:4], x1)
    with pytest.raises(TypeError):
        MinibatchOT()(x0, x1, generatr=None)  # type: ignore[call-arg]
