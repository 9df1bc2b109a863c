"""Families of policies: a goal for each row, the law of w, and what training draws of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from flowmatch_core._tensors import as_time
from flowmatch_core.field import Time
from flowmatch_core.oracles import LinearGaussianMDP
from flowmatch_core.successor import SuccessorLoss, Transitions, td2_cfm_loss, td_cfm_loss
from pipelines import environments
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.data import collect
from pipelines.data.batches import Batches
from pipelines.environments import Array, Family, linear_gaussian, maze
from pipelines.environments._family import sources
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from tests.support.checks import BOUND, z_scores
from tests.support.processes import Probe
from tests.support.random import generator

ROOT = Path(__file__).parents[2]
MINE = {"w": {"wx": (-1.0, 1.0), "wy": (-1.0, 1.0)}, "policy": "tests.pipelines.policies:towards"}
ENTRY = {"gamma": 0.8, "transitions": 3000, "rollouts": 30, "length": 25, "starts": 6}
KINDS: dict[str, dict[str, Any]] = {
    "goals": {"kind": "maze", "family": "goals", "behaviour": "mixed", "reward": "square", **ENTRY},
    "mine": {"kind": "linear_gaussian", "noise": 1e-9, "reward": "bump", **MINE, **ENTRY},
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spiral(**changes: Any) -> linear_gaussian.Spiral:
    settings = {**MINE, **changes}
    return linear_gaussian.build(linear_gaussian.Settings.model_validate(settings))


def family_of(environment: environments.Environment) -> Family:
    assert environment.family is not None
    return environment.family


# ---- the goals of the maze ----


def test_a_goal_for_each_row_is_that_goal_alone() -> None:
    """Rows of goals in different rooms are not compared with each other's, or with the axes of the rooms."""
    position = maze.build(maze.Settings()).coverage(rng(), 300)[0][:, :2]
    goals = maze.Goals().draw(300, rng(1))
    together = maze.reach_target(position, goals)
    each = [maze.reach_target(position[i : i + 1], goals[i])[0] for i in range(300)]
    np.testing.assert_array_equal(together, each)
    four = position[:4], goals[:4]  # as many rows as rooms, where a wrong axis would broadcast
    np.testing.assert_array_equal(maze.reach_target(*four), together[:4])


@pytest.mark.parametrize("task", list(maze.GOALS))
def test_the_policy_to_the_middle_of_a_room_is_the_scripted_one(task: str) -> None:
    state, _ = maze.build(maze.Settings()).coverage(rng(), 200)
    w = np.tile(maze.GOALS[task], (200, 1))
    expected = maze.build(maze.Settings.model_validate({"task": task})).policy(state)
    np.testing.assert_array_equal(maze.Goals().act(state, w), expected)


def test_policies_to_goals_arrive() -> None:
    environment = maze.build(maze.Settings(family="goals"))
    goals = maze.Goals().draw(200, rng(2))
    drawn = environment.roll(environment.starts(rng(), 200), 200, lambda s: maze.Goals().act(s, goals), rng())[0]
    missed = np.hypot(*(drawn[:, -1, :2] - goals).T)
    assert np.quantile(missed, 0.95) < 0.015


def test_goals_are_uniform_on_four_squares() -> None:
    goals = maze.Goals().draw(40_000, rng())
    size = np.abs(goals)
    assert size.min() >= 0.03 and size.max() <= 0.27
    error = 4 * 0.24 / np.sqrt(12 * len(goals))
    np.testing.assert_allclose(size.mean(0), 0.15, atol=error)
    np.testing.assert_allclose((goals > 0).mean(0), 0.5, atol=4 * 0.5 / 200)


def test_the_nearest_goal_is_within_the_law_and_no_other_is_nearer() -> None:
    family = maze.Goals()
    w = rng().uniform(-0.4, 0.4, (200, 2))
    nearest, goals = family.nearest(w), family.draw(3000, rng(1))
    family.check(nearest)
    gap = np.hypot(*(nearest - w).T)
    assert (gap[:, None] <= np.linalg.norm(w[:, None] - goals, axis=-1) + 1e-12).all()


@pytest.mark.parametrize("bad", [(0.1, 0.3), (0.01, 0.1), (np.nan, 0.1)])
def test_a_w_outside_its_law_is_one_sentence(bad: tuple[float, float]) -> None:
    with pytest.raises(
        UserError, match=r"^w is \[.*outside the law of the scripted policies.*; expected gx in \[-0.27"
    ):
        maze.Goals().check(np.array([[0.1, 0.1], bad]))


@pytest.mark.parametrize(
    "built", [maze.Goals(), family_of(spiral()), family_of(spiral(draw="tests.pipelines.policies:corners"))]
)
def test_in_its_units_w_has_norm_one(built: Family) -> None:
    loc, scale = built.units
    drawn = (built.draw(50_000, rng(3)) - loc) / scale
    np.testing.assert_allclose((drawn**2).sum(1).mean(), 1.0, atol=0.02)
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.03)


# ---- a family of the user's ----


def test_functions_of_the_user_are_the_family() -> None:
    built = spiral(draw="tests.pipelines.policies:corners")
    family, state = family_of(built), rng().normal(size=(5, 2))
    w = family.draw(5, rng())
    assert set(np.abs(w).ravel()) == {1.0}
    np.testing.assert_allclose(family.act(state, w), 0.5 * (w - state))
    assert built.inputs == ("ux", "uy", "wx", "wy")
    assert built.oracle() is None and built.exact_values(state, state, 0.9) == {}
    uniform = family_of(spiral()).draw(20_000, rng())
    np.testing.assert_allclose([uniform.mean(), uniform.var()], [0, 1 / 3], atol=0.01)


def test_the_files_of_the_users_functions_are_inputs_of_the_environment() -> None:
    settings = linear_gaussian.Settings.model_validate({**MINE, "draw": "tests.pipelines.policies:corners"})
    assert any(path.name == "policies.py" for path in sources(settings, None).values())
    assert sources(linear_gaussian.Settings(), None) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "tests.pipelines.policies:flat"}, r"answered 3 rows with shape \(3, 1\); expected shape \(3, 2\)"),
        ({"policy": "tests.pipelines.policies:undefined"}, r"answered 3 of 3 rows with NaN or infinity"),
    ],
)
def test_actions_that_are_none_are_one_sentence(changes: dict[str, Any], words: str) -> None:
    family = family_of(spiral(**changes))
    with pytest.raises(UserError, match=words):
        family.act(np.zeros((3, 2)), np.full((3, 2), -0.5))


def test_draws_outside_the_bounds_are_one_sentence() -> None:
    family = family_of(spiral(draw="tests.pipelines.policies:outside"))
    with pytest.raises(UserError, match=r"w is \[7.0, 7.0\], outside the law of tests.pipelines.policies:towards; exp"):
        family.draw(3, rng())


@pytest.mark.parametrize(
    "bad",
    [
        {"policy": "tests.pipelines.policies:towards"},
        {"w": {"wx": (-1, 1)}},
        {"draw": "tests.pipelines.policies:corners"},
        {"policy": "tests.pipelines.policies:towards", "draw": "tests.pipelines.policies:corners"},
        {**MINE, "w": {"wx": (1, -1)}},
    ],
)
def test_half_a_family_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected"):
        linear_gaussian.Settings.model_validate(bad)
    with pytest.raises(ValidationError, match="expected one of them"):
        maze.Settings.model_validate({**MINE, "family": "goals"})


# ---- tables and batches ----


def tables(here: Path, name: str, entry: dict[str, Any]) -> Path:
    """The folder of an environment's tables."""
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    raw["environments"] = {name: entry}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("FLOWMATCH_HOME", str(here / "home"))
        patch.setenv("FLOWMATCH_INVOCATION", "test")
        record = RunRecord.start("test", {})
        collect.write(Stage("test", params.parse(raw, Path("params.yaml")), record), name)
    return here / layout.collected(name)


@pytest.fixture(scope="module", params=list(KINDS))
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of each kind of family."""
    return tables(tmp_path_factory.mktemp("family"), request.param, KINDS[request.param])


def part(table: pd.DataFrame, prefix: str) -> Array:
    columns = [name for name in table.columns if name.startswith(f"{prefix}_")]
    values: Array = table[columns].to_numpy()
    return values


def test_a_rollout_follows_one_w_and_transitions_know_none(collected: Path) -> None:
    built = environments.restore(files.read_json(layout.provenance(collected)))
    family, count = family_of(built), len(built.action_names)
    for table in (pd.read_parquet(layout.rollouts(collected)), pd.read_parquet(layout.evaluation(collected))):
        state, (action, w) = part(table, "state"), np.split(part(table, "action"), [count], 1)
        np.testing.assert_allclose(action, family.act(state, w), atol=1e-12)
        family.check(w)
        seen = pd.DataFrame(w).groupby(table["episode"]).nunique()
        assert (seen == 1).all(axis=None)
        assert len(np.unique(w, axis=0)) == table["episode"].nunique()
    names = [f"action_{name}" for name in built.action_names]
    transitions = pd.read_parquet(layout.transitions(collected))
    assert [name for name in transitions.columns if "action" in name] == names


def test_rollouts_with_another_start_or_action_keep_their_w(collected: Path) -> None:
    built = environments.restore(files.read_json(layout.provenance(collected)))
    family, count = family_of(built), len(built.action_names)
    table = pd.read_parquet(layout.counterfactual(collected))
    later = table[table["step"] > 0]
    action, w = np.split(part(later, "action"), [count], 1)
    np.testing.assert_allclose(action, family.act(part(later, "state"), w), atol=1e-12)
    first = pd.read_parquet(layout.evaluation(collected)).query("step == 0")
    own = part(first, "action")[:, count:]
    for _, rows in table[table["step"] == 0].groupby("exchanged"):
        np.testing.assert_array_equal(part(rows, "action")[:, count:], own[: len(rows)])


def raw(batches: Batches, part: Tensor, loc: Tensor, scale: Tensor) -> Array:
    values: Array = (part.double() * scale + loc).numpy()
    return values


def test_every_row_of_a_batch_has_a_w_of_its_own_by_which_the_next_action_is_the_policys(collected: Path) -> None:
    batches = Batches(collected, torch.device("cpu"))
    family = batches.family
    assert family is not None
    draw, _ = batches.transitions(500, 10**6)
    source = torch.Generator().manual_seed(0)
    seen = []
    table = part(pd.read_parquet(layout.transitions(collected)), "action")
    for batch in (draw(source), draw(source)):
        assert batch.action is not None and batch.next_action is not None
        count = batch.action.shape[1] - len(family.names)
        units = [torch.tensor(files.read_json(layout.provenance(collected))[f"action_{n}"]) for n in ("loc", "scale")]
        action, following = (raw(batches, a, *units) for a in (batch.action, batch.next_action))
        w = following[:, count:]
        np.testing.assert_array_equal(action[:, count:], w)
        family.check(family.nearest(w))
        np.testing.assert_allclose(family.nearest(w), w, atol=1e-6)
        state = raw(batches, batch.next_state, batches.loc, batches.scale)
        # float32 states: where a policy is steep, an action differs more than they do
        differs = np.abs(following[:, :count] - family.act(state, w)).max(1)
        assert np.quantile(differs, 0.98) < 1e-4
        nearest = np.abs(action[:, None, :count] - table[None]).max(-1).min(1)
        assert nearest.max() < 1e-5  # the actions are those of the table
        seen.append(w)
    assert len(np.unique(np.concatenate(seen), axis=0)) == 1000


def test_the_same_generator_gives_the_same_w_again(collected: Path) -> None:
    batches = Batches(collected, torch.device("cpu"))
    draw, _ = batches.transitions(50, 10**6)
    one, two, other = (draw(torch.Generator().manual_seed(seed)).next_action for seed in (0, 0, 1))
    assert one is not None and two is not None and other is not None
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_futures_are_those_of_the_w_that_a_model_is_given(collected: Path) -> None:
    """A point that halves its way to w without noise is at S_T = w' + (s' - w') / 2^T: on the line from state to w."""
    if collected.name != "mine":
        pytest.skip("the closed form is that of the user's family")
    batches = Batches(collected, torch.device("cpu"))
    pairs = batches.futures(4000, 0.8)
    batch, future = pairs(torch.Generator().manual_seed(0))
    assert batch.action is not None
    units = [torch.tensor(files.read_json(layout.provenance(collected))[f"action_{n}"]) for n in ("loc", "scale")]
    w = raw(batches, batch.action, *units)[:, 2:]
    state, later = (raw(batches, s, batches.loc, batches.scale) for s in (batch.state, future))
    # s' = rho (s + (w - s) / 2): fixed point w rho / (2 - rho), contraction rho / 2
    rho = 0.99
    rest = w * rho / (2 - rho)
    start, end = state - rest, later - rest
    clear = np.linalg.norm(end, axis=1) > 1e-3  # many times the rounding of float32
    assert clear.sum() > 1000
    ratio = (start * end)[clear].sum(1) / (start**2)[clear].sum(1)
    steps = np.log(ratio) / np.log(rho / 2)
    np.testing.assert_allclose(steps, np.round(steps), atol=0.02)
    assert steps.min() > 0.9


# ---- the fixed point ----

NOISE, RHO, GAMMA, ROWS = 0.5, 0.99, 0.5, 1500


class OfCorners:
    """The exact field of every w of the law of corners, where the policy is a = (w - s) / 2."""

    def __init__(self) -> None:
        eye = torch.eye(2, dtype=torch.float64)
        corners = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)], dtype=torch.float64)
        self.fields = []
        for w in corners:
            process = LinearGaussianMDP(RHO * eye, RHO * eye, 0 * w, NOISE**2 * eye, -eye / 2, w / 2)
            self.fields.append((w, process.velocity_field(GAMMA, tolerance=1e-4)))

    def __call__(self, t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        v, times = torch.zeros_like(x), as_time(t, x).expand(len(x))
        for w, field in self.fields:
            here = (cond[:, 4:] == w).all(1)
            v[here] = field(times[here], x[here], cond[here, :4])
        return v


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Transitions:
    """A batch of the corners' family in the units of the environment."""
    entry = {**KINDS["mine"], "noise": NOISE, "draw": "tests.pipelines.policies:corners", "transitions": 20_000}
    folder = tables(tmp_path_factory.mktemp("corners"), "corners", entry)
    batches, provenance = Batches(folder, torch.device("cpu")), files.read_json(layout.provenance(folder))
    torch.manual_seed(0)
    drawn = batches.transitions(ROWS, 10**6)[0](torch.Generator().manual_seed(0))
    loc, scale = (torch.tensor(provenance[f"action_{name}"], dtype=torch.float64) for name in ("loc", "scale"))

    def actions(standardised: Tensor | None) -> Tensor:
        assert standardised is not None
        action = standardised.double() * scale + loc
        return torch.cat([action[:, :2], action[:, 2:].round()], 1)

    state, following = (part.double() * batches.scale + batches.loc for part in (drawn.state, drawn.next_state))
    return Transitions(state, actions(drawn.action), following, actions(drawn.next_action))


@pytest.mark.parametrize("loss", [td_cfm_loss, td2_cfm_loss])
def test_the_exact_field_of_every_w_is_the_fixed_point_of_one_batch_with_all_of_them(
    batch: Transitions, loss: SuccessorLoss
) -> None:
    probe = Probe(OfCorners(), ROWS)
    total = loss(probe, OfCorners(), batch, gamma=GAMMA, steps=10, generator=generator()).total
    assert z_scores(probe.gradients(total), 0.0).abs().max() < BOUND


def test_next_actions_of_another_w_have_another_fixed_point(batch: Transitions) -> None:
    """The power of the test above: the w of the next row in the bootstrap alone."""
    assert batch.next_action is not None
    w = batch.next_action[:, 2:].roll(1, 0)
    other = torch.cat([0.5 * (w - batch.next_state), w], 1)
    probe = Probe(OfCorners(), ROWS)
    wrong = Transitions(batch.state, batch.action, batch.next_state, other)
    total = td2_cfm_loss(probe, OfCorners(), wrong, gamma=GAMMA, steps=10, generator=generator()).total
    assert z_scores(probe.gradients(total), 0.0).abs().max() > 2 * BOUND
