"""The catalog of what `params.yaml` may name agrees, row by row, with the code that it describes."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from flowmatch_core.solvers import grids
from flowmatch_core.successor import GaussianEnsemble, LatentNetwork, Particles
from pipelines.base import plugins
from pipelines.config import catalog
from pipelines.config.catalog import LossSpec, NetworkSpec, ObjectiveSpec, Spec
from pipelines.models import build, density

ROOT = Path(__file__).parents[2]
TABLES: Mapping[str, Mapping[str, Spec]] = {
    "flowmatch_core.paths": catalog.PATHS,
    "flowmatch_core.couplings": catalog.COUPLINGS,
    "flowmatch_core.networks": catalog.NETWORKS,
    "flowmatch_core.objectives": catalog.OBJECTIVES,
    "flowmatch_core.successor.losses": catalog.SUCCESSOR_LOSSES,
}
WITHOUT_ROW: Mapping[str, Mapping[str, str]] = {
    "flowmatch_core.paths": {},
    "flowmatch_core.couplings": {"reflow": "it needs a trained flow, which no number in params.yaml is"},
    "flowmatch_core.networks": {
        "embeddings": "parts of networks",
        "encoded": "wraps a network; the conditions of the pipeline are vectors",
        "layers": "parts of networks",
        "noise_prediction": "wraps a network; models of noise are wrapped in it without being asked",
        "preconditioned": "wraps a network",
    },
    "flowmatch_core.objectives": {
        "bridge": "its bridge replaces path and coupling, which a method names",
        "snapshots": "it needs samples at several times, which a data set does not have",
    },
    "flowmatch_core.successor.losses": {
        "bootstrap": "what the losses share",
        "intention": "it trains an encoder on evidence, which an environment does not state",
    },
}
ROWS = [(name, spec) for table in TABLES.values() for name, spec in table.items()]
OWN_NETWORKS = [(name, spec.network) for name, spec in catalog.SUCCESSOR_LOSSES.items() if spec.network]

# What the pipeline gives in place of the user, or leaves at its default because no YAML value can stand for it.
NETWORK_SIZES = {"event_dim", "cond_dim", "generator"}
OBJECTIVE_ARGUMENTS = {"field", "path", "x1", "x0", "cond", "time", "prediction", "weight", "generator"}
OBJECTIVE_DEFAULTS = {
    "interpolant": {"gamma"},
    "likelihood": {"method", "rtol", "atol", "probes", "base_scale", "max_steps"},
    "posterior_cfm": {"reference", "reference_cond", "reference_weight"},
}


def parameters(spec: Spec) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(spec.load()).parameters


def defaults(spec: Spec) -> dict[str, Any]:
    """The defaults of a row's options in the code."""
    return {name: parameters(spec)[name].default for name in spec.options}


@pytest.mark.parametrize(("name", "spec"), [*ROWS, *OWN_NETWORKS])
def test_a_row_leads_to_the_file_that_defines_its_member(name: str, spec: Spec) -> None:
    assert spec.module.rpartition(".")[2] == name
    assert (ROOT / spec.file).is_file()
    found = spec.load()
    assert (found.__module__, found.__qualname__) == (spec.module, spec.attribute)


@pytest.mark.parametrize("family", TABLES)
def test_every_file_of_a_family_has_a_row_or_a_reason(family: str) -> None:
    rows, others = TABLES[family], WITHOUT_ROW[family]
    assert not rows.keys() & others.keys()
    assert set(plugins.names(family)) == rows.keys() | others.keys()
    assert {spec.module.rpartition(".")[0] for spec in rows.values()} == {family}


@pytest.mark.parametrize(("name", "spec"), [*catalog.PATHS.items(), *catalog.COUPLINGS.items(), *catalog.GRIDS.items()])
def test_options_of_paths_couplings_and_grids_are_all_their_parameters(name: str, spec: Spec) -> None:
    assert spec.options.keys() == parameters(spec).keys()


def test_every_grid_of_numbers_has_a_row() -> None:
    members = {name: member for name, member in vars(grids).items() if name in grids.__all__}
    made = {name for name, member in members.items() if inspect.isclass(member) and not inspect.isabstract(member)}
    assert {spec.attribute for spec in catalog.GRIDS.values()} == made - {"Nodes"}  # which needs a list of times
    assert {name for name, spec in catalog.GRIDS.items() if spec.attribute.lower() != name} == set()


@pytest.mark.parametrize(("name", "spec"), [*catalog.NETWORKS.items(), *OWN_NETWORKS])
def test_options_of_networks_are_all_parameters_but_sizes(name: str, spec: NetworkSpec) -> None:
    assert spec.options.keys().isdisjoint(NETWORK_SIZES)
    sizes = NETWORK_SIZES | ({"image"} if spec.image else set())
    assert spec.options.keys() | sizes == parameters(spec).keys()
    assert spec.defaults == defaults(spec)


@pytest.mark.parametrize(("name", "spec"), [*ROWS, *OWN_NETWORKS])
def test_the_type_of_an_option_takes_its_default(name: str, spec: Spec) -> None:
    for option, default in defaults(spec).items():
        assert default is not inspect.Parameter.empty, option
        assert TypeAdapter(spec.options[option]).validate_python(default) == default


@pytest.mark.parametrize(("name", "spec"), catalog.OBJECTIVES.items())
def test_an_objective_takes_what_its_row_says(name: str, spec: ObjectiveSpec) -> None:
    coupling = {"coupling"} if spec.coupling else set()
    along = set() if spec.path else {"path", "x0", "time", "prediction"}
    decided = (OBJECTIVE_ARGUMENTS - along) | coupling | OBJECTIVE_DEFAULTS.get(name, set())
    assert spec.options.keys().isdisjoint(decided)
    assert parameters(spec).keys() == decided | spec.options.keys()


@pytest.mark.parametrize(("name", "spec"), catalog.SUCCESSOR_LOSSES.items())
def test_a_successor_loss_takes_what_its_row_says(name: str, spec: LossSpec) -> None:
    decided = {"field", "batch", "weight", "generator"}
    decided |= {"futures": {"future"}, "target": {"target", "gamma"}, "transitions": set()}[spec.needs]
    decided |= {"path", "time"} if spec.path else set()
    decided |= {"steps", "solver"} if spec.ode else set()
    decided |= {"progress"} if spec.progress else set()
    assert spec.options.keys().isdisjoint(decided)
    assert parameters(spec).keys() == decided | spec.options.keys()


@pytest.mark.parametrize(("name", "spec"), catalog.SUCCESSOR_LOSSES.items())
def test_a_successor_loss_trains_the_network_that_its_row_says(name: str, spec: LossSpec) -> None:
    field = parameters(spec)["field"].annotation
    if spec.network is None:
        assert field == "VelocityField"
        assert spec.prediction == getattr(spec.load(), "prediction", "velocity")
        return
    assert field == spec.network.attribute
    assert issubclass(spec.network.load(), (LatentNetwork, GaussianEnsemble))
    assert spec.prediction == "state"
    assert spec.options.keys().isdisjoint(spec.network.options)
    assert spec.all_options == {**spec.options, **spec.network.options}


def test_particles_are_kept_by_the_losses_that_particles_have() -> None:
    able = {name for name, spec in catalog.SUCCESSOR_LOSSES.items() if spec.particles}
    assert able == {name for name, spec in catalog.SUCCESSOR_LOSSES.items() if hasattr(Particles, spec.attribute)}
    assert able


@pytest.mark.parametrize(("name", "spec"), catalog.NORMALIZING.items())
def test_a_normalizing_flow_takes_what_its_row_says(name: str, spec: NetworkSpec) -> None:
    assert spec.module == f"flowmatch_core.normalizing.{name}"
    assert spec.attribute.lower() == name.replace("_", "")
    assert spec.options.keys() == parameters(spec).keys()
    assert spec.defaults == defaults(spec)
    flow = density.normalizing(build.describe(name, spec, {}, 2, 3))
    assert (flow.event_shape, flow.cond_dim, flow.kind) == ((2,), 3, spec.load()())


@pytest.mark.parametrize(("name", "spec"), catalog.CLOSED_FORMS.items())
def test_a_closed_form_takes_what_its_row_says(name: str, spec: Spec) -> None:
    assert (spec.module, spec.attribute) == ("pipelines.training.closed_forms", name)
    assert parameters(spec).keys() == {"data"} | spec.options.keys()
    chosen = all(default is None for default in defaults(spec).values())  # on the validation rows
    assert chosen == (name != "large_mixture")


def test_a_loss_of_a_density_has_one_meaning() -> None:
    tables = (catalog.OBJECTIVES, catalog.NORMALIZING, catalog.CLOSED_FORMS)
    assert len(catalog.DENSITIES) == sum(map(len, tables))


def test_the_catalog_is_read_without_torch() -> None:
    code = "import sys, pipelines.config.catalog, pipelines.config.params; print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"
