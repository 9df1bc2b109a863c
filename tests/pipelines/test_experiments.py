"""Experiments: findings are judged by their intervals, and what is measured is what the mathematics says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.integrate import quad

from flowmatch_core import metrics
from flowmatch_core.intervals import Interval
from flowmatch_core.networks import MLPField
from flowmatch_core.oracles import TwoDrifts
from flowmatch_core.solvers import solve
from pipelines.base import files, plugins
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.config.params import ExperimentEntry
from pipelines.environments import linear_gaussian
from pipelines.experiments import (
    Finding,
    Outcome,
    all_discounts,
    intentions,
    memoryless_chain,
    sde_vs_ode,
    two_d,
)

ROOT = Path(__file__).parents[2]
SMALL: dict[str, dict[str, Any]] = {
    "all_discounts": {"hidden": (16,), "steps": 20, "batch": 32, "starts": 2, "samples": 20, "repeats": 2},
    "intentions": {"hidden": (16,), "steps": 10, "batch": 32, "ode_steps": 1, "samples": 50, "repeats": 2},
    "memoryless_chain": {"steps": (32, 64), "starts": 20, "chains": 60, "repeats": 2},
    "sde_vs_ode": {"evaluations": (4, 8), "samples": 100, "repeats": 2, "projections": 8, "training_steps": 20},
    "two_d": {
        "tasks": {"pair": {"source": {"kind": "moons"}, "target": {"kind": "eight_gaussians", "noise": 1.0}}},
        "repeats": 2,
        "train": 300,
        "test": 60,
        "transported": 60,
        "hidden": (16,),
        "steps": 20,
        "batch": 32,
        "euler": (4,),
    },
}
EVERY_EXPERIMENT = pytest.mark.parametrize("name", plugins.names("pipelines.experiments"))


def measure(name: str, **other: Any) -> Outcome:
    member = plugins.load("pipelines.experiments", name)
    outcome: Outcome = member.run(
        member.Settings(**{**SMALL[name], **other}), generator=torch.Generator().manual_seed(0)
    )
    return outcome


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most", "verdict"),
    [
        (1.0, 2.0, 1.0, None, "holds"),
        (0.9, 2.0, 1.0, None, "open"),
        (0.5, 0.9, 1.0, None, "FAILS"),
        (0.5, 0.9, None, 1.0, "holds"),
        (1.1, 1.9, None, 1.0, "FAILS"),
        (0.9, 1.1, 0.8, 1.2, "holds"),
        (0.7, 1.1, 0.8, 1.2, "open"),
        (0.5, 0.6, None, None, "measured"),
        (float("nan"), float("nan"), 0.0, None, "open"),  # one repetition has no interval
    ],
)
def test_a_finding_is_judged_by_its_interval(
    low: float, high: float, at_least: float | None, at_most: float | None, verdict: str
) -> None:
    finding = Finding("x", "x", Interval((low + high) / 2, low, high, 3), at_least, at_most)
    assert finding.verdict == finding.cell()["verdict"] == verdict


@EVERY_EXPERIMENT
def test_a_member_runs_and_draws_what_it_found(name: str) -> None:
    from matplotlib import pyplot as plt

    outcome = measure(name)
    assert outcome.findings and outcome.title and outcome.notes and outcome.caption
    assert len({finding.name for finding in outcome.findings}) == len(outcome.findings)
    assert all(np.isfinite(finding.measured[:4]).all() for finding in outcome.findings)
    figure = plugins.load("pipelines.experiments", name).figure(outcome.table)
    lines = [line for axis in figure.axes for line in axis.get_lines()]
    assert any(len(line.get_xdata()) > 1 for line in lines)
    plt.close(figure)


@EVERY_EXPERIMENT
def test_the_same_generator_gives_the_same_numbers(name: str) -> None:
    before = torch.get_rng_state()
    one, two = measure(name), measure(name)
    pd.testing.assert_frame_equal(one.table, two.table, check_exact=True)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the chain with a random drift ----


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_posterior_of_the_chain_is_that_of_bayes(t: float) -> None:
    data = memoryless_chain._mixture(torch.device("cpu"))
    for x in (-1.3, 0.1, 0.9):
        weights, means, variances = memoryless_chain._posterior(data, t, torch.tensor([[x]], dtype=torch.float64))

        def joint(x1: float, x: float = x) -> float:
            prior = float(data.log_prob(torch.tensor([x1], dtype=torch.float64)).exp())
            return prior * float(np.exp(-(((x - t * x1) / (1 - t)) ** 2) / 2))

        total, mean, second = (quad(lambda x1, k=k: joint(x1) * x1**k, -6, 6, limit=200)[0] for k in range(3))
        found = (weights * means).sum(), (weights * (variances + means**2)).sum()
        assert float(weights.sum()) == pytest.approx(1)
        assert float(found[0]) == pytest.approx(mean / total, abs=1e-6)
        assert float(found[1]) == pytest.approx(second / total, abs=1e-6)


def test_a_step_of_the_chain_moves_by_the_flow_on_average_and_spreads_by_its_variance() -> None:
    data, n = memoryless_chain._mixture(torch.device("cpu")), 200_000
    x = torch.full((n, 1), 0.4, dtype=torch.float64)
    moved = memoryless_chain._chain(data, x, 1, torch.Generator().manual_seed(0)) - x  # from noise in one step: dt = 1
    velocity = float(data.velocity(0.0, x[:1]))
    variance = float(data.second_moment.squeeze() - data.mean.squeeze() ** 2)
    assert float(moved.mean()) == pytest.approx(velocity, abs=5 * (variance / n) ** 0.5)
    assert float(moved.var()) == pytest.approx(variance, rel=0.02)


def test_variance_of_the_chain_goes_with_the_step_as_predicted() -> None:
    outcome = measure("memoryless_chain", steps=(64, 256), chains=100)
    found = {finding.name: finding.measured.mean for finding in outcome.findings}
    assert found["slope"] == pytest.approx(1, abs=0.1)
    assert found["constant"] == pytest.approx(1, abs=0.15)
    assert found["diffusion_slope"] == pytest.approx(0, abs=0.1)


def test_sensitivity_of_the_prediction_is_that_of_the_flow() -> None:
    """Of one Gaussian all is known: x1 = m + s x0, and the velocity's variance along the way."""
    one = torch.ones(1, dtype=torch.float64)
    data = type(memoryless_chain._mixture(torch.device("cpu")))(one, 0.3 * one[:, None], 0.25 * one[:, None, None])
    with torch.no_grad():
        end, rate = memoryless_chain._prediction(data, torch.tensor([[-1.0], [2.0]], dtype=torch.float64))

    def integrand(t: float) -> float:
        total = 0.25 * t**2 + (1 - t) ** 2  # of x_t; the flow stretches by sqrt(0.25 / total) from t to 1
        return 0.25 / total * (0.25 / total)

    assert end.flatten().tolist() == pytest.approx([0.3 - 0.5, 0.3 + 1.0], abs=1e-6)
    assert rate.tolist() == pytest.approx([quad(integrand, 0, 1)[0]] * 2, rel=1e-3)


# ---- SDE against ODE ----


def test_every_cell_is_measured() -> None:
    settings = SMALL["sde_vs_ode"]
    table = measure("sde_vs_ode").table
    cells = table[table["sampler"] != "floor"].groupby(["field", "sampler", "nfe"]).size()
    assert set(cells) == {settings["repeats"]}
    assert len(cells) == len(sde_vs_ode.FIELDS) * len(sde_vs_ode.SAMPLERS) * len(settings["evaluations"])


def test_an_error_of_size_zero_changes_nothing_and_one_of_some_size_does() -> None:
    def distances(error: float) -> pd.DataFrame:
        table = measure("sde_vs_ode", error=error).table
        ode = table[table["sampler"].str.startswith("ODE") & (table["field"] != "learned")]
        return ode.pivot(index=["sampler", "repeat", "nfe"], columns="field", values="distance")

    none, some = distances(0.0), distances(0.8)
    assert (none["early error"] == none["exact"]).all() and (none["late error"] == none["exact"]).all()
    assert (some["early error"] != some["exact"]).all()
    late = some.xs(8, level="nfe")  # Euler's four evaluations are all before the late error
    assert (late["late error"] != late["exact"]).all()
    assert (some["exact"] == none["exact"]).all()


def test_a_sampler_spends_the_evaluations_that_it_is_given() -> None:
    calls = 0

    def field(t: Any, x: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return -x

    for sampler in sde_vs_ode.SAMPLERS:
        calls = 0
        sde_vs_ode._sample(sampler, field, torch.zeros(3, 2), 8, torch.Generator())
        assert calls == (7 if sampler == "SDE, Heun" else 8)  # the last step of the SDE has nothing to correct


# ---- the stage ----


@EVERY_EXPERIMENT
def test_the_stage_writes_what_it_measured(tmp_path: Path, name: str) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    small = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL[name].items()}
    raw["experiments"] = {"mine": {"kind": name, **small}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "pipelines.stages.experiment", "--experiment"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FLOWMATCH_INVOCATION": "test"}
    result = subprocess.run([*command, "mine"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "data/metrics/experiments/mine.json").read_text())
    for cell in found.values():
        assert cell["value_low"] <= cell["value"] <= cell["value_high"]
        assert cell["verdict"] in ("holds", "FAILS", "open", "measured")
        assert cell["sentence"] in result.stdout
    folder = tmp_path / "data/experiments/mine"
    assert len(files.read_json(folder / "summary.json")["title"]) > 0
    assert len(pd.read_parquet(folder / "results.parquet")) > 0
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


# ---- data sets in the plane ----


def between_normals(**sizes: Any) -> tuple[two_d.Settings, two_d.Draws, torch.Generator]:
    """Return rows of normal distributions of scales 1 and 3."""
    task = two_d.Task(source={"kind": "normal"}, target={"kind": "normal", "deviation": 3.0})
    settings = two_d.Settings(tasks={"normal": task}, train=8000, test=300, transported=1000, **sizes)
    generator = torch.Generator().manual_seed(0)
    return settings, two_d._draw(task, settings, generator), generator


def measured(field: Any, drawn: two_d.Draws, settings: two_d.Settings) -> dict[str, float]:
    """Return the measures of a field, with an energy as if the starts were of variance 1."""
    starts = drawn.source["train"][: settings.transported]
    transport = float(metrics.wasserstein2(starts, drawn.target["train"][: settings.transported]))
    found = two_d._measure(field, drawn, transport, settings)
    return {**found, "energy": found["energy"] * 2 / float((drawn.unit * starts).square().sum(1).mean())}


def test_measures_of_the_exact_transport_between_normal_distributions() -> None:
    settings, drawn, _ = between_normals()
    found = measured(lambda t, x, cond: 2 * x / (1 + 2 * t), drawn, settings)  # x_t = (1 + 2 t) x_0
    floor = drawn.unit * float(metrics.wasserstein2(drawn.target["val"], drawn.target["test"]))
    assert found["energy"] == pytest.approx(8, rel=1e-4)  # W2^2 = 2 (3 - 1)^2
    assert found["npe"] < 0.15  # the sampling error of W2
    assert found["w2"] < 2 * floor
    assert found["w2_euler_100"] == pytest.approx(found["w2"], rel=1e-4)  # straight at constant speed
    stopped = measured(lambda t, x, cond: 0 * x, drawn, settings)
    assert stopped["npe"] == pytest.approx(1)
    assert stopped["w2"] > 2 * floor


@pytest.mark.slow  # 30 s
def test_trained_flows_between_normal_distributions_have_the_energy_of_their_paths() -> None:
    # With s_t^2 the variance at time t, the field of independent pairs is s' x / s, of energy 2 times the integral of
    # s'^2; s_t^2 = (1 - t)^2 + 9 t^2 along the straight path and cos^2 + 9 sin^2 along the cosine.
    def energy(variance: Any, rate: Any) -> float:
        return float(2 * quad(lambda t: rate(t) ** 2 / (4 * variance(t)), 0, 1)[0])

    straight = energy(lambda t: (1 - t) ** 2 + 9 * t**2, lambda t: 20 * t - 2)
    cosine = energy(
        lambda t: np.cos(np.pi * t / 2) ** 2 + 9 * np.sin(np.pi * t / 2) ** 2, lambda t: 4 * np.pi * np.sin(np.pi * t)
    )
    settings, drawn, generator = between_normals()
    for method, expected in {"i_cfm": straight, "vp_cfm": cosine, "ot_cfm": 8.0, "reflow": 8.0}.items():
        found = measured(two_d._train(method, drawn, settings, generator), drawn, settings)
        assert found["energy"] == pytest.approx(expected, rel=0.07), method


def test_the_unit_of_training_is_the_same_for_both_coordinates() -> None:
    task = two_d.Task(source={"kind": "normal"}, target={"kind": "moons", "deviation": 7.0})
    settings = two_d.Settings(tasks={"moons": task}, train=4000)
    drawn = two_d._draw(task, settings, torch.Generator().manual_seed(0))
    assert drawn.unit == pytest.approx(7, rel=0.03)
    # a source that is normal in the units of the data stays round, with the variance that the unit leaves it
    np.testing.assert_allclose(drawn.source["train"].std(0), 1 / drawn.unit, rtol=0.06)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"noise": 0.1}, ["kind"]),
        ({"kind": "moon"}, ["moon", "moons"]),
        ({"kind": "moons", "nosie": 0.1}, ["nosie"]),
        ({"kind": "moons", "train": 10}, ["train"]),
        ({"kind": "digits"}, ["digits", "generator"]),
    ],
)
def test_a_wrong_source_or_target_is_refused_with_a_sentence(entry: dict[str, Any], parts: list[str]) -> None:
    for end in ("source", "target"):
        with pytest.raises((ValueError, UserError)) as error:
            two_d.Task(**{"source": {"kind": "normal"}, "target": {"kind": "normal"}, end: entry})
        assert all(part in str(error.value) for part in parts)


def test_the_table_has_a_row_per_task_and_method() -> None:
    outcome = measure("two_d")
    given = params.load(ROOT / "params.yaml")
    entry = {"kind": "two_d", **SMALL["two_d"]}
    given = given.model_copy(update={"experiments": {"plane": ExperimentEntry.model_validate(entry)}})
    found = {"experiments/plane": {finding.name: finding.cell() for finding in outcome.findings}}
    table = plugins.load("pipelines.reporting.tables", "two_d").build(given, found, {}, {}).rows
    assert table["method"].tolist() == [*two_d.METHODS.values(), "true samples"]
    w2 = {finding.name: finding.measured.mean for finding in outcome.findings}["pair_ot_cfm_w2_euler_4"]
    assert table["W2, 4 Euler steps"][1].startswith(f"{w2:.3g} [")
    measures = ["W2, 4 Euler steps", "W2, dopri5", "NPE", "path energy", "NFE", "CPU s"]
    assert table[measures].iloc[:-1].notna().all(axis=None)
    assert table.loc[table.index[-1], measures].notna().tolist() == [False, True, False, False, False, False]
    given = given.model_copy(update={"experiments": {}})
    assert plugins.load("pipelines.reporting.tables", "two_d").build(given, {}, {}, {}).markdown() == ""


# ---- one model of many discounts ----


def test_the_spiral_of_the_experiment_is_that_of_the_environment() -> None:
    mine, theirs = (
        all_discounts._spiral(torch.device("cpu")),
        linear_gaussian.build(linear_gaussian.Settings()).oracle(),
    )
    assert theirs is not None
    for name in ("A", "B", "c", "W", "K", "k"):
        torch.testing.assert_close(getattr(mine, name).double(), getattr(theirs, name).double(), rtol=1e-6, atol=1e-9)


def test_a_comparison_has_every_model_at_every_discount() -> None:
    outcome = measure("all_discounts", gammas=(0.5, 0.9))
    cells = outcome.table.groupby(["model", "gamma"]).size()
    assert set(cells) == {2} and len(cells) == len(all_discounts.MODELS) * 2
    claims = {finding.name: finding.at_most for finding in outcome.findings if finding.at_most is not None}
    assert claims == {"gamma_0.5_ratio": 1.5, "gamma_0.9_ratio": 1.5}


@pytest.mark.parametrize("gammas", [(0.5, 0.99), (0.4, 0.8), (0.8, 0.5)])
def test_discounts_outside_the_training_are_refused(gammas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="gammas is"):
        all_discounts.Settings(gammas=gammas)


@pytest.mark.slow  # 4 minutes
def test_one_model_of_all_discounts_is_nearly_as_good_as_one_of_each() -> None:
    settings = all_discounts.Settings(repeats=2)
    outcome = all_discounts.run(settings, generator=torch.Generator().manual_seed(1))
    found = {finding.name: finding.measured.mean for finding in outcome.findings}
    for gamma in settings.gammas:
        assert found[f"gamma_{gamma:g}_ratio"] <= all_discounts.AT_MOST
        assert found[f"gamma_{gamma:g}_floor"] < found[f"gamma_{gamma:g}_each"]


# ---- intentions ----


def hidden_drift() -> tuple[intentions.Settings, TwoDrifts]:
    """The walk in the units of the experiment, in which the mean given the sign is 1."""
    settings = intentions.Settings(samples=4000)
    return settings, TwoDrifts(torch.tensor([1 - settings.gamma]), settings.noise * (1 - settings.gamma))


def believed(evidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder that believes the sign of the second step."""
    return evidence.sign(), torch.full_like(evidence, -40.0)


def test_a_model_of_the_walk_moves_with_the_state() -> None:
    network = MLPField(1, (16,), 1, generator=torch.Generator().manual_seed(0)).double()
    x0, state, z = torch.randn(3, 5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = intentions._along(network)
    with torch.no_grad():
        here = solve(field, x0, cond=torch.cat([state, z], 1), solver="rk4", steps=20).x
        torch.testing.assert_close(here, state + solve(network, x0, cond=z, solver="rk4", steps=20).x)


def test_the_signs_of_steps_are_probed_as_often_as_noise_permits() -> None:
    settings, walk = hidden_drift()
    share = intentions._probe(believed, walk, settings, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert share == pytest.approx(float(torch.special.ndtr(torch.tensor(1 / settings.noise))), abs=0.005)


def test_samples_are_given_the_evidence_of_their_episode() -> None:
    """The exact field: the sign that is believed is wrong as often as the noise of a step outweighs the drift."""
    settings, walk = hidden_drift()
    model = intentions.Trained(walk.velocity_field(settings.gamma, tolerance=1e-3), believed)  # type: ignore[arg-type]
    mean = 2 * float(torch.special.ndtr(torch.tensor(1 / settings.noise))) - 1
    for sign in (1.0, -1.0):
        x = intentions._sample(model, walk, sign, settings, torch.Generator().manual_seed(0))
        assert float(x.mean()) == pytest.approx(sign * mean, abs=4.5 * float(x.std()) / settings.samples**0.5 + 0.02)


@pytest.mark.slow  # a minute
def test_an_intention_keeps_the_drifts_apart() -> None:
    outcome = intentions.run(intentions.Settings(repeats=2), generator=torch.Generator().manual_seed(1))
    rows = outcome.table[outcome.table["emd"].notna()]
    scores = rows.pivot(index="repeat", columns="model", values="emd")
    variances = rows.loc[rows["model"] == "without", "variance"]
    assert variances.between(20, 30).all()  # it has learned the walk with new signs, of variance 25
    assert (scores["decoder"] <= 0.5 * scores["without"]).all()
    assert (rows.loc[rows["model"] == "decoder", "probe"] >= 0.95).all()
