"""The kind transitions: every layout gives the same rows, held-out episodes give the futures, ends keep their mass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from flowmatch_core.successor import HorizonModel
from pipelines import environments
from pipelines.base import files, layout, metric_keys
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.data import collect, logs
from pipelines.data.batches import Batches
from pipelines.environments import Log, linear_gaussian, transitions
from pipelines.evaluation import models, scores, truth
from pipelines.models.untrained import Untrained, untrained
from pipelines.orchestration import preflight, promotion, relocate
from pipelines.reporting import report
from pipelines.reporting.tables import successor as successor_table
from pipelines.runs import sources
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import collect as collect_stage
from pipelines.stages import evaluate_successor, sample_successor
from tests.pipelines.policies import still

ROOT = Path(__file__).parents[2]
LENGTHS = [7, 4, 9, 5, 8, 6, 3, 9]  # steps of the episodes; the second and the fourth end in a terminal state
TERMINAL = {1, 3}
ENTRY = {
    "kind": "transitions",
    "file": "log.parquet",
    "state": ["x", "y"],
    "action": ["u1", "u2"],
    "episode": "episode",
    "next_state": None,
    "policy": None,
    "terminal": "done",
    "timeout": "truncated",
    "reward": "reward",
}
"""The entry of the specification."""


def state(episode: int, step: np.ndarray) -> np.ndarray:
    """States that say where they stand."""
    place = 100.0 * episode + step
    return np.stack([place, -2 * place], 1)


def action(episode: int, step: np.ndarray) -> np.ndarray:
    return np.stack([100.0 * episode + step + 0.5, np.sin(step)], 1)


def reward(episode: int, step: np.ndarray) -> np.ndarray:
    """The reward of the step from here."""
    return 10.0 * episode + step + 1


def rows(next_state: bool = False) -> pd.DataFrame:
    """A table with a row for each state, or for each step with its next state."""
    parts = []
    for episode, steps in enumerate(LENGTHS):
        step = np.arange(steps if next_state else steps + 1)
        last = step == step[-1]
        part = pd.DataFrame({"episode": f"run {episode}", "step": step})
        part[["x", "y"]], part[["u1", "u2"]] = state(episode, step), action(episode, step)
        if next_state:
            part[["nx", "ny"]] = state(episode, step + 1)
        part = part.assign(reward=reward(episode, step), done=last & (episode in TERMINAL))
        parts.append(part.assign(truncated=last & (episode not in TERMINAL)))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows().to_parquet("log.parquet")
    return tmp_path


def entry(**changes: Any) -> params.EnvironmentEntry:
    return params.EnvironmentEntry.model_validate({**ENTRY, "gamma": 0.5, "length": 4, **changes})


def log(**changes: Any) -> Log:
    built = environments.build("transitions", entry(**changes).settings())
    assert isinstance(built, Log)
    return built


def tables(seed: int = 0, **changes: Any) -> logs.LogTables:
    return logs.LogTables(log(**changes), entry(**changes), seed)


def written(**changes: Any) -> Path:
    """The folder of the tables of a log."""
    chosen = entry(**changes)
    described = collect._from_log(Path("data"), chosen, 0)
    names = {"state_names": list(log(**changes).state_names), "action_names": list(log(**changes).action_names)}
    files.write_json(Path("data/provenance.json"), {"truth": log(**changes).truth, **names, **described})
    return Path("data")


# ---- layouts ----


def csv(path: Path) -> None:
    rows().to_csv(path, index=False)


def d4rl(path: Path, following: bool = True) -> None:
    table = rows(next_state=True)
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = table[["x", "y"]].to_numpy(), table[["u1", "u2"]].to_numpy()
        if following:
            file["next_observations"] = table[["nx", "ny"]].to_numpy()
        file["rewards"], file["terminals"] = table["reward"].to_numpy(), table["done"].to_numpy()
        file["timeouts"] = table["truncated"].to_numpy()


def minari(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for episode, steps in enumerate(LENGTHS):
            step, group = np.arange(steps), file.create_group(f"episode_{episode}")
            group["observations"] = state(episode, np.arange(steps + 1))
            group["actions"], group["rewards"] = action(episode, step), reward(episode, step)
            last = step == steps - 1
            group["terminations"], group["truncations"] = last & (episode in TERMINAL), last & (episode not in TERMINAL)


def exorl(path: Path) -> None:
    path.mkdir()
    for episode, steps in enumerate(LENGTHS):
        step, over = np.arange(steps + 1), np.ones(steps + 1)
        over[-1] = episode not in TERMINAL
        led, earned = action(episode, step - 1), reward(episode, step - 1)
        np.savez(
            path / f"{episode}.npz", observation=state(episode, step), action=led, reward=earned, discount=over[:, None]
        )


LAYOUTS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "log.csv": (csv, {}),
    "log.tsv": (lambda path: rows().to_csv(path, index=False, sep="\t"), {}),
    "semicolons.csv": (lambda path: rows().to_csv(path, index=False, sep=";"), {}),
    "next.parquet": (lambda path: rows(True).to_parquet(path), {"next_state": ["nx", "ny"]}),
    "prefix.parquet": (
        lambda path: rows().rename(columns={"x": "s_x", "y": "s_y"}).to_parquet(path),
        {"state": "s*", "action": "u*"},
    ),
    "d4rl.hdf5": (d4rl, {"state": "s*", "action": "a*", "terminal": None, "timeout": None}),
    "minari.hdf5": (minari, {"state": "s*", "action": "a*", "terminal": None, "timeout": None}),
    "exorl": (exorl, {"state": "s*", "action": "a*", "terminal": None, "timeout": None}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_steps_that_were_recorded(name: str) -> None:
    write, changes = LAYOUTS[name]
    write(Path(name))
    found = list(log(file=name, **changes).episodes())
    assert len(found) == len(LENGTHS)
    for number, episode in enumerate(found):
        steps = np.arange(LENGTHS[number] + 1)
        np.testing.assert_array_equal(episode.states, state(number, steps))
        np.testing.assert_array_equal(episode.actions[: len(steps) - 1], action(number, steps[:-1]))
        np.testing.assert_array_equal(episode.rewards, reward(number, steps[:-1]))
        assert episode.terminal == (number in TERMINAL)


def test_several_files_are_one_log() -> None:
    table = rows()
    table[:20].to_parquet("part0.parquet")  # in the middle of an episode
    table[20:].to_parquet("part1.parquet")
    whole = list(log().episodes())
    for file in ("part*.parquet", ["part0.parquet", "part1.parquet"]):
        parts = list(log(file=file).episodes())
        assert [episode.name for episode in parts] == [episode.name for episode in whole]
        for a, b in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(a.states, b.states)


def test_d4rl_without_next_observations_ends_with_its_last_row() -> None:
    d4rl(Path("d4rl.hdf5"), following=False)
    found = list(log(file="d4rl.hdf5", **LAYOUTS["d4rl.hdf5"][1]).episodes())
    assert [len(episode.states) for episode in found] == LENGTHS
    assert [number for number, episode in enumerate(found) if episode.terminal] == sorted(TERMINAL)


def test_a_row_that_time_cut_off_is_no_terminal() -> None:
    """As in logs whose `done` is true at every end."""
    table = rows()
    table["done"] |= table["truncated"]
    table.to_parquet("log.parquet")
    assert [number for number, episode in enumerate(log().episodes()) if episode.terminal] == sorted(TERMINAL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:minari.utils")  # about who made it and how
def test_a_data_set_that_minari_made(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    package = pytest.importorskip("minari", reason="the extra minari")
    spaces = pytest.importorskip("gymnasium").spaces
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "sets"))
    buffers = []
    for episode, steps in enumerate(LENGTHS):
        step, over = np.arange(steps), np.arange(steps) == steps - 1
        buffers.append(
            package.data_collector.EpisodeBuffer(
                observations=list(state(episode, np.arange(steps + 1))),
                actions=list(action(episode, step)),
                rewards=reward(episode, step).tolist(),
                terminations=(over & (episode in TERMINAL)).tolist(),
                truncations=(over & (episode not in TERMINAL)).tolist(),
            )
        )
    box = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    package.create_dataset_from_buffers(
        "own/log-v0", buffers, observation_space=box, action_space=box, data_format="hdf5"
    )
    changes = LAYOUTS["minari.hdf5"][1]
    by_package = list(log(file="sets/own/log-v0", **changes).episodes())
    by_h5py = list(log(file="sets/own/log-v0/data/main_data.hdf5", **changes).episodes())
    assert len(by_package) == len(LENGTHS)
    for number, (a, b) in enumerate(zip(by_package, by_h5py, strict=True)):
        for part in ("states", "actions", "rewards", "terminal"):
            np.testing.assert_array_equal(getattr(a, part), getattr(b, part))
        np.testing.assert_array_equal(a.states, state(number, np.arange(LENGTHS[number] + 1)))
        assert a.terminal == (number in TERMINAL)


# ---- tables ----


def number(table: pd.DataFrame, prefix: str = "state") -> np.ndarray:
    """Where the states of a table stand."""
    place = table[f"{prefix}_x"].to_numpy()
    np.testing.assert_array_equal(table[f"{prefix}_y"], -2 * place)
    return place


def test_transitions_are_the_steps_of_the_training_episodes_in_order() -> None:
    made = tables()
    table = pd.concat(list(made.transitions()))
    expected = [100 * e + s for e in made.training for s in range(LENGTHS[e])]
    assert number(table).tolist() == expected
    assert number(table, "next_state").tolist() == [place + 1 for place in expected]
    assert table["action_u1"].tolist() == [place + 0.5 for place in expected]
    assert table["next_action_u1"].tolist() == [place + 1.5 for place in expected]
    assert table["reward"].tolist() == [10 * e + s + 1 for e in made.training for s in range(LENGTHS[e])]
    over = [e in TERMINAL and s == LENGTHS[e] - 1 for e in made.training for s in range(LENGTHS[e])]
    assert table["terminal"].tolist() == over
    assert made.count == len(expected)


def test_the_last_step_before_a_time_limit_has_no_next_action_and_is_left_out() -> None:
    """Unless it ends in a terminal state, in which no action has an effect."""
    rows(next_state=True).to_parquet("log.parquet")
    made = tables(next_state=["nx", "ny"])
    table = pd.concat(list(made.transitions()))
    steps = {e: LENGTHS[e] - (e not in TERMINAL) for e in made.training}
    assert number(table).tolist() == [100 * e + s for e in made.training for s in range(steps[e])]
    assert np.isfinite(table["next_action_u1"]).all()


def test_a_part_of_the_transitions_is_made_of_random_episodes() -> None:
    chosen = {seed: pd.concat(list(tables(seed, transitions=15).transitions())) for seed in range(6)}
    assert all(len(table) == 15 for table in chosen.values())
    assert len({tuple(table["episode"].unique()) for table in chosen.values()}) > 1
    with pytest.raises(UserError, match=r"^1000 transitions were asked of the log, whose training episodes have \d+;"):
        tables(transitions=1000)


def test_an_episode_stays_in_training_or_held_out_when_the_log_grows() -> None:
    one = rows().query("episode == 'run 0'")

    def write(count: int) -> None:
        pd.concat([one.assign(episode=f"e{i}") for i in range(count)]).to_parquet("log.parquet")

    split = {}
    for count in (150, 200):
        write(count)
        made = tables()
        split[count] = {made.index[i].name for i in made.held_out}
        assert made.held_out.isdisjoint(made.training)
        assert len(made.held_out) + len(made.training) == count
    assert split[150] == {name for name in split[200] if int(name[1:]) < 150}
    assert abs(len(split[200]) / 200 - logs.HELD_OUT) < 5 * (0.2 * 0.8 / 200) ** 0.5
    other = tables(seed=1)
    assert {other.index[i].name for i in other.held_out} != split[200]


def test_the_evaluation_is_the_logged_future_of_held_out_states() -> None:
    made = tables(starts=4)
    list(made.transitions())
    table = made.evaluation
    places = number(table).reshape(4, 5)
    for place, over in zip(places, table["terminal"].to_numpy().reshape(4, 5), strict=True):
        e, s = divmod(int(place[0]), 100)
        assert e in made.held_out
        last = LENGTHS[e]
        assert e in TERMINAL or s + 4 <= last  # a time limit is not the future
        assert place.tolist() == [100 * e + min(s + k, last) for k in range(5)]
        assert over.tolist() == [e in TERMINAL and s + k >= last for k in range(5)]
    assert len({row.tobytes() for row in places}) == 4


def test_the_value_of_the_truth_is_the_logged_return() -> None:
    """The last reward goes on for ever, as its state does."""
    folder, gamma = written(starts=4), 0.5
    table = files.read_table(layout.evaluation(folder))
    first = table.loc[table["step"] == 0, "state_x"]
    expected = []
    for place in first:
        e, s = divmod(int(place), 100)
        earned = [10 * e + min(s + k, LENGTHS[e] - 1) + 1 for k in range(400)]
        earned[4:] = [earned[3]] * 396
        expected.append(sum(gamma**k * r for k, r in enumerate(earned)))
    np.testing.assert_allclose(truth.returns(folder, "reward", gamma), expected, rtol=1e-12)


def test_a_logged_reward_is_that_of_the_nearest_next_state() -> None:
    folder = written()
    table = files.read_table(layout.transitions(folder))
    known = truth.reward_of(log(), "reward", folder)
    states = table[["next_state_x", "next_state_y"]].to_numpy()
    np.testing.assert_array_equal(known(states + 0.2), table["reward"])
    np.testing.assert_array_equal(truth.reward_of(log(reward="y"), "y", folder)(states), states[:, 1])


def test_another_future_begins_at_the_nearest_state_of_another_episode() -> None:
    folder = written(starts=4)
    start, again = truth.read(folder, torch.device("cpu")), truth.neighbours(folder, torch.device("cpu"))
    assert again is not None
    held_out = tables(starts=4).held_out
    table = files.read_table(layout.rollouts(folder))
    columns = [name for name in table.columns if name.startswith(("state_", "action_"))]
    usable = [
        table[columns][(table["episode"] == e) & (table["step"] == s)].to_numpy()[0]
        for e in range(len(LENGTHS))
        if e not in held_out
        for s in range(LENGTHS[e] if e in TERMINAL else LENGTHS[e] - 3)
    ]
    scale = table[columns].to_numpy().std(0)
    for i in range(4):
        here = torch.cat([start.state[i], start.action[i]]).numpy()
        there = torch.cat([again.state[i], again.action[i]]).numpy()
        gaps = np.linalg.norm((np.array(usable) - here) / scale, axis=1)
        assert np.linalg.norm((there - here) / scale) == pytest.approx(gaps.min(), rel=1e-5)
        e, s = divmod(int(there[0]), 100)
        future = again.states[i, :, 0].tolist()
        assert future == [100 * e + min(s + k, LENGTHS[e]) for k in range(5)]


def test_windows_and_futures_of_a_log_end_with_their_episodes() -> None:
    folder, gamma = written(), 0.5
    batches = Batches(folder, torch.device("cpu"))
    training = tables().training
    generator = torch.Generator().manual_seed(0)

    def place(standard: Tensor) -> np.ndarray:
        return (standard * batches.scale + batches.loc)[:, 0].round().numpy().astype(int)

    batch = batches.returns(4000, gamma, 3)(generator)
    here, there = place(batch.state), place(batch.next_state)
    assert batch.terminal is not None
    over = {100 * e + LENGTHS[e] for e in TERMINAL}
    allowed = {100 * e + s for e in training for s in range(LENGTHS[e] if e in TERMINAL else LENGTHS[e] - 2)}
    assert set(here) == allowed
    last = np.array([LENGTHS[e] for e in here // 100])
    np.testing.assert_array_equal(there, here + np.minimum(3, last - here % 100))
    np.testing.assert_array_equal(batch.terminal.numpy(), [place in over for place in there])

    batch, future = batches.futures(60_000, gamma)(generator)
    here, there = place(batch.state), place(future)
    allowed = {100 * e + s for e in training for s in range(LENGTHS[e] if e in TERMINAL else LENGTHS[e] - 3)}
    assert set(here) == allowed
    for start in sorted(allowed)[::5]:
        left = LENGTHS[start // 100] - start % 100
        law = np.array([(1 - gamma) * gamma**k for k in range(left - 1)] + [gamma ** (left - 1)])
        waits = (there - here)[here == start]
        found = np.bincount(waits, minlength=left + 1)[1:] / len(waits)
        assert (np.abs(found - law) < 5 * np.sqrt(law * (1 - law) / len(waits)) + 1e-9).all()


# ---- another policy ----


def test_next_actions_are_those_of_the_policy_and_nothing_is_invented() -> None:
    changes = {"policy": "tests.pipelines.policies:still"}
    made = tables(**changes)
    table = pd.concat(list(made.transitions()))
    assert (table[["next_action_u1", "next_action_u2"]] == 0).all(axis=None)
    assert (table["action_u1"] == number(table) + 0.5).all()
    assert made.rollouts is None
    assert made.neighbours() is None
    evaluation = made.evaluation
    assert set(evaluation["step"]) == {0, 1}
    assert (evaluation["action_u1"] == np.where(evaluation["step"] == 0, number(evaluation) + 0.5, 0)).all()
    assert still(np.zeros((3, 2))).shape == (3, 2)


def nan(states: np.ndarray) -> np.ndarray:
    return np.full((len(states), 2), np.nan)


def narrow(states: np.ndarray) -> np.ndarray:
    return np.zeros((len(states), 1))


@pytest.mark.parametrize(("policy", "words"), [("nan", "NaN"), ("narrow", r"shape \(\d+, 1\); expected")])
def test_a_policy_that_answers_badly_is_one_sentence(policy: str, words: str) -> None:
    made = tables(policy=f"{__name__}:{policy}")
    with pytest.raises(UserError, match=words):
        list(made.transitions())


def test_a_bootstrap_has_the_next_state_with_its_mass_and_all_of_it_where_it_is_terminal() -> None:
    n, gamma = 40_000, 0.7
    states = torch.tensor([[[0.0], [1.0]], [[0.0], [2.0]]])
    terminal = torch.tensor([[False, False], [False, True]])
    starts = truth.Starts(["x"], states, states, terminal)
    x = truth.bootstrap(starts, torch.full((n, 2, 1), 9.0), gamma, torch.Generator().manual_seed(0))[..., 0]
    assert abs(float((x[:, 0] == 1).double().mean()) - (1 - gamma)) < 5 * (gamma * (1 - gamma) / n) ** 0.5
    assert set(x[:, 0].tolist()) == {1.0, 9.0}
    assert set(x[:, 1].tolist()) == {2.0}


# ---- stages ----


def halfway(states: np.ndarray) -> np.ndarray:
    """The spiral's own policy, under a name of ours: the closed form is that of the policy."""
    return linear_gaussian.build(linear_gaussian.Settings()).policy(states)


def spiral_log(episodes: int, steps: int, names: tuple[str, str] = ("x", "y")) -> pd.DataFrame:
    """The spiral written out as a log, with the bump of the next state as the reward."""
    spiral, rng, parts = linear_gaussian.build(linear_gaussian.Settings()), np.random.default_rng(0), []
    now = spiral.starts(rng, episodes)
    for step in range(steps):
        act = spiral.policy(now)
        then = spiral.step(now, act, rng)
        table = pd.DataFrame({"episode": np.arange(episodes), "step": step, "u1": act[:, 0], "u2": act[:, 1]})
        table[list(names)] = now
        parts.append(table.assign(reward=spiral.rewards(then)["bump"], done=False, truncated=step == steps - 1))
        now = then
    return pd.concat(parts).sort_values(["episode", "step"], ignore_index=True)


class Closed(HorizonModel):
    """The closed form of the spiral, or one that ignores the state."""

    has_density = True

    def __init__(self, blind: bool) -> None:
        super().__init__(0.9, None, None)
        self.blind = blind
        self.mdp = linear_gaussian.build(linear_gaussian.Settings()).oracle().to("cpu", torch.float64)

    def sample(
        self, state: Tensor, action: Tensor | None, n: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert action is not None
        state, action = (0 * state, 0 * action) if self.blind else (state, action)
        return self.mdp.successor(state, action, 0.9).sample(n, generator=generator)

    def log_prob(self, x: Tensor, state: Tensor, action: Tensor | None) -> Tensor:
        state, action = (0 * state, 0 * action) if self.blind and action is not None else (state, action)
        return self.mdp.successor(state, action, 0.9).log_prob(x)


def parameters(entries: dict[str, Any], methods: dict[str, Any]) -> params.Params:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw |= {"environments": entries, "datasets": {}, "experiments": {}}
    raw["successor"] |= {
        "methods": methods,
        "seeds": [0],
        "sample": {"samples": 128, "solver": "midpoint", "steps": 20},
        "evaluate": {"likelihood_rows": 8, "solver": "rk4", "steps": 4, "solver_steps": {}},
    }
    return params.Params.model_validate(raw)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[[params.Params], Stage]:
    def make(chosen: params.Params) -> Stage:
        monkeypatch.setenv("FLOWMATCH_CORES", "1")  # the models that are put in place are in this process
        monkeypatch.setenv("FLOWMATCH_HOME", str(folder / "home"))
        monkeypatch.setenv("FLOWMATCH_INVOCATION", "test")
        return Stage("test", chosen, RunRecord.start("test", {}))

    return make


def run(stage: Stage, patch: pytest.MonkeyPatch, environment: str) -> dict[str, Any]:
    def model(given: params.Params, name: str, method: str, *_: Any) -> HorizonModel | Untrained:
        return untrained(given, name, method) or Closed(blind=method == "blind")

    patch.setattr(models, "load", model)
    for step in (collect_stage, sample_successor, evaluate_successor):
        step.main(stage, environment)
    metrics: dict[str, Any] = files.read_json(layout.metrics(environment))
    return metrics


METHODS = {"right": {"loss": "td2_cfm"}, "blind": {"loss": "td2_cfm"}, "mc": {"loss": "mc_cfm"}}
METHODS |= {"n_step": {"loss": "td2_cfm", "fit": {"returns": 3}}}


def test_models_of_the_logs_policy_are_scored_on_held_out_episodes(
    monkeypatch: pytest.MonkeyPatch, stage: Callable[[params.Params], Stage]
) -> None:
    spiral_log(60, 80).to_parquet("log.parquet")
    chosen = parameters({"own": {**ENTRY, "gamma": 0.9, "starts": 24}}, METHODS)
    preflight.check(chosen)
    metrics = run(stage(chosen), monkeypatch, "own")
    right, blind, floor = (metrics[name] for name in ("right", "blind", "floor"))
    assert right["emd"] < 0.5 * blind["emd"]
    assert right["mse_v"] < 0.5 * blind["mse_v"]
    assert right["nll"] < blind["nll"] - 0.3
    assert 0 < floor["emd"] < blind["emd"]
    assert "skipped" not in metrics["mc"]
    provenance = files.read_json(layout.provenance(layout.collected("own")))
    assert provenance["truth"] == "held-out episodes"
    assert provenance["cut_off_mass"] == pytest.approx(0.9 ** provenance["length"])
    assert provenance["cut_off_mass"] <= logs.MASS
    table = successor_table.build(chosen, {"own": metrics}, {}, {"own": provenance})
    assert set(table.rows["truth"]) == {"held-out episodes"}
    assert "Bellman residual / floor" not in table.rows


def test_models_of_another_policy_have_no_reference_but_a_residual(
    monkeypatch: pytest.MonkeyPatch, stage: Callable[[params.Params], Stage]
) -> None:
    spiral_log(60, 80).to_parquet("log.parquet")
    chosen = parameters({"half": {**ENTRY, "gamma": 0.9, "policy": f"{__name__}:halfway"}}, METHODS)
    metrics = run(stage(chosen), monkeypatch, "half")
    name = scores.BELLMAN
    assert metrics["right"][name] < 1.4 * metrics["right"][f"{name}_floor"]  # a step's noise is small
    blind = metrics["blind"]
    assert blind[name] > 1.4 * blind[f"{name}_floor"] or blind[name] > 2 * metrics["right"][name]
    for method in ("right", "blind"):
        assert not {"emd", "nll", "mse_v", "emd_over_floor"} & metrics[method].keys()
    assert all("another one's" in metrics[method]["skipped"] for method in ("mc", "n_step"))
    assert "no reference" in metrics["floor"]["skipped"]
    provenance = files.read_json(layout.provenance(layout.collected("half")))
    table = successor_table.build(chosen, {"half": metrics}, {}, {"half": provenance})
    assert set(table.rows["truth"]) == {"no reference"}
    shown = table.rows.set_index("method")
    assert shown.loc["right", "EMD"] is None
    assert shown.loc["right", "Bellman residual / floor"] is not None
    assert not layout.truth(layout.evaluations("half")).exists()
    assert not promotion._has_reference(chosen, Path(), "half.right")
    for method in METHODS:
        with files.replacing(layout.curve("half", method)) as file:
            file.write_text("step\n")
    page = report.Page(Path())
    report._environment(page, chosen, "half", metrics)
    assert "No reference; Bellman residual: right" in page.environments[0].lead
    assert [file.stem for file in sorted(Path().glob("*.png"))] == ["half-loss", "half-occupancy"]


@pytest.mark.parametrize("names", [("seed", "start"), ("time", "episode"), ("step", "terminal")])
def test_any_name_of_a_component_gives_the_numbers_of_any_other(
    monkeypatch: pytest.MonkeyPatch, stage: Callable[[params.Params], Stage], names: tuple[str, str]
) -> None:
    def metrics(name: str, columns: tuple[str, str]) -> tuple[dict[str, Any], pd.DataFrame]:
        table = spiral_log(30, 60, ("one", "two")).drop(columns="step").rename(columns={"episode": "run"})
        table.rename(columns=dict(zip(("one", "two"), columns, strict=True))).to_parquet("log.parquet")
        changes = {"state": list(columns), "episode": "run", "gamma": 0.9, "starts": 4, "reward": "reward"}
        chosen = parameters({name: {**ENTRY, **changes}}, {"right": {"loss": "td2_cfm"}})
        found = run(stage(chosen), monkeypatch, name)
        samples = files.read_table(layout.sampled(layout.samples(name), "right"))
        return found, report._shown(samples, columns)

    (plain, plain_samples), (other, other_samples) = metrics("log", ("one", "two")), metrics("log", names)
    assert other == plain
    np.testing.assert_array_equal(other_samples.to_numpy(), plain_samples.to_numpy())
    assert set(other_samples.columns) == {*metric_keys.columns("state", names), "seed", "start"}


@pytest.mark.slow
def test_a_log_of_the_spiral_trains_as_well_as_the_spiral(
    monkeypatch: pytest.MonkeyPatch, stage: Callable[[params.Params], Stage]
) -> None:
    """EMD of TD²-CFM to the closed form, at the same states, after the same steps."""
    from pipelines.stages import train_successor

    spiral_log(400, 150).to_parquet("log.parquet")
    entries = {
        "log": {**ENTRY, "gamma": 0.9},
        "spiral": {
            "kind": "linear_gaussian", "behaviour": "policy", "gamma": 0.9, "transitions": 45_000, "rollouts": 40,
            "length": 150, "starts": 16, "reward": "bump",
        },
    }  # fmt: skip
    chosen = parameters(entries, {"td2_cfm": {"loss": "td2_cfm", "fit": {"steps": 1500}}})
    made, found = stage(chosen), {}
    for name in entries:
        collect_stage.main(made, name)
        train_successor.main(made, name, "td2_cfm")
    spiral = linear_gaussian.build(linear_gaussian.Settings())
    states = spiral.starts(np.random.default_rng(1), 16)
    s, a = (torch.tensor(rows, dtype=torch.float32) for rows in (states, spiral.policy(states)))
    exact = spiral.oracle().to("cpu", torch.float32).successor(s, a, 0.9)
    true, other = (exact.sample(512, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for name in entries:
        model = models.load(chosen, name, "td2_cfm", 0, torch.device("cpu"), "midpoint", 20)
        assert isinstance(model, HorizonModel)
        x = models.sample(model, s, a, 512, torch.Generator().manual_seed(2))
        found[name] = scores.distances(x, true).mean()
    floor = scores.distances(other, true).mean()
    print(f"EMD to the closed form: {found}, floor {floor:.4f}")
    assert found["log"] < 1.5 * found["spiral"] + 0.2 * floor


# ---- entries ----


def test_the_entry_of_the_specification_is_valid_alone(folder: Path) -> None:
    chosen = parameters({"robot": ENTRY}, METHODS).environments["robot"]
    assert (chosen.gamma, chosen.transitions, chosen.rollouts) == (0.95, None, None)
    assert (chosen.length, chosen.starts, chosen.reward) == (None, None, "reward")
    assert chosen.settings().reward == "reward"


@pytest.mark.parametrize("key", ["gamma", "transitions", "rollouts", "length", "starts", "reward"])
def test_other_kinds_require_what_a_log_says_itself(folder: Path, key: str) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw["environments"]["spiral"].pop(key)
    with pytest.raises(UserError, match=rf"environments.spiral.{key} is missing; add it\."):
        params.parse(raw, Path("params.yaml"))
    raw["environments"]["spiral"][key] = None
    with pytest.raises(UserError, match=rf"environments.spiral.{key} is null; it should be a value"):
        params.parse(raw, Path("params.yaml"))


def test_all_is_no_number_of_what_is_drawn(folder: Path) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw["environments"]["spiral"]["transitions"] = "all"
    with pytest.raises(UserError, match=r"environments.spiral.transitions is all, and linear_gaussian draws"):
        preflight.check(params.parse(raw, Path("params.yaml")))


def test_a_log_is_found_from_the_folder_of_a_profile(folder: Path) -> None:
    raw = {"environments": {"robot": {**ENTRY, "file": "log.parquet"}, "more": {**ENTRY, "file": ["a*", "/b.csv"]}}}
    moved = relocate.relocate(raw, folder, folder / ".workspaces" / "smoke")["environments"]
    assert moved["robot"]["file"] == "../../log.parquet"
    assert moved["more"]["file"] == ["../../a*", "/b.csv"]


def test_the_files_of_a_log_are_sources(folder: Path) -> None:
    chosen = parameters({"robot": ENTRY, "other": {**ENTRY, "policy": "tests.pipelines.policies:still"}}, METHODS)
    found = sources.find(chosen)
    assert found["robot"] == {"log.parquet": Path("log.parquet")}
    assert any(name.endswith("policies.py") for name in found["other"])
    for name in ("a", "b"):
        Path(name).mkdir()
        rows().to_parquet(f"{name}/log.parquet")
    twice = parameters({"robot": {**ENTRY, "file": ["a/log.parquet", "b/log.parquet"]}}, METHODS)
    assert set(sources.find(twice)["robot"].values()) == {Path("a/log.parquet"), Path("b/log.parquet")}
    Path("log.parquet").unlink()
    with pytest.raises(UserError, match=r"^params.yaml: environments.robot: file is 'log.parquet', which is not there"):
        sources.find(chosen)


# ---- bad input ----


def changed(**columns: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype(dict.fromkeys(columns, object))
        for name, (row, value) in columns.items():
            table.loc[row, name] = value
        return table.infer_objects()

    return change


BAD: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], dict[str, Any], str]] = [
    (
        lambda t: t.rename(columns={"u1": "u_1"}),
        {},
        r"action is 'u1', and the log has no.*did you mean 'u_1'",
    ),
    (lambda t: t, {"state": ["q*"]}, r"state is 'q\*', and the log has no such column"),
    (lambda t: t, {"state": "q*"}, r"state is 'q\*'; expected the beginning of columns"),
    (lambda t: t, {"state": ["x", "x"]}, r"state has 'x' twice"),
    (lambda t: t, {"terminal": "don"}, r"terminal is 'don'.*did you mean 'done'"),
    (lambda t: t, {"reward": "rewards"}, r"reward is 'rewards'.*did you mean 'reward'"),
    (lambda t: t, {"next_state": ["x"]}, r"next_state has 1 columns; expected as many as state, 2"),
    (lambda t: pd.concat([t, t[:3]]), {}, r"the episode 'run 0' comes back after other rows.*overlap"),
    (lambda t: t.drop(index=3), {}, r"'step' goes from 2 to 4 in the episode 'run 0'"),
    (lambda t: t.iloc[[0, 2, 1, *range(3, len(t))]], {}, r"'step' goes from 2 to 1"),
    (changed(x=(2, np.nan)), {}, r"the episode 'run 0' has a missing or infinite state, first in its row 2"),
    (changed(u2=(2, np.inf)), {}, r"has a missing or infinite action"),
    (changed(done=(2, True)), {}, r"is terminal at its row 2 of 8 and goes on"),
    (changed(truncated=(2, True)), {}, r"is cut off by a timeout at its row 2 of 8 and goes on"),
    (lambda t: t.assign(done=7), {}, r"the column 'done' holds '7'; expected true or false"),
    (changed(episode=(2, None)), {}, r"a row without a value in 'episode'"),
    (lambda t: t.assign(x="red"), {}, r"the column 'x' holds 'red'; expected numbers"),
    (lambda t: t.assign(episode=1, step=range(len(t)), done=False, truncated=False), {}, r"the log has 1 episode"),
    (lambda t: t, {"length": 10, "terminal": None}, r"0 of 8 episodes have 10 steps or a terminal end"),
    (lambda t: t, {"gamma": 0.999, "length": None, "terminal": None}, r"0 of 8 episodes have 4603 steps.*lower gamma"),
    (lambda t: t, {"starts": 500}, r"500 start states were asked of the log"),
    (lambda t: t, {"rollouts": 50}, r"rollouts is 50, and the log has \d training episodes"),
    (lambda t: t, {"file": "lag.parquet"}, r"file is 'lag.parquet', which is not there"),
    (lambda t: t, {"file": "log.xlsx"}, r"has the suffix 'xlsx'; expected parquet, csv"),
    (lambda t: t, {"file": ["log.parquet", "log.xlsx"]}, r"expected files of one kind"),
]


@pytest.mark.parametrize(("change", "changes", "sentence"), BAD)
def test_bad_input_is_one_sentence(
    change: Callable[[pd.DataFrame], pd.DataFrame], changes: dict[str, Any], sentence: str
) -> None:
    change(rows()).to_parquet("log.parquet")
    Path("log.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=sentence) as error:
        list(tables(**changes).transitions())
    assert "\n" not in str(error.value)


def test_next_states_that_do_not_follow_are_one_sentence() -> None:
    table = rows(next_state=True)
    table.loc[3, "nx"] += 1
    table.to_parquet("log.parquet")
    with pytest.raises(UserError, match=r"the episode 'run 0' jumps: the next state of its row 3"):
        list(log(next_state=["nx", "ny"]).episodes())


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.hdf5"])
def test_a_damaged_file_is_one_sentence(name: str) -> None:
    Path(name).write_bytes(b"episode,x\nno\x00 log\xff")
    with pytest.raises(UserError) as error:
        list(log(file=name).episodes())
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_log_that_changes_while_it_is_read_is_one_sentence() -> None:
    made = tables()
    rows().query("episode != 'run 2'").to_parquet("log.parquet")
    with pytest.raises(UserError, match=r"^the log changed while it was read"):
        list(made.transitions())


def test_one_episode_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()
    original = transitions._episode

    def counted(given: Any) -> Any:
        read.append(given.name)
        return original(given)

    monkeypatch.setattr(transitions, "_episode", counted)
    monkeypatch.setattr("pipelines.environments._logs._BATCH", 5)
    episodes: Iterator[Any] = log().episodes()
    for count in range(1, len(LENGTHS) + 1):
        next(episodes)
        assert len(read) == count
