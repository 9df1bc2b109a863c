"""Units of environments: actions in any unit, states far from zero, and components that never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from flowmatch_core.metrics import emd
from flowmatch_core.successor import HorizonModel, Transitions
from pipelines.base import files, layout, metric_keys, plugins
from pipelines.config import params, yaml_files
from pipelines.config.params import Params, SuccessorFit, SuccessorMethod
from pipelines.data.batches import Batches
from pipelines.data.collect import write_frames
from pipelines.data.moments import units
from pipelines.environments import linear_gaussian
from pipelines.evaluation import models
from pipelines.models import successor
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import collect, evaluate_successor, sample_successor, train_successor
from pipelines.training import fit
from pipelines.training.successor import SuccessorJob

CPU = torch.device("cpu")
ROWS, EPISODES, LENGTH = 500, 20, 10
ACTIONS = {"one": (0.0, 1.0), "thousand": (0.0, 1000.0), "thousandth": (0.0, 0.001), "300 to 500": (400.0, 100.0)}
STATES = {"near": (0.0, 1.0), "northing": (6e6, 0.3), "seconds": (1.7e9, 60.0)}


def tables(folder: Path, state: tuple[float, float], action: tuple[float, float]) -> Batches:
    """The tables of one system, whose states and actions are in these units, as `collect` writes them."""
    rng = np.random.default_rng(0)

    def drawn(n: int, *prefixes: str) -> pd.DataFrame:
        table = dict[str, np.ndarray]()
        for prefix in prefixes:
            names, (loc, scale) = (("x", "y"), state) if prefix.endswith("state") else (("u", "v"), action)
            table |= {f"{prefix}_{name}": loc + scale * rng.uniform(-1, 1, n) for name in names}
        return pd.DataFrame(table)

    table = drawn(ROWS, "state", "action", "next_state", "next_action").assign(terminal=False)
    measured = ["next_state_x", "next_state_y", "action_u", "action_v"]
    described, sentences = units(write_frames(layout.transitions(folder), [table], measured), ["x", "y"], ["u", "v"])
    assert not sentences
    rollouts = drawn(EPISODES * (LENGTH + 1), "state", "action").assign(terminal=False)
    rollouts["episode"], rollouts["step"] = np.divmod(np.arange(len(rollouts)), LENGTH + 1)
    files.write_table(layout.rollouts(folder), rollouts)
    names = {"state_names": ["x", "y"], "action_names": ["u", "v"]}
    files.write_json(layout.provenance(folder), {**names, **described})
    return Batches(folder, CPU)


def batches(made: Batches) -> list[Transitions]:
    """What each loss draws: rows in memory, streamed rows, windows and futures."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    streamed, seek = made.transitions(50, ROWS // 5)
    seek(0)
    found = [made.transitions(50, ROWS)[0](generator), streamed(generator)]
    found.append(made.returns(50, 0.9, 3)(generator))
    return [*found, made.futures(50, 0.9)(generator)[0]]


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_one_system_in_any_units_gives_the_same_batches(
    tmp_path: Path, state: tuple[float, float], action: tuple[float, float]
) -> None:
    for name in ("plain", "other"):
        (tmp_path / name).mkdir()
    plain = batches(tables(tmp_path / "plain", (0.0, 1.0), (0.0, 1.0)))
    other = batches(tables(tmp_path / "other", state, action))
    for one, two in zip(plain, other, strict=True):
        for name in ("state", "action", "next_state", "next_action"):
            value, expected = getattr(two, name), getattr(one, name)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected, rtol=0, atol=2e-6, msg=name)
            assert 0.8 < float(value.std()) < 1.2


@pytest.mark.slow
def test_one_system_in_any_units_of_actions_is_learned_equally_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The EMD to the closed form after a short training, from actions as they are in each unit."""
    spiral = linear_gaussian.build(linear_gaussian.Settings.model_validate({"contraction": 0.9, "action_scale": 1.0}))
    mdp, gamma, found = spiral.oracle(), 0.8, {}
    drawn = spiral.transitions(range(5_000), 1, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    start, act = torch.randn(2, 8, 2, generator=generator, dtype=torch.float64)
    truth = mdp.successor(start, act, gamma).sample(256, generator=generator)
    for name, (loc, scale) in ACTIONS.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        folder = layout.collected("spiral")  # one name, which the weights and the batches are drawn by
        parts = {
            **columns("state", drawn.state),
            **columns("next_state", drawn.next_state),
            **columns("action", loc + scale * drawn.action),
            **columns("next_action", loc + scale * spiral.policy(drawn.next_state)),
        }
        table = pd.DataFrame(parts).assign(terminal=False)
        measured = [*columns("next_state", drawn.state), *columns("action", drawn.action)]
        described, _ = units(write_frames(layout.transitions(folder), [table], measured), ["0", "1"], ["0", "1"])
        names = {"state_names": ["0", "1"], "action_names": ["0", "1"]}
        files.write_json(layout.provenance(folder), {**names, **described})
        table.to_parquet(layout.rollouts(folder))  # a checkpoint knows it by its contents
        raw = yaml_files.read_yaml(Path(__file__).parents[2] / "params.yaml")["successor"]["fit"]
        network = {"name": "mlp", "hidden": [64, 64]}
        given = SuccessorFit.model_validate({**raw, "network": network, "steps": 300, "lr": 5e-3})
        job = SuccessorJob("spiral", "td2_cfm", given, SuccessorMethod.model_validate({"loss": "td2_cfm"}), gamma)
        fit._fit_one(0, lambda row: None, base=0, job=job, device="cpu", state=Path())
        model = successor.load(layout.network(Path(), 0), CPU, "midpoint", 10)
        x = model.sample(start, loc + scale * act, 256, generator=torch.Generator().manual_seed(1))
        found[name] = float(np.mean([emd(x[:, i], truth[:, i]) for i in range(len(start))]))
    best, worst = min(found.values()), max(found.values())
    assert worst < 1.05 * best
    others = float(np.mean([emd(truth[:, i], truth[:, i - 1]) for i in range(len(start))]))
    print(found, others)
    assert worst < 0.5 * others  # they have learned where each start leads


def columns(part: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(metric_keys.columns(part, ["0", "1"]), rows.T, strict=True))


# ---- components that never change, from the environment to the scores ----

MEMBERS = "tests.pipelines.gymnasium_members"
METHODS: dict[str, dict[str, Any]] = {
    "td2_cfm": {"loss": "td2_cfm"},
    "vae": {"loss": {"name": "vae", "width": 8, "blocks": 1}},
    "ensemble": {"loss": {"name": "ensemble", "members": 2, "hidden": [8]}},
}


def written(folder: Path) -> Params:
    raw = yaml_files.read_yaml(Path(__file__).parents[2] / "params.yaml")
    corridor = {
        "kind": "gymnasium",
        "id": f"{MEMBERS}:Furnished-v0",
        "policy": f"{MEMBERS}:right_in_a_furnished_corridor",
        "gamma": 0.8,
        "transitions": 400,
        "rollouts": 10,
        "length": 12,
        "starts": 3,
        "reward": "s1",
    }
    raw |= {"device": "cpu", "threads": 1, "environments": {"corridor": corridor}}
    fit = {**raw["successor"]["fit"], "network": {"name": "mlp", "hidden": [16]}, "steps": 12, "batch": 64}
    sample = {"samples": 8, "solver": "euler", "steps": 2}
    raw["successor"] |= {"methods": METHODS, "seeds": [0], "sample": sample, "fit": {**fit, "log_every": 4}}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return params.load(folder / "params.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all methods were trained and scored in a corridor with constant components."""
    pytest.importorskip("gymnasium", reason="the extra flowmatch[gymnasium]")
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FLOWMATCH_HOME", str(folder / "home"))
        patch.setenv("FLOWMATCH_INVOCATION", "test")
        given, cell = written(folder), {"environment": "corridor"}

        def stage(name: str) -> Stage:
            return Stage(name, given, RunRecord.start(name, {}))

        collect.main(stage("collect@corridor"), **cell)
        for method in METHODS:
            train_successor.main(stage(f"train_successor@corridor-{method}"), **cell, method=method)
        sample_successor.main(stage("sample_successor@corridor"), **cell)
        evaluate_successor.main(stage("evaluate_successor@corridor"), **cell)
    return folder


def model(root: Path, method: str) -> HorizonModel:
    return successor.load(layout.network(root / layout.models("corridor", method), 0), CPU, "euler", 2)


def test_constants_are_described_once(root: Path) -> None:
    provenance = files.read_json(layout.provenance(root / layout.collected("corridor")))
    assert provenance["state_names"] == ["s0", "s1", "s2", "s3"]
    assert provenance["constants"] == {"s0": 0.1, "s2": 1e8}
    assert (provenance["action_loc"][1], provenance["action_scale"][1]) == (7.0, 1.0)
    said = [message for message in provenance["messages"] if "in all transitions" in message]
    assert [message.split(",")[0] for message in said] == [
        "s0 is 0.1 in all transitions",
        "s2 is 1e+08 in all transitions",
        "the action a1 is 7 in all transitions",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_leaves_constants_out_and_puts_them_back(root: Path, method: str) -> None:
    made = model(root, method)
    table = files.read_table(layout.sampled(root / layout.samples("corridor"), method))
    samples = table[[f"s{i}" for i in range(4)]].to_numpy()
    np.testing.assert_array_equal(samples[:, [0, 2]], np.broadcast_to([0.1, 1e8], (len(samples), 2)))
    assert len(np.unique(samples[:, 1])) > 0.9 * len(samples)
    state = torch.tensor([[0.1, -0.5, 1e8, 0.0]], dtype=torch.float64)
    x = made.sample(state, torch.tensor([[0.5, 7.0]]).double(), 5)
    assert torch.equal(x[..., [0, 2]], state[..., [0, 2]].expand(5, 1, 2))
    if made.has_density:
        assert bool(made.log_prob(x, state, torch.tensor([[0.5, 7.0]]).double()).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_constants_add_nothing_to_the_scores(root: Path, method: str) -> None:
    scores = files.read_json(root / layout.metrics("corridor"))[method]
    assert 0 < scores["emd"] < 10
    assert np.isfinite(scores["mse_v"])
    assert ("nll" in scores) == (method == "td2_cfm")


def test_an_ensemble_follows_the_known_policy_and_its_own_model_of_that_which_made_a_log(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    pd.DataFrame({"episode": [0, 0, 1, 1], "x": [0.0, 1, 2, 3], "u": [0.5] * 4}).to_parquet(file)
    log = {"file": str(file), "state": ["x"], "action": ["u"]}
    kind = plugins.load("pipelines.environments", "transitions")
    assert models.policy(kind.build(kind.Settings.model_validate(log))) is None
    act = models.policy(kind.build(kind.Settings.model_validate({**log, "policy": f"{MEMBERS}:right"})))
    assert act is not None
    np.testing.assert_array_equal(act(np.zeros((3, 1))), np.full((3, 1), 0.5))
    spiral = linear_gaussian.build(linear_gaussian.Settings.model_validate({}))
    assert models.policy(spiral) == spiral.policy
