"""Training of densities: conditions, weights, streams, units, early stopping, and baselines against closed forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest, multivariate_normal, norm
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from flowmatch_core.flow import ContinuousFlow, Flow
from flowmatch_core.marginals import Marginals
from flowmatch_core.objectives import nll_loss
from flowmatch_core.solvers import Warped
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.base.seeding import derived_seed
from pipelines.config.params import CouplingChoice, DensityFit, DensityMethod
from pipelines.models import density, saved
from pipelines.models.conditions import Conditions
from pipelines.training import density as training
from pipelines.training import loop
from pipelines.training.density import DensityJob
from pipelines.training.fit import Fitted, Task
from pipelines.training.rows import Prepared

CPU = torch.device("cpu")
FIT: dict[str, Any] = {
    "network": {"name": "mlp", "hidden": [16]}, "steps": 12, "batch": 32, "lr": 1e-2, "warmup": 2, "weight_decay": 0.0,
    "adam_betas": (0.9, 0.999), "adam_eps": 1e-8, "ema_step": 0.1, "log_every": 4, "val_every": 4,
}  # fmt: skip
SPECIES = {"name": "species", "kind": "words", "levels": ["a", "b", "c"]}
AGE = {"name": "age", "kind": "number", "loc": 40.0, "scale": 5.0, "low": 20.0, "high": 60.0}
ROWS = {"train": 600, "val": 150, "test": 150}
FAR = 6e6  # a northing in metres: its float32 neighbours are 0.5 m apart


def table(rows: int, seed: int) -> pd.DataFrame:
    """Two columns whose means depend on a word and on a number, weights, and years."""
    rng = np.random.default_rng(seed)
    species = rng.choice(SPECIES["levels"], rows)
    age = rng.normal(40.0, 5.0, rows)
    mean = np.select([species == "a", species == "b"], [0.0, 2.0], -1.0) + 0.1 * (age - 40.0)
    x = mean + 0.3 * rng.normal(size=rows)
    y = -0.5 * x + rng.normal(size=rows)
    return pd.DataFrame(
        {"x": FAR + x, "y": y, "species": species, "age": age, "heavy": rng.uniform(0.2, 1.8, rows),
         "year": rng.integers(2007, 2010, rows) + rng.random(rows)}
    )  # fmt: skip


def prepared(
    columns: tuple[str, ...] = ("x", "y"),
    conditions: tuple[Mapping[str, Any], ...] = (SPECIES, AGE),
    weight: str | None = None,
    discrete: Mapping[str, Any] | None = None,
    kinds: tuple[str, ...] = (),
) -> pd.DataFrame:
    """Write a prepared data set `own` in small row groups, and return its training rows."""
    folder = layout.prepared("own")
    folder.mkdir(parents=True)
    names = [*columns, *(one["name"] for one in conditions)]
    for seed, (part, rows) in enumerate(ROWS.items()):
        kept = [*names, weight] if weight is not None and part == "train" else names
        table(rows, seed)[kept].to_parquet(layout.part(folder, part), row_group_size=50)
    train = table(ROWS["train"], 0)
    values = train[list(columns)].to_numpy(copy=True)
    if kinds:
        transforms = Marginals.fit(torch.from_numpy(values), kinds=kinds, components=3)
        described = {"columns": list(columns), "marginals": transforms.description}
        files.write_tensors(layout.marginals(folder), transforms.state_dict(), described)
        values = transforms(torch.from_numpy(values))[0].numpy()
    files.write_json(
        layout.provenance(folder),
        {"columns": list(columns), "conditions": list(conditions), "weight": weight, "discrete": dict(discrete or {}),
         "types": {}, "constants": {}, "marginals": bool(kinds), "loc": values.mean(0).tolist(),
         "scale": values.std(0).tolist()},
    )  # fmt: skip
    return train


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "VALIDATION", 200)
    return tmp_path


def job(method: Mapping[str, Any], **fit: Any) -> DensityJob:
    given = DensityFit.model_validate({**FIT, **fit})
    return DensityJob("own", "mine", given, DensityMethod.model_validate(method))


def trained(made: DensityJob, checkpoint: str = "checkpoint") -> tuple[Task | Fitted, loop.Trained]:
    torch.manual_seed(0)
    task = made.task(CPU)
    return task, task.train(made.fit, torch.Generator().manual_seed(1), Path(checkpoint), lambda row: None)


def model(method: Mapping[str, Any], **fit: Any) -> Flow:
    """Train a model, write its file, and load it."""
    task, found = trained(job(method, **fit))
    saved.save(Path("m.safetensors"), found.network, task.loc, task.scale, task.meta, task.marginals, task.whitening)
    return density.load(Path("m.safetensors"), CPU, "rk4", 10)


def points(rows: pd.DataFrame, columns: tuple[str, ...] = ("x", "y")) -> tuple[Tensor, Tensor]:
    encoded = Conditions((SPECIES, AGE)).encode(rows)
    return torch.tensor(rows[list(columns)].to_numpy()), torch.from_numpy(encoded)


TUNE: dict[str, Any] = {
    "loss": {"name": "likelihood", "solver": "adams", "steps": 8, "grid": {"name": "warped", "p": 0.85}},
    "steps": 9, "batch": 16, "lr": 1e-3, "val_every": 3,
}  # fmt: skip
EVERY = [
    {"loss": "cfm"},
    {"loss": "cfm", "coupling": "minibatch_ot"},
    {"loss": "cfm", "coupling": {"name": "conditional_ot", "weight": 100.0}},
    {"loss": "interpolant"},
    {"loss": "posterior_cfm"},
    {"loss": "gaussian"},
    {"loss": {"name": "gaussian_mixture", "components": 2}},
    {"loss": {"name": "kernel_density", "bandwidth": 0.3}},
    {"loss": {"name": "maf", "transforms": 2, "hidden": [16]}},
    {"loss": {"name": "nsf", "transforms": 1, "hidden": [16], "bins": 4}},
    {"loss": TUNE["loss"]},
    {"loss": "cfm", "coupling": "minibatch_ot", "tune": TUNE},
    {"loss": {"name": "large_mixture", "components": 2, "iterations": 5}},
    {"loss": "cfm", "mixture": {"components": 2, "iterations": 5, "likeliest": 2}},
    {"loss": {"name": "real_nvp", "transforms": 2, "hidden": [16]}},
    {"loss": {"name": "glow", "steps": 2, "hidden": [16]}},
    {"loss": {"name": "made", "hidden": [16]}},
    {"loss": {"name": "naf", "transforms": 1, "hidden": [16], "signal": 4, "monotonic": [8]}},
]


QUICK = [0, 2, 5, 6, 7, 8, 11, 12, 13]  # the others are slow tests


@pytest.mark.parametrize(
    ("method", "columns"),
    [
        *(
            pytest.param(method, ("x", "y"), id=json.dumps(method), marks=[] if i in QUICK else pytest.mark.slow)
            for i, method in enumerate(EVERY)
        ),
        *(
            pytest.param(
                EVERY[i], ("x",), id=f"{json.dumps(EVERY[i])} one column", marks=[] if i == 5 else pytest.mark.slow
            )
            for i in (0, 5, 8, 9)
        ),
    ],
)
def test_every_method_is_trained_on_conditions_and_has_samples_and_densities_in_double_precision(
    method: Mapping[str, Any], columns: tuple[str, ...]
) -> None:
    prepared(columns)
    flow = model(method)
    x, cond = points(table(50, 3), columns)
    assert flow.cond_shape is not None
    assert tuple(flow.cond_shape) == (4,)
    with torch.no_grad():
        log_prob, drawn = flow.log_prob(x, cond), flow.sample((20,), cond, torch.Generator().manual_seed(0))
    assert (log_prob.shape, drawn.shape, drawn.dtype) == ((50,), (20, 50, len(columns)), torch.float64)
    assert log_prob.isfinite().all()
    assert len(drawn[..., 0].unique()) > 990  # in single precision a dozen
    meta = saved.meta(Path("m.safetensors"))
    assert ("path" in meta) == DensityMethod.model_validate(method).has_field
    more = 2 if "mixture" in method else 0  # the number of the component
    assert (meta["network"]["event_dim"], meta["network"]["cond_dim"]) == (len(columns), 4 + more)


@pytest.mark.parametrize("weight", [None, "heavy"])
def test_the_gaussian_given_conditions_is_weighted_linear_regression(weight: str | None) -> None:
    train = prepared(weight=weight)
    flow = model({"loss": "gaussian"})
    importance = np.ones(len(train)) if weight is None else train["heavy"].to_numpy()

    def design(rows: pd.DataFrame) -> np.ndarray:
        words = [rows["species"] == word for word in "abc"]
        return np.column_stack([*words, rows["age"]]).astype(float)

    a, y = design(train), train[["x", "y"]].to_numpy()
    shift = np.array([FAR, 0.0])
    root = np.sqrt(importance)[:, None]
    slopes = np.linalg.lstsq(root * a, root * (y - shift), rcond=None)[0]
    residual = y - shift - a @ slopes
    covariance = (importance[:, None] * residual).T @ residual / importance.sum()
    test = table(150, 2)
    x, cond = points(test)
    truth = multivariate_normal(np.zeros(2), covariance).logpdf(x.numpy() - shift - design(test) @ slopes)
    np.testing.assert_allclose(flow.log_prob(x, cond).numpy(), truth, atol=2e-4)  # a ridge of 1e-6, float32 conditions


@pytest.mark.parametrize("weight", [None, "heavy"])
def test_independent_columns_have_their_weighted_moments_whatever_the_conditions(weight: str | None) -> None:
    train = prepared(weight=weight)
    flow = model({"loss": "independent"})
    importance = None if weight is None else train["heavy"].to_numpy()
    y = train[["x", "y"]].to_numpy()
    mean = np.average(y, axis=0, weights=importance)
    deviation = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=importance))
    x, cond = points(table(150, 2))
    truth = norm(mean, deviation).logpdf(x.numpy()).sum(1)
    np.testing.assert_allclose(flow.log_prob(x, cond).numpy(), truth, atol=2e-4)  # a ridge of 1e-6


def test_a_gaussian_of_transformed_columns_is_a_gaussian_copula_with_its_determinant() -> None:
    """Its density integrates to one over the strip between two years, which a step marginal makes uniform."""
    year = {"year": {"how": "steps", "low": 2007, "levels": None}}
    train = prepared(("x", "year"), (), discrete=year, kinds=("mixture", "steps"))
    flow = model({"loss": "gaussian"})
    data = Prepared(layout.prepared("own"))
    assert data.marginals is not None
    u = data.marginals(torch.tensor(train[["x", "year"]].to_numpy(copy=True)))[0].numpy()
    x = torch.tensor(table(100, 7)[["x", "year"]].to_numpy(copy=True))
    image, log_det = data.marginals(x)
    truth = multivariate_normal(u.mean(0), np.cov(u.T, ddof=0)).logpdf(image.numpy()) + log_det.numpy()
    np.testing.assert_allclose(flow.log_prob(x).numpy(), truth, atol=1e-4)
    axes = torch.linspace(-6, 6, 600, dtype=torch.float64) + FAR, torch.linspace(2007, 2010, 301, dtype=torch.float64)
    middle = (axes[1][1:] + axes[1][:-1]) / 2
    mass = flow.log_prob(torch.cartesian_prod(axes[0], middle)).exp().sum()
    assert float(mass * (axes[0][1] - axes[0][0]) * 0.01) == pytest.approx(1.0, abs=0.01)  # years beyond have a little
    drawn = flow.sample((2000,), generator=torch.Generator().manual_seed(0))
    assert set(drawn[:, 1].floor().int().tolist()) >= {2007, 2008, 2009}
    assert abs(float(drawn[:, 0].mean()) - train["x"].mean()) < 5 * train["x"].std() / 2000**0.5


def test_a_field_is_trained_on_transformed_columns() -> None:
    prepared(("x", "y"), kinds=("mixture", "mixture"))
    flow = model({"loss": "cfm"})
    x, cond = points(table(50, 3))
    with torch.no_grad():
        assert flow.log_prob(x, cond).isfinite().all()
    data = Prepared(layout.prepared("own"))
    rows = data.training(10_000, 1000, CPU).draw(torch.Generator().manual_seed(0)).x
    assert ((rows.mean(0)).abs() < 0.05).all()
    assert ((rows.std(0) - 1).abs() < 0.05).all()


def test_the_mixture_and_the_kernel_density_are_those_of_scikit_learn() -> None:
    train = prepared(conditions=())
    values = train[["x", "y"]].to_numpy()
    loc, scale = values.mean(0), values.std(0)
    x = table(150, 2)[["x", "y"]].to_numpy()
    standardised = (x - loc) / scale
    kernel = KernelDensity(bandwidth=0.3).fit((values - loc) / scale).score_samples(standardised)
    found = model({"loss": {"name": "kernel_density", "bandwidth": 0.3}}).log_prob(torch.tensor(x))
    np.testing.assert_allclose(found.numpy(), kernel - np.log(scale).sum(), rtol=1e-7)
    mixture = GaussianMixture(3, random_state=0, max_iter=200).fit((values - loc) / scale).score_samples(standardised)
    found = model({"loss": {"name": "gaussian_mixture", "components": 3}}).log_prob(torch.tensor(x))
    np.testing.assert_allclose(found.numpy(), mixture - np.log(scale).sum(), rtol=1e-6)


@pytest.mark.parametrize("loss", ["gaussian_mixture", "kernel_density"])
def test_what_is_not_given_is_chosen_on_the_validation_rows(loss: str) -> None:
    prepared(conditions=())
    option = {"gaussian_mixture": "components", "kernel_density": "bandwidth"}[loss]
    chosen = trained(job({"loss": loss}))[1].curve[0]["val_loss"]
    for value in (1, 6) if option == "components" else (0.05, 0.15, 0.6):
        other = trained(job({"loss": {"name": loss, option: value}}))[1].curve[0]["val_loss"]
        assert chosen <= other + 1e-3, value


def test_a_mixture_of_weighted_rows_is_that_of_rows_drawn_by_weight() -> None:
    """Its mean is the weighted one, within five standard errors; the weights of one word are ten times the others'."""
    prepared(("x", "y"), (), weight="heavy")
    path = layout.part(layout.prepared("own"), "train")
    rows = table(ROWS["train"], 0)
    rows["heavy"] = np.where(rows["species"] == "b", 10.0, 1.0)
    rows[["x", "y", "heavy"]].to_parquet(path)
    task, found = trained(job({"loss": {"name": "gaussian_mixture", "components": 2}}))
    mean = found.network.sample((100_000,), generator=torch.Generator().manual_seed(0)).mean(0)  # type: ignore[operator]
    x = (rows[["x", "y"]].to_numpy() - task.loc.numpy()) / task.scale.numpy()
    truth = np.average(x, axis=0, weights=rows["heavy"])
    assert (np.abs(mean.numpy() - truth) < 5 / ROWS["train"] ** 0.5).all()
    assert (np.abs(x.mean(0) - truth) > 5 / ROWS["train"] ** 0.5).any()  # the plain mean is told apart


class Killed(Exception):
    pass


@pytest.mark.parametrize("rows_in_memory", [pytest.param(1000, id="memory", marks=pytest.mark.slow), 200])
@pytest.mark.parametrize("loss", ["cfm", {"name": "maf", "transforms": 1, "hidden": [8]}], ids=["cfm", "maf"])
def test_a_killed_training_resumes_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, rows_in_memory: int, loss: Any
) -> None:
    """With conditions, weights, redrawn noise and checks, from memory and from disk."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    year = {"year": {"how": "uniform", "low": 2007, "levels": None}}
    prepared(("x", "year"), weight="heavy", discrete=year)
    made = job({"loss": loss}, rows_in_memory=rows_in_memory, patience=2)
    _, whole = trained(made, "whole")

    def killed(row: loop.Progress) -> None:
        if row.step >= 8:
            raise Killed

    torch.manual_seed(0)
    with pytest.raises(Killed):
        made.task(CPU).train(made.fit, torch.Generator().manual_seed(1), Path("killed"), killed)
    _, resumed = trained(made, "killed")
    assert (resumed.curve, resumed.chosen_step) == (whole.curve, whole.chosen_step)
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())


@pytest.mark.parametrize("stop_at", [8, 15, 18])
@pytest.mark.parametrize("rows_in_memory", [pytest.param(1000, id="memory", marks=pytest.mark.slow), 200])
def test_a_training_in_two_phases_resumes_to_the_same_bits_in_each(
    monkeypatch: pytest.MonkeyPatch, stop_at: int, rows_in_memory: int
) -> None:
    """The first phase has 12 steps and the second 9."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1e9)
    prepared(weight="heavy")
    made = job({"loss": "cfm", "tune": TUNE}, rows_in_memory=rows_in_memory)
    _, whole = trained(made, "whole.checkpoint")
    assert whole.curve[-1]["step"] == 21
    assert whole.chosen_step is not None
    assert whole.chosen_step > 12

    def killed(row: loop.Progress) -> None:
        if row.step >= stop_at:
            raise Killed

    torch.manual_seed(0)
    with pytest.raises(Killed):
        made.task(CPU).train(made.fit, torch.Generator().manual_seed(1), Path("killed.checkpoint"), killed)
    _, resumed = trained(made, "killed.checkpoint")
    assert (resumed.curve, resumed.chosen_step) == (whole.curve, whole.chosen_step)
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())


def test_the_second_phase_is_chosen_by_the_likelihood_of_the_validation_rows() -> None:
    """Its checks are the negative log-likelihood of the flow, whatever the loss of the first phase."""
    prepared()
    torch.manual_seed(0)
    tune = {**TUNE, "loss": {**TUNE["loss"], "steps": 64}}
    task = job({"loss": "cfm", "tune": tune}).task(CPU)
    assert isinstance(task, Task)
    assert task.tuning is not None
    part = Prepared(layout.prepared("own")).rows("val", 1000).to(CPU, torch.float32)
    log_prob = ContinuousFlow(task.network, (2,), "rk4", 64).log_prob(part.x, part.cond)  # type: ignore[arg-type]
    index = torch.arange(200) % 150  # what 200 draws take of 150 rows
    assert task.tuning.validation.loss(task.network) == pytest.approx(-float(log_prob[index].mean().detach()), abs=2e-4)


def test_the_checks_of_a_likelihood_solve_with_twice_the_steps() -> None:
    """A network whose weights are large has another loss at the steps of the training."""
    prepared()
    losses = []
    for steps in (2, 4, 64):
        torch.manual_seed(0)
        made = job({"loss": {**TUNE["loss"], "steps": steps}})
        task = made.task(CPU)
        assert isinstance(task, Task)
        assert task.validation is not None
        with torch.no_grad():
            for parameter in task.network.parameters():
                parameter.mul_(4.0)
        part = Prepared(layout.prepared("own")).rows("val", 1000).to(CPU, torch.float32)
        solved = []
        for count in (steps, 2 * steps):
            index = torch.arange(200) % 150
            generator = torch.Generator().manual_seed(derived_seed(torch.initial_seed(), "validation"))
            total = 0.0
            for rows in index.split(made.fit.batch):
                loss = nll_loss(
                    task.network, part.x[rows], None if part.cond is None else part.cond[rows], solver="adams",
                    steps=count, grid=Warped(0.85), generator=generator,
                )  # fmt: skip
                total += float(loss.detach()) * len(rows) / 200
            solved.append(total)
        assert task.validation.loss(task.network) == pytest.approx(solved[1], rel=1e-5)
        losses.append(abs(solved[0] - solved[1]))
    assert losses[0] > 0.02 > losses[2]


@pytest.mark.slow
def test_maximum_likelihood_finds_the_gaussian_of_the_rows() -> None:
    """Trained from the start: the loss of the rows is that of the Gaussian with their moments, its minimum."""
    prepared(conditions=())
    rows = np.random.default_rng(0).multivariate_normal([FAR, 3.0], [[4.0, 1.5], [1.5, 1.0]], 20_000)
    for part in ROWS:
        pd.DataFrame(rows, columns=["x", "y"]).to_parquet(layout.part(layout.prepared("own"), part))
    provenance = files.read_json(layout.provenance(layout.prepared("own")))
    units = {"loc": rows.mean(0).tolist(), "scale": rows.std(0).tolist()}
    files.write_json(layout.provenance(layout.prepared("own")), {**provenance, **units})
    loss = {**TUNE["loss"], "steps": 16}
    network = {"name": "mlp", "hidden": [32, 32], "frequencies": 0}
    flow = model({"loss": loss}, steps=200, batch=256, network=network, val_every=50)
    x = torch.from_numpy(rows)
    exact = multivariate_normal(rows.mean(0), np.cov(rows.T, bias=True)).logpdf(rows).mean()
    found = float(flow.log_prob(x).mean())
    assert exact - 0.02 < found < exact + 0.005  # a field that is not linear may fit the rows better than a Gaussian


def test_streamed_rows_are_those_in_memory_with_their_conditions_and_weights() -> None:
    train = prepared(weight="heavy")
    torch.manual_seed(0)
    data = Prepared(layout.prepared("own"))
    stream = data.training(60, 200, CPU)
    assert stream.streamed
    batches = [stream.draw(torch.Generator()) for _ in range(ROWS["train"] // 60)]
    assert all(batch.cond is not None and batch.weight is not None for batch in batches)
    seen = torch.cat([torch.cat([b.x, b.cond, b.weight[:, None]], 1) for b in batches])  # type: ignore[list-item,index]
    x, cond = points(train)
    whole = torch.cat([((x - data.loc) / data.scale).float(), cond, torch.tensor(train["heavy"])[:, None].float()], 1)
    assert torch.equal(seen[seen[:, 0].argsort()], whole[whole[:, 0].argsort()])
    memory = data.training(60, 1000, CPU)
    assert not memory.streamed
    assert memory.draw(torch.Generator()).weight is None  # they decide which rows are drawn


def test_the_weights_of_streamed_rows_multiply_the_loss() -> None:
    """The loss is a mean over the batch, whose gradient is that of the weighted rows."""
    prepared(conditions=(), weight="heavy")
    made = job({"loss": {"name": "maf", "transforms": 1, "hidden": [8]}}, rows_in_memory=200)
    torch.manual_seed(0)
    task = made.task(CPU)
    assert isinstance(task, Task)
    loss = task.terms(task.network, task.network, torch.Generator(), 0.0)["loss"]
    torch.manual_seed(0)
    rows = Prepared(layout.prepared("own")).training(32, 200, CPU).draw(torch.Generator())
    assert rows.weight is not None
    expected = -(rows.weight * task.network.log_prob(rows.x)).mean()  # type: ignore[operator]
    assert torch.equal(loss, expected)


def test_the_noise_of_a_discrete_column_is_drawn_anew_for_each_batch() -> None:
    year = {"year": {"how": "uniform", "low": 2007, "levels": None}}
    prepared(("year",), (), discrete=year)
    data = Prepared(layout.prepared("own"))
    rows, generator = data.training(4000, 1000, CPU), torch.Generator().manual_seed(0)
    first, second = ((rows.draw(generator).x * data.scale + data.loc)[:, 0] for _ in range(2))
    stored = table(ROWS["train"], 0)["year"]
    assert set(first.floor().int().tolist()) == set(stored.astype(int)) == {2007, 2008, 2009}
    assert len(first.unique()) > 3500  # the table has 600 values
    noise = torch.cat([first, second]) - torch.cat([first, second]).floor()
    assert abs(float(noise.mean()) - 0.5) < 5 * (1 / 12 / 8000) ** 0.5
    assert abs(float(noise.var()) - 1 / 12) < 5 * (1 / 180 / 8000) ** 0.5
    validated = data.rows("val", 1000).x * data.scale + data.loc
    np.testing.assert_allclose(validated[:, 0].numpy(), table(ROWS["val"], 1)["year"], rtol=1e-12)


def test_noise_is_added_to_training_rows_alone_and_drawn_anew() -> None:
    prepared(conditions=())
    data = Prepared(layout.prepared("own"))
    draws = []
    for noise in (0.0, 0.3):
        torch.manual_seed(0)
        rows, generator = data.training(4000, 1000, CPU, noise), torch.Generator().manual_seed(0)
        draws.append([rows.draw(generator).x, rows.draw(generator).x])
    added = draws[1][0] - draws[0][0]  # the first draw of the generator decides the rows
    assert abs(float(added.mean())) < 5 * 0.3 / 8000**0.5
    assert abs(float(added.var()) / 0.3**2 - 1) < 5 * (2 / 8000) ** 0.5
    assert abs(float(torch.corrcoef(added.T)[0, 1])) < 5 / 4000**0.5
    losses = []
    for noise in (0.0, 0.3):
        torch.manual_seed(0)
        task = job({"loss": "cfm"}, noise=noise).task(CPU)
        assert isinstance(task, Task)
        assert task.validation is not None
        losses.append(task.validation.loss(task.network))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stratified", [False, True])
def test_flow_times_have_the_law_that_is_asked_for(stratified: bool) -> None:
    prepared(conditions=())
    batch, eps = 500, 0.1
    made = job({"loss": "cfm"}, time={"name": "late", "eps": eps}, stratified=stratified, batch=batch)
    task, seen = made.task(CPU), []
    assert isinstance(task, Task)

    def network(t: Tensor, x: Tensor, cond: Tensor | None) -> Tensor:
        seen.append(t)
        return x

    task.terms(network, network, torch.Generator().manual_seed(0), 0.0)  # type: ignore[arg-type]
    share = torch.log((1 + eps) / (1 + eps - seen[0])) / np.log((1 + eps) / eps)
    assert kstest(share.numpy(), "uniform").pvalue > 1e-3
    assert (len((batch * share.double()).floor().unique()) > 0.98 * batch) == stratified


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_and_validation_rows_are_whitened_by_the_weighted_training_rows(in_memory: bool) -> None:
    """In full: draws have unit covariance under the weights, as the rows of the file have."""
    prepared(conditions=(), weight="heavy")
    data = Prepared(layout.prepared("own"), 1.0)
    train = data.rows("train", 1000)
    assert train.weight is not None
    covariance = torch.cov(train.x.T, correction=0, aweights=train.weight)
    torch.testing.assert_close(covariance, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    plain = Prepared(layout.prepared("own")).rows("val", 1000).x
    loc, scale, matrix = data.units
    assert matrix is not None
    x = torch.tensor(table(ROWS["val"], 1)[["x", "y"]].to_numpy())
    torch.testing.assert_close(data.rows("val", 1000).x, (x - loc) / scale @ matrix.T, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(plain, data.rows("val", 1000).x)
    rows = data.training(60, 1000 if in_memory else 200, CPU)
    drawn = rows.draw(torch.Generator().manual_seed(0)).x
    assert torch.cdist(drawn.double(), train.x).min(1).values.max() < 1e-5


def test_a_whitened_model_has_the_density_of_the_columns() -> None:
    """It integrates to one over a grid in the units of the data, whatever the field has learnt."""
    prepared(conditions=(), weight="heavy")
    for method in ({"loss": "cfm"}, EVERY[8]):
        flow = model(method, whitening=0.5)
        x, y = (torch.linspace(-9, 9, 181, dtype=torch.float64) for _ in range(2))
        grid = torch.cartesian_prod(FAR + x, y)
        assert float(flow.log_prob(grid).exp().sum() * (x[1] - x[0]) * (y[1] - y[0])) == pytest.approx(1, abs=0.01)


def test_dependent_columns_have_no_whitening() -> None:
    train = prepared(conditions=())
    train["x"] = FAR + 2 * train["y"]
    train[["x", "y"]].to_parquet(layout.part(layout.prepared("own"), "train"))
    with pytest.raises(UserError, match=r"a whitening of 0\.5, but the training rows of 'own' .* set whitening to 0"):
        job({"loss": "cfm"}, whitening=0.5).task(CPU)


def test_a_longer_part_is_thinned_out_evenly() -> None:
    prepared(conditions=())
    data = Prepared(layout.prepared("own"))
    every, some = data.rows("val", 1000).x, data.rows("val", 10).x
    assert (len(every), len(some)) == (150, 10)
    assert torch.equal(some, every[np.linspace(0, 149, 10).round()])


def test_the_validation_loss_is_a_function_of_the_network() -> None:
    prepared()
    torch.manual_seed(0)
    task = job({"loss": "cfm", "coupling": "minibatch_ot"}).task(CPU)
    assert isinstance(task, Task)
    assert task.validation is not None
    first = task.validation.loss(task.network)
    torch.rand(5)
    assert task.validation.loss(task.network) == first
    with torch.no_grad():
        next(iter(task.network.parameters())).add_(0.1)
    assert task.validation.loss(task.network) != first


@pytest.mark.slow
def test_a_network_that_memorises_is_stopped_and_the_one_before_is_kept() -> None:
    """20 rows and a wide network: the validation loss rises long before the last step."""
    prepared(conditions=())
    path = layout.part(layout.prepared("own"), "train")
    table(ROWS["train"], 0).head(20)[["x", "y"]].to_parquet(path)
    network = {"name": "mlp", "hidden": [64, 64]}
    _, found = trained(job({"loss": "cfm"}, network=network, steps=1500, patience=4, val_every=20))
    assert found.chosen_step is not None
    assert found.chosen_step < found.curve[-1]["step"] == found.chosen_step + 4 * 20 < 600


def test_a_coupling_of_noise_and_data_alone_compares_conditions_where_there_are_any() -> None:
    """Otherwise the noise of a condition would not be normal, and neither would samples be those of the condition."""
    prepared()
    given = {"name": "conditional_ot", "weight": 100.0}  # one of them is a number
    curves = [trained(job({"loss": "cfm", "coupling": one}))[1].curve for one in ("minibatch_ot", given)]
    assert curves[0] == curves[1]
    assert curves[0] != trained(job({"loss": "cfm"}))[1].curve
    choice = CouplingChoice.model_validate
    assert choice("minibatch_ot").given(False) == choice("conditional_ot")
    assert choice({"name": "sinkhorn", "reg": 0.5}).given(False).arguments == {"reg": 0.5, "weight": 100.0}
    for unchanged in ("independent", "conditional_ot", {"name": "sinkhorn", "weight": 3.0}):
        assert choice(unchanged).given(True) == choice(unchanged)


def test_conditions_that_are_not_there_are_refused_when_training_begins() -> None:
    prepared(conditions=())
    with pytest.raises(UserError, match=r"coupling is 'conditional_ot', which compares conditions, but .* has none"):
        job({"loss": "cfm", "coupling": "conditional_ot"}).task(CPU)


def test_a_coupling_of_weighted_rows_needs_them_in_memory() -> None:
    prepared(weight="heavy")
    method = {"loss": "cfm", "coupling": "minibatch_ot"}
    with pytest.raises(UserError, match=r"expected independent, or a rows_in_memory of at least the number of rows"):
        job(method, rows_in_memory=200).task(CPU)
    job(method).task(CPU)


def test_more_components_than_rows_are_refused() -> None:
    prepared()
    with pytest.raises(UserError, match=r"gaussian_mixture has 601 components for 600 training rows"):
        job({"loss": {"name": "gaussian_mixture", "components": 601}}).task(CPU)
    with pytest.raises(UserError, match=r"large_mixture has 601 components for 600 training rows"):
        job({"loss": {"name": "large_mixture", "components": 601}}).task(CPU)
