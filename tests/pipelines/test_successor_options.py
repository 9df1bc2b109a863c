"""Every way to train a successor model that params.yaml offers: what reaches the loss, the network and the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats
from torch import Tensor, nn

from flowmatch_core.field import Time, has_closed_form_divergence
from flowmatch_core.paths import VelocityOf
from flowmatch_core.successor import (
    Discounts,
    GeometricHorizonModel,
    HorizonGAN,
    HorizonModel,
    HorizonVAE,
    LatentHorizonModel,
    LogUniformDiscounts,
    NoisePrediction,
    Particles,
    UniformDiscounts,
)
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import params, yaml_files
from pipelines.config.params import Params, SuccessorFit, SuccessorMethod
from pipelines.data.batches import Batches, Draw
from pipelines.evaluation import models
from pipelines.models import build, pyfunc, registry, successor
from pipelines.models.untrained import Untrained
from pipelines.orchestration import preflight
from pipelines.runs import versions
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.stages import collect, sample_successor, train_successor
from pipelines.training import fit, loop
from pipelines.training.loop import Progress
from pipelines.training.successor import SuccessorJob

CPU = torch.device("cpu")
VP = {"name": "vp", "beta_max": 19.0}
DDIM = {"ode_solver": "ddim", "ode_steps": 20, "network": {"hidden": [12]}}
METHODS: dict[str, dict[str, Any]] = {
    "td_dd": {"loss": "td_dd", "path": VP, "fit": DDIM},
    "td2_dd": {"loss": "td2_dd", "path": VP, "fit": DDIM},
    "gan": {
        "loss": {"name": "gan", "penalty": [0.1, 0.01], "width": 16, "blocks": 1},
        "fit": {"adam_betas": [0.0, 0.9], "adam_beta2_end": 0.99},
    },
    "vae": {"loss": {"name": "vae", "beta": 0.1, "width": 16, "blocks": 1}, "seeds": [3, 0]},
    "ensemble": {"loss": {"name": "ensemble", "members": 2, "hidden": [16]}},
    "particles": {"loss": "td2_cfm", "fit": {"particles": True, "returns": 3, "ode_steps": 4}},
    "discounts": {"loss": "td2_cfm", "fit": {"discounts": {"name": "uniform", "low": 0.5, "high": 0.97}}},
    "log_discounts": {"loss": "vae", "fit": {"discounts": {"name": "log_uniform", "low": 0.0, "high": 0.97}}},
    "td_cfm": {"loss": "td_cfm"},
    "oracle": {"loss": "oracle"},
}
LISTED = [name for name in METHODS if name != "td_cfm"]
FIT: dict[str, Any] = {
    "network": {"name": "mlp", "hidden": [16]}, "steps": 12, "batch": 64, "lr": 1e-3, "warmup": 0, "log_every": 4,
    "ode_solver": "euler", "ode_steps": 2,
}  # fmt: skip
KILLED_AT = 8
A, S = torch.zeros(5, 2), torch.linspace(-1, 1, 10).reshape(5, 2)


def written(folder: Path, **changes: Any) -> Params:
    """A params.yaml with one small environment, whose policy and closed form are the spiral's."""
    raw = yaml_files.read_yaml(Path(__file__).parents[2] / "params.yaml")
    small = {"transitions": 400, "rollouts": 10, "length": 12, "starts": 3, "fit": {}, "methods": LISTED}
    raw |= {"device": "cpu", "threads": 1, "datasets": {"moons": raw["datasets"]["moons"]}}
    raw["environments"] = {"spiral": {**raw["environments"]["spiral"], **small, **changes.pop("environment", {})}}
    successor = {"methods": METHODS, "seeds": [0], "sample": {"samples": 8, "solver": "euler", "steps": 2}}
    raw["successor"] |= {**successor, "fit": {**raw["successor"]["fit"], **FIT}, **changes}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return params.load(folder / "params.yaml")


def stage(name: str, given: Params) -> Stage:
    return Stage(name, given, RunRecord.start(name, {}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the environment's tables are collected and every method is trained and sampled."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FLOWMATCH_HOME", str(folder / "home"))
        patch.setenv("FLOWMATCH_INVOCATION", "test")
        given = written(folder)
        collect.main(stage("collect@spiral", given), environment="spiral")
        for method in METHODS:
            train_successor.main(stage(f"train_successor@spiral-{method}", given), environment="spiral", method=method)
        sample_successor.main(stage("sample_successor@spiral", given), environment="spiral")
    return folder


@pytest.fixture(autouse=True)
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def job(root: Path, method: dict[str, Any], **changes: Any) -> SuccessorJob:
    """As the stage makes it."""
    given, choice = params.load(root / "params.yaml"), SuccessorMethod.model_validate(method)
    merged = yaml_files.merge(given.successor.fit_for(given.environments["spiral"], choice).model_dump(), changes)
    return SuccessorJob("spiral", "m", SuccessorFit(**merged), choice, gamma=0.95)


def trained(root: Path, method: str) -> HorizonModel:
    return successor.load(layout.network(root / layout.models("spiral", method), 0), CPU, "euler", 4)


# ---- what is trained, stored and sampled ----


@pytest.mark.parametrize("method", [name for name in LISTED if name != "oracle"])
def test_what_is_trained_loads_and_samples(root: Path, method: str) -> None:
    model = trained(root, method)
    assert model.gamma == 0.95
    x = model.sample(S, A, 7, generator=torch.Generator().manual_seed(0))
    assert x.shape == (7, 5, 2)
    assert bool(x.isfinite().all())
    curve = pd.read_csv(root / layout.curve("spiral", method))
    assert curve["step"].tolist() == [4, 8, 12]
    assert curve.notna().all(axis=None)


def test_a_method_has_its_own_seeds_in_training_and_sampling(root: Path) -> None:
    for method, seeds in (("gan", {0}), ("vae", {0, 3})):
        assert set(layout.networks(root / layout.models("spiral", method))) == seeds
        assert set(files.read_table(root / layout.sampled(layout.samples("spiral"), method))["seed"]) == seeds


@pytest.mark.parametrize(("method", "kind"), [("gan", HorizonGAN), ("vae", HorizonVAE)])
def test_a_latent_model_has_samples_and_values_and_no_density(
    root: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: type[nn.Module]
) -> None:
    folder = root / layout.models("spiral", method)
    monkeypatch.setattr(versions, "files", lambda uri, *others: folder)
    model = registry.load(f"models:/spiral.{method}/latest")
    assert isinstance(model, LatentHorizonModel)
    assert isinstance(model.network, kind)
    assert not model.has_density
    with pytest.raises(TypeError, match="has no log_prob"):
        model.log_prob(S, S, A)
    value = model.value(lambda x: torch.ones(x.shape[:-1]), S, A, 3)
    torch.testing.assert_close(value, torch.full((5,), 20.0))
    described = files.read_tensors(folder / "seed0.safetensors")[1]["network"]
    assert described == {"name": method, "event_dim": 2, "cond_dim": 4, "width": 16, "blocks": 1}
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize("method", ["td_dd", "td2_dd"])
def test_a_diffusion_model_is_the_flow_of_its_noise(root: Path, method: str) -> None:
    model = trained(root, method)
    assert isinstance(model, GeometricHorizonModel)
    field = model.flow.field
    assert isinstance(field, VelocityOf)
    assert isinstance(field.network, NoisePrediction)
    tensors, meta = files.read_tensors(layout.network(root / layout.models("spiral", method), 0))
    assert meta["prediction"] == "noise"
    assert meta["network"]["hidden"] == [12]  # from the fit of the method
    plain = build.network(meta["network"])
    plain.load_state_dict({k.removeprefix("network.network."): v for k, v in tensors.items() if k.startswith("n")})
    way = build.path(params.PathChoice.model_validate(VP))
    truth = VelocityOf(NoisePrediction(plain, way), way, "noise")
    t, x, cond = torch.rand(5), torch.randn(5, 2), torch.randn(5, meta["network"]["cond_dim"])
    with torch.no_grad():
        assert torch.equal(field(t, x, cond), truth(t, x, cond))


def test_the_likelihood_of_a_diffusion_model_takes_the_closed_form_of_its_divergence(root: Path) -> None:
    model = trained(root, "td_dd")
    assert isinstance(model, GeometricHorizonModel)
    field = model.flow.field
    assert has_closed_form_divergence(field)
    flow = model.flow

    def opaque(t: Time, x: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return field(t, x.float(), cond.float()).to(x.dtype)  # the dtype of the weights is hidden, too

    plain = GeometricHorizonModel(
        opaque,
        flow.event_shape,
        model.gamma,
        flow.solver,
        flow.steps,
        loc=flow.loc,
        scale=flow.scale,
        action_loc=model.action_loc,
        action_scale=model.action_scale,
    )
    assert not has_closed_form_divergence(plain.flow.field)
    by_autograd = plain.log_prob(S, S, A)
    assert bool(by_autograd.isfinite().all())
    torch.testing.assert_close(model.log_prob(S, S, A), by_autograd, rtol=1e-4, atol=1e-4)


# ---- models of many discounts ----


@pytest.mark.parametrize(
    ("method", "law"),
    [("discounts", UniformDiscounts(0.5, 0.97)), ("log_discounts", LogUniformDiscounts(0.0, 0.97))],
)
def test_a_model_of_many_discounts_loads_at_that_of_the_environment_and_goes_to_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, method: str, law: Discounts
) -> None:
    folder = root / layout.models("spiral", method)
    monkeypatch.setattr(versions, "files", lambda uri, *others: folder)
    model = registry.load(f"models:/spiral.{method}/latest")
    assert isinstance(model, HorizonModel)
    assert (model.gamma, model.discounts) == (0.95, law)
    at = {gamma: model.at(gamma).sample(S, A, 3, generator=torch.Generator().manual_seed(0)) for gamma in (0.6, 0.95)}
    assert torch.equal(at[0.95], model.sample(S, A, 3, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(at[0.95], at[0.6])
    columns = {name: part.numpy() for name, part in zip("xyuv", torch.cat([S, A], 1).mT, strict=True)}
    predicted = pyfunc._load_pyfunc(str(folder)).predict(pd.DataFrame(columns))
    assert np.isfinite(predicted).all(axis=None)


@pytest.mark.parametrize(
    "method",
    [
        {"loss": "td2_cfm"},
        {"loss": "td2_cfm", "fit": {"returns": 3}},
        {"loss": "td2_cfm", "fit": {"particles": True}},
        {"loss": "mc_cfm"},
    ],
    ids=lambda method: "_".join([method["loss"], *method.get("fit", {})]),
)
def test_a_step_has_a_discount_for_every_row_and_the_same_in_both_terms(root: Path, method: dict[str, Any]) -> None:
    law = {"discounts": {"name": "uniform", "low": 0.5, "high": 0.97}}
    made = job(root, {**method, "fit": {**method.get("fit", {}), **law}})
    task, generator = made.task(CPU), torch.Generator().manual_seed(0)
    average, seen = copy.deepcopy(task.network), list[Tensor]()
    task.network.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    task.terms(task.network, average, generator, 0.0)
    assert len(seen) == 1
    gamma = seen[0][:, -3].split(made.fit.batch // (1 if method["loss"] == "mc_cfm" else 2))
    assert len(set(gamma[0].tolist())) == len(gamma[0])
    assert 0.5 <= float(gamma[0].min()) < 0.6 and 0.9 < float(gamma[0].max()) <= 0.97
    assert torch.equal(gamma[0], gamma[-1])


# ---- methods that are not run ----


def test_a_method_that_is_not_listed_is_left_out_with_its_reason(root: Path) -> None:
    given = params.load(root / "params.yaml")
    assert [file.name for file in (root / layout.models("spiral", "td_cfm")).iterdir()] == ["skipped.json"]
    found = {name: models.load(given, "spiral", name, 0, CPU, "euler", 2) for name in given.successor.methods}
    left_out = found.pop("td_cfm")
    assert isinstance(left_out, Untrained)
    assert left_out.reason == "spiral does not list it"
    assert all(isinstance(model, HorizonModel) for model in found.values())
    sampled = {file.name.split(".")[0] for file in (root / layout.samples("spiral")).iterdir()} - {"value_map"}
    assert sampled == set(LISTED)
    assert (root / layout.curve("spiral", "td_cfm")).read_text() == "step\n"
    assert files.read_json(root / layout.final_losses("spiral", "td_cfm")) == {}


def test_an_oracle_without_a_closed_form_is_left_out_with_its_reason(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = params.load(root / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWMATCH_HOME", str(tmp_path / "home"))
    file = layout.provenance(layout.collected("spiral"))
    described = files.read_json(root / file)
    for closed_form in (True, False):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, {**described, "closed_form": closed_form})
        train_successor.main(stage("train_successor@spiral-oracle", given), environment="spiral", method="oracle")
        found = models.load(given, "spiral", "oracle", 0, CPU, "euler", 2)
        if closed_form:
            assert isinstance(found, HorizonModel)
        else:
            assert isinstance(found, Untrained)
            assert found.reason == "spiral has no closed form"


# ---- arguments and options ----


def test_arguments_reach_the_loss_and_the_network(root: Path) -> None:
    """The VAE's loss is its error and beta times its divergence; both terms are linear in beta."""

    def loss(**arguments: Any) -> Tensor:
        torch.manual_seed(0)
        task = job(root, {"loss": {"name": "vae", "width": 16, "blocks": 1, **arguments}}).task(CPU)
        assert isinstance(task.network, HorizonVAE)
        assert len(task.network.decoder.inner) == 1
        assert task.network.decoder.first.out_features == 16
        return task.terms(task.network, task.network, torch.Generator().manual_seed(0), 0.0)["loss"].detach()

    at = {beta: loss(beta=beta) for beta in (1.0, 2.0, 4.0)}
    assert at[2.0] > at[1.0]
    torch.testing.assert_close(at[4.0] - at[2.0], 2 * (at[2.0] - at[1.0]))
    torch.testing.assert_close(loss(), loss(beta=0.5))


def test_the_penalty_reaches_the_gan(root: Path) -> None:
    losses = []
    for penalty in (0.0, 1.0):
        torch.manual_seed(0)
        task = job(root, {"loss": {"name": "gan", "width": 16, "blocks": 1, "penalty": penalty}}).task(CPU)
        losses.append(
            float(task.terms(task.network, task.network, torch.Generator().manual_seed(0), 0.0)["loss"].detach())
        )
    assert losses[1] > losses[0]


def test_the_penalty_of_a_pair_is_that_of_the_share_that_is_done(root: Path) -> None:
    def loss(penalty: Any, progress: float) -> Tensor:
        torch.manual_seed(0)
        task = job(root, {"loss": {"name": "gan", "width": 16, "blocks": 1, "penalty": penalty}}).task(CPU)
        return task.terms(task.network, task.network, torch.Generator().manual_seed(0), progress)["loss"]

    for progress, between in ((0.0, 0.5), (0.5, 0.3125), (1.0, 0.125)):
        assert torch.equal(loss([0.5, 0.125], progress), loss(between, 0.0))
    assert not torch.equal(loss([0.5, 0.125], 0.5), loss([0.5, 0.125], 0.0))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"loss": "td_cfm", "fit": {"particles": True}}, ["particles is true", "'td_cfm'", "td2_cfm"]),
        ({"loss": "td2_dd", "path": VP, "fit": {"particles": True}}, ["particles is true", "'td2_dd'"]),
        ({"loss": "gan", "fit": {"particles": True}}, ["particles is true", "'gan'"]),
        ({"loss": "mc_cfm", "fit": {"particles": True}}, ["particles is true", "successor.methods.<name>.fit"]),
        ({"loss": "td_dd", "path": {"name": "vp", "beta_max": 9.0}}, ["successor.methods.<name>.path", "0.1028"]),
        ({"loss": "mc_cfm", "fit": {"returns": 3}}, ["returns is 3", "'mc_cfm'", "successor.methods.<name>.fit"]),
        (
            {"loss": "ensemble", "fit": {"discounts": {"name": "uniform", "low": 0.5, "high": 0.97}}},
            ["discounts is set for the loss 'ensemble'", "expected null"],
        ),
        (
            {"loss": "td_cfm", "fit": {"discounts": {"name": "uniform", "low": 0.5, "high": 0.9}}},
            ["discounts is 'uniform'", "gamma was 0.95, but should be in [0.5, 0.9]"],
        ),
        (
            {"loss": "td_cfm", "fit": {"discounts": {"name": "log_uniform", "low": 0.99, "high": 0.97}}},
            ["discounts is 'log_uniform'", "should be 0 <= low <= high < 1"],
        ),
        ({"loss": "td_cfm", "fit": {"discounts": {"name": "uniform", "low": 0.5}}}, ["discounts is", "'high'"]),
    ],
)
def test_what_a_loss_cannot_use_is_a_sentence_before_anything_runs(
    tmp_path: Path, root: Path, method: dict[str, Any], words: list[str]
) -> None:
    made = job(root, method)
    with pytest.raises(UserError) as at_training:
        made.task(CPU)
    given = written(tmp_path, methods={"m": method}, environment={"methods": ["m"]})
    with pytest.raises(UserError) as before:
        preflight.check(given)
    assert str(before.value) == str(at_training.value)
    assert str(before.value).startswith("params.yaml: ")
    assert "\n" not in str(before.value)
    for word in words:
        assert word in str(before.value)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"name": "vae", "beta": 0}, ["'beta': 0", "beta was 0.0, but should be a finite positive number"]),
        ({"name": "gan", "penalty": -1.0}, ["'penalty': -1.0", "penalty was -1.0, but should be a finite number"]),
        ({"name": "gan", "penalty": [0.05, -1.0]}, ["penalty was (0.05, -1.0)"]),
        ({"name": "gan", "width": 0}, ["'width': 0"]),
    ],
)
def test_arguments_that_a_loss_refuses_are_a_sentence_before_anything_runs(
    tmp_path: Path, loss: dict[str, Any], words: list[str]
) -> None:
    given = written(tmp_path, methods={"m": {"loss": loss}}, environment={"methods": ["m"]})
    with pytest.raises(UserError) as caught:
        preflight.check(given)
    assert str(caught.value).startswith("params.yaml: successor.methods.m.loss was given {")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_arguments_that_are_right_pass(tmp_path: Path) -> None:
    """Of losses of every kind: with a network of their own and with a field."""
    preflight.check(written(tmp_path))
    fused = {
        loss: {"loss": {"name": loss, "fused": False}, "path": way}
        for loss, way in (("td_cfm", "cond_ot"), ("td2_dd", VP))
    }
    preflight.check(written(tmp_path, methods=fused, environment={"methods": None}))


def test_what_no_environment_runs_is_not_in_the_way(tmp_path: Path) -> None:
    """And a method's own fit excepts it from what all others do."""
    methods = {
        "td2_cfm": {"loss": "td2_cfm"},
        "mc_cfm": {"loss": "mc_cfm", "fit": {"particles": False, "returns": 1}},
        "td_cfm": {"loss": "td_cfm"},
    }
    fit = {"particles": True, "returns": 2}
    environment = {"fit": fit, "methods": ["td2_cfm", "mc_cfm"]}
    preflight.check(written(tmp_path, methods=methods, environment=environment))
    with pytest.raises(UserError, match="particles is true for the loss 'td_cfm'"):
        preflight.check(written(tmp_path, methods=methods, environment={"fit": fit, "methods": None}))


class Recorder(nn.Module):
    """A field that keeps the times at which it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.t = torch.empty(0)

    def forward(self, t: Tensor, x: Tensor, cond: Tensor) -> Tensor:
        self.t = t
        return x


@pytest.mark.parametrize("loss", ["td_cfm", "td_cfm_coupled", "td2_cfm", "td_dd", "td2_dd", "mc_cfm", "particles"])
@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_flow_times_have_the_law_that_is_asked_for(root: Path, loss: str, time: str) -> None:
    method = METHODS["particles"] if loss == "particles" else {"loss": loss, "path": VP if "dd" in loss else "cond_ot"}
    task = job(root, method, time=time, batch=2_000).task(CPU)
    field = Recorder()
    task.terms(field, lambda t, x, cond: x, torch.Generator().manual_seed(0), 0.0)  # type: ignore[arg-type]
    times = (field.t if loss == "mc_cfm" else field.t[:1_000]).double()
    at = times if time == "uniform" else torch.special.ndtr(times.logit())
    assert stats.kstest(at.numpy(), "uniform").pvalue > 1e-3


def test_the_bootstrap_is_solved_as_the_fit_says(root: Path) -> None:
    """The target is asked once a step by Euler and DDIM, and twice by the midpoint rule, and once at the point."""
    for solver, evaluations in (("euler", 4), ("midpoint", 7), ("ddim", 4)):
        for loss, way in (("td2_cfm", "cond_ot"), ("td2_dd", "vp")):
            task = job(root, {"loss": loss, "path": way, "fit": {"ode_solver": solver, "ode_steps": 3}}).task(CPU)
            asked = []
            target = lambda t, x, cond: asked.append(1) or x  # noqa: B023, E731
            task.terms(Recorder(), target, torch.Generator().manual_seed(0), 0.0)  # type: ignore[arg-type]
            assert len(asked) == evaluations, (loss, solver)


def test_returns_weigh_the_bootstrap_by_the_discount_of_their_steps(root: Path) -> None:
    for method in ({"loss": "td_cfm"}, {"loss": "vae"}, METHODS["particles"]):
        for returns in (1, 3):
            task = job(root, {**method, "fit": {**method.get("fit", {}), "returns": returns}}).task(CPU)
            g = torch.Generator().manual_seed(0)
            for _ in range(6):  # particles are under way after some steps
                total, direct, bootstrap = task.terms(task.network, task.network, g, 0.0).values()
            weight = 0.95**returns
            torch.testing.assert_close(total, (1 - weight) * direct + weight * bootstrap)


def test_one_step_returns_may_be_taken_on_the_rollouts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = list[int](), Batches.returns

    def returns(self: Batches, n: int, gamma: float, steps: int) -> Draw:
        asked.append(steps)
        return real(self, n, gamma, steps)

    monkeypatch.setattr(Batches, "returns", returns)
    for change, expected in (({}, []), ({"rollouts": True}, [1]), ({"returns": 3}, [3])):
        asked.clear()
        task = job(root, {"loss": "td2_cfm", "fit": change}).task(CPU)
        task.terms(task.network, task.network, torch.Generator().manual_seed(0), 0.0)
        assert asked == expected


# ---- particles ----


def test_particles_are_as_the_fit_says(root: Path) -> None:
    memory = job(root, METHODS["particles"]).task(CPU).memory
    assert isinstance(memory, Particles)
    assert (memory.slots, memory.steps, tuple(memory.cond.shape)) == (32, 4, (32, 4))
    assert memory.path == build.path(params.PathChoice.model_validate("cond_ot"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_particles_are_on_the_device(root: Path) -> None:
    device = torch.device("cuda", 0)
    task = job(root, METHODS["particles"]).task(device)
    assert task.memory is not None
    assert {buffer.device for buffer in task.memory.buffers()} == {device}
    loss = task.terms(task.network, task.network, torch.Generator(device).manual_seed(0), 0.0)["loss"]
    assert loss.device == device


@pytest.mark.parametrize("returns", [1, 3])
def test_a_killed_seed_goes_on_with_its_particles(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returns: int
) -> None:
    made = job(root, {"loss": "td2_cfm", "fit": {"particles": True, "returns": returns, "ode_steps": 4}})
    whole, killed, resumed = whole_and_resumed(made, tmp_path, monkeypatch)
    assert bool(killed["memory.x"].any())
    assert resumed == whole


def test_a_killed_gan_goes_on_where_its_schedules_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, resumed = whole_and_resumed(job(root, METHODS["gan"]), tmp_path, monkeypatch)
    assert resumed == whole


def whole_and_resumed(
    made: SuccessorJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, dict[str, Tensor], bytes]:
    """The file of a seed that is trained at once, the checkpoint of one that is killed, and the file of its end."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)

    def fitted(state: Path, stop_at: int | None = None) -> bytes:
        def tell(row: Progress) -> None:
            if row.step == stop_at:
                raise KeyboardInterrupt

        state.mkdir(exist_ok=True)
        fit._fit_one(0, tell, base=0, job=made, device="cpu", state=state)
        return (state / "seed0.safetensors").read_bytes()

    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "killed", KILLED_AT)
    kept, _ = files.read_tensors(tmp_path / "killed" / "seed0.checkpoint")
    return whole, kept, fitted(tmp_path / "killed")
