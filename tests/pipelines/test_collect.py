"""Collection: tables that do not depend on the workers, follow the policy, and hold what they say."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from pipelines.base import files, plugins
from pipelines.base.errors import UserError
from pipelines.data import collect, moments
from pipelines.data.moments import Moments
from pipelines.environments import Array, linear_gaussian, maze

KINDS = ["linear_gaussian", "maze"]
MAZE_NEXT = [
    [-0.06071224381240647, -0.1951414712374198, 0.008461856139449947, 0.05103664759993402],
    [-0.0004999776193100815, -0.26440566833645507, -0.058703958690144456, 0.003168195752852791],
]
MAZE_ROLLED = [
    [0.14657750303078104, -0.17831824282690786, -0.0846464307584022, 0.017858352857251028],
    [-0.2726568162162405, 0.18616267183178603, 0.02758035659790039, 0.011032142639160157],
]
SPIRAL_NEXT = [[-0.10881357390483601, -0.41865423985564343], [0.2815971909438322, 0.83921925270107]]
SPIRAL_ROLLED = [[1.5174385525980572, 0.06210753620375556], [0.5106700829657134, -0.015063708347696214]]
SIZES = {"transitions": 25_000, "rollouts": 601, "length": 4, "starts": 260}


def draw(
    kind: str, seed: int = 0, workers: int | None = None, behaviour: str = "uniform", **sizes: int
) -> collect.Collection:
    settings = plugins.load("pipelines.environments", kind).Settings(behaviour=behaviour)
    return collect.collect(kind, settings, seed=seed, workers=workers, **{**SIZES, **sizes})


def part(table: pd.DataFrame, prefix: str) -> Array:
    """The columns of a prefix, (rows, n)."""
    names = [name for name in table.columns if name.startswith(f"{prefix}_")]
    return table[names].to_numpy()


@pytest.mark.parametrize("behaviour", ["uniform", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_the_seed_and_not_on_the_workers(kind: str, behaviour: str) -> None:
    one = draw(kind, workers=1, behaviour=behaviour)
    for workers in (2, 5, None):
        many = draw(kind, workers=workers, behaviour=behaviour)
        for name in ("transitions", "rollouts", "evaluation"):
            pd.testing.assert_frame_equal(getattr(one, name), getattr(many, name), check_exact=True)
    other = draw(kind, seed=1, behaviour=behaviour)
    for name in ("transitions", "rollouts", "evaluation"):
        assert (part(getattr(one, name), "state") != part(getattr(other, name), "state"))[:, :2].all()


def test_rows_of_the_default_run_stay_what_they_were() -> None:
    """Results in README.md stand on these; a row that changes makes all of them another experiment."""
    maze_tables = draw("maze", seed=7, transitions=2, rollouts=2, length=1, starts=1)
    np.testing.assert_allclose(part(maze_tables.transitions, "next_state"), MAZE_NEXT, rtol=0, atol=1e-12)
    np.testing.assert_allclose(part(maze_tables.rollouts, "state")[1::2], MAZE_ROLLED, rtol=0, atol=1e-12)
    spiral = draw("linear_gaussian", seed=7, transitions=2, rollouts=2, length=1, starts=1)
    np.testing.assert_allclose(part(spiral.transitions, "next_state"), SPIRAL_NEXT, rtol=0, atol=1e-12)
    np.testing.assert_allclose(part(spiral.rollouts, "state")[1::2], SPIRAL_ROLLED, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_does_not_depend_on_the_size_of_the_others(kind: str) -> None:
    one, other = draw(kind), draw(kind, transitions=100, starts=300)
    more = draw(kind, transitions=30_000, rollouts=1300)
    pd.testing.assert_frame_equal(one.rollouts, other.rollouts, check_exact=True)
    pd.testing.assert_frame_equal(one.evaluation[:1250], other.evaluation[:1250], check_exact=True)
    pd.testing.assert_frame_equal(one.evaluation, more.evaluation, check_exact=True)
    pd.testing.assert_frame_equal(one.transitions[:20_000], more.transitions[:20_000], check_exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_tables_share_no_draw(kind: str) -> None:
    tables = draw(kind)
    first = [part(t[t["step"] == 0], "state")[:, :2] for t in (tables.transitions, tables.rollouts, tables.evaluation)]
    every = np.concatenate(first)
    assert len(np.unique(every, axis=0)) == len(every)


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_are_one_step_with_the_policys_next_action(kind: str) -> None:
    module = plugins.load("pipelines.environments", kind)
    environment, table = module.build(module.Settings()), draw(kind).transitions
    np.testing.assert_array_equal(part(table, "next_action"), environment.policy(part(table, "next_state")))
    assert list(table["episode"]) == list(range(25_000))
    assert (table["step"] == 0).all()
    assert (table["behaviour"] == "coverage").all()
    off_policy = np.abs(part(table, "action") - environment.policy(part(table, "state"))).max(-1)
    assert (off_policy > 1e-3).mean() > 0.99


def test_maze_transitions_are_those_of_the_physics() -> None:
    table = draw("maze").transitions
    environment = maze.build(maze.Settings())
    expected = environment.step(part(table, "state"), part(table, "action"), np.random.default_rng(0))
    np.testing.assert_array_equal(part(table, "next_state"), expected)


def test_spiral_noise_differs_from_row_to_row() -> None:
    table = draw("linear_gaussian").transitions
    noise = part(table, "next_state") - 0.99 * (part(table, "state") + part(table, "action"))
    assert noise.std() == pytest.approx(0.03, rel=0.02)
    assert len(np.unique(noise.round(12), axis=0)) == len(noise)


@pytest.mark.parametrize("name", ["rollouts", "evaluation"])
def test_maze_rollouts_follow_the_policy(name: str) -> None:
    table = getattr(draw("maze"), name)
    environment = maze.build(maze.Settings())
    episodes = table["episode"].nunique()
    assert list(table["episode"]) == list(np.arange(episodes).repeat(SIZES["length"] + 1))
    assert list(table["step"]) == list(range(SIZES["length"] + 1)) * episodes
    np.testing.assert_array_equal(part(table, "action"), environment.policy(part(table, "state")))
    states, actions = (part(table, p).reshape(episodes, SIZES["length"] + 1, -1) for p in ("state", "action"))
    for k in range(SIZES["length"]):
        following = environment.step(states[:, k], actions[:, k], np.random.default_rng(0))
        np.testing.assert_array_equal(states[:, k + 1], following)


def test_half_of_the_rollouts_begin_at_the_start_distribution() -> None:
    table = draw("maze").rollouts
    first = table[table["step"] == 0]
    assert first["behaviour"].value_counts().to_dict() == {"coverage": 301, "start": 300}
    start = part(first[first["behaviour"] == "start"], "state")
    assert (start[:, 0] < -0.15).all()
    assert (start[:, 1] > 0.15).all()
    assert (start[:, 2:] == 0).all()
    coverage = part(first[first["behaviour"] == "coverage"], "state")
    assert (coverage[:, 0] > 0).mean() > 0.3
    assert (coverage[:, 2:] != 0).all()
    assert (draw("maze").evaluation["behaviour"] == "start").all()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_holds_every_reward_of_its_rows_state(kind: str) -> None:
    module = plugins.load("pipelines.environments", kind)
    table = draw(kind).evaluation
    rewards = module.build(module.Settings()).rewards(part(table, "state"))
    assert {name for name in table.columns if name.startswith("reward_")} == {f"reward_{name}" for name in rewards}
    for name, value in rewards.items():
        np.testing.assert_array_equal(table[f"reward_{name}"], value)


@pytest.mark.parametrize("kind", KINDS)
def test_counterfactuals_exchange_the_state_alone_or_the_action_alone(kind: str) -> None:
    module = plugins.load("pipelines.environments", kind)
    collector = collect.Collector(kind, module.Settings(), 0)
    evaluation = collector.evaluation(12, 5)
    table = collector.counterfactuals(evaluation, 5)
    assert table is not None
    first = evaluation[evaluation["step"] == 0].head(collect.COUNTERFACTUALS)
    state, action = part(first, "state"), part(first, "action")
    now = {name: rows[rows["step"] == 0] for name, rows in table.groupby("exchanged")}
    np.testing.assert_array_equal(part(now["state"], "action"), action)
    np.testing.assert_array_equal(part(now["state"], "state"), np.roll(state, -1, 0))
    np.testing.assert_array_equal(part(now["action"], "state"), state)
    assert (part(now["action"], "action") != action).all()
    for name in now:
        rows = table[table["exchanged"] == name]
        assert list(rows["episode"]) == list(np.repeat(np.arange(collect.COUNTERFACTUALS), 6))
        assert list(rows["step"]) == list(range(6)) * collect.COUNTERFACTUALS
        later = rows[rows["step"] > 0]
        np.testing.assert_array_equal(
            part(later, "action"), collector.environment.policy(part(later, "state"))
        )  # from then on the policy decides
        before = rows[rows["step"] < 5]
        noise = part(later, "state") - collector.environment.step(  # type: ignore[attr-defined]
            part(before, "state"), part(before, "action"), np.random.default_rng(0)
        )
        assert np.abs(noise).max() < (1e-12 if kind == "maze" else 0.03 * 8)
    pd.testing.assert_frame_equal(table, collect.Collector(kind, module.Settings(), 0).counterfactuals(evaluation, 5))


def test_columns_of_the_tables() -> None:
    tables = draw("maze", transitions=1, rollouts=2, length=1, starts=1)
    index, state, action = ["episode", "step", "behaviour"], ["x", "y", "vx", "vy"], ["ux", "uy"]
    rollout = [f"state_{name}" for name in state] + [f"action_{name}" for name in action]
    following = [f"next_state_{name}" for name in state] + [f"next_action_{name}" for name in action]
    assert list(tables.transitions.columns) == [*index, *rollout, *following, "terminal"]
    assert list(tables.rollouts.columns) == [*index, *rollout, "terminal"]
    assert list(tables.evaluation.columns)[:10] == [*index, *rollout, "terminal"]
    for table in vars(tables).values():
        assert table["terminal"].dtype == bool
        assert not table["terminal"].any()


@pytest.mark.parametrize(("method", "column"), [("step", "next_state_y"), ("policy", "next_action_uy")])
def test_not_finite_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, method: str, column: str) -> None:
    original = getattr(linear_gaussian.Spiral, method)

    def broken(self: linear_gaussian.Spiral, *arguments: Any) -> Array:
        result: Array = original(self, *arguments)
        if len(result) > 1000:
            result[:3, 1] = np.nan
        return result

    monkeypatch.setattr(linear_gaussian.Spiral, method, broken)
    with pytest.raises(UserError) as error:
        draw("linear_gaussian", workers=2)
    text = str(error.value)
    # The first piece has 10,000 rows, three bad ones among them.
    assert "'linear_gaussian'" in text
    assert f"{column!r} in 3 of 10000 rows, first in episode 0" in text
    assert "finite" in text


# ---- as a stream ----


def test_few_pieces_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads slowly keeps the workers from drawing on: no more than `AHEAD` pieces each wait."""
    drawn = []
    original = collect._transitions

    def counted(*arguments: Any) -> pd.DataFrame:
        drawn.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(collect, "_transitions", counted)
    collector = collect.Collector("linear_gaussian", linear_gaussian.Settings(), 0, workers=2)
    frames = collector.transitions(300_000, 1)
    for used in range(1, 31):
        next(frames)
        time.sleep(0.05)
        assert len(drawn) <= used + 2 * collect.AHEAD
    assert next(frames, None) is None
    assert len(drawn) == 30


def test_a_reader_that_stops_early_ends_the_workers() -> None:
    before = set(threading.enumerate())  # threads of other tests in this process come and go
    frames = collect.Collector("linear_gaussian", linear_gaussian.Settings(), 0, workers=2).transitions(300_000, 1)
    next(frames)
    workers = [thread for thread in threading.enumerate() if thread not in before]
    assert workers
    frames.close()  # type: ignore[attr-defined]
    assert not any(thread.is_alive() for thread in workers)


def test_a_written_table_is_the_collected_one_in_row_groups(tmp_path: Path) -> None:
    sizes = {**SIZES, "transitions": 230_001}
    tables = draw("linear_gaussian", **sizes)
    collector = collect.Collector("linear_gaussian", linear_gaussian.Settings(), 0)
    names = ["next_state_x", "next_state_y"]
    found = collect.write_frames(tmp_path / "t.parquet", collector.transitions(230_001, 4), names)
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100_000, 100_000, 30_001]
    pd.testing.assert_frame_equal(files.read_table(tmp_path / "t.parquet"), tables.transitions, check_exact=True)
    whole = {"loc": tables.transitions[names].mean(), "scale": tables.transitions[names].std(ddof=0)}
    assert found["low"] == tables.transitions[names].min().tolist()
    assert found["high"] == tables.transitions[names].max().tolist()
    for name in ("loc", "scale"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-12)
        # Networks are trained in float32, in which nothing changes.
        np.testing.assert_array_equal(np.float32(found[name]), np.float32(whole[name]))


def test_moments_of_parts_are_those_of_the_whole() -> None:
    rows = 1e6 + np.random.default_rng(0).standard_normal((10_000, 3)) * [1e-3, 1, 1e3]
    parts = Moments(["a", "b", "c"])
    for part_of in np.split(rows, [1, 2, 5000, 9999]):
        parts.add(part_of)
    result = parts.result()
    np.testing.assert_allclose(result["loc"], rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(result["scale"], rows.std(0), rtol=1e-6)


def test_a_constant_column_is_its_own_location_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    frames = [pd.DataFrame({"x": [0.1] * 7, "y": [1.0, 2, 3, 4, 5, 6, 7]})] * 3
    found = collect.write_frames(tmp_path / "t.parquet", frames, ["y", "x"])
    assert found == {"loc": [4.0, 0.1], "scale": [2.0, 1.0], "low": [1.0, 0.1], "high": [7.0, 0.1]}
    with pytest.raises(ZeroDivisionError):
        collect.write_frames(tmp_path / "other.parquet", (1 // 0 for _ in range(2)), ["y"])  # type: ignore[misc]
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_units_of_an_environment_name_what_is_constant() -> None:
    found = {"loc": [0.0, 3.0, 7.0, 1.0], "scale": [2.0, 1.0, 4.0, 1.0]}
    found |= {"low": [-1.0, 3.0, 5.0, 1.0], "high": [1.0, 3.0, 9.0, 1.0]}
    described, sentences = moments.units(found, ["x", "y"], ["y", "v"])
    assert described == {
        **{name: values[:2] for name, values in found.items()},
        "constants": {"y": 3.0},
        "action_loc": [7.0, 1.0],
        "action_scale": [4.0, 1.0],
    }
    assert [sentence.split(" in all")[0] for sentence in sentences] == ["y is 3", "the action v is 1"]
    with pytest.raises(UserError, match="change no component of the state: y is 3, x is 1; expected one that varies"):
        moments.units({name: values[1::2] for name, values in found.items()}, ["y", "x"], [])


@pytest.mark.slow
def test_twenty_million_rows_stay_below_two_gibibytes(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from pipelines.data import collect
from pipelines.environments import linear_gaussian
collector = collect.Collector("linear_gaussian", linear_gaussian.Settings(), 0)
collect.write_frames(Path({str(tmp_path)!r}) / "t.parquet", collector.transitions(20_000_000, 1), ["next_state_x"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert parquet.ParquetFile(tmp_path / "t.parquet").metadata.num_rows == 20_000_000
    assert int(run.stdout) < 2 * 2**20  # KiB
