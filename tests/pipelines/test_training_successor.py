"""The rows of a table become the transitions that it holds, in memory as from a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from flowmatch_core.successor import Loss, Transitions
from pipelines.base import files, layout
from pipelines.config.params import SuccessorFit, SuccessorMethod
from pipelines.models import successor
from pipelines.training import fit, loop
from pipelines.training.loop import Progress
from pipelines.training.successor import SuccessorJob

ROWS = 600
FIT = {
    "network": {"name": "mlp", "hidden": [8]}, "steps": 40, "batch": 64, "lr": 1e-3, "warmup": 0, "weight_decay": 0.0,
    "adam_betas": (0.9, 0.999), "adam_eps": 1e-8, "ema_step": 0.1, "log_every": 5, "ode_solver": "euler",
    "ode_steps": 1, "time": "uniform", "returns": 1, "particles": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(terminal: bool | None) -> None:
    """Numbers from which each row's place in the table can be told; every third next state is terminal, or none."""
    i = np.arange(float(ROWS))
    table = pd.DataFrame({"state_x": i, "state_y": i + 0.25, "next_state_x": i + 1, "next_state_y": i + 1.25})
    table = table.assign(action_u=-i, next_action_u=-i - 1)
    if terminal is not None:
        table = table.assign(terminal=(np.arange(ROWS) % 3 == 0) & terminal)
    folder = layout.collected("spiral")
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(layout.transitions(folder), row_group_size=100)
    loc, scale = [10.0, -10.0], [2.0, 4.0]
    described = {"state_names": ["x", "y"], "action_names": ["u"], "loc": loc, "scale": scale}
    described |= {"constants": {}, "action_loc": [0.0], "action_scale": [1.0]}
    files.write_json(layout.provenance(folder), described)


@pytest.mark.parametrize("rows_in_memory", [ROWS, 300])
@pytest.mark.parametrize("terminal", [None, False, True])
def test_a_batch_holds_what_the_table_holds(
    monkeypatch: pytest.MonkeyPatch, rows_in_memory: int, terminal: bool | None
) -> None:
    seen: list[Transitions] = []

    def loss(
        field: object, target: object, batch: Transitions, *, path: object, time: object, **options: object
    ) -> Loss:
        assert set(options) == {"gamma", "steps", "solver", "generator"}
        seen.append(batch)
        return Loss(*torch.zeros(3))

    monkeypatch.setattr(successor, "loss", lambda *_: loss)
    torch.manual_seed(0)
    task = job(rows_in_memory, terminal).task(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        task.terms(task.network, task.network, generator, 0.0)
    for batch in seen:
        assert len(batch.state) == 32  # half of the batch: a loss regresses on two terms
        i = batch.state[:, 0] * 2 + 10
        torch.testing.assert_close(batch.state[:, 1] * 4 - 10, i + 0.25)
        torch.testing.assert_close(batch.next_state[:, 0] * 2 + 10, i + 1)
        torch.testing.assert_close(batch.next_state[:, 1] * 4 - 10, i + 1.25)
        torch.testing.assert_close((batch.action, batch.next_action), (-i[:, None], -i[:, None] - 1))
        if terminal:
            assert batch.terminal is not None
            assert torch.equal(batch.terminal, i.round() % 3 == 0)
        else:
            assert batch.terminal is None
    if rows_in_memory < ROWS:
        i = torch.cat([batch.state[:, 0] * 2 + 10 for batch in seen])[:ROWS].round()
        assert torch.equal(i.sort().values, torch.arange(float(ROWS)))


def job(rows_in_memory: int, terminal: bool | None = None) -> SuccessorJob:
    write(terminal)
    given = SuccessorFit(**FIT, rows_in_memory=rows_in_memory)
    return SuccessorJob("spiral", "td_cfm", given, SuccessorMethod(loss="td_cfm", path="cond_ot"), gamma=0.9)


def test_where_rows_come_from_does_not_change_the_first_weights() -> None:
    states = []
    for rows_in_memory in (300, ROWS):
        torch.manual_seed(0)
        states.append(job(rows_in_memory).task(torch.device("cpu")).network.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("rows_in_memory", [300, ROWS])
def test_a_killed_seed_goes_on_with_the_rows_that_come_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_in_memory: int
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    made = job(rows_in_memory)

    def fitted(state: Path, stop_at: int | None = None) -> bytes:
        def tell(row: Progress) -> None:
            if row.step == stop_at:
                raise KeyboardInterrupt

        state.mkdir(exist_ok=True)
        fit._fit_one(0, tell, base=0, job=made, device="cpu", state=state)
        return (state / "seed0.safetensors").read_bytes()

    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "killed", 20)
    assert fitted(tmp_path / "killed") == whole
