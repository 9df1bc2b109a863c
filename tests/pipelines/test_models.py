"""A model's file says all that is needed to rebuild it: network, path and what the network predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowmatch_core.flow import ContinuousFlow
from flowmatch_core.paths import VP, VelocityOf
from flowmatch_core.successor import GeometricHorizonModel, NoisePrediction
from pipelines.base import files, layout
from pipelines.base.errors import UserError
from pipelines.config import catalog
from pipelines.config.params import NetworkChoice, PathChoice
from pipelines.models import build, registry, saved, successor
from pipelines.models.tables import DensityModel
from pipelines.runs import versions

CPU = torch.device("cpu")
VECTORS = [name for name, spec in catalog.NETWORKS.items() if not spec.image]
SMALL: dict[str, Any] = {"hidden": [8], "stages": [8, 4], "cond_hidden": [8], "time_width": 8, "width": 8, "blocks": 1}


def small(name: str) -> NetworkChoice:
    """The network with little of everything that it takes."""
    takes = NetworkChoice(name=name).settings().model_fields
    return NetworkChoice(name=name, **{key: value for key, value in SMALL.items() if key in takes})


def written(file: Path, choice: NetworkChoice, **meta: Any) -> nn.Module:
    """A network with weights of its own, in a file with its description."""
    torch.manual_seed(0)
    config = build.network_config(choice, 2, 3)
    own = {"gamma": 0.9, "state_names": ["x", "y"], "action_names": ["push"], **meta}
    described = {"network": config, "path": {"name": "cond_ot"}, "prediction": "velocity", **own}
    path = build.path(PathChoice(**described["path"]))
    network = successor.network(config, described["prediction"], path)
    saved.save(file, network, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), described)
    return network


@pytest.mark.parametrize("name", VECTORS)
def test_every_network_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    network = written(tmp_path / "m.safetensors", small(name))
    torch.manual_seed(1)
    model = successor.load(tmp_path / "m.safetensors", CPU, "euler", 2)
    assert isinstance(model, GeometricHorizonModel)
    t, x, cond = torch.rand(5), torch.randn(5, 2), torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(model.flow.field(t, x, cond), network(t, x, cond))
    assert model.loc is not None
    assert model.loc.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", VECTORS)
def test_a_description_holds_the_defaults_too(name: str) -> None:
    """So that a model stays what it was when a default changes."""
    config = build.network_config(NetworkChoice(name=name), 2, 0)
    assert set(config) == {"name", "event_dim", "cond_dim", *NetworkChoice(name=name).settings().model_fields}
    assert None not in config.values()


def test_the_network_of_a_diffusion_loss_is_read_as_noise(tmp_path: Path) -> None:
    """Of a successor model it is a `NoisePrediction`: a plain network diverges under bootstrapping."""
    network = written(
        tmp_path / "m.safetensors", small("mlp"), prediction="noise", path={"name": "vp", "beta_max": 9.0}
    )
    assert isinstance(network, NoisePrediction)
    model = successor.load(tmp_path / "m.safetensors", CPU, "euler", 2)
    assert isinstance(model, GeometricHorizonModel)
    truth = VelocityOf(network, VP(beta_max=9.0), "noise")
    t, x, cond = torch.rand(5), torch.randn(5, 2), torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(model.flow.field(t, x, cond), truth(t, x, cond))


def test_a_density_is_told_from_a_successor_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "files", lambda uri, into: tmp_path)
    file = layout.network(tmp_path, 0)
    written(file, small("mlp"))
    assert isinstance(registry.load("models:/x.y/1"), GeometricHorizonModel)
    tensors, meta = files.read_tensors(file)
    del meta["gamma"]
    files.write_tensors(file, tensors, meta)
    model = registry.load("models:/x.y/1")
    assert isinstance(model, DensityModel)
    assert isinstance(model.flow, ContinuousFlow)
    assert list(model.columns) == ["x0", "x1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["network"].pop("name"),
        lambda meta: meta["network"].update(name="perceptron"),
        lambda meta: meta["network"].update(name="../../evil"),
        lambda meta: meta["network"].update(wide=3),
        lambda meta: meta["network"].update(hidden=[9]),
        lambda meta: meta.pop("path"),
        lambda meta: meta.update(path={"name": "of_yore"}),
    ],
)
def test_a_file_of_another_version_is_a_sentence(tmp_path: Path, change: Any) -> None:
    file = tmp_path / "m.safetensors"
    written(file, small("mlp"))
    tensors, meta = files.read_tensors(file)
    change(meta)
    files.write_tensors(file, tensors, meta)
    with pytest.raises(UserError, match="does not hold a model of this version") as caught:
        successor.load(file, CPU, "euler", 2)
    assert "\n" not in str(caught.value)


def test_what_a_class_refuses_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"the network 'film_mlp' was given .* FiLMField says: hidden has 3 layers"):
        build.network(build.network_config(NetworkChoice(name="film_mlp", hidden=[8, 8, 8]), 2, 0))
