"""Rows in memory and from disk: all of them, once, in an order of the seed alone, at a cost that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn

from pipelines.base import layout
from pipelines.base.errors import UserError
from pipelines.config.params import Fit
from pipelines.data import streaming
from pipelines.data.streaming import Memory, Rows, Stream
from pipelines.training import loop

ROOT = Path(__file__).parents[2]
TOTAL, GROUP, BATCH = 1050, 100, 32
CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table whose rows are numbered; the last row group is shorter."""
    number = np.arange(float(TOTAL))
    table = pd.DataFrame({"name": "a", "x": number, "y": -number, "flag": number == 7})
    table.to_parquet(tmp_path / "t.parquet", row_group_size=GROUP)
    return tmp_path / "t.parquet"


def opened(path: Path, limit: int = 400, columns: tuple[str, ...] = ("x", "y", "flag"), seed: int = 0) -> Rows:
    encode = streaming.standardised(columns, torch.zeros(len(columns)), torch.ones(len(columns)))
    return streaming.read(path, columns, encode, batch=BATCH, limit=limit, seed=seed, device=CPU)


def drawn(source: Rows, batches: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([source.draw(generator) for _ in range(batches)])


def test_a_table_that_fits_is_drawn_with_replacement_by_the_generator(path: Path) -> None:
    source = opened(path, limit=TOTAL)
    assert isinstance(source, Memory)
    index = torch.randint(TOTAL, (BATCH,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(source, 1)[0], torch.stack([index, -index, index == 7], 1).float())


def test_a_longer_table_streams_every_row_once_an_epoch(path: Path) -> None:
    source = opened(path, limit=TOTAL - 1)
    assert isinstance(source, Stream)
    x = drawn(source, 2 * TOTAL // BATCH + 1).flatten(0, 1)
    first, second = x[:TOTAL], x[TOTAL : 2 * TOTAL]
    for epoch in (first, second):
        assert torch.equal(epoch[:, 0].sort().values, torch.arange(float(TOTAL)))
        assert torch.equal(epoch[:, 1], -epoch[:, 0])
        assert torch.equal(epoch[:, 2], (epoch[:, 0] == 7).float())
    assert not torch.equal(first, second)


def test_a_table_of_one_row_group_is_shuffled_anew_each_epoch(tmp_path: Path) -> None:
    number = np.arange(10.0 * BATCH)
    pd.DataFrame({"x": number}).to_parquet(tmp_path / "t.parquet")
    first, second = drawn(opened(tmp_path / "t.parquet", 5 * BATCH, ("x",)), 20).flatten().chunk(2)
    assert torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, second)


def test_the_order_is_the_seeds_and_not_the_generators(path: Path) -> None:
    x = drawn(opened(path), 40)
    assert torch.equal(x, drawn(opened(path), 40, seed=2))
    assert not torch.equal(x, drawn(opened(path, seed=1), 40))


def test_rows_are_mixed_within_and_between_row_groups(path: Path) -> None:
    """Half a buffer of 400 holds two row groups, from anywhere in the file, and a batch holds rows of both."""
    x = drawn(opened(path), 5)[..., 0]
    groups = x.div(GROUP, rounding_mode="floor")
    assert all(len(batch.unique()) >= 2 for batch in groups)
    assert not torch.equal(x.flatten().sort().values, x.flatten())
    assert len(drawn(opened(path), TOTAL // BATCH)[..., 0].div(GROUP, rounding_mode="floor").unique()) == 11
    assert set(groups.unique().tolist()) != {0.0, 1.0}


@pytest.mark.parametrize("step", [0, 1, 6, 7, 33, 80])
def test_a_step_has_its_batch_wherever_reading_begins(path: Path, step: int) -> None:
    whole, source = drawn(opened(path), 90), opened(path)
    drawn(source, 3)
    source.seek(step)
    assert torch.equal(drawn(source, 10), whole[step : step + 10])


def test_rows_are_standardised(path: Path) -> None:
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    for limit in (TOTAL, 100):
        encode = streaming.standardised(["x", "y"], loc, scale)
        source = streaming.read(path, ["x", "y"], encode, batch=BATCH, limit=limit, seed=0, device=CPU)
        x = drawn(source, 3)
        torch.testing.assert_close(x[..., 0] * 2 + 1, -(x[..., 1] * 4 + 2))


@pytest.mark.parametrize("limit", [TOTAL, 400])
def test_columns_far_from_zero_keep_their_digits(tmp_path: Path, limit: int) -> None:
    """In single precision a northing of 6e6 m has steps of 0.5 m."""
    offset = 0.001 * np.arange(float(TOTAL))
    pd.DataFrame({"x": 6e6 + offset}).to_parquet(tmp_path / "t.parquet", row_group_size=GROUP)
    loc, scale = (torch.tensor([value], dtype=torch.float64) for value in (6e6, 0.3))
    encode = streaming.standardised(["x"], loc, scale)
    source = streaming.read(tmp_path / "t.parquet", ["x"], encode, batch=BATCH, limit=limit, seed=0, device=CPU)
    x = drawn(source, 40).flatten().double()
    assert (x * 300 - (x * 300).round()).abs().max() < 1e-3
    assert len(x.unique()) > 600


def test_rows_by_weight_are_drawn_in_proportion_to_it() -> None:
    """A million draws: shares within five standard errors, and no draw of what has (almost) no weight."""
    rows = torch.tensor([[1.0, 0.5], [2.0, 2.5], [3.0, 1e-30], [4.0, 1.0]])
    x = Memory(rows, 1_000_000).by_weight().draw(torch.Generator().manual_seed(0))
    assert x.shape == (1_000_000, 1)
    for value, share in ((1.0, 0.125), (2.0, 0.625), (3.0, 0.0), (4.0, 0.25)):
        assert abs(float((x == value).double().mean()) - share) <= 5 * (share * (1 - share) / 1e6) ** 0.5


def test_no_more_rows_are_read_than_the_buffer_holds(path: Path) -> None:
    """Two blocks at a time: the one in use, and the next one."""
    source = opened(path, limit=500)
    assert isinstance(source, Stream)
    blocks = list(source._epoch(0))
    assert sorted(group for block in blocks for group in block) == list(range(11))
    assert max(sum(source.sizes[group] for group in block) for block in blocks) <= 250
    tiny = opened(path, limit=2)  # never less than a row group a block
    assert isinstance(tiny, Stream)
    assert [len(block) for block in tiny._epoch(0)] == [1] * 11


@pytest.mark.parametrize("limit", [TOTAL, 400])
def test_a_number_that_is_not_finite_is_found_where_it_stands(tmp_path: Path, limit: int) -> None:
    x = np.arange(float(TOTAL))
    x[777] = np.nan
    pd.DataFrame({"y": x, "x": x}).to_parquet(tmp_path / "t.parquet", row_group_size=GROUP)
    with pytest.raises(UserError, match=r"t\.parquet holds nan in column '[xy]', row 777 \(. such values\)"):
        drawn(opened(tmp_path / "t.parquet", limit, ("x", "y")), TOTAL // BATCH + 1)


def test_a_table_that_is_missing_or_damaged_is_a_sentence(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there; make it"):
        opened(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="has no column 'z'"):
        opened(path, columns=("x", "z"))
    content = bytearray(path.read_bytes())
    source = opened(path)
    content[100:5000] = bytes(4900)  # the data, not the description at the end
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a whole parquet file"):
        drawn(opened(path), TOTAL // BATCH + 1)
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match="is not a whole parquet file"):
        opened(path)
    del source


def test_whether_something_is_true_is_known_without_reading(tmp_path: Path) -> None:
    for name, values, expected in (("a", [False, False], False), ("b", [False, True], True)):
        file = tmp_path / f"{name}.parquet"
        pd.DataFrame({"x": [1.0, 2.0], "terminal": values}).to_parquet(file, row_group_size=1)
        assert streaming.any_true(file, "terminal") is expected
        assert not streaming.any_true(file, "lost")
    silent = tmp_path / "silent.parquet"
    parquet.write_table(pa.table({"terminal": [False]}), silent, write_statistics=False)
    assert streaming.any_true(silent, "terminal")


class Killed(Exception):
    pass


def test_a_killed_training_on_a_stream_resumes_to_the_same_weights(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    fit = Fit(
        network="mlp", steps=40, batch=BATCH, lr=1e-2, warmup=5, weight_decay=0.0,
        adam_betas=(0.9, 0.999), adam_eps=1e-8, ema_step=0.1,
        log_every=7,
    )  # fmt: skip

    def fitted(name: str, stop_at: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        network, source, done = nn.Linear(2, 1), opened(path, columns=("x", "y")), 0

        def terms(
            network: nn.Module, average: nn.Module, generator: torch.Generator, progress: float
        ) -> dict[str, Tensor]:
            nonlocal done
            if done == stop_at:
                raise Killed
            done += 1
            return {"loss": (network(source.draw(generator) / TOTAL) - 1).square().mean()}

        generator = torch.Generator().manual_seed(1)
        return loop.train(network, terms, fit, generator, tmp_path / name, lambda row: None, source.seek).network

    whole = fitted("whole").state_dict()
    with pytest.raises(Killed):
        fitted("killed", 25)
    resumed = fitted("killed").state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


LONG = 20_000_000
TRAINED = """
import json, resource, sys, time

import torch

from pipelines.base import layout
from pipelines.config.params import SuccessorFit, SuccessorMethod
from pipelines.training import checkpoints, loop
from pipelines.training.successor import SuccessorJob

torch.set_num_threads(1)
name, limit = sys.argv[1], int(sys.argv[2])
folder = layout.collected(name)
fit = SuccessorFit(
    network={"name": "mlp", "hidden": [64, 64]}, steps=int(sys.argv[3]), batch=256, lr=1e-3, warmup=5,
    weight_decay=0.0, adam_betas=(0.9, 0.999), adam_eps=1e-8, ema_step=0.1, log_every=100,
    ode_solver="midpoint", ode_steps=2, time="uniform", returns=1, particles=False,
    rows_in_memory=limit,
)
choice = SuccessorMethod(loss="td2_cfm", path="cond_ot")
state = checkpoints.folder("long", {}, [layout.transitions(folder)])
torch.manual_seed(0)
began = time.monotonic()
task = SuccessorJob(name, "td2_cfm", fit, choice, 0.9).task(torch.device("cpu"))
task.terms(task.network, task.network, torch.Generator(), 0.0)
ready = time.monotonic() - began
trained = loop.train(
    task.network, task.terms, fit, torch.Generator().manual_seed(0), folder / "checkpoint", lambda row: None, task.seek
)
print(json.dumps({
    "ready": ready, "steps_per_second": fit.steps / trained.seconds,
    "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


def written(root: Path, name: str, total: int) -> None:
    """So many transitions of four states and two actions, in row groups as `collect` writes them."""
    folder = root / layout.collected(name)
    folder.mkdir(parents=True)
    states, actions = [f"s{i}" for i in range(4)], [f"a{i}" for i in range(2)]
    columns = [*(f"{p}state_{n}" for p in ("", "next_") for n in states)]
    columns += [*(f"{p}action_{n}" for p in ("", "next_") for n in actions)]
    rng = np.random.default_rng(0)
    schema = pa.schema([*((name, pa.float64()) for name in columns), ("terminal", pa.bool_())])
    with parquet.ParquetWriter(layout.transitions(folder), schema) as writer:
        for _ in range(total // 100_000):
            drawn = {name: rng.standard_normal(100_000) for name in columns}
            writer.write_table(pa.table({**drawn, "terminal": rng.random(100_000) < 0.01}, schema=schema))
    text = {"state_names": states, "action_names": actions, "loc": [0.0] * 4, "scale": [1.0] * 4}
    text |= {"constants": {}, "action_loc": [0.0] * 2, "action_scale": [1.0] * 2}
    layout.provenance(folder).write_text(json.dumps(text))


def measured(root: Path, name: str, total: int, limit: int, steps: int) -> dict[str, float]:
    written(root, name, total)
    command = [sys.executable, "-c", TRAINED, name, str(limit), str(steps)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    numbers: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    print(name, limit, numbers)
    return numbers


@pytest.mark.slow
def test_twenty_million_transitions_train_in_four_gibibytes(tmp_path: Path) -> None:
    """It includes the hash of the file that a checkpoint is known by; all rows at once would need 4.3 GiB or more."""
    long = measured(tmp_path, "long", LONG, 2_000_000, 20_000)
    assert long["GiB"] <= 4.0
    short = measured(tmp_path, "short", 200_000, 2_000_000, 20_000)
    # The 20,000 steps take more than two blocks of a million rows, so that blocks are read meanwhile.
    assert long["steps_per_second"] > 0.5 * short["steps_per_second"]
