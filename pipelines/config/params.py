"""The typed schema of `params.yaml` and its only reader.

Every number that a user may change is declared here with its range. A mistake is reported before anything runs, in one
sentence that names the key, what was found and what is expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from pipelines.base import plugins
from pipelines.base.errors import UserError
from pipelines.base.plugins import Settings
from pipelines.config import catalog
from pipelines.config.catalog import ORACLE, LossSpec, NetworkSpec, ObjectiveSpec, Spec
from pipelines.config.messages import sentence
from pipelines.config.yaml_files import merge, read_yaml

Solver = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]
FixedSolver = Literal["euler", "midpoint", "heun", "rk4"]
M = TypeVar("M", bound=BaseModel)


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("expected every seed once")
    return seeds


def _plugin_of(family: str) -> AfterValidator:
    def check(name: str) -> str:
        plugins.check(family, name)
        return name

    return AfterValidator(check)


def _row_of(table: Mapping[str, Spec], *others: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in others:
            catalog.find(table, name, *others)
        return name

    return AfterValidator(check)


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_different)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]  # becomes a folder and part of a stage's name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("it should be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]


class Choice(BaseModel):
    """A row of the catalog and options for it; a bare name takes the defaults."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Any]  # checked by `settings`
    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that are given."""
        return dict(self.__pydantic_extra__)

    def values(self) -> dict[str, Any]:
        """The options that are given, converted to their types."""
        return self.settings().model_validate(self.arguments).model_dump(exclude_unset=True)

    def options(self) -> Mapping[str, Any]:
        """The types of the options that may be given."""
        raise NotImplementedError

    def settings(self) -> type[BaseModel]:
        """The schema of the options."""
        fields: dict[str, Any] = {name: (kind, None) for name, kind in self.options().items()}
        return create_model(self.name, __base__=Settings, **fields)


def _network(name: str) -> str:
    try:
        catalog.find(catalog.NETWORKS, name)
    except ValueError as error:
        raise ValueError(f"expected a network of vectors: {str(error).removeprefix('expected ')}") from None
    return name


class NetworkChoice(Choice):
    """A network of vectors, a class in `flowmatch_core/networks/`."""

    name: Annotated[str, AfterValidator(_network)]

    @property
    def spec(self) -> NetworkSpec:
        """Its row of the catalog."""
        return catalog.NETWORKS[self.name]

    def options(self) -> Mapping[str, Any]:
        return self.spec.options

    def __str__(self) -> str:
        widths = next((value for value in self.arguments.values() if isinstance(value, (list, tuple))), ())
        return f"{self.name} {'×'.join(map(str, widths))}".rstrip()


class Fit(Settings):
    """A network and how it is trained."""

    network: NetworkChoice
    steps: int = Field(ge=1, description="gradient steps")
    batch: int = Field(ge=2, description="regression rows a step")
    lr: float = Field(gt=0, description="peak learning rate; linear warm-up, cosine to zero")
    warmup: int = Field(ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(ge=0, description="AdamW's decoupled decay")
    adam_betas: tuple[Share, Share] = Field(description="AdamW's decay of the mean gradient and of the mean square")
    adam_beta2_end: Share | None = Field(
        default=None, description="what the decay of the mean square comes to at the end, on a line; null: constant"
    )
    adam_eps: float = Field(gt=0, description="AdamW's epsilon")
    ema_step: float = Field(gt=0, le=1, description="weight of the newest weights in the averaged network, per step")
    log_every: int = Field(ge=1, description="steps between two rows of the loss curve")


class SuccessorFit(Fit):
    """The same for a successor model, with how its targets are made; what a loss does not know is not used."""

    ode_solver: Literal[FixedSolver, "ddim"] = Field(description="solver of the bootstrap; ddim for noise predictions")
    ode_steps: int = Field(ge=1, description="solver steps of one bootstrap target")
    time: Literal["uniform", "logit_normal"] = Field(description="law of the flow times of the regression")
    returns: int = Field(
        ge=1,
        description="steps between a state and its bootstrap. Above 1 the data are the rollouts instead of the "
        "transitions, since n-step returns are exact under the policy alone",
    )
    particles: bool = Field(
        description="TD²-CFM with points that persist from step to step, one target evaluation each; for large "
        "networks. A path has ode_steps points"
    )
    rows_in_memory: int = Field(ge=2, description="transitions in memory at a time; a longer table streams from disk")


class PathChoice(Choice):
    """A probability path, a class in `flowmatch_core/paths/`."""

    name: Annotated[str, _row_of(catalog.PATHS)]

    @property
    def spec(self) -> Spec:
        """Its row of the catalog."""
        return catalog.PATHS[self.name]

    def options(self) -> Mapping[str, Any]:
        return self.spec.options


class CouplingChoice(Choice):
    """A coupling of noise and data, a class in `flowmatch_core/couplings/`."""

    name: Annotated[str, _row_of(catalog.COUPLINGS)]

    @property
    def spec(self) -> Spec:
        """Its row of the catalog."""
        return catalog.COUPLINGS[self.name]

    def options(self) -> Mapping[str, Any]:
        return self.spec.options


class LossChoice(Choice):
    """An objective, a function in `flowmatch_core/objectives/`."""

    name: Annotated[str, _row_of(catalog.OBJECTIVES)]

    @property
    def spec(self) -> ObjectiveSpec:
        """Its row of the catalog."""
        return catalog.OBJECTIVES[self.name]

    def options(self) -> Mapping[str, Any]:
        return self.spec.options


class DensityMethod(Settings):
    """A way to train a density model: path, coupling and loss, each a file of that name in `flowmatch_core`."""

    path: PathChoice
    coupling: CouplingChoice
    loss: LossChoice
    prediction: Literal["velocity", "noise", "data", "score"] = Field(
        default="velocity", description="what the network predicts and is regressed on"
    )


class SuccessorLossChoice(Choice):
    """A successor loss, a function in `flowmatch_core/successor/losses/`; `oracle` is the closed form, if there is one.

    A loss that brings its own network (gan, vae) takes the options of the network too.
    """

    name: Annotated[str, _row_of(catalog.SUCCESSOR_LOSSES, ORACLE)]

    @property
    def spec(self) -> LossSpec:
        """Its row of the catalog; the closed form has none."""
        return catalog.SUCCESSOR_LOSSES[self.name]

    def options(self) -> Mapping[str, Any]:
        return {} if self.name == ORACLE else self.spec.all_options


class SuccessorMethod(Settings):
    """A way to obtain a successor model."""

    loss: SuccessorLossChoice
    path: PathChoice = Field(
        default=PathChoice.model_validate("cond_ot"), description="the path; gan and vae have none"
    )
    fit: dict[str, Any] = Field(default={}, description="what differs from the common `fit` for this method")


class Entry(BaseModel):
    """An entry whose `kind` names a plugin of a family; the plugin's `Settings` check the keys not declared here."""

    model_config = ConfigDict(extra="allow", frozen=True)
    family: ClassVar[str]
    kind: str

    @property
    def own(self) -> dict[str, Any]:
        """The keys that the plugin's own `Settings` declare."""
        return self.__pydantic_extra__ or {}

    def settings(self) -> Any:
        """The plugin's settings, validated by its file."""
        return plugins.load(self.family, self.kind).Settings.model_validate(self.own)


class Trained(Entry):
    """A data set or an environment: models are trained on it."""

    fit: dict[str, Any] = Field(default={}, description="what differs from the common `fit` for this entry")


class Experiment(Entry):
    family: ClassVar[str] = "pipelines.experiments"
    kind: Annotated[str, _plugin_of("pipelines.experiments")]


class Dataset(Trained):
    family: ClassVar[str] = "pipelines.datasets"
    kind: Annotated[str, _plugin_of("pipelines.datasets")]


class Environment(Trained):
    family: ClassVar[str] = "pipelines.environments"
    kind: Annotated[str, _plugin_of("pipelines.environments")]
    gamma: float = Field(ge=0, lt=1, description="discount, per transition")
    transitions: int = Field(ge=2, description="offline transitions to collect")
    rollouts: int = Field(ge=2, description="on-policy episodes for Monte-Carlo training")
    length: int = Field(
        ge=2,
        description="transitions of a rollout; beyond its end lies gamma^length of an evaluated horizon's mass, and at "
        "most gamma^(length/2) of a trained one's, which starts in the first half; the last state gets it",
    )
    starts: int = Field(ge=2, description="start states of the evaluation")
    reward: str = Field(description="the reward of the environment whose value is compared")
    methods: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="the methods of `successor.methods` to be run here, all by default; a change runs this "
        "environment's stages again, as one of any key here",
    )

    def runs(self, method: str) -> bool:
        """Whether a method is run here."""
        return self.methods is None or method in self.methods


class DensitySample(Settings):
    samples: int = Field(ge=2, description="samples a model")
    solver: Solver
    steps: int = Field(ge=1)


class DensityEvaluation(Settings):
    rows: int = Field(ge=2, description="test rows and samples in the distances (EMD is cubic in it)")
    likelihood_rows: int = Field(ge=2, description="test rows whose likelihood is computed, at most")
    projections: int = Field(ge=1, description="directions of the sliced Wasserstein distance")
    solver: FixedSolver
    steps: int = Field(ge=2, description="solver steps of the likelihood; its error is found with half as many")


class SuccessorSample(Settings):
    samples: int = Field(ge=2, description="samples a start state")
    solver: Solver
    steps: int = Field(ge=1)


class SuccessorEvaluation(Settings):
    likelihood_rows: int = Field(ge=2, description="true samples a start state whose likelihood is computed")
    solver: FixedSolver
    steps: int = Field(ge=2, description="solver steps of the likelihood; its error is found with half as many")
    solver_steps: dict[Name, tuple[Annotated[int, Field(ge=1)], ...]] = Field(
        description="by environment, numbers of sampling steps at which EMD and value error are reported besides"
    )


class Density(Settings):
    methods: dict[Name, DensityMethod] = Field(min_length=1)
    seeds: Seeds
    fit: Fit
    sample: DensitySample
    evaluate: DensityEvaluation

    def fit_for(self, dataset: Dataset) -> Fit:
        return Fit.model_validate(merge(self.fit.model_dump(), dataset.fit))


class Successor(Settings):
    methods: dict[Name, SuccessorMethod] = Field(min_length=1)
    seeds: Seeds
    fit: SuccessorFit
    sample: SuccessorSample
    evaluate: SuccessorEvaluation

    def fit_for(self, environment: Environment, method: SuccessorMethod) -> SuccessorFit:
        return SuccessorFit.model_validate(merge(merge(self.fit.model_dump(), environment.fit), method.fit))


class Params(Settings):
    """All of `params.yaml`."""

    profile: str = Field(description="name under which runs are filed; a profile's file sets it")
    seed: int = Field(ge=0, description="base seed; every stage derives its own from it")
    device: Device
    threads: int = Field(ge=1, description="CPU threads of a process that computes")
    mirror: Path | None = Field(description="folder with local copies of real data sets")
    datasets: dict[Name, Dataset]
    density: Density
    environments: dict[Name, Environment]
    successor: Successor
    experiments: dict[Name, Experiment]

    @model_validator(mode="after")
    def _names_are_free(self) -> Params:
        both = sorted(self.datasets.keys() & self.environments.keys())
        if both:
            raise ValueError(f"{both[0]!r} names a data set and an environment; expected different names")
        for section in ("density", "successor"):
            if "floor" in getattr(self, section).methods:
                raise ValueError(f"{section}.methods has 'floor', the name of the sampling floor; expected another one")
        known = self.successor.methods
        for name, entry in self.environments.items():
            unknown = [method for method in entry.methods or () if method not in known]
            if unknown:
                raise ValueError(
                    f"environments.{name}.methods has {unknown[0]!r}; expected of successor.methods: {', '.join(known)}"
                )
        for name in self.successor.evaluate.solver_steps:
            if name not in self.environments:
                raise ValueError(
                    f"successor.evaluate.solver_steps has {name!r}; expected of environments: "
                    f"{', '.join(self.environments)}"
                )
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key, or a value is out of place.
    """
    path = Path(path)
    params = _validate(Params, read_yaml(path), path)
    for kind, section, entries, common in (
        ("density", "datasets", params.datasets, params.density.fit),
        ("successor", "environments", params.environments, params.successor.fit),
    ):
        _check_choice(common.network, path, (kind, "fit", "network"))
        for name, entry in entries.items():
            _validate(plugins.load(entry.family, entry.kind).Settings, entry.own, path, (section, name))
            _check_fit(common, [entry.fit], path, (section, name, "fit"))
    for name, density in params.density.methods.items():
        for key, choice in (("path", density.path), ("coupling", density.coupling), ("loss", density.loss)):
            _check_choice(choice, path, ("density", "methods", name, key))
    successor = params.successor
    for name, method in successor.methods.items():
        _check_choice(method.path, path, ("successor", "methods", name, "path"))
        _check_choice(method.loss, path, ("successor", "methods", name, "loss"))
        _check_fit(successor.fit, [method.fit], path, ("successor", "methods", name, "fit"))
        for environment, entry in params.environments.items():
            if entry.fit and method.fit and entry.runs(name):  # each may be right, and both together wrong
                both = f"environments.{environment}.fit with successor.methods.{name}.fit"
                _check_fit(successor.fit, [entry.fit, method.fit], path, (both,))
    for name, experiment in params.experiments.items():
        settings = plugins.load(experiment.family, experiment.kind).Settings
        _validate(settings, experiment.own, path, ("experiments", name))
    return params


def _check_fit(common: Fit, changes: Sequence[Mapping[str, Any]], path: Path, prefix: tuple[str, ...]) -> None:
    fit = _validate(type(common), reduce(merge, changes, common.model_dump()), path, prefix)
    _check_choice(fit.network, path, (*prefix, "network"))


def _check_choice(choice: Choice, path: Path, prefix: tuple[str, ...]) -> None:
    _validate(choice.settings(), choice.arguments, path, prefix)


def _validate(model: type[M], raw: Any, path: Path, prefix: tuple[str, ...] = ()) -> M:
    try:
        # As JSON, so that strict types still let a list become a tuple and a string a path.
        return model.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise UserError(sentence(error, model, path, prefix)) from None
