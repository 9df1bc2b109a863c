"""Every mistake in params.yaml is one sentence that names the key, what was found and what is expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipelines.base.errors import UserError
from pipelines.config import changes, params, yaml_files

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "pipelines" / "config" / "profiles"


def changed(tmp_path: Path, key: str, value: Any) -> Path:
    """The project's params.yaml with one value put in place of another."""
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    here = raw
    *parents, last = key.split(".")
    for part in parents:
        here = here[part]
    here[last] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def sentence(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        params.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("density.fit.lrr", 0.1, ["density.fit.lrr", "0.1", "'lr'"]),
        ("sead", 1, ["sead", "'seed'"]),
        ("density.methods.cfm.couplin", "x", ["density.methods.cfm.couplin", "'coupling'"]),
        ("datasets.moons.nois", 0.1, ["datasets.moons.nois", "'noise'"]),
        ("environments.maze_loop.tasc", "loop", ["environments.maze_loop.tasc", "'task'"]),
        ("density.fit.lr", -1.0, ["density.fit.lr", "-1.0", "greater than 0"]),
        ("density.fit.lr", "fast", ["density.fit.lr", "'fast'", "number"]),
        ("density.fit.steps", 0, ["density.fit.steps", "0", "greater than or equal to 1"]),
        ("density.fit.steps", 10.5, ["density.fit.steps", "10.5", "integer"]),
        ("density.fit.steps", "3000", ["density.fit.steps", "'3000'", "integer"]),
        ("density.fit.steps", True, ["density.fit.steps", "True", "integer"]),
        ("density.fit.steps", None, ["density.fit.steps is null", "integer"]),
        ("density.fit", None, ["density.fit is null; it should be a mapping of keys to values."]),
        ("datasets.moons", None, ["datasets.moons is null; it should be a mapping of keys to values."]),
        ("environments.spiral", None, ["environments.spiral is null; it should be a mapping of keys to values."]),
        ("datasets.Own data", {"kind": "moons"}, ["datasets has the name 'Own data'; expected small letters"]),
        ("density.seeds", [2**63], ["density.seeds.0", "less than 9223372036854775808"]),
        ("density.fit.network.hidden", [], ["density.fit.network.hidden", "at least 1 item"]),
        ("density.fit.network.hidden", [0], ["density.fit.network.hidden.0", "0"]),
        ("density.fit.network.hidden", 128, ["density.fit.network.hidden", "128", "list"]),
        ("density.fit.network.activation", "selu", ["density.fit.network.activation", "'selu'", "'silu'"]),
        ("density.fit.network.hiden", [8], ["density.fit.network.hiden", "'hidden'"]),
        ("density.fit.network.frequencies", 1.5, ["density.fit.network.frequencies", "1.5", "integer"]),
        ("density.fit.network.event_dim", 3, ["density.fit.network.event_dim", "not a known key", "hidden"]),
        ("density.fit.network.name", "mlpp", ["density.fit.network.name", "'mlpp'", "'mlp'"]),
        ("density.fit.network.name", "unet_mlp", ["not a known key", "stages"]),
        ("density.fit.network", "encoded", ["density.fit.network.name", "network of vectors"]),
        ("datasets.digits.fit", {"network": {"hiden": [8]}}, ["datasets.digits.fit.network.hiden", "'hidden'"]),
        ("density.fit.ema_step", 2.0, ["density.fit.ema_step", "2.0", "less than or equal to 1"]),
        ("density.fit.lr", float("nan"), ["density.fit.lr", "finite"]),
        ("density.fit.lr", float("inf"), ["density.fit.lr", "finite"]),
        ("density.sample.solver", "rk45", ["density.sample.solver", "'rk45'", "'rk4'"]),
        ("density.evaluate.solver", "dopri5", ["density.evaluate.solver", "'dopri5'"]),
        ("density.seeds", [], ["density.seeds is []; it should have at least 1 item"]),
        ("density.seeds", [0, 0], ["density.seeds", "every seed once"]),
        ("density.seeds", [-1], ["density.seeds.0", "-1"]),
        ("density.methods", {}, ["density.methods", "at least 1 item"]),
        (
            "density.methods.cfm.coupling",
            "minibatch",
            ["coupling", "'minibatch'", "'minibatch_ot'", "independent"],
        ),
        ("density.methods.cfm.path.name", "condot", ["path.name", "'condot'", "'cond_ot'"]),
        ("density.methods.cfm.path", {}, ["density.methods.cfm.path.name", "missing"]),
        ("density.methods.cfm.loss", "fm", ["density.methods.cfm.loss", "'fm'", "'cfm'"]),
        (
            "density.methods.cfm.coupling",
            "conditional_ot",
            ["density.methods.cfm.coupling is 'conditional_ot'", "has none; expected independent"],
        ),
        (
            "density.methods.cfm.coupling",
            {"name": "sinkhorn", "weight": 1.0},
            ["density.methods.cfm.coupling is 'sinkhorn'", "compares conditions, but the data set"],
        ),
        (
            "density.methods.mine",
            {"loss": "gaussian", "coupling": "minibatch_ot"},
            ["'gaussian' trains no velocity field, so it has no coupling; expected {loss: gaussian}"],
        ),
        ("density.methods.mine", {"loss": {"name": "maf", "hidden": []}}, ["density.methods.mine.loss.hidden"]),
        ("density.methods.mine", {"loss": {"name": "nsf", "bins": 1}}, ["density.methods.mine.loss.bins", "2"]),
        (
            "density.methods.mine",
            {"loss": {"name": "kernel_density", "bandwidth": 0}},
            ["density.methods.mine.loss.bandwidth", "greater than 0"],
        ),
        ("density.fit.patience", 0, ["density.fit.patience", "greater than or equal to 1"]),
        ("successor.methods.td2_cfm.loss", "td3_cfm", ["loss", "'td3_cfm'", "td2_cfm"]),
        ("successor.fit.ode_steps", 0, ["successor.fit.ode_steps", "0"]),
        ("successor.fit.ode_solver", "dopri5", ["successor.fit.ode_solver", "'dopri5'"]),
        ("environments.spiral.gamma", 1, ["environments.spiral.gamma", "1", "less than 1"]),
        ("environments.spiral.gamma", -0.1, ["environments.spiral.gamma", "greater than or equal to 0"]),
        ("environments.maze_loop.task", "lop", ["environments.maze_loop.task", "'lop'", "'loop'"]),
        ("environments.maze_loop.kind", "labyrinth", ["environments.maze_loop.kind", "'labyrinth'", "maze"]),
        ("environments.spiral.fit", {"lrr": 1.0}, ["environments.spiral.fit.lrr", "'lr'"]),
        ("environments.spiral.methods", ["td_cmf"], ["environments.spiral.methods has 'td_cmf'", "td2_cfm, td_cfm,"]),
        ("environments.spiral.methods", [], ["environments.spiral.methods", "at least 1 item"]),
        ("environments.spiral.seeds", [1, 1], ["environments.spiral.seeds", "every seed once"]),
        ("successor.methods.td_cfm.seeds", [], ["successor.methods.td_cfm.seeds", "at least 1 item"]),
        ("successor.methods.td_cfm.fit", {"lrr": 1.0}, ["params.yaml: successor.methods.td_cfm.fit.lrr", "'lr'"]),
        ("successor.methods.td_cfm.fit", {"steps": "x"}, ["successor.methods.td_cfm.fit.steps", "'x'"]),
        (
            "successor.methods.td_cfm.fit",
            {"network": {"hiden": [8]}},
            ["successor.methods.td_cfm.fit.network.hiden", "'hidden'"],
        ),
        (
            "successor.methods.td_cfm.fit",
            {"network": {"name": "unet_mlp", "hidden": [8]}},
            ["successor.methods.td_cfm.fit.network.hidden", "not a known key", "'cond_hidden'"],
        ),
        ("successor.methods.td_cfm.loss", {"name": "vae", "beta": [1]}, ["successor.methods.td_cfm.loss", "[1]"]),
        ("successor.fit.time", "normal", ["successor.fit.time", "'normal'", "'logit_normal'"]),
        ("successor.fit.time", {"name": "late", "ep": 1}, ["successor.fit.time.ep is not a known key", "'eps'"]),
        ("successor.fit.discounts", "normal", ["successor.fit.discounts", "'normal'", "log_uniform, uniform"]),
        (
            "successor.fit.discounts",
            {"name": "uniform", "low": 0.5, "high": 1.0},
            ["successor.fit.discounts.high", "1.0", "less than 1"],
        ),
        (
            "successor.fit.discounts",
            {"name": "uniform", "hihg": 0.9},
            ["successor.fit.discounts.hihg is not a known key", "'high'"],
        ),
        ("density.fit.time", {"name": "late", "eps": 0}, ["density.fit.time.eps", "0", "greater than 0"]),
        ("density.fit.time", {"name": "uniform", "eps": 1}, ["density.fit.time.eps is not a known key"]),
        ("density.fit.clip", 0.0, ["density.fit.clip", "0", "greater than 0"]),
        ("density.fit.lr_end", 1.5, ["density.fit.lr_end", "1.5", "less than or equal to 1"]),
        ("density.fit.ema_ramp", 0.5, ["density.fit.ema_ramp", "0.5", "greater than or equal to 1"]),
        ("density.fit.noise", -0.1, ["density.fit.noise", "-0.1", "greater than or equal to 0"]),
        ("density.fit.whitening", 1.5, ["density.fit.whitening", "1.5", "less than or equal to 1"]),
        ("density.fit.stratified", 1, ["density.fit.stratified", "1", "boolean"]),
        (
            "density.methods.cfm.loss",
            {"name": "likelihood", "grid": {"name": "warpt"}},
            ["density.methods.cfm.loss.grid", "'warpt'", "'warped'"],
        ),
        (
            "density.methods.cfm.loss",
            {"name": "likelihood", "grid": {"name": "warped", "q": 1}},
            ["density.methods.cfm.loss.grid.q is not a known key"],
        ),
        (
            "density.methods.cfm.loss",
            {"name": "likelihood", "solver": "dopri5"},
            ["density.methods.cfm.loss.solver", "'dopri5'", "'adams'"],
        ),
        (
            "density.methods.cfm.tune",
            {"loss": "maf", "steps": 9, "lr": 1e-3, "batch": 8},
            ["density.methods.cfm.tune.loss", "a loss of a velocity field", "likelihood"],
        ),
        (
            "density.methods.cfm.tune",
            {"loss": {"name": "likelihood", "step": 9}, "steps": 9, "lr": 1e-3, "batch": 8},
            ["density.methods.cfm.tune.loss.step is not a known key", "'steps'"],
        ),
        ("density.methods.cfm.tune", {"loss": "likelihood", "steps": 9}, ["density.methods.cfm.tune"]),
        (
            "density.methods.gaussian_mixture.tune",
            {"loss": "likelihood", "steps": 9, "lr": 1e-3, "batch": 8},
            ["density.methods.gaussian_mixture", "trains no velocity field, so it has no tune"],
        ),
        ("successor.fit.returns", 0, ["successor.fit.returns", "0"]),
        ("successor.fit.particles", 1, ["successor.fit.particles", "1", "boolean"]),
        ("successor.fit.adam_betas", [0.9], ["successor.fit.adam_betas"]),
        ("successor.fit.adam_betas", [0.9, 1.0], ["successor.fit.adam_betas.1", "1.0", "less than 1"]),
        ("successor.fit.adam_beta2_end", 1.0, ["successor.fit.adam_beta2_end", "1.0", "less than 1"]),
        ("density.fit.adam_beta2_end", -0.1, ["density.fit.adam_beta2_end", "-0.1", "greater than or equal to 0"]),
        ("density.fit.adam_beta2_end", [0.9, 0.99], ["density.fit.adam_beta2_end", "[0.9, 0.99]", "number"]),
        (
            "successor.methods.td_cfm.loss",
            {"name": "gan", "penalty": [0.05]},
            ["successor.methods.td_cfm.loss.penalty is [0.05]", "expected a number", "two numbers"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "gan", "penalty": [0.05, "x"]},
            ["successor.methods.td_cfm.loss.penalty is [0.05, 'x']", "two numbers"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "vae", "betta": 0.1},
            ["successor.methods.td_cfm.loss.betta is not a known key (found 0.1); did you mean 'beta'?"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "gan", "beta": 0.1},
            ["successor.methods.td_cfm.loss.beta is not a known key (found 0.1)", "penalty, width, blocks"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "vae", "event_dim": 3},
            ["successor.methods.td_cfm.loss.event_dim is not a known key (found 3)", "beta, width, blocks"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "td_cfm", "steps": 3},
            ["successor.methods.td_cfm.loss.steps is not a known key (found 3)", "fused"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "td_cfm", "gamma": 0.5},
            ["successor.methods.td_cfm.loss.gamma is not a known key (found 0.5)", "fused"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "td_cfm", "field": 1},
            ["successor.methods.td_cfm.loss.field is not a known key (found 1)", "fused"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "mc_cfm", "width": 3},
            ["successor.methods.td_cfm.loss.width is not a known key (found 3); expected none."],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "gan", "penalty": "little"},
            ["successor.methods.td_cfm.loss.penalty is 'little'", "two numbers"],
        ),
        (
            "successor.methods.td_cfm.loss",
            {"name": "gan", "blocks": 1.5},
            ["successor.methods.td_cfm.loss.blocks is 1.5", "integer"],
        ),
        (
            "density.methods.cfm.loss",
            {"name": "interpolant", "gamma": 0.5},
            ["density.methods.cfm.loss.gamma is not a known key (found 0.5)"],
        ),
        (
            "density.methods.cfm.path",
            {"name": "cond_ot", "sigma_max": 1.0},
            ["density.methods.cfm.path.sigma_max is not a known key (found 1.0); did you mean 'sigma_min'?"],
        ),
        (
            "density.methods.cfm.coupling",
            {"name": "sinkhorn", "red": 1.0},
            ["density.methods.cfm.coupling.red is not a known key (found 1.0); did you mean 'reg'?"],
        ),
        ("environments.spiral.transitions", 0, ["environments.spiral.transitions", "0"]),
        ("datasets.moons.kind", "moon", ["datasets.moons.kind", "'moon'", "'moons'"]),
        ("datasets.moons.noise", -1.0, ["datasets.moons.noise", "-1.0"]),
        ("datasets.moons.train", "many", ["datasets.moons.train", "'many'"]),
        ("datasets.digits.methods", ["cfm", "cfn"], ["datasets.digits.methods has 'cfn'", "of density.methods: cfm"]),
        ("datasets.digits.sample", {"sample": 3}, ["datasets.digits.sample.sample", "'samples'"]),
        ("datasets.digits.evaluate", {"steps": 3}, ["datasets.digits.evaluate.steps", "multiple of 2"]),
        ("datasets.digits.evaluate", {"grid": {"name": "warped", "q": 1.0}}, ["datasets.digits.evaluate.grid.q"]),
        ("density.methods.cfm.fit", {"step": 1}, ["density.methods.cfm.fit.step", "'steps'"]),
        ("datasets.digits.fit", {"steps": "x"}, ["datasets.digits.fit.steps", "'x'"]),
        ("experiments.sde_vs_ode.kind", "sde_vs_od", ["experiments.sde_vs_ode.kind", "'sde_vs_od'", "'sde_vs_ode'"]),
        ("experiments.sde_vs_ode.sample", 5, ["experiments.sde_vs_ode.sample", "'samples'"]),
        ("experiments.sde_vs_ode.repeats", 1, ["experiments.sde_vs_ode.repeats", "greater than or equal to 2"]),
        ("datasets", {"Bad Name": {"kind": "moons"}}, ["Bad Name", "small letters"]),
        ("device", "gpu", ["device", "'gpu'", "cuda:N"]),
        ("device", 0, ["device", "0", "string"]),
        ("seed", -1, ["seed", "-1"]),
        ("threads", 0, ["threads", "0"]),
        ("mirror", 3, ["mirror", "3"]),
        ("density.evaluate.steps", 0, ["density.evaluate.steps", "0", "greater than or equal to 2"]),
        ("density.evaluate.steps", 7, ["density.evaluate.steps", "7", "multiple of 2"]),
        ("datasets.spiral", {"kind": "moons"}, ["'spiral' names a data set and an environment"]),
        ("datasets.sde_vs_ode", {"kind": "moons"}, ["'sde_vs_ode' names a data set and an experiment"]),
        ("datasets.results", {"kind": "moons"}, ["'results' names a part of the report", "the data set"]),
        ("density.methods.truth", {"path": "cond_ot", "coupling": "independent", "loss": "cfm"}, ["has 'truth'"]),
        (
            "successor.methods.floor",
            {"loss": "td_cfm", "path": {"name": "cond_ot"}},
            ["successor.methods has 'floor'"],
        ),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, key: str, value: Any, words: list[str]) -> None:
    text = sentence(changed(tmp_path, key, value))
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    "key", ["seed", "density", "density.fit.lr", "environments.spiral.gamma", "datasets.moons.kind"]
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = changed(tmp_path, "profile", "x")
    raw = yaml.safe_load(path.read_text())
    here = raw
    *parents, last = key.split(".")
    for part in parents:
        here = here[part]
    del here[last]
    path.write_text(yaml.safe_dump(raw))
    text = sentence(path)
    assert key in text
    assert "missing" in text


def test_an_entry_changes_its_network_or_takes_another(tmp_path: Path) -> None:
    entry = {"network": {"hidden": [8]}}
    loaded = params.load(changed(tmp_path, "datasets.moons.fit", entry))
    network = loaded.density.fit_for(loaded.datasets["moons"], loaded.density.methods["cfm"]).network
    assert (network.name, network.arguments) == ("mlp", {"hidden": [8], "frequencies": 8, "activation": "tanh"})
    entry = {"network": {"name": "unet_mlp", "stages": [8, 4]}}
    loaded = params.load(changed(tmp_path, "datasets.moons.fit", entry))
    network = loaded.density.fit_for(loaded.datasets["moons"], loaded.density.methods["cfm"]).network
    assert (network.name, network.arguments) == ("unet_mlp", {"stages": [8, 4]})
    assert str(network) == "unet_mlp 8×4"


def with_fits(tmp_path: Path, environment: dict[str, Any], method: dict[str, Any]) -> Path:
    """The project's params.yaml where the spiral and td_cfm have fits of their own."""
    path = changed(tmp_path, "environments.spiral.fit", environment)
    raw = yaml.safe_load(path.read_text())
    raw["successor"]["methods"]["td_cfm"]["fit"] = method
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_method_goes_before_an_environment_before_all(tmp_path: Path) -> None:
    environment = {"steps": 7, "lr": 0.5, "network": {"hidden": [8], "frequencies": 2}}
    loaded = params.load(with_fits(tmp_path, environment, {"steps": 9, "network": {"hidden": [4]}}))
    common, spiral, maze = loaded.successor.fit, loaded.environments["spiral"], loaded.environments["maze_loop"]
    method, other = (loaded.successor.methods[name] for name in ("td_cfm", "td2_cfm"))
    both = loaded.successor.fit_for(spiral, method)
    assert (both.steps, both.lr, both.batch) == (9, 0.5, common.batch)
    assert both.network.arguments == {"hidden": [4], "frequencies": 2, "activation": "silu"}
    one = loaded.successor.fit_for(spiral, other)
    assert (one.steps, one.lr, one.network.arguments["hidden"]) == (7, 0.5, [8])
    alone = loaded.successor.fit_for(maze, method)
    assert (alone.steps, alone.lr) == (9, common.lr)
    assert alone.network.arguments == {"hidden": [4], "frequencies": 8, "activation": "silu"}
    assert loaded.successor.fit_for(maze, other) == common


def test_a_methods_network_of_another_name_is_a_whole_one(tmp_path: Path) -> None:
    network = {"name": "unet_mlp", "stages": [8, 4]}
    loaded = params.load(with_fits(tmp_path, {"network": {"hidden": [8]}}, {"network": network}))
    for entry in loaded.environments.values():
        found = loaded.successor.fit_for(entry, loaded.successor.methods["td_cfm"]).network
        assert (found.name, found.arguments) == ("unet_mlp", {"stages": [8, 4]})


def test_two_fits_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    environment = {"network": {"name": "unet_mlp", "stages": [8, 4]}}
    text = sentence(with_fits(tmp_path, environment, {"network": {"hidden": [8]}}))
    assert "environments.spiral.fit with successor.methods.td_cfm.fit.network.hidden is not a known key" in text


def test_a_repeated_key_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("seed: 0\ndensity:\n  lr: 1\n  lr: 2\n")
    text = sentence(path)
    assert "'lr'" in text
    assert "3" in text
    assert "4" in text


@pytest.mark.parametrize(
    "content",
    [b"a: [1, 2", b"- 1\n- 2\n", b"", b"a: b: c\n", b"\t\tx: 1\n", b"a: \xff\n", b"[1]: 2\n", b"1: 2\n", b"\x00"],
)
def test_a_malformed_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    sentence(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    assert "project's root" in sentence(tmp_path / "params.yaml")


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    path = changed(tmp_path, "density.fit", {"lr": -1.0})
    assert "more)" in sentence(path)


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("1.0e-8", "1e-8"))
    assert params.load(path).density.fit.adam_eps == 1e-8


NUMBERS_TO_SOME = """
074 -012 0777 089 1_000 0o17 -0o17 0x1f 0x_ 0b1 1_e3 ._5 .5_ 1:30 190:20:30.15 yes No ON off y true Null ~ None = <<
1e3 1.e3 12e03 -.5 +.5 .5e3 .5e+3 00.5 .inf -.Inf .NaN -.nan 2020-01-01 2020-13-01 1.2.3
"""
PAIRS = product("019_:.+-exoEbnN", repeat=2)
WORDS = [*NUMBERS_TO_SOME.split(), *("".join(pair) for pair in PAIRS)]


def test_every_word_is_read_as_dvc_reads_it_or_refused(tmp_path: Path) -> None:
    """Which is by YAML 1.2; PyYAML's 1.1 makes 60 of 074, 90 of 1:30, true of `on` and a word of 0o17."""
    theirs = YAML(typ="safe")  # as in dvc.utils.serialize
    refused = []
    for word in WORDS:
        path = tmp_path / "params.yaml"
        path.write_text(f"key: {word}\n")
        try:
            ours = yaml_files.read_yaml(path)["key"]
        except UserError:
            refused.append(word)
            continue
        assert repr(ours) == repr(theirs.load(path.read_text())["key"]), word
    assert {"074", "-012", "0777", "089"} <= set(refused)
    assert not {"1_000", "0o17", "1:30", "yes", "1e3", "-.5", ".inf", "2020-01-01"} & set(refused)


def test_a_leading_zero_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("warmup: 100", "warmup: 074"))
    line = path.read_text().splitlines().index("    warmup: 074") + 1
    assert sentence(path).endswith(
        f"line {line} has the number 074, whose leading zero means base 8 to some readers "
        "and nothing to others; write 74, or quotes around it if it is a word."
    )


def test_words_are_written_so_that_every_reader_reads_words() -> None:
    for word in WORDS:
        text = yaml_files.write_yaml({"key": [word], word: 1})
        for load in (YAML(typ="safe").load, yaml.safe_load, lambda text: yaml.load(text, yaml_files._Loader)):
            assert load(text) == {"key": [word], word: 1}, text


def test_a_key_that_mlflow_would_refuse_is_named(tmp_path: Path) -> None:
    key = "k" * (params.LONGEST_KEY - len("successor.methods.mc_cfm.fit.") + 1)
    text = sentence(changed(tmp_path, "successor.methods.mc_cfm.fit", {key: 1}))
    assert "successor.methods.mc_cfm.fit.kkk" in text
    assert "has 251 characters with the keys above it, expected at most 250" in text


def test_zero_is_a_seed(tmp_path: Path) -> None:
    assert params.load(changed(tmp_path, "seed", 0)).seed == 0


@pytest.mark.parametrize(
    ("profile", "seeds"),
    [("default", {4, 3}), ("smoke", {1}), ("paper", {3}), ("td_tables", {3}), ("td_claims", {8})],
)
def test_every_profile_is_valid_and_has_its_seeds(tmp_path: Path, profile: str, seeds: set[int]) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    if profile != "default":
        raw, _ = changes.apply(raw, yaml_files.read_yaml(PROFILES / f"{profile}.yaml"))
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    loaded = params.load(path)
    assert loaded.profile == profile
    assert {len(loaded.successor.seeds_in(entry)) for entry in loaded.environments.values()} == seeds


def test_the_paper_profile_has_the_papers_settings(tmp_path: Path) -> None:
    """Temporal Difference Flows, tables 5 to 8."""
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(yaml_files.merge(raw, yaml_files.read_yaml(PROFILES / "paper.yaml"))))
    loaded = params.load(path)
    fit = loaded.successor.fit
    assert (fit.steps, fit.batch // 2, fit.lr, fit.ema_step) == (3_000_000, 1024, 1e-4, 1e-3)
    assert (fit.weight_decay, fit.adam_eps, fit.ode_solver, fit.ode_steps) == (1e-3, 1e-4, "midpoint", 10)
    gan = loaded.successor.methods["gan"]
    adversarial = loaded.successor.fit_for(loaded.environments["maze_loop"], gan)
    assert gan.loss.values()["penalty"] == (0.05, 0.005)
    assert (adversarial.adam_betas, adversarial.adam_beta2_end) == ((0.0, 0.9), 0.99)
    assert {
        loaded.successor.fit_for(e, m).network.name
        for e in loaded.environments.values()
        for m in loaded.successor.methods.values()
    } == {"unet_mlp"}
    mazes = [entry for entry in loaded.environments.values() if entry.kind == "maze"]
    assert {entry.own["task"] for entry in mazes} == {
        "loop",
        *(f"reach_{room}" for room in ("top_left", "top_right", "bottom_left", "bottom_right")),
    }
    for entry in mazes:
        assert (entry.own["action_repeat"], entry.starts, entry.length) == (1, 64, 1000)
    horizons = sorted(entry.gamma for entry in mazes)
    assert horizons == [0.8, 0.9, 0.95, 0.98] + [0.99] * 5  # Figure 2, then Tables 1 and 11
    assert loaded.successor.sample.samples == 2048
    assert len(loaded.successor.seeds) == 3


def test_seeds_of_a_method_come_before_those_of_its_environment() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["successor"] |= {"seeds": [5]}
    raw["successor"]["methods"]["td_cfm"] |= {"seeds": [2, 9]}
    raw["environments"]["maze_loop"] |= {"seeds": [0, 1], "methods": ["td_cfm", "td2_cfm"]}
    loaded = params.Params.model_validate(raw)
    successor, maze, spiral = loaded.successor, loaded.environments["maze_loop"], loaded.environments["spiral"]
    assert [successor.seeds_for(maze, m) for m in ("td_cfm", "td2_cfm")] == [(2, 9), (0, 1)]
    assert [successor.seeds_for(spiral, m) for m in ("td_cfm", "td2_cfm")] == [(2, 9), (5,)]
    assert (successor.seeds_in(maze), successor.seeds_in(spiral)) == ((0, 1, 2, 9), (2, 5, 9))


def test_a_data_set_has_methods_seeds_and_settings_of_its_own() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["density"]["methods"]["ot_cfm"] |= {"seeds": [7], "fit": {"steps": 9}}
    raw["datasets"]["moons"] |= {
        "methods": ["cfm", "ot_cfm"], "seeds": [4, 5], "fit": {"steps": 3, "lr": 0.5},
        "sample": {"samples": 11}, "evaluate": {"steps": 22, "grid": "uniform"},
    }  # fmt: skip
    density, moons = (loaded := params.Params.model_validate(raw)).density, loaded.datasets["moons"]
    assert density.methods_for(moons) == ["cfm", "ot_cfm"]
    assert density.methods_for(loaded.datasets["digits"]) == list(density.methods)
    assert [density.seeds_for(moons, m) for m in density.methods_for(moons)] == [(4, 5), (7,)]
    assert [density.fit_for(moons, density.methods[m]).steps for m in ("cfm", "ot_cfm")] == [3, 9]
    assert density.fit_for(moons, density.methods["ot_cfm"]).lr == 0.5
    assert (density.sample_for(moons).samples, density.sample_for(moons).steps) == (11, density.sample.steps)
    assert (density.evaluate_for(moons).steps, density.evaluate_for(moons).grid.name) == (22, "uniform")
    assert density.evaluate_for(loaded.datasets["digits"]) == density.evaluate


def paths(nested: Any, *above: str) -> Iterator[tuple[str, ...]]:
    """The key of every value and section, from the root."""
    for key, value in nested.items() if isinstance(nested, dict) else ():
        yield (*above, key)
        yield from paths(value, *above, key)


RAW = yaml_files.read_yaml(ROOT / "params.yaml")
KEYS = sorted(paths(RAW))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def put(key: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The project's parameters with another value at a key."""
    raw = deepcopy(RAW)
    here = raw
    for part in key[:-1]:
        here = here[part]
    here[key[-1]] = value
    return raw


def check_sentence(load: Callable[[], object], beginning: str) -> None:
    """Parameters are accepted or refused in one line, whatever a key or a value contains."""
    try:
        load()
    except UserError as error:
        text = str(error)
    else:
        return
    assert text.isprintable(), text
    assert text.startswith(beginning), text
    assert text.endswith((".", "?", "more)")), text


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(KEYS), ANYTHING)
def test_any_value_anywhere_is_accepted_or_one_sentence(key: tuple[str, ...], value: Any) -> None:
    check_sentence(lambda: params.parse(put(key, value), Path("params.yaml")), "params.yaml: ")


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(KEYS), st.text(max_size=12), ANYTHING)
def test_any_further_key_anywhere_is_accepted_or_one_sentence(key: tuple[str, ...], name: str, value: Any) -> None:
    check_sentence(lambda: params.parse(put((*key[:-1], name), value), Path("params.yaml")), "params.yaml: ")


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_mapping_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    check_sentence(lambda: params.load(path), str(path))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, len((ROOT / "params.yaml").read_bytes())), st.binary(max_size=4))
def test_a_damaged_file_is_one_sentence_or_still_valid(
    tmp_path_factory: pytest.TempPathFactory, at: int, inserted: bytes
) -> None:
    """The file cut at any byte, and with any bytes in between."""
    whole, path = (ROOT / "params.yaml").read_bytes(), tmp_path_factory.getbasetemp() / "damaged.yaml"
    for content in (whole[:at] + inserted, whole[:at] + inserted + whole[at:]):
        path.write_bytes(content)
        check_sentence(lambda: params.load(path), str(path))
